"""Disks that are full, folders that go away under a run: a sentence, and a state to resume."""

from __future__ import annotations

import errno
import io
import logging
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from afd.config.run import make_config
from afd.models.wan.checkpoints import save_diffusers, save_self_forcing
from afd.trainer.logging import log_to
from afd.trainer.trackers import Boards
from tests.afd.commands import (
    UPDATES,
    assert_same_run,
    begin,
    ended,
    lines,
    saved,
    small_run,
    wait_for,
)
from tests.afd.test_resume import numbers
from tests.afd.tiny_methods import toy_student

_log = logging.getLogger("afd")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def straight(config: Path) -> Path:
    """The run that nothing happens to."""
    out = config.parent / "straight"
    assert ended(begin(["train", str(config), f"out={out}"])) == 0
    return out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a file system, where that is allowed at all")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Take what is left of a disk, to the last byte."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return path


def sentence(said: Path) -> str:
    """The one line on the standard streams that names the problem."""
    text = said.read_text()
    assert "Traceback" not in text
    (found,) = [line for line in text.splitlines() if "afd: error:" in line]
    return found


def test_a_disk_that_gets_full_ends_a_run_that_then_continues_to_the_same_bits(
    tmp_path: Path, config: Path, straight: Path, small_disk: Path
) -> None:
    out, said = small_disk / "run", tmp_path / "said"
    more = ["logging.tensorboard=true", "logging.videos_every=2"]
    process = begin(["train", str(config), f"out={out}", *more], out=said)
    wait_for(lambda: (out / "checkpoints" / "update_000004").is_dir(), process)
    filler = fill(small_disk)
    assert ended(process) == 3
    error = sentence(said)
    assert "No space left on device; free some space there and continue: afd resume" in error
    assert f"the newest checkpoint is {out}/checkpoints/update_000004" in error
    assert str(out) in error.split("afd: error:")[1].split(":")[0]
    assert saved(out) == 4
    # Still full: reported again, without damage.
    assert ended(begin(["resume", str(out)], out=said)) == 3
    filler.unlink()
    assert ended(begin(["resume", str(out)], out=said)) == 0
    assert_same_run(out, straight)
    assert not list(out.rglob("*.partial"))


@pytest.mark.soak
def test_a_limit_on_the_size_of_files_is_named(
    tmp_path: Path, config: Path, straight: Path
) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    process = begin(["train", str(config), f"out={out}"], out=said, file_bytes=60_000)
    assert ended(process) == 3
    assert "File too large; raise the limit on the size of files" in sentence(said)
    assert "(nothing is saved yet)" in sentence(said)
    assert not list((out / "checkpoints").iterdir())
    assert ended(begin(["resume", str(out)])) == 0
    assert_same_run(out, straight)


@pytest.mark.parametrize("how", [pytest.param("removed", marks=pytest.mark.soak), "moved"])
def test_a_run_whose_folder_goes_away_saves_itself_there_again(
    tmp_path: Path, config: Path, straight: Path, how: str
) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    process = begin(["train", str(config), f"out={out}"], out=said)
    wait_for(lambda: lines(out) >= 5, process)
    out.rename(tmp_path / "moved")
    if how == "removed":
        shutil.rmtree(tmp_path / "moved")
    assert ended(process) == 3
    step = saved(out)
    assert 5 <= step < UPDATES
    error = sentence(said)
    assert f"run folder {out}: was moved or removed while the run wrote there" in error
    assert f"its state after update {step} was written to the old path" in error
    assert ended(begin(["resume", str(out)])) == 0
    # The numbers until then went with the folder, which the log reports.
    kept = numbers(out)
    assert kept == numbers(straight)[step:]
    assert (
        f"metrics.jsonl: its lines differ from those that the run wrote up to update {step}"
        in (out / "train.log").read_text()
    )
    if how == "moved":
        assert ended(begin(["resume", str(tmp_path / "moved")])) == 0
        assert_same_run(tmp_path / "moved", straight)


def test_a_folder_in_the_place_of_the_runs_is_left_alone(tmp_path: Path, config: Path) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    process = begin(["train", str(config), f"out={out}"], out=said)
    wait_for(lambda: lines(out) >= 5, process)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("somebody's")
    out.rename(tmp_path / "moved")
    (tmp_path / "other").rename(out)
    assert ended(process) == 3
    assert "another folder is there now" in sentence(said)
    assert os.listdir(out) == ["file"]
    assert saved(tmp_path / "moved") == 4


def test_what_lies_in_the_way_of_a_checkpoint_is_named(
    tmp_path: Path, config: Path, straight: Path
) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    out.mkdir()
    (out / "checkpoints").write_text("a file")
    process = begin(["train", str(config), f"out={out}"], out=said)
    assert ended(process) == 3
    assert f"{out}/checkpoints: File exists" in sentence(said)
    (out / "checkpoints").unlink()
    assert ended(begin(["resume", str(out)])) == 0
    assert_same_run(out, straight)


def test_a_teachers_folder_that_goes_away_is_named(
    tmp_path: Path, config: Path, straight: Path
) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    clips = tmp_path / "clips"
    shutil.copytree(config.parent / "clips", clips)
    process = begin(["train", str(config), f"out={out}", f"teacher.path={clips}"], out=said)
    # Before everything is in memory.
    wait_for(lambda: (out / "train.log").is_file(), process)
    clips.rename(tmp_path / "away")
    assert ended(process) == 2
    assert str(clips) in sentence(said)
    (tmp_path / "away").rename(clips)
    assert ended(begin(["train", str(config), f"out={out}", f"teacher.path={clips}"])) == 0
    assert_same_run(out, straight)


def test_a_log_and_boards_that_cannot_be_written_are_missed_once(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config({"out": str(small_disk / "run"), "logging": {"tensorboard": True}})
    config.run_dir.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), np.uint8)
    boards = Boards(config, 0)
    screen = io.StringIO()
    with log_to(config.run_dir / "train.log", Console(file=screen, width=500)):
        fill(small_disk)
        for step in range(3):
            _log.info("update %d %s", step, "x" * 9000)
            boards.video(step, "video", tmp_path, noise, 8)
            boards.scalars(step, {"key": 1.0})
            # It writes beside us; a flush waits for it.
            with boards._or_without():
                if boards._tensorboard is not None:
                    boards._tensorboard.flush()
        boards.close()
    said = screen.getvalue()
    assert said.count("train.log: cannot be written, continuing without it (No space left") == 1
    assert said.count("tensorboard: cannot be written, continuing without it") == 1
    assert "update 2" in said
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["toy", "self_forcing", "diffusers"])
@pytest.mark.parametrize("room", [0, 5000, 150_000])
def test_weights_that_have_no_room_are_an_error_of_the_disk(
    kind: str, room: int, tmp_path: Path
) -> None:
    student, place = toy_student(), tmp_path / "place"
    write: dict[str, Callable[[], object]] = {
        "toy": lambda: student.save(place),
        "diffusers": lambda: save_diffusers(place, student.net),
        "self_forcing": lambda: save_self_forcing(place, generator=student.net),
    }
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write[kind]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(place))
    assert not list(tmp_path.iterdir())


def test_sampling_that_is_ended_or_has_no_room_leaves_no_half_video(
    tmp_path: Path, small_disk: Path
) -> None:
    said, out = tmp_path / "said", small_disk / "videos"
    words = ["sample", "sample_toy", f"out={out}", "device=cpu"]
    filler = fill(small_disk)
    assert ended(begin(words, out=said)) == 3
    assert "No space left on device; free some space there" in sentence(said)
    filler.unlink()
    process = begin([*words, "batch=1"], out=said)
    wait_for(lambda: out.is_dir() and any(out.iterdir()), process)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGHUP)
    assert ended(process) in (130, 0)
    assert all(path.suffix == ".mp4" for path in out.glob("*"))
