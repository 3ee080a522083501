"""Rejects arguments that overlap a tensor which an op writes in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
Named = Sequence[tuple[str, Tensor]]


def refuse_overlaps(written: Named, read: Named) -> None:
    """Rejects any overlap of a written tensor with another, written or read.

    Written tensors are dense. A read tensor is treated as the range from its first to its last
    element, so interleaved rows are rejected, too. Reads only metadata and runs on every call.

    Raises:
        ValueError: names both arguments.
    """
    if any(type(x) not in _PLAIN or x.is_meta for _, x in written):
        _refuse_shared_storage(written, read)
        return
    starts = [x.data_ptr() for _, x in written]
    ends = [start + x.nbytes for start, (_, x) in zip(starts, written, strict=True)]
    first, last = min(starts), max(ends)
    for name, x in read:
        start = x.data_ptr()
        if start < last and start + extent(x) > first:
            _refuse(written, starts, ends, name, x, start)
    for i, (name, x) in enumerate(written[1:], 1):
        _refuse(written[:i], starts, ends, name, x, starts[i])


def extent(x: Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    if x.is_contiguous() or not x.numel():
        return x.nbytes
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def _refuse(
    written: Named, starts: list[int], ends: list[int], name: str, x: Tensor, start: int
) -> None:
    """Raises if x, at `start`, overlaps one of `written` (one address space per device)."""
    for (other, y), its_start, its_end in zip(written, starts, ends, strict=False):
        if start < its_end and its_start < start + extent(x) and x.device == y.device:
            raise ValueError(
                f"{other}, {name}: got tensors that share memory; needed: separate memory for "
                f"{other}, which is written in place"
            )


def _refuse_shared_storage(written: Named, read: Named) -> None:
    """The same for fake and meta tensors, which have no address but whose views share a storage."""
    for i, (name, x) in enumerate((*written, *read)):
        storage, start = x.untyped_storage()._cdata, _offset(x)
        beside = [y for y in written[:i] if y[1].untyped_storage()._cdata == storage]
        starts = [_offset(y) for _, y in beside]
        ends = [at + int(y.nbytes) for at, (_, y) in zip(starts, beside, strict=True)]
        _refuse(beside, starts, ends, name, x, start)


def _offset(x: Tensor) -> int:
    return int(x.storage_offset()) * x.element_size()
