"""Orientation of pictures: how a stored picture is rotated and mirrored for display."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# Formats whose size and orientation Pillow reads.
STILLS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
# The EXIF orientation tag; _EXIF below gives the meaning of its values 1 to 8.
_EXIF_TAG = 0x0112


class Orientation(NamedTuple):
    """An optional transposition, followed by optional flips of the rows and columns."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, picture_HWC: np.ndarray) -> np.ndarray:
        """The picture as displayed (a view)."""
        if self.transpose:
            picture_HWC = picture_HWC.swapaxes(0, 1)
        rows = slice(None, None, -1 if self.flip_rows else 1)
        columns = slice(None, None, -1 if self.flip_columns else 1)
        return picture_HWC[rows, columns]


UPRIGHT = Orientation()
_EXIF = {
    1: UPRIGHT,
    2: Orientation(False, False, True),
    3: Orientation(False, True, True),
    4: Orientation(False, True, False),
    5: Orientation(True, False, False),
    6: Orientation(True, False, True),
    7: Orientation(True, True, True),
    8: Orientation(True, True, False),
}


def frame_orientation(frame: Any) -> Orientation | None:
    """The orientation given by a decoded frame's display matrix; None if it is not a multiple of a
    quarter turn.

    The matrix [[a, b, u], [c, d, v], [x, y, w]] maps the stored point (p, q) to
    (a p + c q + x, b p + d q + y).
    """
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # If there is also side data unknown to this PyAV (EXIF in a video's pictures), it gives
        # only the angle.
        turns = round(frame.rotation / 90) % 4
        return (UPRIGHT, _EXIF[8], _EXIF[3], _EXIF[6])[turns]
    if data is None:
        return UPRIGHT
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])
    if a * d - b * c == 0:
        return UPRIGHT  # as players treat an all-zero matrix
    straight, turned = min(abs(a), abs(d)), min(abs(b), abs(c))
    # A multiple of a quarter turn, to within half a degree.
    if straight > 100 * max(abs(b), abs(c)):
        return Orientation(False, d < 0, a < 0)
    if turned > 100 * max(abs(a), abs(d)):
        return Orientation(True, b < 0, c < 0)
    return None


def read_still(path: Path) -> tuple[tuple[int, int], Orientation] | None:
    """Read the width, height and EXIF orientation of a picture file from its header alone.

    Returns None for a file that Pillow cannot read. Raises DecompressionBombError if the picture
    is excessively large.
    """
    try:
        with Image.open(path, formats=STILLS) as still:
            size = still.size
            value = None if still.format in ("GIF", "BMP") else _exif_value(still)
    except Image.DecompressionBombError:
        raise
    except Exception:  # whatever Pillow finds wrong, FFmpeg may still read the pixels
        return None
    return size, _EXIF.get(value, UPRIGHT) if isinstance(value, int) else UPRIGHT


def _exif_value(still: Any) -> Any:
    # For a PNG, Pillow would otherwise decode the pixels to search for EXIF data after them.
    if still.format == "PNG" and "exif" not in still.info:
        return None
    return still.getexif().get(_EXIF_TAG)
