"""Checkpoints in the layouts of the released files, made small, and back again bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd.models.wan.checkpoints import (
    from_diffusers,
    load_checkpoint,
    save_diffusers,
    save_self_forcing,
    to_diffusers,
)
from afd.models.wan.network import CausalWan
from afd.models.wan.types import WanConfig

CONFIG = WanConfig(
    dim=32,
    num_heads=2,
    ffn_dim=48,
    num_layers=3,
    freq_dim=16,
    text_dim=24,
    text_len=8,
    in_dim=4,
    out_dim=4,
    chunk=2,
)
# What no file holds.
REST = {"head_dim": 16, "text_len": 8, "chunk": 2}


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> CausalWan:
    torch.manual_seed(seed)
    return CausalWan(CONFIG).to(dtype)


def same(one: CausalWan, other: CausalWan) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name])
        for name in mine
    )


def prefixed(net: CausalWan, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in net.state_dict().items()}


def diffusers_layout(net: CausalWan) -> dict[str, Tensor]:
    return {to_diffusers(name): value for name, value in net.state_dict().items()}


# --- names ---


def test_every_name_of_the_full_network_maps_both_ways(shared: Path) -> None:
    table = json.loads((shared / "specs" / "diffusers_key_map.json").read_text())
    with torch.device("meta"):
        full = CausalWan(WanConfig())
    names = list(full.state_dict())
    assert len(names) == 825
    assert sum(p.numel() for p in full.parameters()) == 1_418_996_800
    expected = {
        ours.replace("{i}", str(i)): theirs.replace("{i}", str(i))
        for ours, theirs in table.items()
        for i in range(30)
    }
    assert set(names) == expected.keys()
    for name in names:
        assert to_diffusers(name) == expected[name]
        assert from_diffusers(to_diffusers(name)) == name


# --- reading ---


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "model._fsdp_wrapped_module.",
        "_fsdp_wrapped_module.model._fsdp_wrapped_module.",
        "_orig_mod.model.",
        "",
    ],
)
@pytest.mark.parametrize("part", ["generator", "generator_ema", "model"])
def test_any_prefix_of_any_part_loads(tmp_path: Path, part: str, prefix: str) -> None:
    net = network()
    torch.save({part: prefixed(net, prefix), "step": 600}, tmp_path / "model.pt")
    assert same(load_checkpoint(tmp_path / "model.pt", **REST), net)


def test_wrappers_inside_a_name_are_stripped_too(tmp_path: Path) -> None:
    net = network()
    wrapped = {
        "model._fsdp_wrapped_module."
        + name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): value
        for name, value in net.state_dict().items()
    }
    torch.save({"generator_ema": wrapped}, tmp_path / "model.pt")
    assert same(load_checkpoint(tmp_path / "model.pt", **REST), net)


def test_the_average_is_chosen_or_asked_for(tmp_path: Path) -> None:
    plain, average, discriminator = network(1), network(2), network(3)
    held = {
        "generator": prefixed(plain, "model."),
        "discriminator": prefixed(discriminator, "model."),
        "generator_ema": prefixed(average, "model._fsdp_wrapped_module."),
    }
    path = tmp_path / "model.pt"
    torch.save(held, path)
    assert same(load_checkpoint(path, **REST), average)
    assert same(load_checkpoint(path, ema=True, **REST), average)
    assert same(load_checkpoint(path, ema=False, **REST), plain)
    del held["generator_ema"]
    torch.save(held, path)
    assert same(load_checkpoint(path, **REST), plain)
    with pytest.raises(ValueError, match=r"ema: got True.*generator_ema.*generator \(96 tensors\)"):
        load_checkpoint(path, ema=True, **REST)


def test_a_file_of_the_average_alone_refuses_the_plain_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_self_forcing(path, generator_ema=network())
    with pytest.raises(ValueError, match=r"ema: got False.*generator or model.*generator_ema"):
        load_checkpoint(path, ema=False, **REST)


def test_a_bare_state_dict_loads_and_has_no_average(tmp_path: Path) -> None:
    net = network()
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    assert same(load_checkpoint(tmp_path / "bare.pth", **REST), net)
    with pytest.raises(ValueError, match="ema: got True"):
        load_checkpoint(tmp_path / "bare.pth", ema=True, **REST)


def test_the_old_pickle_format_loads_without_a_memory_map(tmp_path: Path) -> None:
    net = network()
    held = {"generator": prefixed(net, "model.")}
    torch.save(held, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(load_checkpoint(tmp_path / "old.pt", **REST), net)


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def test_a_pickle_with_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="objects other than tensors"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("layout", [dict, diffusers_layout], ids=["released", "diffusers"])
def test_a_single_safetensors_file_loads_in_either_naming(
    tmp_path: Path, layout: Callable[..., dict[str, Tensor]]
) -> None:
    net = network()
    state = net.state_dict() if layout is dict else layout(net)
    save_file(state, tmp_path / "wan.safetensors")
    assert same(load_checkpoint(tmp_path / "wan.safetensors", **REST), net)
    with pytest.raises(ValueError, match=r"ema: got True.*has no parts"):
        load_checkpoint(tmp_path / "wan.safetensors", ema=True, **REST)


def test_a_folder_of_the_original_code_loads_with_its_own_sizes(tmp_path: Path) -> None:
    net = network()
    save_file(net.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    written = {"_class_name": "WanModel", "dim": 32, "num_heads": 2, "eps": 1e-6, "text_len": 8}
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = load_checkpoint(tmp_path, chunk=2)
    assert loaded.config == CONFIG
    assert same(loaded, net)
    (tmp_path / "config.json").write_text(json.dumps({**written, "eps": 1e-5}))
    with pytest.raises(ValueError, match="eps: got 1e-05"):
        load_checkpoint(tmp_path)


def test_settings_that_no_file_holds_are_the_callers(tmp_path: Path) -> None:
    save_self_forcing(tmp_path / "model.pt", generator=network())
    path = tmp_path / "model.pt"
    loaded = load_checkpoint(path, head_dim=16, text_len=8, chunk=1, window=6, sink=2)
    assert (loaded.config.chunk, loaded.config.window, loaded.config.sink) == (1, 6, 2)
    with pytest.raises(ValueError, match="head_dim: got 128; needed: a divisor of the width 32"):
        load_checkpoint(path)


def test_the_dtype_is_the_files_unless_asked(tmp_path: Path) -> None:
    net = network(dtype=torch.bfloat16)
    save_self_forcing(tmp_path / "model.pt", generator=net)
    assert same(load_checkpoint(tmp_path / "model.pt", **REST), net)
    wide = load_checkpoint(tmp_path / "model.pt", dtype=torch.float32, **REST)
    assert same(wide, network(dtype=torch.bfloat16).float())
    state = {**net.state_dict(), "head.modulation": net.head.modulation.detach().float()}
    torch.save({"generator": state}, tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match=r"dtype: got None.*bfloat16, torch\.float32"):
        load_checkpoint(tmp_path / "mixed.pt", **REST)
    loaded = load_checkpoint(tmp_path / "mixed.pt", dtype=torch.bfloat16, **REST)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_a_loaded_network_trains_and_owns_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_self_forcing(path, generator=network())
    loaded = load_checkpoint(path, **REST)
    with path.open("r+b") as file:
        file.truncate(0)  # a view of the file would now crash the process
    assert all(p.requires_grad and p.is_contiguous() for p in loaded.parameters())
    assert same(loaded, network())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_holds_the_weights_once(tmp_path: Path) -> None:
    """Beside the file's own pages, which the system may drop at any time."""
    big = WanConfig(dim=512, num_heads=4, ffn_dim=4096, num_layers=6, text_dim=64)
    with torch.device("meta"):
        net = CausalWan(big)
    state = {name: torch.zeros(value.shape) for name, value in net.state_dict().items()}
    size = sum(value.nbytes for value in state.values())
    torch.save({"generator": state}, tmp_path / "model.pt")
    save_self_forcing(tmp_path / "small.pt", generator=network())
    code = """
import re, sys
from afd.models.wan.checkpoints import load_checkpoint
def kib(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
load_checkpoint(sys.argv[2], head_dim=16)  # imports and caches of torch
before = kib("RssAnon"), kib("VmRSS")
net = load_checkpoint(sys.argv[1])
print(kib("RssAnon") - before[0], kib("VmHWM") - before[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt"), str(tmp_path / "small.pt")],
        capture_output=True,
        text=True,
        check=True,
    )
    own, peak = (1024 * int(word) for word in done.stdout.split())
    assert size > 100e6
    assert own <= 1.1 * size
    assert peak <= 2.2 * size


# --- strictness ---


def test_what_is_missing_extra_and_misshaped_is_listed(tmp_path: Path) -> None:
    state = network().state_dict()
    for leaf in ("q", "k", "v", "o"):
        del state[f"blocks.1.self_attn.{leaf}.weight"]
        del state[f"blocks.1.self_attn.{leaf}.bias"]
    state["img_emb.proj.weight"] = torch.zeros(2)
    state["blocks.2.norm3.weight"] = torch.zeros(31)
    torch.save({"generator": state}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="of 96 tensors") as caught:
        load_checkpoint(tmp_path / "model.pt", **REST)
    message = str(caught.value)
    assert "8 missing (blocks.1.self_attn.q.weight" in message
    assert "and 4 more" in message
    assert "1 extra (img_emb.proj.weight)" in message
    assert "1 wrongly shaped (blocks.2.norm3.weight [31] for [32])" in message


@pytest.mark.parametrize(
    ("held", "match"),
    [
        ({"generator": {"some.weight": torch.zeros(2)}}, r"no patch_embedding.*holds some\.weight"),
        ({"generator": {"patch_embedding.weight": 3}}, "tensors only"),
        ({"optimizer": {"step": 3}}, r"ema: got None.*optimizer \(1 tensors\)"),
        ([torch.zeros(2)], "got 'list'"),
        ({}, "this holds no tensors"),
        ({"generator": {"a": torch.eye(2).to_sparse()}}, "got 'a'; needed: named, dense tensors"),
        ({"generator": {"a": torch.empty(2, device="meta")}}, "needed: named, dense tensors"),
        ({"generator": {0: torch.zeros(2)}}, "got '0'; needed: named, dense tensors"),
        (
            network().state_dict() | {"time_embedding.0.weight": torch.zeros(3)},
            r"time_embedding\.0\.weight: got \(3,\); needed: a matrix",
        ),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, held: object, match: str) -> None:
    torch.save(held, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=match):
        load_checkpoint(tmp_path / "other.pt", **REST)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    state = {k: v.to(torch.int8) for k, v in network().state_dict().items()}
    torch.save({"generator": state}, tmp_path / "int8.pt")
    with pytest.raises(ValueError, match=r"got 'torch\.int8'; needed: floating point"):
        load_checkpoint(tmp_path / "int8.pt", dtype=torch.float32, **REST)


def test_unknown_paths_and_layouts_say_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; needed: a Self-Forcing"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; needed"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"got \[\]; needed: one \.safetensors file or index"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_damaged_files_are_refused_whatever_the_unpickler_raises(
    tmp_path: Path, zipped: bool
) -> None:
    path = tmp_path / "cut.pt"
    held = {"generator": network().state_dict()}
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in (0, 1, 40, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="it is damaged, or contains objects other"):
            load_checkpoint(path, **REST)
    (tmp_path / "cut.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="it cannot be read"):
        load_checkpoint(tmp_path / "cut.safetensors", **REST)


def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    save_diffusers(tmp_path / "net", network())
    index = {"weight_map": {"a": "../other.safetensors"}}
    (tmp_path / "net" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="file names in its own folder"):
        load_checkpoint(tmp_path / "net")


# --- writing ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips_are_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    net, average = network(1, dtype), network(2, dtype)
    save_self_forcing(tmp_path / "model.pt", generator=net, generator_ema=average.state_dict())
    assert same(load_checkpoint(tmp_path / "model.pt", ema=False, **REST), net)
    assert same(load_checkpoint(tmp_path / "model.pt", **REST), average)
    save_diffusers(tmp_path / "wan" / "transformer", net)
    for folder in ("wan", "wan/transformer"):
        loaded = load_checkpoint(tmp_path / folder, text_len=8, chunk=2)
        assert loaded.config == CONFIG
        assert same(loaded, net)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt", "wan"]


def test_a_written_pt_file_has_the_released_layout(tmp_path: Path) -> None:
    net = network()
    save_self_forcing(tmp_path / "model.pt", generator=torch.compile(net))
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    assert held.keys() == {"generator"}
    assert held["generator"].keys() == {f"model.{name}" for name in net.state_dict()}


def test_slices_of_a_larger_buffer_are_saved_alone(tmp_path: Path) -> None:
    state = network().state_dict()
    buffer = torch.cat([state["blocks.0.norm3.weight"], torch.zeros(10_000_000)])
    state["blocks.0.norm3.weight"] = buffer[:32]
    save_self_forcing(tmp_path / "model.pt", generator=state)
    assert (tmp_path / "model.pt").stat().st_size < 4_000_000
    assert same(load_checkpoint(tmp_path / "model.pt", **REST), network())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    save_self_forcing(path, generator=network(1))

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("afd.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_self_forcing(path, generator=network(2))
    with pytest.raises(OSError, match="no space"):
        save_diffusers(tmp_path / "folder", network(2))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    assert same(load_checkpoint(path, **REST), network(1))


def test_saving_refuses_what_it_would_spoil(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="generator: got None"):
        save_self_forcing(tmp_path / "model.pt")
    save_diffusers(tmp_path / "net", network(1))
    before = load_file(tmp_path / "net" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="needed: a new or empty folder"):
        save_diffusers(tmp_path / "net", network(2))
    after = load_file(tmp_path / "net" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
