"""A damaged run folder: a resume gives the same bits, or names the damage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.errors import CheckpointError, ConfigError, TeacherError
from afd.trainer.loop import Outcome, load_run, train
from tests.afd.test_resume import assert_same, final_state, numbers
from tests.afd.tiny import Interrupted, TinyMethod, make_clips, tiny_config

# What a damaged run folder may end a resume with: one sentence, which the command line prints.
DOCUMENTED = (ConfigError, CheckpointError, TeacherError, OSError)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run stopped after update 5, saved after 2, 4 and 5; and one that was never stopped."""
    root = tmp_path_factory.mktemp("run folder")
    clips = make_clips(root / "clips")
    train(tiny_config(root / "straight", clips), method=TinyMethod())
    stopped = tiny_config(root / "stopped", clips, "checkpoint.keep=3")
    train(stopped, method=Interrupted(4, 2))
    return root / "stopped", root / "straight"


def cut(path: Path, at: float) -> None:
    path.write_bytes(path.read_bytes()[: int(at * path.stat().st_size)])


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[int(at * len(data)) % len(data)] ^= 1 << int(97 * at) % 8
    path.write_bytes(data)


def zeros(path: Path, at: float) -> None:
    """What a power cut leaves of blocks that were not written yet."""
    data = path.read_bytes()
    begin = int(at * len(data))
    path.write_bytes(data[:begin] + bytes(len(data) - begin))


def remove(path: Path, at: float) -> None:
    path.unlink()


def folder(path: Path, at: float) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, at: float) -> None:
    path.unlink()
    path.symlink_to("absent" if at < 0.5 else path.name)


def swap(path: Path, at: float) -> None:
    """With another file of the run."""
    others = sorted(p for p in path.parents[1].rglob("*") if p.is_file() and p != path)
    other = others[int(at * len(others)) % len(others)]
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


def stray(path: Path, at: float) -> None:
    names = (".DS_Store", f"._{path.name}", "Thumbs.db", f"{path.name}~", f"{path.name}.partial")
    place = path.parent / names[int(at * len(names)) % len(names)]
    if place.exists():
        return
    place.mkdir() if at > 0.8 else place.write_bytes(b"\0strange")


def touch(path: Path, at: float) -> None:
    os.utime(path, (at * 1e9, at * 1e9))


DAMAGES: list[Callable[[Path, float], None]] = [
    *(cut, flip, zeros, remove, folder, link, swap, stray, touch)
]


@given(
    damages=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(DAMAGES), st.floats(0, 0.999)),
        min_size=1,
        max_size=3,
    )
)
def test_a_damaged_run_folder_gives_the_same_bits_or_a_sentence(
    folders: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
    damages: list[tuple[float, Callable[[Path, float], None], float]],
) -> None:
    stopped, straight = folders
    out = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(stopped, out)
    hurt = set()
    for which, damage, at in damages:
        files = sorted(path for path in out.rglob("*") if path.is_file() and not path.is_symlink())
        path = files[int(which * len(files))]
        hurt.add(path.name)
        damage(path, at)
    ended = resumed(out)
    if isinstance(ended, Exception):
        assert str(out) in str(ended), ended
    elif "config.yaml" not in hurt:  # which may request more updates, as the log reports
        ours, theirs = final_state(out), final_state(straight)
        for key in ("update", "method_state", "random", "sampler"):
            assert_same(ours[key], theirs[key], key)
        wanted = {line["update"]: line for line in numbers(straight)}
        found = numbers(out)
        log = (out / "train.log").read_text(encoding="utf-8", errors="replace")
        if found != list(wanted.values()):
            assert "metrics.jsonl: its lines differ" in log or "DONE" in hurt
    shutil.rmtree(out.parent)


def resumed(out: Path) -> Outcome | Exception:
    """How a run that continues in a folder ends."""
    try:
        return train(load_run(out), method=TinyMethod(seed=7))
    except DOCUMENTED as error:
        return error
