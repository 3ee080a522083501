"""Video files in and out: decode, resample in time, centre-crop, resize; encode.

Shapes: F frames, C = 3 (red, green, blue), H rows, W columns; values in [-1, 1].
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, cast

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afd_kernels.contracts import require

# Containers that hold their pictures themselves. FFmpeg also opens lists (m3u8, ffconcat), which
# would take a manifest's path out of its folder.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"  # single pictures: a stream may begin so
)


class VideoError(ValueError):
    """A video file cannot be used; the message names the file and says why."""


def check_video(path: Path | str, *, frames: int = 1, fps: float | None = None) -> None:
    """Refuse a file that is missing, no video, without frames, cut off, or shorter than needed.

    Every packet is read (cheap) but only the first frame is decoded. `frames` and `fps` as in
    `read_video`.
    """
    path = Path(path)
    with _opened(path) as (container, stream):
        if next(container.decode(stream), None) is None:
            raise VideoError(f"{path}: has a video stream without a single frame")
        container.seek(0, stream=stream)
        packets = [packet for packet in container.demux(stream) if packet.size]
        if len(packets) < stream.frames:
            raise VideoError(
                f"{path}: is cut off ({len(packets)} of {stream.frames} frames are there)"
            )
        if fps is None:
            there = len(packets)
        else:
            shown = [(p.pts, p.duration or 0) for p in packets if p.pts is not None]
            start = min((pts for pts, _ in shown), default=0)
            end = max((pts + duration for pts, duration in shown), default=0)
            there = math.ceil((end - start) * stream.time_base * _rate(fps))
        if there < frames:
            raise VideoError(_too_short(path, there, frames, fps))


def read_video(
    path: Path | str,
    *,
    frames: int,
    height: int,
    width: int,
    fps: float | None = None,
    short: Literal["error", "repeat"] = "error",
) -> Tensor:
    """Decode to float32 [F, 3, height, width] in [-1, 1].

    Time: frame k is the one shown nearest to k / fps seconds after the first; fps None takes the
    first F frames as they come. A clip that ends before is refused or its last frame repeated.
    Space: the largest centred part with the target's shape (after the container's rotation and
    pixel aspect), then an antialiased bilinear resize.
    """
    path = Path(path)
    if min(frames, height, width) < 1 or (fps is not None and not fps > 0):
        raise ValueError(
            f"frames, height, width, fps: got {frames}, {height}, {width}, {fps}; "
            "all must be positive"
        )
    return _decode(path, str(path), frames, height, width, fps, short)


def _decode(
    source: Path | BytesIO,
    name: str,
    frames: int,
    height: int,
    width: int,
    fps: float | None,
    short: Literal["error", "repeat"],
) -> Tensor:
    """`read_video` of a file or of bytes; `name` is for messages."""
    video_FCHW, there = torch.empty(frames, 3, height, width), 0
    with _opened(source, name) as (container, stream):
        aspect = float(stream.sample_aspect_ratio or 1)
        # One decoded full-size frame in memory at a time.
        for frame in _frames(name, container, stream, frames, fps):
            video_FCHW[there] = _fit(*_upright(frame, aspect), height, width)
            there += 1
    if there < frames and short == "error":
        raise VideoError(_too_short(name, there, frames, fps))
    video_FCHW[there:] = video_FCHW[there - 1]
    return video_FCHW


def frame_size(path: Path | str) -> tuple[int, int]:
    """Rows and columns of a file's frames as they are stored."""
    with _opened(Path(path)) as (_, stream):
        return stream.codec_context.height, stream.codec_context.width


def write_video(path: Path | str, video_FCHW: Tensor, *, fps: float, crf: int = 18) -> None:
    """Encode float [F, 3, H, W] in [-1, 1] (H and W even) as h264 yuv420p mp4.

    The file appears under its name only when it is whole. The same input gives the same bytes.
    """
    path = Path(path)
    _check_encodable(video_FCHW)
    partial = path.with_name(path.name + ".partial")
    _encode(str(partial), video_FCHW, fps, crf)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def through_codec(video_BFCHW: Tensor, *, fps: float | None = None, crf: int = 18) -> Tensor:
    """What is read back of each video once `write_video` has written it: [B, F, 3, H, W] again.

    No file is written. float32 on the video's device; a gradient passes through as if nothing had
    happened. fps None: 16, for the encoder takes quantisers from it.
    """
    require(
        video_BFCHW.ndim == 5, "video_BFCHW", video_BFCHW, "[B, F, 3, even H, even W] in [-1, 1]"
    )
    rate = 16.0 if fps is None else fps

    def one(video_FCHW: Tensor) -> Tensor:
        _check_encodable(video_FCHW)
        frames, _, height, width = video_FCHW.shape
        held = BytesIO()
        _encode(held, video_FCHW, rate, crf)
        held.seek(0)
        return _decode(held, "a video in memory", frames, height, width, None, "error")

    # The encoder has one thread a video, so that its bytes are the same everywhere.
    workers = max(1, min(len(video_BFCHW), os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        seen = list(pool.map(one, video_BFCHW.detach().cpu().unbind()))
    seen_BFCHW = torch.stack(seen).to(video_BFCHW.device)
    if video_BFCHW.requires_grad:
        return seen_BFCHW + (video_BFCHW - video_BFCHW.detach()).float()
    return seen_BFCHW


def _check_encodable(video_FCHW: Tensor) -> None:
    shape = tuple(video_FCHW.shape)
    if len(shape) != 4 or shape[0] < 1 or shape[1] != 3 or shape[2] % 2 or shape[3] % 2:
        raise ValueError(f"video_FCHW: got shape {shape}, needs [F >= 1, 3, even H, even W]")


def _encode(target: Any, video_FCHW: Tensor, fps: float, crf: int) -> None:
    """An h264 yuv420p mp4 to a path or a binary file."""
    with av.open(target, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=_rate(fps))
        stream.height, stream.width = video_FCHW.shape[2:]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": str(crf)}
        # More threads would make the bytes depend on the machine.
        stream.codec_context.thread_count = 1
        for picture_CHW in video_FCHW:
            frame = av.VideoFrame.from_ndarray(to_uint8(picture_CHW).numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


class VideoWriter:
    """An mp4 that is written while its frames are still being made.

    Frames go to <path>.partial, which any player can show at any time; `close` makes it an ordinary
    mp4 under its own name. As a context manager an error leaves no file.
    """

    def __init__(
        self, path: Path | str, *, fps: float, crf: int = 18, comment: str | None = None
    ) -> None:
        """`comment` is kept in the file; `read_comment` reads it."""
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._rate, self._crf, self._comment = _rate(fps), crf, comment
        # Each frame is a fragment that is on disk when the frame is encoded.
        options = {
            "movflags": "frag_every_frame+empty_moov+default_base_moof",
            "flush_packets": "1",
        }
        self._container: Any = av.open(str(self.partial), "w", format="mp4", options=options)
        self._stream: Any = None
        self.frames = 0

    def append(self, video_FHWC: Tensor) -> None:
        """Encode uint8 [F, H, W, 3] (H and W even, the same in every call) as h264 yuv420p."""
        shape = tuple(video_FHWC.shape)
        even = len(shape) == 4 and shape[3] == 3 and shape[1] % 2 == shape[2] % 2 == 0
        require(
            even and video_FHWC.dtype == torch.uint8,
            "video_FHWC",
            video_FHWC,
            "uint8 [F, even H, even W, 3]",
        )
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._rate)
            self._stream.height, self._stream.width = shape[1], shape[2]
            self._stream.pix_fmt = "yuv420p"
            # No frame waits for later ones. A fixed count of threads gives the same bytes anywhere.
            self._stream.options = {"crf": str(self._crf), "tune": "zerolatency"}
            self._stream.codec_context.thread_count = 4
        for picture in video_FHWC.numpy():
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            self._container.mux(self._stream.encode(frame))
        self.frames += shape[0]

    def close(self) -> None:
        """Finish the file; it appears under its name whole, or nothing is left."""
        try:
            self._finish()
        except BaseException:  # a full disk, for instance
            self.abort()
            raise

    def _finish(self) -> None:
        require(self.frames > 0, "frames", self.frames, "at least one frame before close")
        self._container.mux(self._stream.encode(None))
        self._container.close()
        whole = self.path.with_name(self.path.name + ".whole")
        with (
            av.open(str(self.partial), format="mp4") as source,
            av.open(str(whole), "w", format="mp4", options={"movflags": "faststart"}) as target,
        ):
            if self._comment is not None:
                target.metadata["comment"] = self._comment
            copied: Any = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = copied
                    target.mux(packet)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.replace(self.path)
        self.partial.unlink()

    def abort(self) -> None:
        """Leave nothing behind."""
        try:
            self._container.close()
        finally:
            for suffix in (".partial", ".whole"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


def read_comment(path: Path | str) -> str | None:
    """The comment in a video file, or None."""
    with _opened(Path(path)) as (container, _):
        return cast("str | None", container.metadata.get("comment"))


def _too_short(path: Path | str, there: int, frames: int, fps: float | None) -> str:
    wanted = f"{frames} frames" + (f" at {fps:g} a second" if fps else "")
    return (
        f"{path}: is too short, it gives {there} of the {wanted} wanted; "
        "ask for fewer frames, a higher fps, or short=repeat"
    )


def to_uint8(video_FCHW: Tensor) -> Tensor:
    """[..., 3, H, W] in [-1, 1] to uint8 [..., H, W, 3], rounded, values outside clipped."""
    levels = (video_FCHW.detach().cpu().float() + 1) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()


def from_uint8(video_FHWC: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] to float32 [..., 3, H, W] in [-1, 1]."""
    return (video_FHWC.movedim(-1, -3).float() / 127.5 - 1).contiguous()


class _opened:
    """The container and its first video stream; every failure inside becomes a VideoError."""

    def __init__(self, source: Path | BytesIO, name: str | None = None) -> None:
        self.source, self.name = source, name or str(source)

    def __enter__(self) -> tuple[Any, Any]:
        if isinstance(self.source, Path) and not self.source.is_file():
            raise VideoError(f"{self.name}: no such file")
        source: Any = self.source
        if isinstance(source, Path):
            # Absolute, as a name such as "concat:a.mp4" would be a protocol.
            source = str(source.absolute())
        try:
            self.container = av.open(source, options={"format_whitelist": CONTAINERS})
        except av.ArgumentError:
            raise VideoError(f"{self.name}: is none of the containers {CONTAINERS}") from None
        except av.FFmpegError as error:
            raise VideoError(f"{self.name}: cannot be read as a video ({error.strerror})") from None
        if not self.container.streams.video:
            self.container.close()
            raise VideoError(f"{self.name}: has no video stream")
        stream = self.container.streams.video[0]
        # Starting threads costs more than decoding a small picture.
        if stream.codec_context.width * stream.codec_context.height >= 256 * 256:
            stream.thread_type = "AUTO"
        return self.container, stream

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.container.close()
        if isinstance(error, av.FFmpegError):
            raise VideoError(f"{self.name}: cannot be decoded ({error.strerror})") from None


def _frames(
    path: str, container: Any, stream: Any, frames: int, fps: float | None
) -> Iterator[Any]:
    """The chosen frames in order, at most `frames` of them."""
    taken = 0
    before: tuple[Fraction, Any] | None = None
    start = Fraction(0)
    # Exact times: a wanted time half-way between two frames must not depend on rounding.
    step = 1 / _rate(fps) if fps is not None else Fraction(0)
    for index, frame in enumerate(container.decode(stream)):
        if fps is None:
            yield frame
            taken += 1
        else:
            if frame.pts is None:
                raise VideoError(f"{path}: frame {index} has no presentation time")
            seconds = frame.pts * frame.time_base
            start = seconds if before is None else start
            now = seconds - start
            # An earlier frame may still be nearer to the wanted time than this one.
            while before is not None and taken < frames and taken * step <= now:
                wanted = taken * step
                yield before[1] if wanted - before[0] <= now - wanted else frame
                taken += 1
            before = (now, frame)
        if taken == frames:
            return
    if before is not None:
        # The last frame stays on screen for its own duration (else for one of the average rate).
        length = (before[1].duration or 0) * before[1].time_base
        length = length or 1 / (stream.average_rate or stream.guessed_rate or 1 / step)
        while taken < frames and taken * step < before[0] + length:
            yield before[1]
            taken += 1
    if taken == 0:
        raise VideoError(f"{path}: has a video stream without a single frame")


def _rate(fps: float) -> Fraction:
    """Frames per second as the fraction that was meant, such as 30000/1001."""
    return Fraction(fps).limit_denominator(65535)


def _upright(frame: Any, aspect: float) -> tuple[Tensor, float]:
    """A decoded frame as float32 [3, H, W] in [-1, 1], turned as the container asks, and the
    width of its pixels over their height."""
    pixels = frame.to_ndarray(format="rgb24")
    quarter_turns = round(frame.rotation / 90) % 4
    upright = np.ascontiguousarray(np.rot90(pixels, quarter_turns))
    return from_uint8(torch.from_numpy(upright)), 1 / aspect if quarter_turns % 2 else aspect


def _fit(picture_CHW: Tensor, aspect: float, height: int, width: int) -> Tensor:
    """Centre-crop to the target's shape (pixels are `aspect` times as wide as high) and resize."""
    rows, columns = picture_CHW.shape[1:]
    keep_rows = min(rows, max(1, round(columns * aspect * height / width)))
    keep_columns = min(columns, max(1, round(rows * width / height / aspect)))
    top, left = (rows - keep_rows) // 2, (columns - keep_columns) // 2
    crop = picture_CHW[:, top : top + keep_rows, left : left + keep_columns]
    if crop.shape[1:] == (height, width):
        return crop.contiguous()
    resized = interpolate(
        crop[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return resized[0].clamp(-1, 1)
