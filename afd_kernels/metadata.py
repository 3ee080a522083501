"""What plans and the short way ask of tensors in every call: through the compiled core, if built.

The core reads a plain tensor in a tenth of the time that Python takes for its shape, strides, dtype
and device. Whatever is not plain is asked by Python.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from afd_kernels import native

_core = None if native.why_missing() is not None else native.core()


def key(tensors: tuple[Tensor | None, ...]) -> Hashable:
    """Shapes, strides, dtypes and devices, as a key: equal only where all of them are."""
    if _core is not None and (found := _core.key(tensors)) is not None:
        return found
    return tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors)


def all_usual(arguments: tuple[Any, ...], count: int) -> bool:
    """Whether none of the first `count` arguments, tensors or None, is of native.UNUSUAL."""
    if _core is not None:
        return _core.all_usual(arguments, count)
    given = [x for x in arguments[:count] if x is not None]
    return not any(is_unusual(x) for is_unusual in native.UNUSUAL for x in given)


def alignment(tensors: tuple[Tensor | None, ...]) -> int:
    """Bit i: whether 16 divides the address of tensor i (at most 64 tensors, or None)."""
    if _core is not None:
        return _core.alignment(tensors)
    addresses = (0 if x is None else x.data_ptr() for x in tensors)
    return sum((at % 16 == 0) << i for i, at in enumerate(addresses))


def apart(tensors: tuple[Tensor, ...], extents: tuple[int, ...], written: tuple[int, ...]) -> bool:
    """Whether none of the tensors at `written` shares memory with another; quick, for every call.

    `extents`: the bytes of each, as by aliasing.extent. False where aliasing has to look.
    """
    return _core is not None and _core.apart(tensors, extents, written)
