"""Signs that a student collapses: its videos or velocities change size, or it leaves its start.

The measurements behind the numbers are in docs/ABLATIONS.md, weighting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from afd.trainer.fooled import NEW, Average

REF_DEVIATION = "student/ref_deviation"
# What the sizes are of, and their largest change relative to the mean of the first values. In runs
# of the laptop task that do not break it is 0.01; noise dominates velocities, while the videos of a
# few prompts differ in size.
SIZES = {"student/v_rms": ("velocities", 0.05), "student/x0_rms": ("videos", 0.1)}
# As many as an average takes into its mean.
FIRST = round(1 / NEW)
# The squared distance to the start relative to that of BACK updates before, from update WAIT on. At
# constant speed, after a warm-up of up to a hundred updates, it has then grown at most fourfold.
GREW, BACK, WAIT = 5.0, 50, 150


class Collapse:
    """Looks at every update's metrics; keeps smoothed values."""

    def __init__(self) -> None:
        self._sizes = {key: _Size() for key in SIZES}
        # Smoothed distances of the last BACK + 1 updates.
        self._distances: deque[float] = deque(maxlen=BACK + 1)
        self._seen = 0

    def look(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """The problems in an update's metrics, by name."""
        found: dict[str, str] = {}
        for key, size in self._sizes.items():
            if key in metrics:
                found |= size.look(key, metrics[key])
        return found | self._leaving(metrics)

    def _leaving(self, metrics: Mapping[str, float]) -> dict[str, str]:
        if REF_DEVIATION not in metrics:
            return {}
        value, kept = metrics[REF_DEVIATION], self._distances
        kept.append(0.8 * kept[-1] + 0.2 * value if kept else value)
        self._seen += 1
        if self._seen <= WAIT or kept[-1] <= GREW * kept[0]:
            return {}
        times = f"{kept[-1] / kept[0]:.0f} times" if kept[0] > 0 else "more than"
        sentence = (
            f"the squared distance of the velocities to the reference is {times} that of {BACK} "
            f"updates ago (ref_deviation {kept[-1]:.3g}): the student may be breaking; go back to "
            "an earlier checkpoint, and raise afd.prior_weight or afd.nft_beta, or lower the rate"
        )
        return {"ref deviation": sentence}


class _Size:
    """A size relative to its first values."""

    def __init__(self) -> None:
        self._average = Average()
        self._usual = 0.0

    def look(self, key: str, value: float) -> dict[str, str]:
        now = self._average.add(value)
        if self._average.seen <= FIRST:
            self._usual = now
            return {}
        usual = self._usual
        what, limit = SIZES[key]
        if usual == 0 or abs(now / usual - 1) <= limit:
            return {}
        sentence = (
            f"the RMS of the {what} is {now:.3g}, {now / usual:.0%} of what it was "
            f"({key}): unless the look is meant to change, the student may be collapsing; go back "
            "to an earlier checkpoint, and raise prior_weight or lower the rate"
        )
        return {key: sentence}
