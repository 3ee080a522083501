"""The order in which a run's requests are drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from afd.errors import TeacherError
from afd.teachers.base import Request


class Sampler:
    """Draws requests in seeded random order without replacement, reshuffled every round.

    The order of round k depends only on (seed, k), so the cursor is the whole state.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        seed: int,
        weights: Callable[[int], Sequence[float]] | None = None,
    ) -> None:
        """`weights`: how often each request is drawn, relative to the others, in the round that
        begins after so many draws; None: equally often. A round is as long in any case."""
        self._requests = list(requests)
        asked = json.dumps([_asked(request) for request in self._requests])
        self._asked = hashlib.sha256(asked.encode()).hexdigest()
        self._seed, self._weights = seed, weights
        self._round = 0
        self._position = 0
        self._order = self._shuffled()

    def restart(self) -> None:
        """Shuffle the present round again, after the weights have become known."""
        self._order = self._shuffled()

    def draw(self, count: int) -> list[Request]:
        """The next `count` requests."""
        drawn = []
        for _ in range(count):
            if self._position == len(self._order):
                self._round, self._position = self._round + 1, 0
                self._order = self._shuffled()
            drawn.append(self._requests[self._order[self._position]])
            self._position += 1
        return drawn

    def peek(self, count: int) -> list[Request]:
        """The next `count` requests without drawing them; fewer at the end of the round."""
        return [self._requests[i] for i in self._order[self._position : self._position + count]]

    def state_dict(self) -> dict[str, Any]:
        cursor = {"round": self._round, "position": self._position}
        return cursor | {"of": len(self._requests), "asked": self._asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved cursor. Raises TeacherError if it belongs to other requests, or to the
        same in another order."""
        if state["of"] != len(self._requests):
            raise TeacherError(
                f"the checkpoint was made with {state['of']} teacher videos, "
                f"the folder contains {len(self._requests)} now"
            )
        if state["asked"] != self._asked:
            raise TeacherError(
                "the checkpoint was made with other prompts, or with these in another order; put "
                "back the list that the run began with"
            )
        self._round, self._position = state["round"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        # Odd multiplier: distinct (seed, round) pairs of one run never share a generator.
        mixed = (self._seed + 0x9E3779B97F4A7C15 * (self._round + 1)) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        count = len(self._requests)
        if self._weights is None:
            return torch.randperm(count, generator=generator).tolist()
        # Systematic sampling: each request as often as its weight says, up to rounding.
        weight = torch.tensor(self._weights(self._round * count), dtype=torch.float64)
        order = torch.randperm(count, generator=generator)
        ends = (weight[order] / weight.sum()).cumsum(0) * count
        points = torch.arange(count) + torch.rand(1, generator=generator, dtype=torch.float64)
        chosen = order[torch.searchsorted(ends, points).clamp_max(count - 1)]
        return chosen[torch.randperm(count, generator=generator)].tolist()


def _asked(request: Request) -> list[str | int]:
    return [request.prompt, request.draw, *([request.teacher] if request.teacher else [])]
