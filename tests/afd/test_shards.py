"""Trees of tensors as safetensors shards and a JSON: exact, shared out, without a pickle."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from afd.config.run import make_config
from afd.distributed import ALONE, Ranks, join
from afd.trainer import checkpoint, shards
from tests.afd.test_resume import assert_same
from tests.afd.together import together

CONFIG = make_config({})


def written(folder: Path, tree: Mapping[str, Any]) -> Path:
    folder.mkdir()
    shards.write(folder, tree, ALONE)
    return folder


def odd_tree() -> dict[str, Any]:
    """Everything that a state may hold."""
    draw = torch.Generator().manual_seed(0)
    return {
        "a.b/c": {"bf16.weight": torch.randn(3, 4, generator=draw).bfloat16(), "": torch.ones(1)},
        "adam": {0: {"update": torch.tensor(3.0), "m": torch.rand(2, generator=draw)}, 7: {}},
        "kinds": [
            torch.arange(2**40, 2**40 + 3),
            torch.tensor([True, False]),
            torch.rand(2, generator=draw, dtype=torch.float64),
            torch.arange(5, dtype=torch.uint8),
            torch.tensor(0.1, dtype=torch.bfloat16),
            torch.tensor(True),
            torch.tensor(2**60 + 1),
        ],
        "shapes": [torch.empty(0), torch.empty(3, 0, dtype=torch.int64)],
        "strides": [torch.arange(6).view(2, 3).T, torch.arange(10)[3:7], torch.ones(1).expand(3)],
        "plain": [None, True, 0.1, 2**80, "ä\n", {}, [], {"integers": {}}],
    }


def test_every_kind_of_tensor_and_value_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tree = odd_tree()
    found = shards.read(written(tmp_path / "state", tree), ALONE)
    assert_same(found, tree, "state")
    for mine, theirs in zip(found["kinds"], tree["kinds"], strict=True):
        assert mine.dtype == theirs.dtype
    assert found["shapes"][1].dtype == torch.int64
    bits = torch.tensor([float("nan"), -0.0, float("inf")])
    again = shards.read(written(tmp_path / "bits", {"x": bits, "inf": -float("inf")}), ALONE)
    assert torch.equal(again["x"].view(torch.int32), bits.view(torch.int32))
    assert again["inf"] == -float("inf")
    assert shards.read(written(tmp_path / "none", {"x": 1}), ALONE) == {"x": 1}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"a": {"b": {1, 2}}}, "'a/b' is <class 'set'>"),
        ({"a": {"$tensor": 1}}, r"'a' has keys \['\$tensor'\]"),
        ({"a": {1: 0, "b": 0}}, r"'a' has keys \[1\]"),
        (
            {"a": {"b/c": torch.ones(1), "b": {"c": torch.ones(1)}}},
            "two tensors have the name 'a/b/c'",
        ),
    ],
)
def test_what_would_not_come_back_is_refused(tmp_path: Path, tree: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        written(tmp_path / "state", tree)


def test_no_file_is_much_larger_than_one_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "FILE_BYTES", 100)
    tree = {f"{i}": torch.full((10,), i) for i in range(5)}
    folder = written(tmp_path / "state", tree)
    sizes = sorted(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert len(sizes) == 5
    assert_same(shards.read(folder, ALONE), tree, "state")


def test_tensors_are_read_into_those_there_are_and_only_the_asked_ones(tmp_path: Path) -> None:
    tree = {"a": {"x": torch.arange(3.0), "y": torch.ones(2)}, "ab": torch.ones(3)}
    folder = written(tmp_path / "state", tree)
    live = nn.Parameter(torch.zeros(3))
    other = torch.zeros(2, dtype=torch.int64)
    found = shards.read(folder, ALONE, into={"a": {"x": live, "y": other}}, only="a/")
    assert found["a"]["x"].data_ptr() == live.data_ptr()
    assert live.tolist() == [0, 1, 2]
    assert (found["a"]["y"].dtype, other.tolist()) == (torch.float32, [0, 0])
    assert found["ab"].is_meta


# --- several processes ---


def network() -> nn.Module:
    """Rows that two processes share unevenly, or of which one has none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(3, 1), nn.Conv3d(2, 3, 2))


def state_of(net: nn.Module) -> dict[str, Any]:
    common = {
        "discriminator": torch.arange(4000.0),
        "generator": torch.arange(9, dtype=torch.uint8),
    }
    return {"net": dict(net.state_dict()), **common, "rank": 0}


def sharded(ranks: Ranks) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(network(), mesh=init_device_mesh("cpu", (ranks.world,)))


def write_in_shares(folder: Path) -> None:
    with join("cpu") as ranks:
        shards.write(folder, state_of(sharded(ranks)) | {"rank": ranks.rank}, ranks)


def read_in_shares(folder: Path) -> list[list[int]]:
    """The shapes of this process's shares, once they are known to be right."""
    with join("cpu") as ranks:
        net = sharded(ranks)
        expected = {name: value.to_local().clone() for name, value in net.state_dict().items()}
        for parameter in net.parameters():
            parameter.data.zero_()
        found = shards.read(folder, ranks, into=state_of(net))
        for name, value in net.state_dict().items():
            assert isinstance(found["net"][name], DTensor)
            assert torch.equal(value.to_local(), expected[name]), name
        assert torch.equal(found["discriminator"], torch.arange(4000.0))
        return [list(value.shape) for value in expected.values()]


def shapes_in(path: Path) -> dict[str, list[int]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def test_every_process_writes_its_shares_and_any_number_reads_its_own(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    written(one, state_of(network()))
    two.mkdir()
    together(2, write_in_shares, two)
    assert {path.suffix for path in two.iterdir()} == {".safetensors", ".json"}
    first, second = (shapes_in(path) for path in sorted(two.glob("*.safetensors")))
    assert (first["net/0.weight"], second["net/0.weight"]) == ([3, 4], [2, 4])
    # What both have the same is written by one of them.
    assert len([name for name in (*first, *second) if name == "discriminator"]) == 1
    whole = shards.read(two, ALONE)
    assert_same(whole, shards.read(one, ALONE), "state")
    assert_same(whole["net"], dict(network().state_dict()), "net")
    for folder in (one, two):
        shares = together(2, read_in_shares, folder)
        assert shares[0] != shares[1]


def checkpoint_of(step: int, net: nn.Module) -> dict[str, Any]:
    return {"update": step, "method": "afd", "config": {}, **state_of(net)}


def killed_while_saving(folder: Path, rank: int, event: int) -> None:
    """Step 1 whole; in step 2 one process is killed at its n-th sync."""
    with join("cpu") as ranks:
        net = sharded(ranks)
        checkpoint.save(folder, checkpoint_of(1, net), keep=2, ranks=ranks)
        sync, seen = os.fsync, 0

        def counted(file: int) -> None:
            nonlocal seen
            seen += 1
            if (ranks.rank, seen) == (rank, event):
                os.kill(os.getpid(), signal.SIGKILL)
            sync(file)

        os.fsync = counted
        checkpoint.save(folder, checkpoint_of(2, net), keep=2, ranks=ranks)


# The main process syncs its shard, state.json, meta.json, the folder, and once more after renaming.
@pytest.mark.parametrize(("rank", "event", "left"), [(1, 1, 1), (0, 3, 1), (0, 5, 2)])
def test_one_killed_while_all_write_leaves_the_newest_whole_one(
    tmp_path: Path, rank: int, event: int, left: int
) -> None:
    with pytest.raises(RuntimeError, match=f"process {rank} ended") as error:
        together(2, killed_while_saving, tmp_path, rank, event)
    # Without the main process the other can tell nobody.
    assert ("process 0 lost another process of this run" in str(error.value)) == (rank == 1)
    newest = checkpoint.latest(tmp_path)
    assert newest == tmp_path / f"update_{left:06d}"
    held = checkpoint.load(newest, method="afd", config={})
    assert_same(held, checkpoint_of(left, network()), "state")


def fail_to_write(folder: Path) -> str:
    with join("cpu") as ranks:
        net = sharded(ranks)
        if not ranks.main:
            (folder / "shard-00002-model-00001-of-00001.safetensors").mkdir()
        ranks.barrier()
        with pytest.raises(IsADirectoryError) as error:
            shards.write(folder, state_of(net), ranks)
        return str(error.value)


def test_a_file_that_one_process_cannot_write_is_named_by_all(tmp_path: Path) -> None:
    said = together(2, fail_to_write, tmp_path)
    assert all(f"{tmp_path}/shard-00002" in one for one in said)
