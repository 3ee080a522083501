"""Detection of a fooled discriminator by the frozen rewards beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MARGIN, MEAN, STD, AGREEMENT = "discriminator/margin", "/mean", "/std", "/agreement"
# Updates before the averages mean anything, and the weight of each in them.
AFTER, NEW = 20, 0.1
# An average correlation below this is a contradiction. A fall of a reward, in its standard
# deviations within groups, while the margin shrinks by at least this much.
AGAINST, LOST, WON = -0.1, 0.5, 0.1


@dataclass
class Average:
    """An exponential average that begins as the mean of its first values."""

    value: float = 0.0
    seen: int = 0

    def add(self, value: float) -> float:
        self.seen += 1
        self.value += max(NEW, 1 / self.seen) * (value - self.value)
        return self.value


@dataclass
class Fooled:
    """Compares the discriminator with every frozen reward over the last tens of updates."""

    _averages: dict[str, Average] = field(default_factory=dict)
    # Of each reward: its highest average, and the margin then.
    _best: dict[str, tuple[float, float]] = field(default_factory=dict)

    def look(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """The present signs, a sentence each, by name. Call it once per update."""
        names = [key[: -len(AGREEMENT)] for key in metrics if key.endswith(AGREEMENT)]
        names = [name for name in names if name.startswith("reward/")]
        if not names or MARGIN not in metrics:
            return {}
        margin = self._add(MARGIN, metrics)
        found = {}
        for name in names:
            agreement = self._add(name + AGREEMENT, metrics)
            mean, std = self._add(name + MEAN, metrics), self._add(name + STD, metrics)
            if self._averages[name + MEAN].seen < AFTER:
                continue
            title = name.removeprefix("reward/")
            best, margin_then = self._best.setdefault(name, (mean, margin))
            if mean > best:
                self._best[name] = mean, margin
            elif mean < best - LOST * std and margin < margin_then - WON:
                found[f"fooled {title}"] = (
                    f"frozen reward {title} fell from {best:.3g} to {mean:.3g} while the "
                    f"discriminator's margin shrank from {margin_then:.2f} to {margin:.2f}: the "
                    "student may be fooling the discriminator; go back to an earlier checkpoint, "
                    f"give rewards.{title} a weight, or raise discriminator.learning_rate"
                )
            if agreement < AGAINST:
                found[f"against {title}"] = (
                    f"the discriminator and frozen reward {title} rank the videos of a prompt "
                    f"against each other (correlation {agreement:.2f} in the last updates): one "
                    "of them is being fooled; look at the videos, and hold them with "
                    "afd.prior_share or a weight"
                )
        return found

    def _add(self, key: str, metrics: Mapping[str, float]) -> float:
        return self._averages.setdefault(key, Average()).add(metrics[key])
