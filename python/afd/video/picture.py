"""Conversion of a decoded frame to the RGB picture that a player would display.

Colours follow the frame's tags (matrix, range, transfer). Untagged frames are taken as BT.601, in
limited range except for formats and still pictures that are full range by definition. That is what
FFmpeg, and so most software that writes untagged clips, does at every size.
"""

from __future__ import annotations

import threading
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afd.errors import VideoError
from afd.video.levels import from_uint8
from afd.video.orientation import frame_orientation
from afd.video.source import Source
from afd.video.timeline import Shown

Hdr = Literal["tonemap", "refuse"]

# Code points of ISO/IEC 23091-2 (H.273), which FFmpeg's enumerations use.
_UNTAGGED = {2, 3}
_BT601, _BT2020 = 6, 9
_MATRICES = {1, 4, 5, 6, 7, 9}  # BT.709, FCC, BT.601 twice, SMPTE 240M, BT.2020
_LIMITED, _FULL = 1, 2
_HDR = {16: "PQ", 18: "HLG"}
# Number of cached filters for HDR frames: one per size and format of clip.
_MAPPERS = 8
_TO_BT709 = "out_primaries=bt709:out_transfer=bt709:intent=relative_colorimetric"
_TIME_BASE = Fraction(1, 1000)


class Picture(NamedTuple):
    """An upright picture, uint8 [H, W, 3]; its pixel aspect ratio (width over height); whether the
    pixel values are the decoder's own, at most rearranged."""

    pixels_HWC: np.ndarray
    aspect: float
    own: bool


def picture(source: Source, shown: Shown, hdr: Hdr) -> Picture:
    """Convert a frame to upright, standard-dynamic-range RGB. Raises VideoError if impossible."""
    frame = shown.frame
    orientation = source.orientation or frame_orientation(frame)
    if orientation is None:
        raise VideoError(
            f"{source.name}: its display rotation is not a multiple of 90 degrees; re-encode it "
            "upright"
        )
    name = _HDR.get(frame.color_trc)
    if name is not None and hdr == "refuse":
        raise VideoError(
            f"{source.name}: is an HDR clip ({name}); convert it to BT.709, or let it be converted "
            "here with video.hdr=tonemap"
        )
    own = name is None and not shown.deinterlaced
    _tag(source, frame)
    if name is None:
        # Transfer and primaries must not be converted, which some versions of PyAV do by default.
        frame.color_trc = frame.color_primaries = 2
        pixels_HWC = frame.to_ndarray(format="rgb24", threads=1)
    else:
        pixels_HWC = _tone_mapped(frame)
    aspect = 1 / source.aspect if orientation.transpose else source.aspect
    return Picture(orientation.apply(pixels_HWC), aspect, own)


def _tag(source: Source, frame: Any) -> None:
    """Set the frame's matrix and range explicitly, so that no converter has to guess them."""
    if frame.format.is_rgb or "pal8" in frame.format.name:
        return
    full = frame.format.name.startswith("yuvj") or source.orientation is not None
    if frame.color_range not in (_LIMITED, _FULL):
        frame.color_range = _FULL if full else _LIMITED
    if len(frame.format.components) < 3:
        return  # greyscale has no matrix
    if frame.colorspace in _UNTAGGED:
        hdr = frame.color_trc in _HDR
        frame.colorspace = _BT2020 if hdr else _BT601
    if frame.colorspace not in _MATRICES:
        raise VideoError(
            f"{source.name}: has the colour matrix {frame.colorspace} (of ISO/IEC 23091-2), which "
            "cannot be converted; re-encode it in BT.709"
        )


def _tone_mapped(frame: Any) -> np.ndarray:
    """Map PQ or HLG to BT.709 by FFmpeg's scale filter; reference white (203 cd/m2) maps to
    white."""
    if frame.color_primaries in _UNTAGGED:
        frame.color_primaries = _BT2020
    tags = frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc
    return _mapper(frame.width, frame.height, frame.format.name, tags)(frame)


class _Mapper:
    """FFmpeg's scale filter for HDR frames of one format, shared by threads under a lock. Building
    its colour table takes seconds; after that a frame is cheap."""

    def __init__(self, width: int, height: int, pixels: str) -> None:
        self._lock = threading.Lock()
        graph = av.filter.Graph()
        nodes = [
            graph.add_buffer(
                width=width,
                height=height,
                format=av.VideoFormat(pixels),
                time_base=_TIME_BASE,
            ),
            graph.add("scale", _TO_BT709),
            graph.add("format", "pix_fmts=rgb24"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*nodes).configure()
        self._graph = graph

    def __call__(self, frame: Any) -> np.ndarray:
        """Convert a frame to uint8 [H, W, 3]."""
        with self._lock:
            self._graph.push(frame)
            return self._graph.pull().to_ndarray()


@lru_cache(_MAPPERS)
def _mapper(width: int, height: int, pixels: str, tags: tuple[int, ...]) -> _Mapper:
    """The cached filter for frames with these `tags`; its first frame builds the table."""
    return _Mapper(width, height, pixels)


def displayed_size(source: Source, frame: Any) -> tuple[int, int]:
    """Rows and columns of a frame as displayed with square pixels."""
    rows, columns = frame.height, max(1, round(frame.width * source.aspect))
    orientation = source.orientation or frame_orientation(frame)
    return (columns, rows) if orientation and orientation.transpose else (rows, columns)


def fitted(upright: Picture, height: int, width: int) -> tuple[Tensor, bool]:
    """Centre-crop to the target's aspect ratio and resize to float32 [3, height, width] in
    [-1, 1]; also returns whether these are the decoder's own pixels, uncropped."""
    rows, columns = upright.pixels_HWC.shape[:2]
    keep_rows = min(rows, max(1, round(columns * upright.aspect * height / width)))
    keep_columns = min(columns, max(1, round(rows * width / height / upright.aspect)))
    top, left = (rows - keep_rows) // 2, (columns - keep_columns) // 2
    crop = upright.pixels_HWC[top : top + keep_rows, left : left + keep_columns]
    crop_CHW = from_uint8(torch.from_numpy(np.ascontiguousarray(crop)))
    if crop_CHW.shape[1:] == (height, width):
        return crop_CHW, upright.own and (rows, columns) == (height, width)
    resized = interpolate(
        crop_CHW[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return resized[0].clamp(-1, 1), False
