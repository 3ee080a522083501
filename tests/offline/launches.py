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

from afd_kernels import contracts

# The latent of 81 frames at 480x832: [B, C, F, H, W]; 7 chunks of 3 frames.
SHAPE = (2, 16, 21, 60, 104)
CHUNKS = 7
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")

_TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Call:
    """One use of an op. `kernels` are those to compile; others are compiled by another call."""

    name: str
    op: str
    kernels: tuple[str, ...]
    pred: torch.dtype = torch.bfloat16
    latent: torch.dtype = torch.bfloat16
    noise: torch.dtype | None = None  # None: from the seed
    chunks: int = 0  # 0: t and r per video
    weighting: str = "x0_adaptive"
    schedule: str = "rectified_flow"
    masked: bool = False
    ref: bool = True
    shape: tuple[int, ...] = SHAPE
    streaming: bool = True  # False: odd sizes, where wide loads are impossible
    archs: tuple[str, ...] = ARCHS


_FP32 = {"pred": torch.float32, "latent": torch.float32}
_MIXED = {"latent": torch.float32, "noise": torch.float32}
# One architecture of each vendor is enough for what differs only in host-chosen constants.
_ONE_EACH = ("sm_90", "gfx942")
_ALL = ("partials", "finalize", "grad")
CALLS = (
    Call("bf16", "forward_noise", ("fwd",)),
    Call("fp32", "forward_noise", ("fwd",), **_FP32),
    Call("chunks", "forward_noise", ("fwd",), chunks=CHUNKS),
    Call("noise_given", "forward_noise", ("fwd",), noise=torch.float32, archs=_ONE_EACH),
    Call("vp_cosine", "forward_noise", ("fwd",), schedule="vp_cosine", archs=_ONE_EACH),
    Call("vp_linear", "forward_noise", ("fwd",), schedule="vp_linear", archs=_ONE_EACH),
    Call("odd", "forward_noise", ("fwd",), shape=(2, 3, 5, 7, 3), streaming=False, archs=_ONE_EACH),
    Call("bf16", "forward_noise_bwd", ("bwd",)),
    Call("fp32", "forward_noise_bwd", ("bwd",), **_FP32),
    Call("bf16", "nft_loss", _ALL),
    Call("mixed", "nft_loss", ("partials", "grad"), **_MIXED),
    Call("fp32", "nft_loss", ("partials", "grad"), **_FP32),
    Call("chunks", "nft_loss", _ALL, chunks=CHUNKS),
    Call("velocity", "nft_loss", ("partials", "total"), weighting="velocity"),
    Call("vp_linear", "nft_loss", _ALL, schedule="vp_linear", chunks=CHUNKS, archs=_ONE_EACH),
    Call("no_ref", "nft_loss", ("grad",), ref=False, archs=_ONE_EACH),
    Call("fp16", "nft_loss", ("grad",), pred=torch.float16, latent=torch.float16, archs=_ONE_EACH),
    Call("masked", "nft_loss", _ALL, chunks=CHUNKS, masked=True, archs=_ONE_EACH),
    Call(
        "odd",
        "nft_loss",
        ("partials", "grad"),
        shape=(2, 3, 5, 7, 3),
        streaming=False,
        archs=_ONE_EACH,
    ),
    Call("bf16", "nft_loss_bwd", ("scale",)),
    Call("bf16", "nft_loss_bwd_", ("scale",)),
)


@dataclass
class Launch:
    """One kernel as the runtime would specialise and compile it."""

    kernel: Any
    constants: dict[str, Any] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    aligned: set[str] = field(default_factory=set)
    options: dict[str, Any] = field(default_factory=dict)
    loaded: int = 0  # streamed bytes that one pass over BLOCK elements loads
    stored: int = 0


def record(call: Call, arch: str) -> dict[str, Launch]:
    """The launches of `call` on `arch` by short kernel name ("partials", ...)."""
    op = call.op.removesuffix("_").removesuffix("_bwd")
    module = importlib.import_module(f"afd_kernels.{op}.triton_impl")
    log: dict[str, Launch] = {}
    with _patched(module, arch, log):
        _run(call, module)
    return {name: launch for name, launch in log.items() if name in call.kernels}


class _Recorder:
    def __init__(self, kernel: Any, name: str, log: dict[str, Launch]) -> None:
        self.kernel, self.name, self.log = kernel, name, log

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.record

    def record(self, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        self.log[self.name] = _specialise(self.kernel, named)


def _patched(module: Any, arch: str, log: dict[str, Launch]) -> Any:
    kernels = {
        attribute: _Recorder(kernel, attribute.removesuffix("_kernel").rsplit("_", 1)[1], log)
        for attribute, kernel in vars(module).items()
        if attribute.endswith("_kernel")
    }
    return patch.multiple(module, device_arch=lambda _device: arch, **kernels)


def _specialise(kernel: Any, named: dict[str, Any]) -> Launch:
    launch = Launch(kernel)
    constexpr = {p.name for p in kernel.params if p.is_constexpr}
    elements = max(x.numel() for x in named.values() if isinstance(x, Tensor))
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
    block = launch.constants.get("BLOCK", 0)
    for name, value in named.items():
        if isinstance(value, Tensor) and value.numel() == elements:
            written = name == "out_ptr" or (name == "grad_ptr" and "out_ptr" not in named)
            if written:
                launch.stored += block * value.element_size()
            else:
                launch.loaded += block * value.element_size()
    return launch


def _run(call: Call, module: Any) -> None:
    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch = call.shape[0]
    chunks = call.shape[2] if call.chunks and not call.streaming else call.chunks
    times = empty(torch.float32, *((batch, chunks) if chunks else (batch,)))
    x0 = empty(call.latent, *call.shape)
    pred = empty(call.pred, *call.shape)
    seed = None if call.noise else empty(torch.int64, batch)
    noise = empty(call.noise, *call.shape) if call.noise else None
    args = [0.1, 20.0] if call.schedule == "vp_linear" else []
    if call.op in ("nft_loss_bwd", "nft_loss_bwd_"):
        getattr(module, call.op)(pred, empty(torch.float32))
        return
    if call.op != "nft_loss":
        plan = contracts.plan_forward_noise(x0, times, seed, noise, call.schedule, args, "BCFHW")
        if call.op == "forward_noise":
            module.forward_noise(x0, times, seed, noise, plan)
        else:
            module.forward_noise_bwd(x0, times, plan)
        return
    ref = pred if call.ref else None
    mask = empty(torch.bool, batch, call.shape[2]) if call.masked else None
    tensors = (pred, pred, ref, x0, times, times, seed, noise, mask)
    options = (0.1, 1e-2 if call.ref else 0.0, 5.0, call.weighting)
    group = "chunk" if call.chunks else "video"
    nft_plan = contracts.plan_nft_loss(
        *tensors, *options, group, True, call.schedule, args, "BCFHW", True
    )
    module.nft_loss(*tensors, nft_plan)
