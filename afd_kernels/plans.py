"""Cache of call plans, keyed by shapes, strides, dtypes and options.

Keys and entries hold numbers, dtypes and devices, never tensors or addresses.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from afd_kernels import dispatch, metadata
from afd_kernels.kept import Kept

# Entries per generation; two generations are kept.
_SIZE = 512


class Prepared(NamedTuple):
    """A checked call: `run` is the backend's function, `plan` what the check returned."""

    plan: Any
    run: Callable[..., Any]
    # Whether every tensor already has strides that the backends accept.
    dense: bool


class _Memory:
    """A bounded, approximately LRU map, thread-safe without a lock.

    A hit in the older generation moves the entry to the newer one; when the newer one is full, it
    becomes the older. At worst, a race between threads loses an entry.
    """

    def __init__(self) -> None:
        self.newer: dict[Hashable, Prepared] = {}
        self.older: dict[Hashable, Prepared] = {}

    def get(self, key: Hashable) -> Prepared | None:
        found = self.newer.get(key)
        if found is None and (found := self.older.get(key)) is not None:
            self.put(key, found)
        return found

    def put(self, key: Hashable, value: Prepared) -> None:
        if len(self.newer) >= _SIZE:
            self.older, self.newer = self.newer, {}
        self.newer[key] = value


_memory = _Memory()


def clear() -> None:
    """Clears the cache."""
    _memory.newer, _memory.older = {}, {}


def prepared(
    op: str,
    function: str,
    check: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    options: tuple[Hashable, ...],
    chosen_by: Sequence[int],
    dense: Callable[[Any], Sequence[Tensor | None]],
    also: Hashable = None,
) -> Prepared:
    """The plan of a call and the backend function that runs it, from the cache if present.

    Args:
        op: an op of dispatch.OPS.
        function: the backends' function.
        check: (*tensors, *options), the op's contract; reads only metadata.
        tensors: the op's tensors; None for those not given.
        options: the op's other arguments.
        chosen_by: indices of the tensors by which the backend is picked.
        dense: gives the tensors strides that the backends accept, copying if needed.
        also: other key parts: unchecked arguments, address alignment.

    Raises:
        ValueError: from the contract; nothing is cached then.
        RuntimeError: from the dispatch, likewise.
    """
    key = (
        function,
        dispatch.requested_backend(op),
        options,
        also,
        metadata.key(tuple(tensors)),
    )
    found = _memory.get(key)
    if found is not None:
        return found
    plan = check(*tensors, *options)
    given = [tensors[i] for i in chosen_by]
    module = dispatch.pick(op, *given)
    run = getattr(module, function)
    if hasattr(module, "KEEPS"):
        run = partial(run, kept=Kept())
    unchanged = all(map(operator.is_, dense(tensors), tensors))
    made = Prepared(plan, run, unchanged)
    _memory.put(key, made)
    return made
