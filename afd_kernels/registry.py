"""The one `Library("afd")`: how an op is defined, faked, differentiated and refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
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
    LIBRARY.impl(name, impl, "CPU")
    LIBRARY.impl(name, _on_its_device(impl), "CUDA")
    torch.library.register_fake(f"afd::{name}", fake, lib=LIBRARY)


def _on_its_device(impl: Callable[..., Any]) -> Callable[..., Any]:
    """`impl` with the device of its first CUDA tensor current, where Triton and others launch.

    PyTorch's own kernels see to that themselves; a kernel in Python has to.
    """

    @functools.wraps(impl)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        # Not any first tensor: what else is wrong with the inputs is for the op to say.
        on = next(x.device for x in given if isinstance(x, Tensor) and x.is_cuda)
        with torch.cuda.device(on):
            return impl(*args, **kwargs)

    return run


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
