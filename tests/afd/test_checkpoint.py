"""Checkpoints: whole or not there, kept, found, and refused where they do not belong."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import afd
from afd.config.run import make_config, plain
from afd.errors import CheckpointError, ConfigError
from afd.trainer import checkpoint

CONFIG = plain(make_config({}))
SHARD = "shard-00001-model-00001-of-00001.safetensors"


def state(step: int, **more: Any) -> dict[str, Any]:
    return {"update": step, "method": "afd", "config": CONFIG, "w": torch.full((3,), step), **more}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(7), keep=2)
    assert path.name == "update_000007"
    loaded = checkpoint.load(path, method="afd", config=CONFIG)
    assert torch.equal(loaded["w"], torch.full((3,), 7))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 20, 300, 1_000_000):
        checkpoint.save(tmp_path, state(step), keep=2)
    assert names(tmp_path) == ["update_000300", "update_1000000"]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.name == "update_1000000"


def test_there_is_none_in_an_empty_or_absent_folder(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None


def test_a_half_written_one_is_not_found_and_is_cleaned_up(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), keep=3)
    torn = tmp_path / "update_000002.partial"
    torn.mkdir()
    (torn / "state.json").write_bytes(b"half")
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.name == "update_000001"
    checkpoint.save(tmp_path, state(3), keep=3)
    assert names(tmp_path) == ["update_000001", "update_000003"]


@pytest.mark.parametrize("file", [SHARD, "state.json", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "garbage"])
def test_a_damaged_one_is_passed_over_and_refused(tmp_path: Path, file: str, damage: str) -> None:
    checkpoint.save(tmp_path, state(1), keep=3)
    path = checkpoint.save(tmp_path, state(2), keep=3)
    whole = (path / file).read_bytes()
    if damage == "gone":
        (path / file).unlink()
    else:
        (path / file).write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"[1, 2]")
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.name == "update_000001"
    with pytest.raises(CheckpointError, match="update_000002"):
        checkpoint.load(path, method="afd", config=CONFIG)
    assert checkpoint.save(tmp_path, state(2), keep=3) == path
    assert checkpoint.latest(tmp_path) == path


# What file managers, other systems and people leave; the reader of shards looks at endings only.
STRAYS = (".DS_Store", f"._{SHARD}", "Thumbs.db", "state.json~", ".state.json.swp", "notes.txt")
STRAYS += ("shard-00002-model-00001-of-00001.safetensors", "model.safetensors.index.json")


def test_strange_files_damage_nothing_and_are_not_read(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), keep=1)
    for folder in (tmp_path, path):
        for name in STRAYS:
            (folder / name).write_bytes(b"strange")
        (folder / "a folder").mkdir()
        (folder / "of.safetensors").mkdir()
        os.mkfifo(folder / "pipe.json")
    for name in ("update_1", "update_000009.bak", "update_000001 copy"):
        (tmp_path / name).mkdir()
    (tmp_path / "update_000003.partial").write_text("of a killed process, and a file")
    assert checkpoint.latest(tmp_path) == path
    loaded = checkpoint.load(path, method="afd", config=CONFIG)
    assert torch.equal(loaded["w"], torch.full((3,), 1))
    assert checkpoint.save(tmp_path, state(2), keep=1).name == "update_000002"
    assert sorted(p.name for p in tmp_path.glob("update_*")) == [
        "update_000001 copy",
        "update_000002",
        "update_000009.bak",
        "update_1",
    ]


def replaced(path: Path, by: str) -> None:
    """Put something else in the place of a file."""
    path.unlink()
    if by == "folder":
        path.mkdir()
    elif by == "pipe":
        os.mkfifo(path)
    elif by == "empty":
        path.touch()
    else:
        path.symlink_to({"link to nothing": "absent", "ring": path.name, "device": "/dev/zero"}[by])


@pytest.mark.parametrize("file", [SHARD, "state.json", "meta.json"])
@pytest.mark.parametrize("by", ["folder", "pipe", "empty", "link to nothing", "ring", "device"])
def test_something_else_in_the_place_of_a_file_is_named(
    tmp_path: Path, file: str, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    older = checkpoint.save(tmp_path, state(1), keep=3)
    path = checkpoint.save(tmp_path, state(2), keep=3)
    replaced(path / file, by)
    assert checkpoint.latest(tmp_path) == older
    (record,) = [record for record in caplog.records if record.name == "afd"]
    assert f"{path} is skipped: {file} " in record.getMessage()
    with pytest.raises(CheckpointError, match=file):
        checkpoint.load(path, method="afd", config=CONFIG)
    assert checkpoint.save(tmp_path, state(2), keep=3) == path
    assert checkpoint.latest(tmp_path) == path


def test_every_word_of_meta_is_bound(tmp_path: Path) -> None:
    """A bit that flips anywhere in it falls back to the older checkpoint."""
    older = checkpoint.save(tmp_path, state(1), keep=2)
    path = checkpoint.save(tmp_path, state(2), keep=2)
    whole = (path / "meta.json").read_bytes()
    said = json.loads(whole)
    for at in range(0, len(whole), 7):
        (path / "meta.json").write_bytes(
            whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        )
        newest = checkpoint.latest(tmp_path)
        if newest != older:
            assert newest == path
            # A blank between two words may be another one.
            assert json.loads((path / "meta.json").read_bytes()) == said, whole[at - 9 : at + 9]
    for key in said:
        (path / "meta.json").write_text(json.dumps({k: v for k, v in said.items() if k != key}))
        assert checkpoint.latest(tmp_path) == older, key


def test_files_swapped_between_checkpoints_and_renamed_checkpoints_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [checkpoint.save(tmp_path, state(step), keep=3) for step in (1, 2, 3)]
    for file in (SHARD, "state.json", "meta.json"):
        mine, other = paths[2] / file, paths[1] / file
        held = mine.read_bytes()
        mine.write_bytes(other.read_bytes())
        assert checkpoint.latest(tmp_path) == paths[1], file
        mine.write_bytes(held)
    paths[2].rename(tmp_path / "update_000009")
    assert checkpoint.latest(tmp_path) == paths[1]
    assert "update_000009 is skipped: meta.json is that of update 3" in caplog.text


def test_where_none_is_whole_each_is_named_and_nothing_begins_again(tmp_path: Path) -> None:
    paths = [checkpoint.save(tmp_path, state(step), keep=3) for step in (1, 2, 3)]
    (paths[0] / SHARD).unlink()
    (paths[1] / "meta.json").write_text("[]")
    shutil.rmtree(paths[2])
    paths[2].write_text("a file")
    with pytest.raises(CheckpointError) as error:
        checkpoint.latest(tmp_path)
    said = str(error.value)
    assert "none is complete" in said
    for path in paths:
        assert str(path) in said
    assert f"{SHARD} is missing" in said


def test_a_damaged_newer_one_does_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(2), keep=1)
    (checkpoint.save(tmp_path, state(9), keep=2) / "meta.json").unlink()
    path = checkpoint.save(tmp_path, state(3), keep=1)
    assert names(tmp_path) == ["update_000003", "update_000009"]
    assert checkpoint.latest(tmp_path) == path


def test_saving_a_step_again_leaves_the_whole_one_alone(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), keep=3)
    before = (path / SHARD).stat().st_mtime_ns
    checkpoint.save(tmp_path, state(1), keep=3)
    assert (path / SHARD).stat().st_mtime_ns == before


def test_one_of_another_configuration_is_refused_with_every_differing_key(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), keep=1)
    other = plain(make_config({}, ["seed=4", "afd.nft_beta=0.5", "updates=9"]))
    with pytest.raises(ConfigError) as error:
        checkpoint.load(path, method="afd", config=other)
    assert "seed: 0 there, 4 now" in str(error.value)
    assert "afd.nft_beta: 1.0 there, 0.5 now" in str(error.value)
    assert "steps" not in str(error.value)


def test_one_of_another_method_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), keep=1)
    with pytest.raises(ConfigError, match="method: 'afd' there, 'sft' now"):
        checkpoint.load(path, method="sft", config=CONFIG)


def test_random_states_come_back_through_a_file(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    path = checkpoint.save(tmp_path, state(1, random=[checkpoint.random_state()]), keep=1)
    first = draw()
    checkpoint.set_random_state(checkpoint.load(path, method="afd", config=CONFIG)["random"])
    assert draw() == first


def test_each_process_gets_its_own_random_state_back_and_a_new_one_the_first(
    tmp_path: Path,
) -> None:
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(checkpoint.random_state())
    path = checkpoint.save(tmp_path, state(1, random=states), keep=1)
    loaded = checkpoint.load(path, method="afd", config=CONFIG)["random"]
    for rank, seed in enumerate((0, 1, 0)):
        checkpoint.set_random_state(loaded, rank)
        drawn = torch.rand(3)
        assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(seed)))


def test_a_checkpoint_says_who_wrote_it(tmp_path: Path) -> None:
    meta = json.loads((checkpoint.save(tmp_path, state(1), keep=1) / "meta.json").read_text())
    assert meta["written_by"]["afd"] == afd.__version__
    assert meta["written_by"]["torch"] == torch.__version__
    in_a_repository = (Path(__file__).parents[2] / ".git").exists()
    assert (meta["written_by"]["commit"] is not None) == in_a_repository


def test_one_of_another_format_is_refused_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, state(1), keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 1000)
        path = checkpoint.save(tmp_path, state(2), keep=2)
    assert checkpoint.latest(tmp_path) == path
    with pytest.raises(CheckpointError, match="has format 1000, this version of afd reads 5"):
        checkpoint.load(path, method="afd", config=CONFIG)


def test_one_under_its_former_name_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), keep=2)
    path = tmp_path / "step_000400"
    path.mkdir()
    meta = {"step": 400, "method": "afd", "config": CONFIG, "format": 4, "files": {}}
    meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (path / "meta.json").write_text(json.dumps(meta))
    assert checkpoint.latest(tmp_path) == path
    with pytest.raises(CheckpointError, match="step_000400: has format 4, this version of afd"):
        checkpoint.load(path, method="afd", config=CONFIG)


def test_one_from_before_everything_was_bound_is_named(tmp_path: Path) -> None:
    path = tmp_path / "update_000001"
    path.mkdir()
    meta = {"update": 1, "method": "afd", "config": CONFIG, "format": 3, "sha256": "of state.pt"}
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(
        CheckpointError, match="update_000001: has format 3, this version of afd reads 5"
    ):
        checkpoint.latest(tmp_path)
