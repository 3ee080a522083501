"""Stopping a run anywhere and continuing gives what never stopping gives, bit by bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.config import ConfigError
from afd.ranks import ALONE
from afd.training import checkpoint, shards
from afd.training.loop import Outcome, load_run, train
from tests.afd.tiny import Interrupted, TinyMethod, make_clips, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("teacher") / "clips")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """Six updates without a stop."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train(tiny_config(out, clips), method=TinyMethod()) is Outcome.FINISHED
    return out


def numbers(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("time_s", "phase_s")} for line in lines]


def final_state(out: Path) -> dict[str, Any]:
    path = checkpoint.latest(out / "checkpoints")
    assert path is not None
    assert path.name == "step_000006"
    return shards.read(path, ALONE)


def assert_same_run(out: Path, straight: Path) -> None:
    assert numbers(out) == numbers(straight)
    ours, theirs = final_state(out), final_state(straight)
    for key in ("method_state", "random", "sampler", "step"):
        assert_same(ours[key], theirs[key], key)


def assert_same(a: Any, b: Any, where: str) -> None:
    """Equal to the last bit, at every depth."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_stopped_run_continues_bit_by_bit(
    tmp_path: Path, clips: Path, straight: Path, after: int
) -> None:
    out = tmp_path / "run"
    assert train(tiny_config(out, clips), method=Interrupted(after, signal.SIGINT)) is (
        Outcome.STOPPED
    )
    assert len(numbers(out)) == after + 1
    assert train(load_run(out), method=TinyMethod(seed=5)) is Outcome.FINISHED
    assert_same_run(out, straight)


def test_a_killed_run_continues_bit_by_bit(tmp_path: Path, clips: Path, straight: Path) -> None:
    # Events are the syncs, renames and half-written shards of a run, in order: config and lines,
    # then three checkpoints (of 9 with their lines: 6 to 14 is the first), then the end.
    events = [1, 3, 5, 7, 8, 9, 10, 11, 12, 14, 17, 29, 34]
    said = subprocess.run(
        [sys.executable, "-m", "tests.afd.tiny", str(tmp_path), str(clips), *map(str, events)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    ends = [line.split() for line in said.stdout.splitlines() if line[:1].isdigit()]
    assert [(int(event), int(second)) for event, _, second in ends] == [(e, 0) for e in events]
    killed = [int(first) == -signal.SIGKILL for _, first, _ in ends]
    assert all(killed), "every event lies within the run"
    for event in events:
        assert_same_run(tmp_path / str(event), straight)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, clips: Path, straight: Path
) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, clips), method=Interrupted(4, signal.SIGINT))
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    assert newest.name == "step_000005"
    (shard,) = newest.glob("*.safetensors")
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    assert train(tiny_config(out, clips), method=TinyMethod()) is Outcome.FINISHED
    assert "step_000005 is passed over" in (out / "train.log").read_text()
    assert_same_run(out, straight)


def test_a_resumed_run_may_save_at_other_times_and_go_on_longer(
    tmp_path: Path, clips: Path, straight: Path
) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, clips), method=Interrupted(2, signal.SIGINT))
    config = load_run(out, ["steps=8", "checkpoint.every=1"])
    assert train(config, method=TinyMethod()) is Outcome.FINISHED
    assert numbers(out)[:6] == numbers(straight)
    assert len(numbers(out)) == 8


def test_a_resumed_run_may_not_change_what_it_learns(tmp_path: Path, clips: Path) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, clips), method=Interrupted(2, signal.SIGINT))
    with pytest.raises(ConfigError, match=r"afd\.nft_beta: 1\.0 there, 0\.5 now"):
        train(load_run(out, ["afd.nft_beta=0.5"]), method=TinyMethod())
