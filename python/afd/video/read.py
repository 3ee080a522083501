"""Read video files: check whether a clip is usable, and decode it at a given size and rate.

Shapes: F frames, C = 3 (red, green, blue), H rows, W columns; values in [-1, 1].
"""

from __future__ import annotations

from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from afd.errors import VideoError
from afd.video.picture import Hdr, displayed_size, fitted, picture
from afd.video.source import DEFAULT_LIMITS, Limits, frame_rate, opened
from afd.video.timeline import chosen, decoded, from_packets

# Stored pixels (frames x rows x columns) up to which a check decodes the frames that will be read,
# even if packets would suffice: 81 frames of 480x832.
DECODED_PIXELS = 81 * 480 * 832


class Clip(NamedTuple):
    """A decoded clip: float32 [F, 3, H, W] in [-1, 1], and whether these are the decoder's own
    pixels (neither scaled nor cropped, deinterlaced or tone-mapped)."""

    video_FCHW: Tensor
    own_pixels: bool


def check_video(
    path: Path | str,
    *,
    frames: int = 1,
    fps: float | None = None,
    hdr: Hdr = "tonemap",
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Raise VideoError if `read_video` with these arguments could not read the file, or if the file
    is truncated and its container shows it (mp4, mov); a truncated mkv or ts is a shorter clip.

    The packets of the whole file are read. The requested frames are also decoded, unless the clip
    is large and its format lets the frames be determined from packets; then only the first frame is
    decoded, and damage within later frames is found when they are read.
    """
    path = Path(path)
    _check_arguments(frames, 1, 1, fps)
    with opened(path, limits=limits) as source:
        packets = from_packets(source)
    with opened(path, limits=limits) as source:
        clip = decoded(source)
        first = next(clip)
        picture(source, first, hdr)
        size = first.frame.width * first.frame.height
        if packets is not None and len(packets) * size > DECODED_PIXELS and not first.deinterlaced:
            there = sum(1 for _ in chosen(source, packets, frames, fps))
        else:
            there, converted = 0, _looks(first.frame)
            for shown in chosen(source, chain([first], clip), frames, fps):
                there += 1
                if _looks(shown.frame) != converted:
                    picture(source, shown, hdr)
                    converted = _looks(shown.frame)
    if there < frames:
        raise VideoError(_too_short(str(path), there, frames, fps))


def read_video(
    path: Path | str,
    *,
    frames: int,
    height: int,
    width: int,
    fps: float | None = None,
    short: Literal["error", "repeat"] = "error",
    hdr: Hdr = "tonemap",
    limits: Limits = DEFAULT_LIMITS,
) -> Tensor:
    """Decode a video file to float32 [F, 3, height, width] in [-1, 1].

    Time: frame k is the one shown nearest to k / fps seconds after the first; fps None takes the
    first F frames without resampling. A shorter clip is refused or its last frame repeated.
    Space: the picture as a player displays it (rotation, mirroring, pixel aspect ratio),
    centre-cropped to the target's aspect ratio, with an antialiased bilinear resize. Interlaced
    frames are deinterlaced. `hdr`: PQ and HLG clips are mapped to BT.709, or refused. `limits`:
    decoding limits. Raises VideoError if the file is unusable.
    """
    return read_clip(
        path,
        frames=frames,
        height=height,
        width=width,
        fps=fps,
        short=short,
        hdr=hdr,
        limits=limits,
    ).video_FCHW


def read_clip(
    source: Path | str | BytesIO,
    *,
    frames: int,
    height: int,
    width: int,
    fps: float | None = None,
    short: Literal["error", "repeat"] = "error",
    hdr: Hdr = "tonemap",
    limits: Limits = DEFAULT_LIMITS,
) -> Clip:
    """`read_video` for a path or bytes, also reporting whether the pixels are the decoder's own."""
    _check_arguments(frames, height, width, fps)
    file = source if isinstance(source, BytesIO) else Path(source)
    name = "a video in memory" if isinstance(source, BytesIO) else str(source)
    video_FCHW, there, own_pixels = torch.empty(frames, 3, height, width), 0, True
    with opened(file, name, limits) as held:
        # Only one decoded full-size frame is in memory at a time.
        for shown in chosen(held, decoded(held), frames, fps):
            video_FCHW[there], own = fitted(picture(held, shown, hdr), height, width)
            own_pixels = own_pixels and own
            there += 1
    if there < frames and short == "error":
        raise VideoError(_too_short(name, there, frames, fps))
    video_FCHW[there:] = video_FCHW[there - 1]
    return Clip(video_FCHW, own_pixels)


def frame_size(path: Path | str) -> tuple[int, int]:
    """Rows and columns of a file's first frame as a player displays it, in square pixels."""
    with opened(Path(path)) as source:
        return displayed_size(source, next(decoded(source)).frame)


def read_comment(path: Path | str) -> str | None:
    """Read the comment in a video file's metadata, or None."""
    with opened(Path(path)) as source:
        comment = cast("str | None", source.container.metadata.get("comment"))
    # Bytes that are not UTF-8 come as surrogates from PyAV 19 on, which no file takes.
    return comment and comment.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _check_arguments(frames: int, height: int, width: int, fps: float | None) -> None:
    if min(frames, height, width) < 1 or (fps is not None and not fps > 0):
        raise ValueError(
            f"frames, height, width, fps: got {frames}, {height}, {width}, {fps}; "
            "all must be positive"
        )
    if fps is not None:
        frame_rate(fps)


def _looks(frame: Any) -> tuple[Any, ...]:
    """The properties that determine how a frame is converted."""
    return frame.width, frame.height, frame.format.name, frame.color_trc, frame.colorspace


def _too_short(name: str, there: int, frames: int, fps: float | None) -> str:
    wanted = f"{frames} frames" + (f" at {fps:g} a second" if fps else "")
    return (
        f"{name}: is too short, it has {there} of the requested {wanted}; "
        "ask for fewer frames, a higher fps, or short=repeat"
    )
