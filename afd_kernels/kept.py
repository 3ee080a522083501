"""What a backend keeps between the calls of one plan (plans.py)."""

from __future__ import annotations

from typing import Any


class Kept:
    """Numbers of earlier calls; never a tensor, never an address that is read.

    Attributes:
        problems: structs of the compiled core, filled but for their addresses. A call takes one out
            and puts it back, so that calls at the same time have one each.
        launches: Triton launches in order, to be repeated (triton_launch.py), by which tensors'
            addresses 16 divides.
    """

    __slots__ = ("launches", "problems")

    def __init__(self) -> None:
        self.problems: list[Any] = []
        self.launches: dict[int, tuple[Any, ...]] = {}
