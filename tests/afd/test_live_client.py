"""`afd live` with real sockets: the example's client, slow viewers, memory, the end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from afd.live import protocol
from tests.afd.live_server import configuration, running

ROOT = Path(__file__).parents[2]


@contextmanager
def process(tmp_path: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`afd live` on a free port, and the URL of its socket."""
    command = [sys.executable, "-m", "afd", "live", "--port", "0", f"out={tmp_path}", "threads=1"]
    started = subprocess.Popen(
        [*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        found = re.search(r"http://(\S+?)/ ", line)
        assert found, line + (started.stderr.read() if started.stderr else "")
        yield started, f"ws://{found[1]}/socket"
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate()


def dial(url: str, **options: Any) -> ClientConnection:
    return connect(url, subprotocols=[protocol.SUBPROTOCOL], max_size=None, **options)


def chunk(opened: ClientConnection) -> protocol.ChunkHeader:
    """The next chunk, confirmed."""
    while True:
        message = opened.recv(timeout=30)
        if isinstance(message, bytes):
            header, _ = protocol.unpack(message)
            seen = {"type": "seen", "take": header.take, "chunk": header.chunk}
            opened.send(json.dumps(seen))
            return header


def silent(port: int) -> socket.socket:
    """A viewer that neither reads nor confirms: the buffers of its socket fill."""
    opened = socket.create_connection(("127.0.0.1", port))
    lines = (
        "GET /socket HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        f"Sec-WebSocket-Protocol: {protocol.SUBPROTOCOL}",
    )
    opened.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode())
    assert opened.recv(12) == b"HTTP/1.1 101"
    return opened


def memory() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_the_example_switches_and_keeps_frames_and_ctrl_c_ends_cleanly(tmp_path: Path) -> None:
    begun = time.monotonic()
    with process(tmp_path / "out") as (started, url):
        example = ROOT / "examples" / "live_client.py"
        command = [sys.executable, str(example), url, str(tmp_path / "frames")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        told = [json.loads(line) for line in done.stdout.splitlines()]
        assert told[0]["type"] == "hello"
        assert [m["mode"] for m in told if m["type"] == "switched"] == ["recache"]
        assert len(list((tmp_path / "frames").glob("take*.jpg"))) >= 27
        # A viewer still watches and a recording runs when the signal comes.
        with dial(url) as opened:
            chunk(opened)
            opened.send(json.dumps({"type": "record", "on": True}))
            for _ in range(3):
                chunk(opened)
            started.send_signal(signal.SIGINT)
            out, error = started.communicate(timeout=30)
        assert started.returncode == 0, error
        assert "Traceback" not in error + out
        assert len(list((tmp_path / "out").glob("*.mp4"))) == 1
        assert not list((tmp_path / "out").glob("*.partial"))
    assert time.monotonic() - begun < 120


@pytest.mark.parametrize(
    ("seconds", "growth"),
    [
        (3, 40 << 20),
        pytest.param(600, 60 << 20, marks=[pytest.mark.soak, pytest.mark.timeout(900)]),
    ],
)
def test_memory_stays_bounded_with_a_viewer_that_never_reads(
    tmp_path: Path, seconds: float, growth: int
) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(running(configuration(tmp_path, fps=300)))
        fast = stack.enter_context(dial(server.socket))
        stack.enter_context(silent(server.port))
        for _ in range(30):
            chunk(fast)
        before, end, count = memory(), time.monotonic() + seconds, 0
        while time.monotonic() < end:
            if count % 20 == 0:
                switch = {"type": "switch", "prompt": f"ball {count}", "mode": "recache"}
                fast.send(json.dumps(switch))
            last = chunk(fast)
            count += 1
        assert count > 3 * seconds
        assert last.chunk > count
        assert memory() - before < growth


def test_oversized_frames_and_other_sites_are_cut_off_by_the_real_server(tmp_path: Path) -> None:
    with running(configuration(tmp_path)) as server:
        url = server.socket
        with dial(url) as opened:
            chunk(opened)
            with pytest.raises(ConnectionClosed):
                flood(opened)
        with pytest.raises(InvalidStatus) as refused:
            dial(url, origin=Origin("http://evil.example"))
        assert refused.value.response.status_code == 403
        with dial(url, origin=Origin(server.url.removesuffix("/"))) as opened:
            chunk(opened)


def flood(opened: ClientConnection) -> None:
    """Send more than a message may have, until the server closes the connection."""
    opened.send(bytes(protocol.MAX_PICTURE_BYTES + 4096))
    while True:
        opened.recv(timeout=30)
