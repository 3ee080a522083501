"""How well trivial statistics tell a teacher's clips from a student's.

A discriminator can use what these use: if a linear probe on brightness and the like separates the
two, the student may learn the look instead of the motion. Shape letters: N clips, S statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from afd.audit.clip import Clip

STATISTICS = ("brightness", "contrast", "saturation", "sharpness", "change", "flicker")
FOLDS = 5


def statistics(clips: Sequence[Clip]) -> np.ndarray:
    """float64 [N, S] of readable clips, as STATISTICS names them, each of values in [0, 1]."""
    rows = []
    for clip in clips:
        frames = clip.frames_FHWC.astype(np.float64)
        grey = frames.mean(-1)
        edges = np.abs(np.diff(grey, axis=1)).mean() + np.abs(np.diff(grey, axis=2)).mean()
        steps = np.diff(grey, axis=0) if len(grey) > 1 else np.zeros((1, 1, 1))
        rows.append(
            [
                grey.mean(),
                grey.std((1, 2)).mean(),
                (frames.max(-1) - frames.min(-1)).mean(),
                edges,
                np.abs(steps).mean(),
                np.abs(steps.mean((1, 2))).mean(),
            ]
        )
    return np.array(rows).reshape(-1, len(STATISTICS))


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a value of `positive` exceeds one of `negative`; equal ones count half."""
    if not len(positive) or not len(negative):
        return float("nan")
    a, b = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return float((a > b).mean() + 0.5 * (a == b).mean())


def logistic(x_NS: np.ndarray, y_N: np.ndarray, ridge: float = 1.0, rounds: int = 25) -> np.ndarray:
    """Weights [S + 1], the constant last, of a logistic regression on standardised statistics."""
    x = np.c_[x_NS, np.ones(len(x_NS))]
    penalty = ridge * np.diag([*np.ones(x_NS.shape[1]), 1e-6])
    weights = np.zeros(x.shape[1])
    for _ in range(rounds):
        p = _probability(x, weights)
        gradient = x.T @ (p - y_N) + penalty @ weights
        curvature = (x * (p * (1 - p))[:, None]).T @ x + penalty
        weights = weights - np.linalg.solve(curvature, gradient)
    return weights


def _probability(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))


def _standardised(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`b` in the units of `a`: its mean and deviation."""
    spread = a.std(0)
    return a.mean(0), np.where(spread > 1e-9, spread, 1.0)


def out_of_fold(teacher_NS: np.ndarray, student_MS: np.ndarray, seed: int = 0) -> np.ndarray:
    """The probe's probability of "teacher" for every clip, teachers first, [N + M], by a probe that
    was fitted without it."""
    x = np.concatenate([teacher_NS, student_MS])
    y = np.r_[np.ones(len(teacher_NS)), np.zeros(len(student_MS))]
    found = np.full(len(x), 0.5)
    random = np.random.default_rng(seed)
    # Each fold has its share of both.
    fold = np.r_[
        random.permutation(len(teacher_NS)) % FOLDS, random.permutation(len(student_MS)) % FOLDS
    ]
    for held in range(FOLDS):
        fit, test = fold != held, fold == held
        if not test.any() or len(set(y[fit])) < 2:
            continue
        mean, spread = _standardised(x[fit], x)
        weights = logistic((x[fit] - mean) / spread, y[fit])
        found[test] = _probability(np.c_[(x[test] - mean) / spread, np.ones(test.sum())], weights)
    return found


def separability(teacher_NS: np.ndarray, student_MS: np.ndarray) -> dict[str, float]:
    """Cross-validated AUC of the linear probe under "probe", and of each statistic alone (0.5: says
    nothing, 1: tells them apart, whichever is larger)."""
    p = out_of_fold(teacher_NS, student_MS)
    count = len(teacher_NS)
    found = {"probe": auc(p[:count].tolist(), p[count:].tolist())}
    for index, name in enumerate(STATISTICS):
        alone = auc(teacher_NS[:, index].tolist(), student_MS[:, index].tolist())
        found[name] = max(alone, 1 - alone)
    return found


def balance(teacher_NS: np.ndarray, student_MS: np.ndarray, most: float = 4.0) -> np.ndarray:
    """Weights [N] of the teacher's clips, mean 1, under which their statistics are nearer to the
    student's: the probe's odds of "student", between 1 / `most` and `most` times their mean."""
    p = out_of_fold(teacher_NS, student_MS)[: len(teacher_NS)].clip(1e-3, 1 - 1e-3)
    odds = (1 - p) / p
    odds = (odds / odds.mean()).clip(1 / most, most)
    return odds / odds.mean()
