"""State that a backend keeps between calls of one plan (plans.py)."""

from __future__ import annotations

from typing import Any


class Kept:
    """Numbers of earlier calls; never a tensor, and no address that is read later.

    Attributes:
        problems: structs of the compiled core, filled in except for their addresses. A call takes
            one out and puts it back, so that concurrent calls have one each.
        launches: Triton launches in order, to be repeated (triton_launch.py), keyed by which
            tensors are 16-byte aligned (metadata.alignment).
    """

    __slots__ = ("launches", "problems")

    def __init__(self) -> None:
        self.problems: list[Any] = []
        self.launches: dict[int, tuple[Any, ...]] = {}
