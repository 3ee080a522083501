"""The command line in processes of their own, with real terminals, pipes, signals and disks."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from afd.cli import main
from afd.distributed import ALONE
from afd.trainer import checkpoint, shards
from tests.afd.test_resume import assert_same, numbers
from tests.afd.tiny import make_clips
from tests.afd.tiny_methods import toy_student
from tests.afd.together import SERVER

# Seconds after which a process that ought to write or to end is stuck.
PATIENCE_S = 120
UPDATES = 10


def small_run(folder: Path) -> Path:
    """A configuration: AFD of a small toy student, saved every fourth update, and its files."""
    make_clips(folder / "clips", frames=12)
    toy_student().save(folder / "student.safetensors")
    data: dict[str, Any] = {
        "updates": UPDATES,
        "prompts_per_update": 2,
        "teacher": {"kind": "folder", "path": str(folder / "clips")},
        "student": {
            "checkpoint": str(folder / "student.safetensors"),
            "denoising_steps": [1.0, 0.625],
        },
        "discriminator": {"warmup_updates": 1, "steps_per_update": 1, "backbone": "scratch"},
        "afd": {"samples_per_prompt": 2, "draws": 1, "ema_decay": 0.9, "baseline": "ema"},
        "evaluation": {"every": 0, "curve_videos": 2, "videos": 2, "samples": 2},
        "logging": {"tensorboard": False},
        "checkpoint": {"every": 4, "keep": 2},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def begin(
    words: list[str],
    *,
    tty: str | None = None,
    out: Path | None = None,
    nohup: bool = False,
    file_bytes: int | None = None,
) -> Any:
    """`afd WORDS` in its own session: with a terminal's path, or with a file (or pipe) for
    both output streams; `nohup`: started so; `file_bytes`: how large it may write a file."""
    process = SERVER.Process(target=_command, args=(words, tty, out, nohup, file_bytes))
    process.start()
    return process


def _command(
    words: list[str], tty: str | None, out: Path | None, nohup: bool, file_bytes: int | None
) -> None:
    os.setsid()
    if tty is not None:
        place = os.open(tty, os.O_RDWR)  # the session's own terminal from here on
    else:
        place = os.open(out or os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for descriptor in range(3):
        os.dup2(place, descriptor)
    os.close(place)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    sys.exit(main(words))


def ended(process: Any) -> int:
    """The exit code; a process that does not end is killed, and fails."""
    process.join(PATIENCE_S)
    if process.is_alive():
        process.kill()
        raise AssertionError("the command does not end")
    return int(process.exitcode)


def wait_for(what: Callable[[], bool], process: Any) -> None:
    """Until something has happened in a run that must not end before."""
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert process.is_alive(), f"the command has ended with {process.exitcode}"
        assert time.monotonic() < end, "nothing happens"
        time.sleep(2e-3)


def lines(out: Path) -> int:
    """Updates that a run has written down."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def assert_same_run(out: Path, straight: Path) -> None:
    """Finished, with the same numbers and weights to the last bit."""
    assert (out / "DONE").is_file()
    assert numbers(out) == numbers(straight)
    states = []
    for folder in (out, straight):
        newest = checkpoint.latest(folder / "checkpoints")
        assert newest is not None
        states.append(shards.read(newest, ALONE))
    for key in ("update", "method_state", "random", "sampler"):
        assert_same(states[0][key], states[1][key], key)


def saved(out: Path) -> int:
    """The update of the newest whole checkpoint."""
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    return int(json.loads((newest / "meta.json").read_text())["update"])
