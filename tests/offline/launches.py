"""The launches the Triton backend would make, recorded from its own host code on meta tensors.

Nothing is repeated here: block sizes, dtypes, constants and which arguments are specialised come
from calling the real functions with a recorder in the place of each kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
# One architecture of each vendor is enough for what differs only in host-chosen constants.
ONE_EACH = ("sm_90", "gfx942")

_TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass
class Launch:
    """One kernel as the runtime would specialise and compile it."""

    kernel: Any
    constants: dict[str, Any] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    aligned: set[str] = field(default_factory=set)
    options: dict[str, Any] = field(default_factory=dict)
    loaded: int = 0  # streamed bytes that one pass over its hot region loads
    stored: int = 0
    hot: str = "kernel"  # the region that is measured: see machine_code.Measured


@dataclass(frozen=True)
class Call:
    """One use of an op. `kernels` are those to compile; others are compiled by another call."""

    name: str
    op: str
    kernels: tuple[str, ...]
    archs: tuple[str, ...] = ARCHS

    def run(self, module: Any) -> None:
        """Calls the backend's function on meta tensors."""
        raise NotImplementedError

    def measure(self, kernel: str, launch: Launch, sizes: dict[str, int]) -> None:
        """Sets what the launch streams and where; `sizes` are bytes per element by argument."""


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def record(call: Call, arch: str) -> dict[str, Launch]:
    """The launches of `call` on `arch` by short kernel name ("partials", ...)."""
    op = call.op.removesuffix("_").removesuffix("_append").removesuffix("_bwd")
    module = importlib.import_module(f"afd_kernels.{op}.triton_impl")
    log: dict[str, Launch] = {}

    def keep(kernel: Any, name: str, named: dict[str, Any]) -> None:
        launch = _specialise(kernel, named)
        tensors = {n: x for n, x in named.items() if isinstance(x, Tensor)}
        call.measure(name, launch, {n: x.element_size() for n, x in tensors.items()})
        log[name] = launch

    with _patched(module, arch, keep):
        call.run(module)
    return {name: launch for name, launch in log.items() if name in call.kernels}


class _Recorder:
    def __init__(self, kernel: Any, name: str, keep: Callable[..., None]) -> None:
        self.kernel, self.name, self.keep = kernel, name, keep

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.record

    def record(self, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        self.keep(self.kernel, self.name, named)


def _patched(module: Any, arch: str, keep: Callable[..., None]) -> Any:
    kernels = {
        attribute: _Recorder(kernel, attribute.removesuffix("_kernel").rsplit("_", 1)[1], keep)
        for attribute, kernel in vars(module).items()
        if attribute.endswith("_kernel")
    }
    return patch.multiple(module, device_arch=lambda _device: arch, **kernels)


def _specialise(kernel: Any, named: dict[str, Any]) -> Launch:
    launch = Launch(kernel)
    constexpr = {p.name for p in kernel.params if p.is_constexpr}
    for name, value in named.items():
        if name not in kernel.arg_names:
            launch.options[name] = value
        elif name in constexpr or value is None or (type(value) is int and value == 1):
            launch.constants[name] = value
        elif isinstance(value, Tensor):
            launch.types[name] = f"*{_TRITON_TYPES[value.dtype]}"
            launch.aligned.add(name)
        elif isinstance(value, int):
            launch.types[name] = "i64" if value >= 2**31 else "i32"
            if value % 16 == 0:
                launch.aligned.add(name)
        else:
            launch.types[name] = "fp32"
        annotated = next((p.annotation_type for p in kernel.params if p.name == name), None)
        if annotated and name in launch.types:
            launch.types[name] = annotated
    return launch
