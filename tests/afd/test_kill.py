"""A run that is killed again and again, with SIGKILL and at any moment, is the run never killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from afd.distributed import ALONE
from afd.trainer import checkpoint, shards
from tests.afd.distributed import run
from tests.afd.test_resume import assert_same, numbers
from tests.afd.tiny import make_clips
from tests.afd.tiny_methods import toy_student
from tests.afd.together import SERVER

KILLS, UPDATES = 22, 36
# Seconds after which a run that ought to write or to end is stuck.
PATIENCE_S = 120


def small_run(out: Path, folder: Path) -> dict[str, Any]:
    """AFD of a small toy student with every part that a checkpoint holds, saved every update."""
    return {
        "out": str(out),
        "updates": UPDATES,
        "prompts_per_update": 2,
        "teacher": {"kind": "folder", "path": str(folder / "clips")},
        "student": {
            "checkpoint": str(folder / "student.safetensors"),
            "denoising_steps": [1.0, 0.625],
        },
        "discriminator": {"warmup_updates": 1, "steps_per_update": 1, "backbone": "scratch"},
        "afd": {"samples_per_prompt": 2, "draws": 1, "ema_decay": 0.9, "baseline": "ema"},
        "evaluation": {"every": 30, "curve_videos": 2, "videos": 2, "samples": 2},
        "logging": {"tensorboard": False},
        "checkpoint": {"every": 1, "keep": 2},
    }


def half_written(out: Path) -> set[int]:
    """Checkpoints that are not whole: the inode of each, as a later attempt writes another."""
    found = set()
    for path in (out / "checkpoints").glob("*.partial"):
        with suppress(FileNotFoundError):  # it has just become whole
            found.add(path.stat().st_ino)
    return found


def begin(data: dict[str, Any]) -> Any:
    """Start or continue a run in a separate process."""
    process = SERVER.Process(target=run, args=(data,))
    process.start()
    return process


def kill(data: dict[str, Any], after_s: float, while_writing: bool) -> bool:
    """Start or continue the run, and kill it; whether that left half a checkpoint behind."""
    out = Path(data["out"])
    before = half_written(out)
    process, end = begin(data), time.monotonic() + PATIENCE_S
    time.sleep(after_s)
    while while_writing and half_written(out) <= before:
        assert time.monotonic() < end, "the run writes nothing"
        time.sleep(2e-4)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run has ended before it could be killed"
    return not half_written(out) <= before


@pytest.mark.timeout(300)
def test_a_run_killed_at_any_moment_is_bit_by_bit_the_run_never_killed(tmp_path: Path) -> None:
    make_clips(tmp_path / "clips", frames=12)
    toy_student().save(tmp_path / "student.safetensors")
    straight, out = tmp_path / "straight", tmp_path / "killed"
    process = begin(small_run(straight, tmp_path))
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    an_update_s = json.loads((straight / "metrics.jsonl").read_text().splitlines()[-1])["time_s"]
    an_update_s /= UPDATES
    data, dice = small_run(out, tmp_path), random.Random(0)
    torn = [kill(data, dice.uniform(0, 5 * an_update_s), n % 2 == 1) for n in range(KILLS)]
    assert sum(torn) >= KILLS // 4, "kills during the write of a checkpoint"
    process = begin(data)
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    assert numbers(out) == numbers(straight)
    assert len(numbers(out)) == UPDATES
    assert (out / "evaluation.jsonl").read_bytes() == (straight / "evaluation.jsonl").read_bytes()
    states = []
    for folder in (out, straight):
        newest = checkpoint.latest(folder / "checkpoints")
        assert newest is not None
        states.append(shards.read(newest, ALONE))
        assert not half_written(folder)
    for key in ("update", "method_state", "random", "sampler"):
        assert_same(states[0][key], states[1][key], key)
