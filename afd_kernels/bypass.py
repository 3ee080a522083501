"""A fast path to an op's kernel that bypasses PyTorch's dispatcher when that is unobservable.

Two round trips between Python and the dispatcher cost more than the kernels of small tensors. A
call takes the fast path if its tensors are plain CPU or CUDA tensors and no mode, transform, trace
or profiler is active; any other call goes through torch.ops.afd.<op>.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from afd_kernels import metadata

_PLAIN = (Tensor, torch.nn.Parameter)
# Argument types that the dispatcher passes through unchanged.
_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": _PLAIN,
    "Optional[Tensor]": (*_PLAIN, type(None)),
    "float": (float,),
    "Optional[float]": (float, type(None)),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "Optional[str]": (str, type(None)),
    "List[float]": (list,),
    "List[int]": (list,),
    "List[bool]": (list, tuple),
}
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._are_functorch_transforms_active
_trace = torch._C._get_tracing_state
_profiles = torch._C._autograd._profiler_enabled


def bypass_dispatcher(op: Any, run: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Wrap `op` so that plain calls use `run`. Argument `place` is a tensor in every call."""
    allowed = [_TYPES[str(x.type)] for x in op._schema.arguments]
    # The tensors come first in every schema.
    count = sum("Tensor" in str(x.type) for x in op._schema.arguments)
    names = [x.name for x in op._schema.arguments[:count]]
    optional = [str(x.type) == "Optional[Tensor]" for x in op._schema.arguments[:count]]
    # Argument-type tuples known to match the schema; they are few.
    known: set[tuple[type, ...]] = set()

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not _nothing_active():
            _refuse_non_tensors(names, optional, args)
            return op(*args)
        types = tuple(map(type, args))
        if types not in known:
            if len(types) != len(allowed) or not all(map(_is_one_of, types, allowed)):
                _refuse_non_tensors(names, optional, args)
                return op(*args)
            known.add(types)
        if not (args[place].is_cpu or args[place].is_cuda):
            return op(*args)
        # A backward may receive tensors of a transform that is no longer active.
        if not metadata.all_usual(args, count):
            return op(*args)
        return run(*args)

    return call


def _refuse_non_tensors(names: list[str], optional: list[bool], args: tuple[Any, ...]) -> None:
    """Rejects numbers, arrays and the like where the schema has a tensor.

    Raises:
        ValueError: names the argument.
    """
    for name, may_be_none, value in zip(names, optional, args, strict=False):
        if not (isinstance(value, Tensor) or (may_be_none and value is None)):
            needed = "a tensor or None" if may_be_none else "a tensor"
            raise ValueError(f"{name}: got {value!r}; needed: {needed}")


def _is_one_of(kind: type, allowed: tuple[type, ...]) -> bool:
    return kind in allowed


def _nothing_active() -> bool:
    """Whether no mode, transform, trace or profiler is active."""
    return not (
        _dispatch_modes()
        or _function_modes()
        or _transforms()
        or forward_ad._current_level >= 0
        or _trace()
        or _profiles()
    )
