"""Triton's driver for a GPU that is not here: kernels are compiled and cached, none is loaded.

The cache's keys hold source, specialised arguments, options and target. Those of a launch on the
simulated device are those of the same launch on a real one: what is compiled here is found there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from tests.fake_cuda.driver import fake_cuda
from tests.fake_cuda.machine import FakeCuda

ARCH = 90  # the capability that fake_cuda() shows, times ten
SHARED_BYTES = 227 << 10  # that one program may have there


@dataclass(frozen=True)
class Compilation:
    """One kernel that a launch asked Triton's cache for."""

    kernel: str
    cached: bool
    seconds: float


class Driver:
    """Answers what Triton asks of a driver; a launch does nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": SHARED_BYTES},
        )
        self.launcher_cls: Callable[..., Any] = lambda source, metadata: lambda *_: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", ARCH, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


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
