"""Detection of training problems, each with a suggested remedy.

Each problem is logged as a warning once until it clears; the report lists all warnings.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from afd.trainer.collapse import Collapse
from afd.trainer.fooled import Fooled
from afd.trainer.several import Several

AGREEMENT, MOTION, FROZEN, MARGIN = "agreement/phys", "motion", "MQ", "discriminator/margin"
OLD_DEVIATION, DIVERSITY = "student/old_deviation", "student/diversity"
SEAMS = "seam_jerk"
# Motion below this fraction of the base student's; a drop of the frozen rating, in its standard
# deviations, while the margin shrinks by at least this much.
LOST_MOTION, LOST_RATING, WON_MARGIN = 0.7, 0.1, 0.1
# Distance between rollouts of a prompt below this fraction of its largest smoothed value.
LOST_DIVERSITY = 0.5
# Kinks where chunks meet, over those within chunks: above this multiple of 1, or of the base
# student's if that is larger.
KINKED = 1.25
# The deviation from the old policy may drift; at this multiple of its usual size it is diverging.
# It grows until the rate is warm and the old policy's decay has its largest value.
RUNAWAY, USUAL_AFTER = 5.0, 100
_log = logging.getLogger("afd")


class Signs:
    """Checks every update and evaluation; keeps state for checks that need several of them."""

    def __init__(self) -> None:
        self._shown: dict[str, set[str]] = {"update": set(), "evaluation": set()}
        self._accuracy = 0.5
        self._agreement: float | None = None
        self._best_agreement = 0.0
        self._margin: float | None = None
        self._deviation = _Deviation()
        self._diversity: float | None = None
        self._best_diversity = 0.0
        self._collapse = Collapse()
        self._fooled = Fooled()
        self._several = Several()
        self._motion: float | None = None
        self._seams: float | None = None
        self._best_rating: tuple[float, float | None] | None = None

    def updated(self, update: int, metrics: Mapping[str, float], *, quiet: bool = False) -> None:
        """Check one update's metrics. `quiet`: only update the state, when replaying history."""
        if MARGIN in metrics:
            before = metrics[MARGIN] if self._margin is None else self._margin
            self._margin = 0.9 * before + 0.1 * metrics[MARGIN]
        present = dict(signs({**metrics, **self._smooth_accuracy(metrics)}))
        present |= self._falling(metrics) | self._deviation.updated(metrics)
        present |= self._narrowing(metrics) | self._collapse.look(metrics)
        present |= self._fooled.look(metrics) | self._several.look(metrics)
        self._report("update", update, present, quiet)

    def evaluated(self, update: int, metrics: Mapping[str, float], *, quiet: bool = False) -> None:
        """Check one evaluation; the first is that of the base student."""
        present = self._still(metrics) | self._kinked(metrics) | self._hacking(metrics)
        self._report("evaluation", update, present, quiet)

    def replay(self, updates: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
        """Rebuild the state from the existing lines of metrics.jsonl and evaluation.jsonl."""
        # An update's evaluation precedes its line of metrics.
        lines = [(line["update"], 1, line) for line in updates]
        lines += [(line["update"], 0, line["metrics"]) for line in evaluations]
        for update, late, metrics in sorted(lines, key=lambda line: line[:2]):
            (self.updated if late else self.evaluated)(update, metrics, quiet=True)

    def _report(self, kind: str, update: int, present: dict[str, str], quiet: bool) -> None:
        for name, sentence in present.items():
            if name not in self._shown[kind] and not quiet:
                _log.warning("update %d: %s", update, sentence)
        self._shown[kind] = set(present)

    def _smooth_accuracy(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Accuracy averaged over the last tens of updates; a single batch is often all correct."""
        if "discriminator/accuracy" not in metrics:
            return {}
        self._accuracy = 0.95 * self._accuracy + 0.05 * metrics["discriminator/accuracy"]
        return {"discriminator/accuracy": self._accuracy}

    def _falling(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """The score used to rank by physics and no longer does: the best early-stopping signal."""
        if AGREEMENT in metrics:
            before = metrics[AGREEMENT] if self._agreement is None else self._agreement
            self._agreement = 0.8 * before + 0.2 * metrics[AGREEMENT]
            self._best_agreement = max(self._best_agreement, self._agreement)
        now = self._agreement
        if now is None or self._best_agreement < 0.4 or now > 0.2:
            return {}
        sentence = (
            f"correlation of score and physics fell from {self._best_agreement:.2f} to {now:.2f}: "
            "stop here, or return to an earlier checkpoint"
        )
        return {"agreement": sentence}

    def _narrowing(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """The rollouts of a prompt become alike; the update learns from their differences."""
        if DIVERSITY not in metrics:
            return {}
        before = metrics[DIVERSITY] if self._diversity is None else self._diversity
        now = self._diversity = 0.9 * before + 0.1 * metrics[DIVERSITY]
        self._best_diversity = max(self._best_diversity, now)
        if now >= LOST_DIVERSITY * self._best_diversity:
            return {}
        sentence = (
            f"the distance between rollouts of a prompt fell to {now:.3g}, "
            f"{now / self._best_diversity:.0%} of what it was: go back to an earlier checkpoint, "
            "lower afd.learning_rate or raise afd.prior_weight"
        )
        return {"diversity": sentence}

    def _still(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Motion is being lost: many scores prefer videos that move less."""
        if MOTION not in metrics:
            return {}
        now = metrics[MOTION]
        if self._motion is None:
            self._motion = now
        if now >= LOST_MOTION * self._motion:
            return {}
        sentence = (
            f"motion fell to {now:.3g}, {now / self._motion:.0%} of the base's {self._motion:.3g}: "
            "inspect the videos; lower the learning rate, or raise prior_weight"
        )
        return {"motion": sentence}

    def _kinked(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Trajectories bend where chunks meet, which many scores do not see."""
        if SEAMS not in metrics:
            return {}
        now = metrics[SEAMS]
        if self._seams is None:
            self._seams = now
        if now <= KINKED * max(1.0, self._seams):
            return {}
        sentence = (
            f"seam_jerk rose from the base's {self._seams:.3g} to {now:.3g}: motion bends where "
            "chunks meet; raise prior_weight, if the method has one, or lower the rate"
        )
        return {"seams": sentence}

    def _hacking(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Reward hacking: the student's online score rises while the frozen rating falls."""
        if FROZEN not in metrics:
            return {}
        now, best = metrics[FROZEN], self._best_rating
        if best is None or now > best[0]:
            self._best_rating = (now, self._margin)
            return {}
        rating, margin = best
        if margin is None or self._margin is None:
            return {}
        if now > rating - LOST_RATING or self._margin > margin - WON_MARGIN:
            return {}
        sentence = (
            f"the untouched VideoAlign's MQ fell from {rating:.2f} to {now:.2f} while the online "
            f"score approached the teacher's (margin {margin:.2f} to {self._margin:.2f}): the "
            "student may be fooling the discriminator; go back to the best checkpoint, and raise "
            "discriminator.learning_rate, discriminator.steps_per_update or prior_weight"
        )
        return {"hacking": sentence}


@dataclass
class _Deviation:
    """The student's distance from the old policy, relative to its usual size."""

    fast: float | None = None
    usual: float = 0.0
    seen: int = 0

    def updated(self, metrics: Mapping[str, float]) -> dict[str, str]:
        if OLD_DEVIATION not in metrics:
            return {}
        value = metrics[OLD_DEVIATION]
        self.fast = value if self.fast is None else 0.8 * self.fast + 0.2 * value
        self.seen += 1
        # It starts at 0, as both policies start equal; the largest early value is the usual size.
        if self.seen <= USUAL_AFTER:
            self.usual = max(self.usual, self.fast)
            return {}
        if self.usual == 0 or self.fast <= RUNAWAY * self.usual:
            return {}
        sentence = (
            f"the student is {self.fast / self.usual:.0f} times as far from the old "
            f"policy as in its first {USUAL_AFTER} updates (old_deviation {self.fast:.3g}): lower "
            "afd.learning_rate, or old_decay so that the old policy follows faster"
        )
        return {"old deviation": sentence}


def signs(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield (name, message) for every problem in one update's metrics."""

    def value(key: str) -> float:
        return metrics.get(key, math.nan)

    margin, zero_std = value(MARGIN), value("student/zero_std_groups")
    if margin > 5:
        yield (
            "margin",
            f"discriminator margin {margin:.1f} is above 5: it may rely on a shortcut; compare the "
            "videos",
        )
    if value("discriminator/accuracy") >= 0.995:
        yield (
            "accuracy",
            "discriminator accuracy is 1: its scores carry little information; lower "
            "discriminator.learning_rate or steps_per_update",
        )
    if value("student/r_mean") > 0.9 or value("student/r_at_1") > 0.5:
        yield (
            "r high",
            "r is near 1: the student may be fooling a discriminator that is too slow; raise "
            "discriminator.learning_rate",
        )
    if value("student/r_mean") < 0.1 or value("student/r_at_0") > 0.5:
        yield (
            "r low",
            "r is near 0: the discriminator may be too strong; lower discriminator.learning_rate",
        )
    if zero_std > 0:
        yield (
            "zero std",
            f"{zero_std:g} of the prompts' groups have equal scores and give no gradient; raise "
            "afd.samples_per_prompt, or check whether the rollouts differ",
        )
