"""Live streams: time to first frame, latency of a switch, frames per second, the server's CPU.

    python benchmarks/live.py                     # the shipped laptop student

The server runs in this process, its viewers in another one, over sockets of loopback. The share of
CPU is that of the encoder's and the sockets' threads; the generator's thread is the student. The
formats of pictures are timed on frames of two sizes, as the encoder's thread makes them.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import uvicorn
from PIL import Image
from websockets.sync.client import ClientConnection, connect

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd.config.run import make_config
from afd.live import protocol
from afd.live.config import LAPTOP, LiveConfig
from afd.live.encoder import encoded
from afd.live.run import make_app
from afd.live.security import guard
from benchmarks import report

HOW = (
    "start: from `afd live` to a first frame at a new socket; restart: from the message to the "
    "first frame; switch: from the message to the first chunk with the new prompt, at any time of "
    "a chunk (125 ms at 24 frames a second); fps: frames received by every viewer; server CPU: of "
    "one core, encoder and sockets; generator CPU: the student's thread; picture: CPU and bytes of "
    "a frame."
)


@dataclass(frozen=True)
class Row:
    """One measured quantity."""

    case: str
    quantity: str
    value: float
    unit: str


class Viewer:
    """A client that confirms every chunk."""

    def __init__(self, url: str) -> None:
        subprotocols: Any = [protocol.SUBPROTOCOL]
        with ExitStack() as stack:
            opened = connect(url, subprotocols=subprotocols, max_size=None)
            self.socket: ClientConnection = stack.enter_context(opened)
            self.close = stack.pop_all().close

    def send(self, kind: str, **more: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **more}))

    def chunk(self) -> protocol.ChunkHeader:
        while True:
            message = self.socket.recv(timeout=60)
            if isinstance(message, bytes):
                header, _ = protocol.unpack(message)
                self.send("seen", take=header.take, chunk=header.chunk)
                return header


@contextmanager
def serving(fps: float, out: Path) -> Iterator[str]:
    """A server of the laptop student in this process; the URL of its socket."""
    config = make_config(
        {**LAPTOP, "fps": fps, "threads": 1, "out": str(out)}, (), "benchmark", LiveConfig
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = make_app(config, guard("127.0.0.1", None))
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", ws_per_message_deflate=False, lifespan="on")
        )
        options = {"sockets": [listening]}
        thread = threading.Thread(target=server.run, kwargs=options, name="sockets")
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"ws://127.0.0.1:{listening.getsockname()[1]}/socket"
        finally:
            server.should_exit = True
            thread.join(15)


def cpu_seconds() -> dict[str, float]:
    """CPU seconds of this process's threads so far, by name."""
    threads = threading.enumerate()
    return {one.name: used(f"/proc/self/task/{one.native_id}/stat") for one in threads}


def used(stat: str) -> float:
    """CPU seconds in a file of /proc."""
    fields = Path(stat).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def watch(url: str, count: int, seconds: float, answers: Connection) -> None:
    """The process of `count` viewers: frames per second of each."""
    viewers = [Viewer(url) for _ in range(count)]
    frames = [0] * count
    for viewer in viewers:
        viewer.chunk()
    answers.send("ready")
    begun = time.monotonic()

    def follow(index: int) -> None:
        while time.monotonic() < begun + seconds:
            frames[index] += viewers[index].chunk().frames

    threads = [threading.Thread(target=follow, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - begun
    answers.send([one / took for one in frames])


def start() -> Iterator[Row]:
    """A fresh `afd live` process."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "afd", "live", "--port", "0", "threads=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        listening = time.monotonic() - begun
        url = line.split("http://")[1].split("/")[0]
        viewer = Viewer(f"ws://{url}/socket")
        viewer.chunk()
        yield Row("start", "page is served", listening, "s")
        yield Row("start", "first frame", time.monotonic() - begun, "s")
        yield Row("start", "CPU until then", used(f"/proc/{process.pid}/stat"), "s")
        viewer.close()
    finally:
        process.terminate()
        process.wait(20)


def latencies(url: str, count: int) -> Iterator[Row]:
    """Restarts and switches of one viewer."""
    viewer = Viewer(url)
    take = viewer.chunk().take
    restarts, switches = [], []
    for number in range(count):
        begun = time.monotonic()
        viewer.send("restart", seed=number)
        while viewer.chunk().take == take:
            pass
        restarts.append(1000 * (time.monotonic() - begun))
        take += 1
    for number in range(count):
        # Not in step with the chunks.
        time.sleep(0.01 * (number % 13))
        begun = time.monotonic()
        viewer.send("switch", prompt=f"A blue ball {number}", mode="recache")
        while viewer.chunk().prompt != f"A blue ball {number}":
            pass
        switches.append(1000 * (time.monotonic() - begun))
    viewer.close()
    for name, values in (("restart to first frame", restarts), ("switch to its chunk", switches)):
        yield Row("latency", name, statistics.median(values), "ms")
        yield Row("latency", f"{name}, worst of {count}", max(values), "ms")


def shares(url: str, viewers: int, seconds: float) -> Iterator[Row]:
    """Frames per second and CPU with so many viewers."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=watch, args=(url, viewers, seconds, theirs))
    process.start()
    ours.recv()
    before, begun = cpu_seconds(), time.monotonic()
    rates = ours.recv()
    took = time.monotonic() - begun
    after = cpu_seconds()
    process.join()
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    case = f"{viewers} viewer{'s' * (viewers > 1)}"
    yield Row(case, "fps, least of the viewers", min(rates), "1/s")
    server = spent["afd-live-encoder"] + spent["sockets"]
    yield Row(case, "server CPU", 100 * server / took, "%")
    yield Row(case, "generator CPU", 100 * spent["afd-live-device"] / took, "%")


def frame(height: int, width: int) -> np.ndarray:
    """A frame with detail of several sizes, uint8 [H, W, 3]."""
    random = np.random.default_rng(0)
    total = np.zeros((height, width, 3))
    for cells in (4, 16, 64):
        rows, columns = max(2, height // cells), max(2, width // cells)
        small = Image.fromarray(random.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
        total += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) / 3
    return total.astype(np.uint8)


def fragments() -> Callable[[np.ndarray], bytes]:
    """An encoder to H.264 in fragmented mp4, as Media Source Extensions take it."""
    held = io.BytesIO()
    options = {"movflags": "frag_every_frame+empty_moov+default_base_moof"}
    container = av.open(held, "w", format="mp4", options=options)
    stream: Any = None

    def encode(picture_HWC: np.ndarray) -> bytes:
        nonlocal stream
        if stream is None:
            stream = container.add_stream("libx264", rate=16)
            stream.height, stream.width = picture_HWC.shape[:2]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "20", "preset": "ultrafast", "tune": "zerolatency"}
            stream.codec_context.thread_count = 1
        begun = held.tell()
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")))
        return bytes(held.tell() - begun)

    return encode


def formats(count: int) -> Iterator[Row]:
    """CPU and bytes per frame of every format, on a picture that moves by two pixels a frame."""
    for height, width in ((16, 16), (480, 832)):
        makers: dict[str, Callable[[np.ndarray], bytes]] = {
            "JPEG": lambda one: encoded(one, "jpeg", 90),
            "WebP": lambda one: encoded(one, "webp", 90),
            "H.264 in fMP4": fragments(),
        }
        still = frame(height, width)
        moving = [np.ascontiguousarray(np.roll(still, 2 * i, 1)) for i in range(count)]
        for name, make in makers.items():
            make(moving[0])
            begun = time.thread_time()
            sizes = [len(make(one)) for one in moving[1:]]
            took = 1000 * (time.thread_time() - begun) / len(sizes)
            case = f"picture {height}x{width}"
            yield Row(case, f"{name}, CPU", took, "ms")
            yield Row(case, f"{name}, size", statistics.mean(sizes) / 1024, "KiB")


def measure(args: argparse.Namespace) -> Iterator[Row]:
    quick = args.quick
    yield from formats(4 if quick else 48)
    if not quick:
        yield from start()
    with serving(24, args.out or Path("runs") / "live") as url:
        yield from latencies(url, 3 if quick else 25)
        for viewers in (1,) if quick else (1, 4, 16):
            yield from shares(url, viewers, 1.0 if quick else 8.0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="of the laptop student")
    parser.add_argument("--quick", action="store_true", help="few repetitions (for CI)")
    parser.add_argument("--out", type=Path, help="folder of the JSON, by default the device's")
    args = parser.parse_args(argv)
    folder = args.out or (
        None if args.quick else report.ROOT / "benchmarks" / "results" / report.device_slug("cpu")
    )
    torch.set_num_threads(1)
    rows = list(measure(args))
    report.table(
        "live", ["case", "quantity"], ["value", "unit"],
        [[row.case, row.quantity, row.value, row.unit] for row in rows],
    )  # fmt: skip
    print(HOW)
    if (sentence := report.busy()) is not None:
        print(sentence)
    if folder is not None:
        print(f"wrote {report.save(folder, 'live', 'cpu', HOW, rows)}")


if __name__ == "__main__":
    main()
