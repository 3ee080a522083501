"""Detection of teachers that do not go together: silent heads, advantages that oppose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

HEAD, BETWEEN, CORRELATION = "discriminator/accuracy/", "teachers/", "/correlation"
# Updates before the averages mean anything, and the weight of each in them.
AFTER, NEW = 20, 0.1
# Once a head has ranked this well, this is chance; correlations below this pull apart.
LEARNT, CHANCE, AGAINST = 0.65, 0.55, -0.2


@dataclass
class Several:
    """Averages of the teachers' heads over the last tens of updates."""

    _averages: dict[str, tuple[float, int]] = field(default_factory=dict)
    _best: dict[str, float] = field(default_factory=dict)

    def look(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """The present signs, a sentence each, by name. Call it once per update."""
        found: dict[str, str] = {}
        for key, value in metrics.items():
            if key.startswith(HEAD):
                found |= self._head(key.removeprefix(HEAD), key, value)
            elif key.startswith(BETWEEN) and key.endswith(CORRELATION):
                pair = key.removeprefix(BETWEEN).removesuffix(CORRELATION)
                found |= self._pair(pair, key, value)
        return found

    def _average(self, key: str, value: float) -> tuple[float, int]:
        mean, seen = self._averages.get(key, (0.0, 0))
        mean += max(NEW, 1 / (seen + 1)) * (value - mean)
        self._averages[key] = mean, seen + 1
        return mean, seen + 1

    def _head(self, name: str, key: str, value: float) -> dict[str, str]:
        mean, seen = self._average(key, value)
        if seen < AFTER:
            return {}
        best = self._best[name] = max(self._best.get(name, 0.0), mean)
        if best < LEARNT or mean > CHANCE:
            return {}
        sentence = (
            f"the discriminator's head for teacher {name} no longer tells its videos from the "
            f"student's (accuracy {mean:.2f}, it was {best:.2f}): the student has learnt what it "
            f"shows, or the head is fooled; look at the videos, and lower the weight of {name}"
        )
        return {f"head {name}": sentence}

    def _pair(self, pair: str, key: str, value: float) -> dict[str, str]:
        mean, seen = self._average(key, value)
        if seen < AFTER or mean > AGAINST:
            return {}
        a, _, b = pair.partition("~")
        sentence = (
            f"teachers {a} and {b} pull the student against each other: their scores of a "
            f"prompt's rollouts have the correlation {mean:.2f}; give them prompts of their own "
            "(teacher.mode=route), or lower one weight"
        )
        return {f"teachers {pair}": sentence}
