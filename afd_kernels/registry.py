"""The one `Library("afd")`: how an op is defined, faked, differentiated and refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

LIBRARY = Library("afd", "DEF")


def define(
    schema: str, impl: Callable[..., Any], fake: Callable[..., Any], *, mutates: bool = False
) -> None:
    """Registers `afd::<schema>` as an opaque op with `impl` on CPU and CUDA and `fake` on meta.

    The backend is chosen inside `impl`, so a compiled graph holds one node per call.
    """
    name = schema.split("(")[0]
    tags = () if mutates else (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(schema, tags=tags)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, impl, key)
    torch.library.register_fake(f"afd::{name}", fake, lib=LIBRARY)


def differentiate(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Registers the first derivative of `afd::<name>`."""
    torch.library.register_autograd(
        f"afd::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def refuse_double_backward(name: str, instead: str) -> None:
    """Gives `afd::<name>` a derivative that raises; without one autograd is silently wrong."""

    def backward(_ctx: Any, *_grads: Any) -> Any:
        raise RuntimeError(
            f"afd::{name} has no derivative (double backward); {instead} is twice differentiable"
        )

    differentiate(name, lambda ctx, inputs, output: None, backward)
