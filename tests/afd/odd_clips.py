"""Clips of the kinds that cameras, phones and editors make, built from nothing."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

HEIGHT, WIDTH, RATE = 64, 96, 16


def grey_ramp(frames: int, height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    """Grey pictures that become brighter, so that a frame is known by its mean."""
    levels = np.linspace(20, 220, frames).astype(np.uint8)
    return [np.full((height, width, 3), level, np.uint8) for level in levels]


def corners() -> np.ndarray:
    """Red and green above blue and white."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    top, left = slice(0, HEIGHT // 2), slice(0, WIDTH // 2)
    bottom, right = slice(HEIGHT // 2, None), slice(WIDTH // 2, None)
    picture[top, left], picture[top, right] = (220, 20, 20), (20, 220, 20)
    picture[bottom, left], picture[bottom, right] = (20, 20, 220), 220
    return picture


def encode(
    path: Path,
    pictures: list[np.ndarray],
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: int = RATE,
    setup: Callable[[Any], None] = lambda stream: None,
    container: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """One picture a frame; `setup` may change the stream before it opens."""
    with av.open(str(path), "w", options=container or {}) as target:
        stream = target.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.options = pixels, options
        setup(stream)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = index, Fraction(1, rate)
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return path


def encode_levels(
    path: Path,
    levels: list[float],
    codec: str,
    pixels: str,
    matrix: int,
    full: int,
    transfer: int = 2,
    **options: str,
) -> Path:
    """Two frames of one colour, given as the planes' values, with the tags of H.273."""
    with av.open(str(path), "w") as target:
        stream = target.add_stream(codec, rate=RATE)
        stream.height, stream.width, stream.pix_fmt, stream.options = HEIGHT, WIDTH, pixels, options
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_trc = matrix, full, transfer
        for index in range(2):
            frame = av.VideoFrame(WIDTH, HEIGHT, pixels)
            kind = np.uint16 if "10" in pixels else np.uint8
            for plane, level in zip(frame.planes, levels, strict=True):
                count = plane.buffer_size // np.dtype(kind).itemsize
                plane.update(np.full(count, round(level), kind).tobytes())
            frame.colorspace, frame.color_range, frame.color_trc = matrix, full, transfer
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return path


def copy_packets(source: Path, path: Path, change: Callable[[int, Any], bool | None]) -> Path:
    """A copy without re-encoding. `change` edits packet k, or drops it by returning False."""
    with av.open(str(source)) as read, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(read.streams.video[0])
        packets = [packet for packet in read.demux(video=0) if packet.size]
        for index, packet in enumerate(packets):
            if change(index, packet) is not False:
                packet.stream = stream
                target.mux(packet)
    return path


def with_edits(source: Path, path: Path, edits: list[tuple[float, float | None]]) -> Path:
    """An mp4's edit list replaced: (seconds shown, first second of the media or None: nothing)."""
    data = bytearray(source.read_bytes())
    movie = struct.unpack(">I", data[data.index(b"mvhd") + 16 :][:4])[0]
    media = struct.unpack(">I", data[data.index(b"mdhd") + 16 :][:4])[0]
    entries = b"".join(
        struct.pack(">IiI", round(length * movie), -1 if at is None else round(at * media), 1 << 16)
        for length, at in edits
    )
    body = struct.pack(">II", 0, len(edits)) + entries
    box = struct.pack(">I", 16 + len(body)) + b"edts" + struct.pack(">I", 8 + len(body)) + b"elst"
    start = data.index(b"edts") - 4
    old = struct.unpack(">I", data[start : start + 4])[0]
    data[start : start + old] = box + body
    for name in (b"trak", b"moov"):
        at = data.index(name) - 4
        size = struct.unpack(">I", data[at : at + 4])[0] + len(box) + len(body) - old
        data[at : at + 4] = struct.pack(">I", size)
    path.write_bytes(data)
    return path


def with_matrix(source: Path, path: Path, a: float, b: float, c: float, d: float) -> Path:
    """An mp4's display matrix replaced."""
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 44

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    data[at : at + 36] = (
        fixed(a)
        + fixed(b)
        + bytes(4)
        + fixed(c)
        + fixed(d)
        + bytes(12)
        + struct.pack(">i", 1 << 30)
    )
    path.write_bytes(data)
    return path
