"""What the first call with some shapes, strides, dtypes and options worked out, for the next ones.

Keys and what is kept hold numbers, dtypes and devices: never a tensor, never an address.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from afd_kernels import dispatch, metadata
from afd_kernels.kept import Kept

# Keys per generation; two generations are kept.
_SIZE = 512


class Prepared(NamedTuple):
    """A checked call: `run` is the backend's function, `plan` what the check returned."""

    plan: Any
    run: Callable[..., Any]
    # Whether every tensor already has the strides that backends take.
    dense: bool


class _Memory:
    """A bounded map, of which the entries used last stay; safe in threads without a lock.

    An entry that is found in the older generation moves to the newer one; a full newer one becomes
    the older. A race between threads loses an entry at worst.
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
    """Forgets every plan."""
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
    """The plan of a call and the backend's function that runs it, from memory where it is known.

    Args:
        op: an op of dispatch.OPS.
        function: the backends' function.
        check: (*tensors, *options), the op's contract; looks at metadata alone.
        tensors: the op's tensors; None for those not given.
        options: its other arguments.
        chosen_by: indices of the tensors by which the backend is picked.
        dense: gives the tensors the strides that backends take, by copies where needed.
        also: what else a plan depends on: arguments that are not checked, alignment of addresses.

    Raises:
        ValueError: from the contract; nothing is kept then.
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
