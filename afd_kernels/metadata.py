"""Reads the tensors' metadata on every call, through the compiled core if it is built.

The core reads a plain tensor in a tenth of the time that Python needs for its shape, strides, dtype
and device. Subclasses and other layouts are read by Python.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from afd_kernels import native

_core = None if native.why_missing() is not None else native.core()


def key(tensors: tuple[Tensor | None, ...]) -> Hashable:
    """A key of shapes, strides, dtypes and devices, equal only if all of them are."""
    if _core is not None and (found := _core.key(tensors)) is not None:
        return found
    return tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors)


def all_usual(arguments: tuple[Any, ...], count: int) -> bool:
    """Whether no predicate of native.UNUSUAL holds for the first `count` arguments (or None)."""
    if _core is not None:
        return _core.all_usual(arguments, count)
    given = [x for x in arguments[:count] if x is not None]
    return not any(is_unusual(x) for is_unusual in native.UNUSUAL for x in given)


def alignment(tensors: tuple[Tensor | None, ...]) -> int:
    """A bit mask: bit i is set if tensor i is 16-byte aligned or None; at most 64 tensors."""
    if _core is not None:
        return _core.alignment(tensors)
    addresses = (0 if x is None else x.data_ptr() for x in tensors)
    return sum((at % 16 == 0) << i for i, at in enumerate(addresses))


def apart(tensors: tuple[Tensor, ...], extents: tuple[int, ...], written: tuple[int, ...]) -> bool:
    """Fast check that none of the tensors at `written` overlaps another, run on every call.

    `extents`: the bytes of each (aliasing.extent). False means that aliasing.refuse_overlaps has to
    decide.
    """
    return _core is not None and _core.apart(tensors, extents, written)
