"""Checks of single clips and of a set, without a network.

Every check is a function of clips that returns a number, larger for a clip that is less to be
trusted, with a limit in `CHECKS` above which the clip is reported. Shape letters: N clips, F
frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import median

import numpy as np

from afd.audit.clip import Clip

# A pixel that changes by less is still: two of 255 levels, which encoders change.
STILL = 2.5 / 255
# A frame darker than this with less contrast than this is black.
DARK, FLAT = 0.06, 0.03
# Times of a clip at which its hash and its distance to others are taken.
MOMENTS = 4
# Bits of two hashes that may differ for the pictures to be compared, as a share.
NEAR = 0.15


@dataclass(frozen=True)
class Check:
    """A check: its limit, the width of the doubt around it, and a sentence about a clip."""

    limit: float
    width: float
    sentence: str


CHECKS = {
    "unreadable": Check(0.5, 0.02, "cannot be read"),
    "short": Check(0.1, 0.05, "is shorter than the others or than what is needed, by {:.0%}"),
    "frozen": Check(0.8, 0.03, "stands still in {:.0%} of its frames"),
    "black": Check(0.3, 0.05, "is black or of one colour in {:.0%} of its frames"),
    "cut": Check(1.0, 0.25, "has a scene cut, {:.1f} times the size at which one is reported"),
    "letterbox": Check(0.04, 0.01, "has bars over {:.0%} of a side at each of two opposite edges"),
    "duplicate": Check(-0.004, 0.0015, "is the same as another clip to within {:.3f} of the scale"),
    "overlay": Check(5.5, 1.0, "shares a still mark of {:.0f} of 1024 cells with another clip"),
}


def short(clips: Sequence[Clip], needed_s: float | None = None) -> list[float]:
    """The missing share of `needed_s` seconds; None: of the set's median length."""
    usual = median([clip.seconds for clip in clips if clip.problem is None] or [0.0])
    needed = usual if needed_s is None else needed_s
    return [1 - clip.seconds / needed if needed and not clip.problem else 0.0 for clip in clips]


def frozen(clip: Clip) -> float:
    """The share of steps, each an eighth of the clip, in which nothing moves; of one frame 1."""
    frames = clip.frames_FHWC
    if clip.problem is not None:
        return 0.0
    if len(frames) < 2:
        return 1.0
    # Between neighbours a slow clip would stand still, too.
    lag = max(1, len(frames) // 8)
    change_FP = np.abs(frames[lag:] - frames[:-lag]).max(-1).reshape(len(frames) - lag, -1)
    # A small object may move: one pixel in 200 is enough.
    return float((np.quantile(change_FP, 0.995, axis=1) < STILL).mean())


def black(clip: Clip) -> float:
    """The share of frames that are black, or a single colour."""
    if clip.problem is not None:
        return 0.0
    grey = clip.frames_FHWC.mean(-1)
    level, contrast = grey.mean((1, 2)), clip.frames_FHWC.std((1, 2)).max(-1)
    return float((((level < DARK) & (contrast < FLAT)) | (contrast < FLAT / 6)).mean())


def cut(clip: Clip) -> float:
    """The largest change between frames over the change that counts as a cut: 0.1 of the scale,
    and five times the clip's own usual change."""
    frames = clip.frames_FHWC
    if clip.problem is not None or len(frames) < 3:
        return 0.0
    change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    return float(change.max() / max(0.1, 5 * float(np.median(change))))


def letterbox(clip: Clip) -> float:
    """The smaller share of the picture that black bars cover at two opposite edges."""
    if clip.problem is not None or black(clip) > 0.9:
        return 0.0
    # Only rows that are black in every frame count, beside others that are not.
    brightest = clip.frames_FHWC.max((0, 3))
    bars = []
    for axis in (1, 0):
        dark = brightest.max(axis) < 2 * DARK
        first, last = _run(dark), _run(dark[::-1])
        bars.append(min(first, last) / len(dark) if first + last < len(dark) else 0.0)
    return float(max(bars))


def _run(dark: np.ndarray) -> int:
    """Length of the run of True at the beginning."""
    return int(len(dark) if dark.all() else np.argmin(dark))


# --- against the other clips of a set ---


def perceptual_hash(clip: Clip) -> np.ndarray:
    """Bits that say where the picture brightens to the right and downwards, at MOMENTS times."""
    grey = _boxes(_moments(clip).mean(-1), 9, 9)
    # Noise on a flat background must not decide a bit.
    right, down = np.diff(grey[:, :8], axis=2) > 0.01, np.diff(grey[:, :, :8], axis=1) > 0.01
    return np.concatenate([right.ravel(), down.ravel()])


def duplicate(clips: Sequence[Clip]) -> tuple[list[float], list[int | None]]:
    """Minus the distance (RMS over the scale) to the nearest clip, and that clip; of clips whose
    hashes are not near the distance is 1."""
    usable = [i for i, clip in enumerate(clips) if clip.problem is None]
    scores = [-1.0] * len(clips)
    nearest: list[int | None] = [None] * len(clips)
    if len(usable) < 2:
        return scores, nearest
    hash_NB = np.stack([perceptual_hash(clips[i]) for i in usable]).astype(np.float32)
    differ = hash_NB @ (1 - hash_NB).T
    near = (differ + differ.T) / hash_NB.shape[1] <= NEAR
    view = [_boxes(np.moveaxis(_moments(clips[i]), 3, 1), 16, 16) for i in usable]
    for a, i in enumerate(usable):
        for b in np.flatnonzero(near[a]):
            j = usable[b]
            if j != i:
                distance = float(np.sqrt(np.square(view[a] - view[b]).mean()))
                if -distance > scores[i]:
                    scores[i], nearest[i] = -distance, j
    return scores, nearest


def overlay(clips: Sequence[Clip], side: int = 32) -> tuple[list[float], float]:
    """Per clip the cells of the picture (of 32 x 32, fewer for a smaller one) that show the same
    still mark as another clip and differ from most; and the percentage that is in most clips.

    The first finds a mark in a few clips, the second, from the variance over the clips, one in
    most of them.
    """
    usable = [i for i, clip in enumerate(clips) if clip.problem is None and black(clip) < 0.5]
    scores = [0.0] * len(clips)
    if len(usable) < 4:
        return scores, 0.0
    size = min(side, *(length for i in usable for length in clips[i].frames_FHWC.shape[1:3]))
    views = [_still(clips[i], size) for i in usable]
    still_NHW = np.stack([view for view, _ in views])
    holds_NHW = np.stack([holds for _, holds in views])
    sharp_NHW = still_NHW - _blurred(still_NHW)
    middle = np.median(sharp_NHW, 0)
    spread = 1.4826 * np.median(np.abs(sharp_NHW - middle), 0)
    common = (np.abs(middle) > 0.08) & (spread < 0.02) & (holds_NHW.mean(0) > 0.9)
    away = np.abs(sharp_NHW - middle) > np.maximum(2 * spread, 0.08)
    away &= (np.abs(sharp_NHW) > 0.08) & holds_NHW
    for a, i in enumerate(usable):
        shared = away[a] & away & (np.sign(sharp_NHW) == np.sign(sharp_NHW[a]))
        shared &= np.abs(still_NHW - still_NHW[a]) < 0.03
        counts = shared.sum((1, 2))
        counts[a] = 0
        scores[i] = float(counts.max())
    return scores, float(100 * common.mean())


def _still(clip: Clip, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The grey picture of what does not move, the median over time, and where it holds in 9 of 10
    frames."""
    grey = clip.frames_FHWC.mean(-1)
    middle = np.median(grey, axis=0)
    holds = (np.abs(grey - middle) < 0.05).mean(0)
    return _boxes(middle, size, size), _boxes(holds, size, size) >= 0.9


def _blurred(x_NHW: np.ndarray) -> np.ndarray:
    """Medians over 5 x 5 pixels, which small marks do not reach."""
    padded = np.pad(x_NHW, ((0, 0), (2, 2), (2, 2)), mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    return np.median(around, axis=(3, 4))


def _moments(clip: Clip) -> np.ndarray:
    """The frames at MOMENTS evenly spaced times."""
    index = np.linspace(0, len(clip.frames_FHWC) - 1, MOMENTS).round().astype(int)
    return clip.frames_FHWC[index]


def _boxes(picture_HW: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Means over rows x columns boxes of pictures [..., H, W]."""
    height, width = picture_HW.shape[-2:]
    found: np.ndarray = _averages(height, rows) @ picture_HW @ _averages(width, columns).T
    return found


@lru_cache(maxsize=64)
def _averages(length: int, count: int) -> np.ndarray:
    """A matrix [count, length] that takes means over `count` even parts; each has an element."""
    edges = np.linspace(0, length, count + 1)
    matrix = np.zeros((count, length), np.float32)
    for row, (a, b) in enumerate(pairwise(edges)):
        last = max(int(a) + 1, int(np.ceil(b - 1e-9)))
        matrix[row, int(a) : last] = 1 / (last - int(a))
    return matrix


# --- all of them ---

SINGLE: dict[str, Callable[[Clip], float]] = {
    "unreadable": lambda clip: float(clip.problem is not None),
    "frozen": frozen,
    "black": black,
    "cut": cut,
    "letterbox": letterbox,
}


def check_all(clips: Sequence[Clip], needed_s: float | None = None) -> dict[str, list[float]]:
    """Every check's number for every clip, but that of `overlay`."""
    found = {name: [check(clip) for clip in clips] for name, check in SINGLE.items()}
    found["short"] = short(clips, needed_s)
    found["duplicate"] = duplicate(clips)[0]
    return found


def doubt(check: Check, value: float) -> float:
    """How likely a check's number makes a fault: one half at the limit, in [0, 1]."""
    return float(1 / (1 + np.exp(np.clip((check.limit - value) / (check.width / 4), -50, 50))))


def trust(found: dict[str, list[float]], checks: dict[str, Check] = CHECKS) -> list[float]:
    """Per clip the probability that it has none of the faults, each taken as independent."""
    count = len(next(iter(found.values())))
    rows = [[1 - doubt(checks[name], found[name][i]) for name in found] for i in range(count)]
    return [float(np.prod(row)) for row in rows]
