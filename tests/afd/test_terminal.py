"""A run outlives its terminal: readers that leave, terminals that close, signals."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afd.terminal import _lasting
from tests.afd.commands import (
    PATIENCE_S,
    UPDATES,
    assert_same_run,
    begin,
    ended,
    lines,
    saved,
    small_run,
    wait_for,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("terminal"))


@pytest.fixture(scope="module")
def straight(config: Path) -> Path:
    """The run that nothing happens to."""
    out = config.parent / "straight"
    assert ended(begin(["train", str(config), f"out={out}"])) == 0
    return out


class Terminal:
    """A terminal on which everything is read away, until it is closed."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        self.path = os.ttyname(self.slave)
        self.read = b""
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._stop, self._wake = os.pipe()
        self._thread.start()

    def _drain(self) -> None:
        while True:
            ready, _, _ = select.select([self.master, self._stop], [], [])
            if self._stop in ready:
                return
            try:
                self.read += os.read(self.master, 65536)
            except OSError:
                return

    def close(self) -> None:
        """As a window that is closed: who has it as its terminal gets SIGHUP, and EIO from then."""
        if self.master < 0:
            return
        os.write(self._wake, b"x")
        self._thread.join()
        os.close(self.slave)
        os.close(self.master)
        self.master = -1


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    yield opened
    opened.close()


def test_a_run_whose_terminal_is_closed_is_saved_and_continues_to_the_same_bits(
    tmp_path: Path, config: Path, straight: Path, terminal: Terminal
) -> None:
    out = tmp_path / "run"
    process = begin(["train", str(config), f"out={out}"], tty=terminal.path)
    wait_for(lambda: lines(out) >= 5, process)
    terminal.close()
    assert ended(process) == 130
    assert 5 <= saved(out) == lines(out) < UPDATES
    log = (out / "train.log").read_text()
    assert "SIGHUP: stopping after this update" in log
    assert f"continue: afd resume {out}" in log
    assert "Traceback" not in log
    assert ended(begin(["resume", str(out)])) == 0
    assert_same_run(out, straight)


def test_under_nohup_a_run_goes_on_without_its_terminal(
    tmp_path: Path, config: Path, straight: Path, terminal: Terminal
) -> None:
    out = tmp_path / "run"
    process = begin(["train", str(config), f"out={out}"], tty=terminal.path, nohup=True)
    wait_for(lambda: lines(out) >= 2, process)
    terminal.close()
    assert ended(process) == 0
    assert_same_run(out, straight)
    assert "finished: 10 updates" in (out / "train.log").read_text()


@pytest.mark.soak  # in a shell: test_head_and_closed_streams_of_a_shell
def test_a_reader_that_leaves_ends_nothing(tmp_path: Path, config: Path, straight: Path) -> None:
    out, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    process = begin(["train", str(config), f"out={out}"], out=pipe)
    wait_for(lambda: lines(out) >= 1, process)
    os.close(reader)
    assert ended(process) == 0
    assert_same_run(out, straight)


def test_a_stream_that_cannot_be_written_to_is_dropped(tmp_path: Path) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        stream = _lasting(descriptor, None)
        for _ in range(3):
            print("a prompt – 新", file=stream, flush=True)
        assert os.readlink(f"/proc/self/fd/{descriptor}") == os.devnull
    finally:
        os.close(descriptor)


def test_signals_save_and_end_a_run_once(tmp_path: Path, config: Path, straight: Path) -> None:
    out = tmp_path / "run"

    def signalled(process: Any, *numbers: signal.Signals) -> None:
        before = lines(out)
        wait_for(lambda: lines(out) > before, process)
        for number in numbers:
            os.kill(process.pid, number)
        assert ended(process) == 130

    # Both signals together, as a service manager sends them; they end a run once.
    run = begin(["train", str(config), f"out={out}"])
    signalled(run, signal.SIGTERM, signal.SIGHUP)
    assert saved(out) == lines(out) < UPDATES
    signalled(begin(["resume", str(out)]), signal.SIGINT)
    assert saved(out) == lines(out) < UPDATES
    assert ended(begin(["resume", str(out)])) == 0
    assert_same_run(out, straight)


def test_head_and_closed_streams_of_a_shell(tmp_path: Path, config: Path, straight: Path) -> None:
    """The real command in real pipes, with no HOME, no TERM and an encoding of one byte."""
    command = f"{sys.executable} -m afd train {config}"
    environment = {"PATH": os.environ["PATH"], "PYTHONIOENCODING": "ascii"}
    shells = {
        name: subprocess.Popen(
            ["bash", "-c", f"set -o pipefail; {command} out={tmp_path / name} {streams}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name, streams in {"head": "2>&1 | head -n 1", "closed": "<&- >&- 2>&-"}.items()
    }
    for name, shell in shells.items():
        out, err = shell.communicate(timeout=PATIENCE_S)
        assert shell.returncode == 0, err
        assert out.count(b"\n") == (name == "head")
        assert not err
        assert_same_run(tmp_path / name, straight)
