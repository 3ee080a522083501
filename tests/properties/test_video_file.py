"""Any bytes under a video's name: read, or refused with VideoError, in agreement with the check."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from afd.errors import VideoError
from afd.video import Limits, check_video, frame_size, read_comment, read_video
from tests.afd.odd_clips import encode, grey_ramp

LIMITS = Limits(pixels=2**20, frames=200, seconds=600.0)
ABSURD = [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"]
KINDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "a.mp4": ("libx264", "yuv420p", {"bf": "2", "g": "6"}),
    "a.mkv": ("libx264", "yuv420p", {"bf": "2"}),
    "a.ts": ("libx264", "yuv420p", {"g": "6"}),
    "a.avi": ("mpeg4", "yuv420p", {"bf": "2"}),
    "a.webm": ("libvpx-vp9", "yuv420p", {}),
    "a.flv": ("flv", "yuv420p", {}),
    "a.gif": ("gif", "rgb8", {}),
    "a.mov": ("mjpeg", "yuvj420p", {}),
    "a.png": ("png", "rgb24", {}),
}


@functools.cache
def valid(name: str) -> bytes:
    codec, pixels, options = KINDS[name]
    frames = 1 if name == "a.png" else 12
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        return encode(path, grey_ramp(frames, 32, 48), codec, pixels, **options).read_bytes()


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """A valid file with bytes changed, cut out, repeated or moved, or two files in one."""
    name = draw(st.sampled_from(sorted(KINDS)))
    data = bytearray(valid(name))
    # Most faults are in the headers.
    place = st.integers(0, len(data) - 1) | st.integers(0, min(len(data) - 1, 1200))
    for _ in range(draw(st.integers(0, 6))):
        at, length = draw(place), draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["bits", "bytes", "big", "cut", "repeat", "end", "join"]))
        if kind == "bits" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "big":
            data[at : at + 4] = draw(
                st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f" + b"\xff" * 3])
            )
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length]
        elif kind == "end":
            del data[max(at, 1) :]
        else:
            data += valid(draw(st.sampled_from(sorted(KINDS))))
        if not data:
            break
    return name, bytes(data)


def error_of(use: Callable[..., object], *values: object, **named: object) -> VideoError | None:
    try:
        use(*values, **named)
    except VideoError as error:
        return error
    return None


@given(
    file=mutated(),
    frames=st.integers(1, 14),
    fps=st.sampled_from([None, 16.0, 5.0, 30000 / 1001]),
)
def test_a_file_is_read_or_refused(file: tuple[str, bytes], frames: int, fps: float | None) -> None:
    name, data = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        reading = {"frames": frames, "fps": fps, "limits": LIMITS}
        refusal = error_of(check_video, path, **reading)
        assert refusal is None or str(refusal).startswith(f"{path}: ")

        def read() -> None:
            video = read_video(path, height=16, width=24, **reading)
            assert video.shape == (frames, 3, 16, 24)
            assert torch.isfinite(video).all()
            assert video.abs().max() <= 1

        for use in (read, lambda: frame_size(path), lambda: read_comment(path)):
            error = error_of(use)
            assert error is None or refusal is not None, f"accepted, then {error}"
