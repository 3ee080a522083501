"""Definition of ops in `Library("afd")`, with their fakes and derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.library import Library

from afd_kernels import derivatives
from afd_kernels.bypass import bypass_dispatcher
from afd_kernels.derivatives import Rule

LIBRARY = Library("afd", "DEF")


# Types of an op's arguments, and their names in a schema.
_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    str: "str",
    str | None: "str?",
    bool: "bool",
    Sequence[float]: "float[]",
}


def schema(fields: type[Any]) -> str:
    """The fields of a NamedTuple as arguments of a schema."""
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(fields).items())


def define(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    rule: Rule,
    *,
    mutates: bool = False,
) -> Callable[..., Any]:
    """Registers `afd::<schema>` as an opaque op with `impl` on CPU and CUDA and `fake` on meta.

    Returns a function of the same arguments, all positional, that calls the op, by the fast path
    (bypass.py) if that makes no observable difference.

    The backend is chosen inside `impl`, so a compiled graph holds one node per call. `rule` holds
    the derivatives; an op that mutates has none.
    """
    name = schema.split("(")[0]
    tags = () if mutates else (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(schema, tags=tags)
    on_cuda = _on_its_device(impl)
    LIBRARY.impl(name, impl, "CPU")
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"afd::{name}", fake, lib=LIBRARY)

    def anywhere(*args: Any) -> Any:
        # The first tensor that is always given determines the device.
        return (on_cuda if args[place].is_cuda else impl)(*args)

    op = getattr(torch.ops.afd, name).default
    place = [str(x.type) for x in op._schema.arguments].index("Tensor")
    run = derivatives.register(LIBRARY, name, anywhere, rule, mutates=mutates)
    return bypass_dispatcher(op, run, place)


def _on_its_device(impl: Callable[..., Any]) -> Callable[..., Any]:
    """`impl` with the device of its first CUDA tensor made current, for Triton and other launches.

    PyTorch's built-in kernels do this themselves; a Python kernel has to do it explicitly.
    """

    @functools.wraps(impl)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        # The first CUDA tensor, not the first tensor: reporting bad inputs is up to the op.
        on = next(x.device for x in given if isinstance(x, Tensor) and x.is_cuda)
        with torch.cuda.device(on):
            return impl(*args, **kwargs)

    return run
