"""What a plan is made of: parts of the memory, and phases of the work."""

from __future__ import annotations

from dataclasses import dataclass

from afd.planning import cost_model as cost
from afd.planning.cost_model import MACHINES

GIB = 2**30


def gib(count: int) -> str:
    """Format a number of bytes for display."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.2f} MiB"


@dataclass(frozen=True)
class Part:
    """Memory of one process: bytes, when (see MOMENTS, or "always", "kept", "start"), label."""

    name: str
    bytes: int
    when: str
    note: str


@dataclass(frozen=True)
class Phase:
    """Work of all processes in one update: FLOP of matrix products and of convolutions, and the
    number of times it is done in the run."""

    name: str
    flop: float
    convolutions: float
    times: float
    note: str

    @property
    def seconds(self) -> float:
        """GPU-seconds of one occurrence, at the assumed utilisation of an H100 or H200."""
        rate = MACHINES["H200"].flop
        products = self.flop / (rate * cost.UTILISATION)
        return products + self.convolutions / (rate * cost.CONVOLUTIONS)
