"""Side-by-side videos of teacher and student, captioned with the discriminator's scores.

Shape letters: F frames, H x W pixels.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font

from afd.methods.base import Shown
from afd.video import from_uint8, write_video

# Small videos are enlarged to this height, so that they and their captions are legible.
HEIGHT = 192
TEXT, GAP = 14, 8
INK, PAPER = 235, 24


def side_by_side(
    teacher_FHWC: np.ndarray | None, student_FHWC: np.ndarray, shown: Shown, step: int
) -> np.ndarray:
    """Teacher | student, uint8 [F, H, W, 3] (H and W even), with a caption above each and the
    prompt below; the shorter video is extended by its last frame. Without a teacher's video
    (None) the student's is alone."""
    panels = [
        (student_FHWC, f"student, update {step}{_told('score', shown.score)}{_told('r', shown.r)}")
    ]
    if teacher_FHWC is not None:
        panels.insert(0, (teacher_FHWC, "teacher" + _told("score", shown.teacher_score)))
    frames = max(len(video_FHWC) for video_FHWC, _ in panels)
    tops: list[np.ndarray] = []
    middles: list[np.ndarray] = []
    for video_FHWC, caption in panels:
        grown = _grown(_as_long(video_FHWC, frames))
        strip = _strip(grown.shape[2], [caption])
        if tops:
            tops.append(_blank(len(strip), GAP))
            middles.append(np.full((frames, grown.shape[1], GAP, 3), PAPER, np.uint8))
        tops.append(strip)
        middles.append(grown)
    top, middle = np.concatenate(tops, axis=1), np.concatenate(middles, axis=2)
    letters = max(8, top.shape[1] // (TEXT // 2))
    bottom = _strip(top.shape[1], textwrap.wrap(shown.prompt, letters)[:2])
    parts = [np.broadcast_to(part, (frames, *part.shape)) for part in (top, bottom)]
    whole = np.concatenate([parts[0], middle, parts[1]], axis=1)
    odd = [(0, whole.shape[1] % 2), (0, whole.shape[2] % 2)]
    return np.pad(whole, [(0, 0), *odd, (0, 0)], mode="edge")


def write_side_by_side(
    folder: Path,
    teacher_FHWC: np.ndarray | None,
    student_FHWC: np.ndarray,
    shown: Shown,
    step: int,
    fps: float,
) -> tuple[Path, np.ndarray]:
    """Write `folder`/update_000025.mp4; returns its path and pictures."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"update_{step:06d}.mp4"
    video_FHWC = side_by_side(teacher_FHWC, student_FHWC, shown, step)
    write_video(path, from_uint8(torch.from_numpy(video_FHWC)), fps=fps)
    return path, video_FHWC


def _told(name: str, value: float | None) -> str:
    return "" if value is None else f"   {name} {value:.2f}"


def _as_long(video_FHWC: np.ndarray, frames: int) -> np.ndarray:
    index = np.minimum(np.arange(frames), len(video_FHWC) - 1)
    return video_FHWC[index]


def _grown(video_FHWC: np.ndarray) -> np.ndarray:
    factor = max(1, HEIGHT // video_FHWC.shape[1])
    return video_FHWC.repeat(factor, 1).repeat(factor, 2)


def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), PAPER, np.uint8)


def _strip(width: int, lines: list[str]) -> np.ndarray:
    """Lines of text on a dark background, uint8 [H, W, 3]; overflow is cut off."""
    rows = []
    for line in lines:
        row, letters = _blank(TEXT + 8, width), _drawn(line)
        letters = letters[: len(row) - 4, : width - 8]
        part = letters[..., None] / 255.0
        where = row[4 : 4 + len(letters), 4 : 4 + letters.shape[1]]
        where[:] = np.round(where + part * (INK - PAPER)).astype(np.uint8)
        rows.append(row)
    return np.concatenate(rows) if rows else _blank(0, width)


def _drawn(line: str) -> np.ndarray:
    """Render a line as greyscale [H, W] in matplotlib's bundled font."""
    font = FT2Font(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"))
    font.set_size(TEXT - 3, 72)
    font.set_text(line)
    font.draw_glyphs_to_bitmap(antialiased=True)
    return np.asarray(font.get_image())
