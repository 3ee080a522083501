"""Triton's driver for a GPU that is not here: kernels are compiled and cached, none is loaded."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

ARCH = 90  # the capability that fake_cuda() shows, times ten
SHARED_BYTES = 227 << 10  # that one program may have there


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
