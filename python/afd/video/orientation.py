"""How a stored picture is turned and mirrored to be shown."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# Formats whose size and orientation Pillow reads.
STILLS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
# The EXIF tag, and what its values 1 to 8 mean.
_EXIF_TAG = 0x0112


class Orientation(NamedTuple):
    """Swap rows and columns (or not), then reverse the order of rows and of columns (or not)."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, picture_HWC: np.ndarray) -> np.ndarray:
        """The picture as it is to be shown: a view."""
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
    """What a decoded frame's display matrix asks for; None where that is no quarter turn.

    The matrix [[a, b, u], [c, d, v], [x, y, w]] shows the stored point (p, q) at
    (a p + c q + x, b p + d q + y).
    """
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # Beside side data that this PyAV has no name for (EXIF in a video's pictures), it gives
        # the angle alone.
        turns = round(frame.rotation / 90) % 4
        return (UPRIGHT, _EXIF[8], _EXIF[3], _EXIF[6])[turns]
    if data is None:
        return UPRIGHT
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])
    if a * d - b * c == 0:
        return UPRIGHT  # as players take a matrix of zeros
    straight, turned = min(abs(a), abs(d)), min(abs(b), abs(c))
    # A quarter turn within half a degree.
    if straight > 100 * max(abs(b), abs(c)):
        return Orientation(False, d < 0, a < 0)
    if turned > 100 * max(abs(a), abs(d)):
        return Orientation(True, b < 0, c < 0)
    return None


def read_still(path: Path) -> tuple[tuple[int, int], Orientation] | None:
    """Width and height of a picture file and what its EXIF asks for, from its header alone.

    None for a file that Pillow does not know; DecompressionBombError where it is absurdly large.
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
    # Of a PNG, Pillow would otherwise decode the pixels to look for it behind them.
    if still.format == "PNG" and "exif" not in still.info:
        return None
    return still.getexif().get(_EXIF_TAG)
