"""Records the Triton launches of a plan and repeats them without Triton's argument binder.

A plan fixes everything a kernel is specialised on except which addresses are 16-byte aligned:
launches are recorded for each such pattern that occurs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from afd_kernels import metadata
from afd_kernels.kept import Kept


def repeat(kept: Kept | None, tensors: tuple[Tensor | None, ...]) -> bool:
    """Repeats the launches recorded by `Launches`; False if the caller has to launch in full.

    `tensors`: all tensors passed to the kernels, in recorded order.
    """
    if kept is None or (made := kept.launches.get(metadata.alignment(tensors))) is None:
        return False
    for run, arguments, places in made:
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

    def __init__(self, kept: Kept | None, tensors: tuple[Tensor | None, ...]) -> None:
        self._kept, self._tensors = kept, tensors
        self._made: list[Any] = []
        self._can = kept is not None and not torch.version.hip

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
            self._kept.launches[metadata.alignment(self._tensors)] = tuple(self._made)
