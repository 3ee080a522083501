"""Forecast of a run's use of its teacher: videos, cost and waiting time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from afd.listing import counted

# Assumed for a service that has not yet made a video for this folder.
SECONDS_PER_VIDEO = 120.0


@dataclass(frozen=True)
class Forecast:
    """Estimate of the videos that the teacher still has to make.

    Attributes:
        wanted: videos that the run can request; 0 if unknown.
        there, rejected: how many of these are finished, and how many the service refused.
        distinct: different videos that the run will use.
        price_usd: expected price of one video; None if nothing is bought.
        spent_usd, budget_usd: of the folder.
        seconds: time to make one video, from the ledger or assumed.
        measured: whether `seconds` comes from the ledger.
        concurrency: videos made concurrently.
    """

    kind: str
    wanted: int
    there: int
    rejected: int
    distinct: int
    price_usd: float | None = None
    spent_usd: float = 0.0
    budget_usd: float = 0.0
    seconds: float = SECONDS_PER_VIDEO
    measured: bool = False
    concurrency: int = 1

    @property
    def to_buy(self) -> int:
        """Videos that still have to be bought."""
        if self.price_usd is None:
            return 0
        return max(0, min(self.distinct, self.wanted) - self.there - self.rejected)

    @property
    def cost_usd(self) -> float:
        return self.to_buy * (self.price_usd or 0.0)

    @property
    def wait_s(self) -> float:
        """Seconds until the last video is finished, if nothing fails."""
        return -(-self.to_buy // self.concurrency) * self.seconds

    def lines(self, training_s: float) -> Iterator[str]:
        """Yield readable lines on cost and wall-clock time. `training_s`: seconds of all updates, 0
        if unknown."""
        if self.price_usd is None:
            number = f"{counted(self.wanted, 'video')}" if self.wanted else "videos not counted"
            yield f"teacher: {self.kind}, {number}; nothing is bought"
        elif not self.wanted:
            yield (
                f"teacher: {self.kind}, about {self.price_usd:.2f} USD a video; the number of "
                "videos is unknown without the prompts"
            )
        else:
            yield (
                f"teacher: {self.kind}, {self.there} of {self.wanted} videos exist, "
                f"{self.rejected} were rejected; {self.to_buy} to buy at about "
                f"{self.price_usd:.2f} USD: {self.cost_usd:.2f} USD, without repeats"
            )
            left = self.budget_usd - self.spent_usd
            word = "which is enough" if self.cost_usd <= left else "which is not enough"
            yield (
                f"money: {self.spent_usd:.2f} of the budget of {self.budget_usd:.2f} USD spent or "
                f"reserved, {left:.2f} left, {word}"
            )
            source = "measured" if self.measured else "assumed"
            yield (
                f"teacher wait: about {self.wait_s / 60:.0f} min at {self.seconds:.0f} s a video "
                f"({source}), {self.concurrency} at once; training continues meanwhile"
            )
        if training_s:
            low, high = max(training_s, self.wait_s), training_s + self.wait_s
            span = f"{low / 3600:.1f}" + (f" to {high / 3600:.1f}" if self.wait_s else "")
            yield f"wall-clock: about {span} hours (estimate; reading files is not counted)"


@dataclass(frozen=True)
class MixForecast(Forecast):
    """Forecast of several teachers: the sum, and a part for each.

    Attributes:
        parts: name, forecast and, for one that buys nothing here, the price of a video.
    """

    parts: tuple[tuple[str, Forecast, float | None], ...] = ()

    @classmethod
    def of(cls, parts: Sequence[tuple[str, Forecast, float | None]]) -> MixForecast:
        """Add up the forecasts of the teachers."""
        each = [forecast for _, forecast, _ in parts]
        return cls(
            kind="mix",
            wanted=sum(one.wanted for one in each),
            there=sum(one.there for one in each),
            rejected=sum(one.rejected for one in each),
            distinct=sum(one.distinct for one in each),
            spent_usd=sum(one.spent_usd for one in each),
            budget_usd=sum(one.budget_usd for one in each),
            parts=tuple(parts),
        )

    @property
    def to_buy(self) -> int:
        return sum(one.to_buy for _, one, _ in self.parts)

    @property
    def cost_usd(self) -> float:
        return sum(one.cost_usd for _, one, _ in self.parts)

    @property
    def wait_s(self) -> float:
        """Seconds until the slowest teacher has finished."""
        return max((one.wait_s for _, one, _ in self.parts), default=0.0)

    def lines(self, training_s: float) -> Iterator[str]:
        for name, one, price in self.parts:
            for line in one.lines(0.0):
                yield f"{name}: {line}"
            if price is not None and one.price_usd is None:
                yield (
                    f"{name}: {counted(one.distinct, 'video')} used, worth "
                    f"{one.distinct * price:.2f} USD at {price:.2f} each"
                )
        yield (
            f"teachers: {len(self.parts)}, {counted(self.to_buy, 'video')} to buy for "
            f"{self.cost_usd:.2f} USD"
        )
        if training_s:
            low, high = max(training_s, self.wait_s), training_s + self.wait_s
            span = f"{low / 3600:.1f}" + (f" to {high / 3600:.1f}" if self.wait_s else "")
            yield f"wall-clock: about {span} hours (estimate; reading files is not counted)"
