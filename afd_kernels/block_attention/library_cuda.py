"""Attention libraries on CUDA behind a common interface, imported only on demand.

Forward: FlashAttention 3 or 4 where installed, cuDNN, PyTorch's flash attention, xformers.
Backward: only the deterministic ones of these, which excludes PyTorch's cuDNN. Tensors
[B, l, h, d], lse fp32 [B, h, l] in natural logarithms, so one library's forward can be combined
with another's backward.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
# Function name to the number of positional tensors and the keyword arguments we pass.
Calls: TypeAlias = Mapping[str, tuple[int, tuple[str, ...]]]


def _transposed(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


@functools.cache
def _import(module: str) -> tuple[Any, str | None]:
    """The module, or the reason why it cannot be used."""
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        return None, f"{top} is not installed"
    try:
        return importlib.import_module(module), None
    except Exception as error:  # an extension built for another torch may raise anything
        return None, f"cannot import {module} ({error})"


def _missing(module: str, calls: Calls) -> str | None:
    """The reason why a module's functions do not support our calls, or None."""
    found, why = _import(module)
    if found is None:
        return why
    for name, (tensors, names) in calls.items():
        try:
            inspect.signature(getattr(found, name)).bind(*range(tensors), **dict.fromkeys(names))
        except (AttributeError, TypeError, ValueError) as error:
            return f"{module} has an incompatible version ({name}: {error})"
    return None


def cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse from PyTorch's cuDNN attention."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_transposed(q, k, v), None, True, scale=scale
    )
    return out.transpose(1, 2), lse.reshape(lse.shape[:3])


def aten_flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse from PyTorch's built-in flash attention."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *_transposed(q, k, v), scale=scale
    )
    return out.transpose(1, 2), lse


class Flash3:
    """FlashAttention 3 (`flash_attn_interface`, built from the flash-attention repository)."""

    name = "FlashAttention 3"
    module = "flash_attn_interface"
    calls: ClassVar[Calls] = {
        "_flash_attn_forward": (3, ("softmax_scale",)),
        "_flash_attn_backward": (6, ("dq", "dk", "dv", "softmax_scale", "deterministic")),
    }
    majors = (9,)
    widest = 256

    def missing(self) -> str | None:
        return _missing(self.module, self.calls)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _import(self.module)[0]._flash_attn_forward(q, k, v, softmax_scale=scale)
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        keys: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        _import(self.module)[0]._flash_attn_backward(
            *(grad_out, q, k, v, out, lse.contiguous()),
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=scale,
            deterministic=True,
        )
        return dq, dk, dv


class Flash4:
    """FlashAttention 4 (`flash_attn.cute`, PyPI's flash-attn-4)."""

    name = "FlashAttention 4"
    module = "flash_attn.cute.interface"
    calls: ClassVar[Calls] = {
        "_flash_attn_fwd": (3, ("softmax_scale", "return_lse")),
        "_flash_attn_bwd": (6, ("softmax_scale", "deterministic")),
    }
    majors = (9, 10, 11)
    widest = 128

    def missing(self) -> str | None:
        return _missing(self.module, self.calls)

    def unordered(self, major: int) -> bool:
        """Whether its backward is nondeterministic on compute capability `major`.x: on 9.x the
        first versions assert against determinism, and cannot be distinguished by version."""
        if major != 9:
            return False
        try:
            source = inspect.getsource(_import(self.module)[0]._flash_attn_bwd)
        except (OSError, TypeError, AttributeError):
            return True
        return "deterministic only supported for sm100" in source

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _import(self.module)[0]._flash_attn_fwd(
            q, k, v, softmax_scale=scale, return_lse=True
        )
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        keys: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dq, dk, dv, *_ = _import(self.module)[0]._flash_attn_bwd(
            *(q, k, v, out, grad_out, lse.contiguous()), softmax_scale=scale, deterministic=True
        )
        return dq, dk, dv


class Cudnn:
    """cuDNN through PyTorch; forward only, because its backward is nondeterministic there."""

    name = "cuDNN"
    majors = (9, 10, 11, 12)
    widest = 128

    def missing(self) -> str | None:
        version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        return None if version and version >= 90000 else f"cuDNN 9 is needed, torch has {version}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q_Bhld, k_Bhld, v_Bhld = _transposed(q, k, v)
        asked = torch.backends.cuda.SDPAParams(q_Bhld, k_Bhld, v_Bhld, None, 0.0, False, False)
        # Not every version of cuDNN supports every shape, and a user may have disabled it.
        run = cudnn if torch.backends.cuda.can_use_cudnn_attention(asked) else aten_flash
        return run(q, k, v, scale)


class AtenFlash:
    """PyTorch's built-in flash attention (FlashAttention 2)."""

    name = "aten flash"
    majors = (8, 9, 10, 11, 12)
    widest = 256

    def missing(self) -> str | None:
        built = torch.backends.cuda.is_flash_attention_available()
        return None if built else "this torch was built without flash attention"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return aten_flash(q, k, v, scale)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        keys: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # RNG state of the unused dropout, in the shapes the forward returns.
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        offset = torch.empty((), dtype=torch.uint64, device=q.device)
        with _deterministic():
            grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                *_transposed(grad_out, q, k, v, out),
                lse.contiguous(),
                *(None, None, q.shape[1], k.shape[1], 0.0, False, seed, offset),
                scale=scale,
            )
        dq, dk, dv = _transposed(*grads)
        return dq, dk, dv


class Xformers:
    """xformers' memory-efficient attention, if PyTorch has none built in; forward only."""

    name = "xformers"
    module = "xformers.ops.fmha"
    majors = (7, 8, 9, 10, 11, 12)
    widest = 256

    def missing(self) -> str | None:
        return _import(self.module)[1]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = _import(self.module)[0].memory_efficient_attention_forward_requires_grad(
            q, k, v, scale=scale
        )
        # Some of its kernels pad the length of lse.
        return out, lse[..., : q.shape[1]]


ORDER = (Flash3(), Flash4(), Cudnn(), AtenFlash(), Xformers())


@contextmanager
def _deterministic() -> Iterator[None]:
    """Use PyTorch's deterministic kernels, without filling new tensors with NaN."""
    fill = torch._C._get_deterministic_fill_uninitialized_memory()
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before, warn_only=warn)
        torch._C._set_deterministic_fill_uninitialized_memory(fill)


def reasons(major: int, head_dim: int, *, backward: bool = False) -> dict[str, str | None]:
    """Per library, the reason why it cannot run this head width on capability `major`.x."""
    return {library.name: _reason(library, major, head_dim, backward) for library in ORDER}


def _reason(library: Any, major: int, head_dim: int, backward: bool) -> str | None:
    if major not in library.majors:
        return f"not for compute capability {major}.x"
    if backward and not hasattr(library, "backward"):
        return "its backward is not deterministic"
    if head_dim % 8 or head_dim > library.widest:
        return f"head_dim {head_dim} is not a multiple of 8 up to {library.widest}"
    missing: str | None = library.missing()
    if missing is None and backward and getattr(library, "unordered", _never)(major):
        return f"its backward is not deterministic on compute capability {major}.x"
    return missing


def _never(major: int) -> bool:
    return False


@functools.cache
def first(major: int, head_dim: int, backward: bool = False) -> Any | None:
    """The first usable library in ORDER, or None."""
    for library in ORDER:
        if _reason(library, major, head_dim, backward) is None:
            return library
    return None


def major(device: torch.device | None = None) -> int:
    """The major version of the device's compute capability."""
    return torch.cuda.get_device_capability(device)[0]


def refuse(dtypes: set[torch.dtype]) -> str | None:
    """The reason why no library runs these dtypes on CUDA here, or None; for 128-channel heads."""
    for dtype in sorted(dtypes - set(_HALF), key=str):
        name = str(dtype).removeprefix("torch.")
        return f"attention libraries on CUDA take bfloat16 and float16, not {name}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is not None:
        return "on ROCm the Triton kernels are used"
    if first(major(), 128) is not None:
        return None
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons(major(), 128).items())
    return f"no attention library ({why})"


def unfit(tensors: Sequence[Tensor]) -> str | None:
    """The reason why no library here takes these tensors [B, l, h, d] in place, or None.

    Libraries use 16-byte copies (TMA on Hopper) and do not support addresses that are not
    16-byte aligned. Our own kernels are compiled for the actual alignment.
    """
    first_tensor = tensors[0]
    width, number = first_tensor.shape[-1], major(first_tensor.device)
    if first(number, width) is None:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons(number, width).items())
        return f"no attention library for heads of {width} channels ({why})"
    for x in tensors:
        step = 16 // x.element_size()
        # The stride of a size-1 dimension is never used.
        apart = (s for s, n in zip(x.stride()[:-1], x.shape, strict=False) if n > 1)
        if x.data_ptr() % 16 or any(stride % step for stride in apart):
            return "attention libraries need rows that begin at multiples of 16 bytes"
    return None
