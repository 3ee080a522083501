"""Triton launches on the simulated device: kernels are compiled and cached, none is loaded.

The cache's keys hold source, specialised arguments, options and target. Those of a launch on the
simulated device are those of the same launch on a real one: what is compiled here is found there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs

from tests.fake_cuda.driver import fake_cuda
from tests.fake_cuda.machine import FakeCuda
from tests.triton_driver import Driver


@dataclass(frozen=True)
class Compilation:
    """One kernel that a launch asked Triton's cache for."""

    kernel: str
    cached: bool
    seconds: float


@contextlib.contextmanager
def compiling(found: Callable[[Compilation], None]) -> Iterator[FakeCuda]:
    """A simulated device whose Triton launches are compiled; `found` is called for each kernel.

    Raises:
        RuntimeError: where Triton runs interpreted.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: got 1; needed: unset, to compile kernels")

    def listen(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        found(Compilation(src.name, cache_hit, 0.0 if cache_hit else times.total / 1e6))

    before, listener = triton.runtime.driver._active, knobs.compilation.listener
    triton.runtime.driver.set_active(Driver())
    knobs.compilation.listener = listen
    try:
        with fake_cuda(compiles=True) as machine:
            yield machine
    finally:
        triton.runtime.driver._active, knobs.compilation.listener = before, listener
