"""Records the Triton launches of a plan and repeats them without Triton's argument binder.

A plan fixes everything a kernel is specialised on except the addresses. Launches are recorded if
all addresses are 16-byte aligned, and repeated only if they are again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from afd_kernels.plans import Kept


def _aligned(tensors: Sequence[Tensor | None]) -> bool:
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    return reduce(operator.or_, addresses) % 16 == 0


def repeat(kept: Kept | None, tensors: Sequence[Tensor | None]) -> bool:
    """Repeats the launches recorded by `Launches`; False if the caller has to launch in full.

    `tensors`: all tensors passed to the kernels, in recorded order.
    """
    if kept is None or kept.launches is None or not _aligned(tensors):
        return False
    for run, arguments, places in kept.launches:
        given = list(arguments)
        for place, index in places:
            given[place] = tensors[index]
        run(*given)
    return True


class Launches:
    """Runs kernels, `launches(kernel, grid)(...)` for `kernel[grid](...)`, and records them.

    `tensors`: as passed to `repeat`. Launches with other tensors are not recorded, nor are those
    of the interpreter or on ROCm, where Triton also specialises on storage sizes.
    """

    def __init__(self, kept: Kept | None, tensors: Sequence[Tensor | None]) -> None:
        self._kept, self._tensors = kept, tensors
        self._made: list[Any] = []
        self._can = kept is not None and not torch.version.hip and _aligned(tensors)

    def __call__(self, kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            compiled = kernel[grid](*args, **options)
            if not self._can:
                return
            if compiled is None:
                self._can = False
                return
            self._record(kernel, compiled, (*grid, 1, 1)[:3], args, options)

        return run

    def _record(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        named = {name: value for name, value in options.items() if name in kernel.arg_names}
        bound = kernel.signature.bind(*args, **named)
        bound.apply_defaults()
        arguments, places = list(bound.arguments.values()), []
        for place, value in enumerate(arguments):
            if isinstance(value, Tensor):
                index = next((i for i, x in enumerate(self._tensors) if x is value), None)
                if index is None:
                    self._can = False
                    return
                places.append((place, index))
                arguments[place] = None
        self._made.append((compiled[grid], tuple(arguments), tuple(places)))

    def keep(self) -> None:
        """Stores the launches so far for `repeat`."""
        if self._can and self._kept is not None:
            self._kept.launches = tuple(self._made)
