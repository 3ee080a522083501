"""Differentiation and batching of ops: autograd, forward mode and torch.func in one mechanism.

Each op has a kernel for the Autograd dispatch key, which PyTorch calls at every level: for a plain
backward, for forward mode, and for each grad or jvp of torch.func around the call; it then
redispatches the call to the next level. A second kernel implements vmap as a loop over the mapped
dimension. Derivatives that a rule does not provide raise an error; none is silently zero.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.library import Library

from afd_kernels import dispatch


@dataclass(frozen=True)
class Rule:
    """The derivatives of an op; None for those it does not have.

    Attributes:
        instead: the plain PyTorch function that is differentiable where the op is not.
        setup_context: (ctx, inputs, output), as in torch.autograd.Function. `ctx.transformed` is
            True if the results may be differentiated again: under torch.func, or with a tangent.
        backward: (ctx, *grads), one gradient per argument of the op.
        jvp: (ctx, *tangents), one tangent (or None) per argument; reads what setup_context saved
            for forward. `ctx.inner` is True where a torch.func transform inside this one
            differentiates the same call.
        prepare: maps the arguments of a call that is differentiated.
    """

    instead: str
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    jvp: Callable[..., Any] | None = None
    prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None


class _Call(NamedTuple):
    """The extra last input of an op's autograd function, after its arguments."""

    # None if the call took the fast path (bypass.py).
    keyset: Any
    # Whether one of the arguments has a tangent.
    tangent: bool
    # The grad mode outside the differentiating torch.func level; None if there is none.
    grad_enabled: bool | None


class _Levels(threading.local):
    """Number of differentiating torch.func transforms that have redispatched the current call."""

    passed: int = 0


_levels = _Levels()


def register(
    library: Library, name: str, impl: Callable[..., Any], rule: Rule, *, mutates: bool
) -> Callable[..., Any]:
    """Gives `afd::<name>` its derivatives and vmap.

    Returns the implementation of a call under autograd only: `impl`, recorded if a gradient is
    needed.
    """
    op = getattr(torch.ops.afd, name).default
    function = _function(op, impl, rule)
    kernel = _in_place_kernel(op, rule) if mutates else _kernel(op, function, rule)
    library.impl(name, kernel, "Autograd", with_keyset=True)
    vmap = _refused_vmap(op, rule) if mutates else _vmap(op)
    torch.library.register_vmap(f"afd::{name}", vmap, lib=library)
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def run(*args: Any) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return impl(*args)
        if mutates:
            return op(*args)
        if rule.prepare is not None:
            args = rule.prepare(args)
        return apply(*args, _Call(None, False, None))

    return run


def _below(op: Any, keyset: Any, args: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _has_tangent(args: tuple[Any, ...]) -> bool:
    """Whether forward mode differentiates with respect to one of `args` at this level.

    A graph traced by torch.compile enters its level without forward_ad's knowledge, hence the
    other checks; level 0 is the only level.
    """
    possible = (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )
    if not possible:
        return False
    # Only asks: a trace must not contain the aliases that unpack_dual makes. Inductor, which traces
    # a mutating op twice, refuses a graph to which the second time adds nodes.
    with disable_proxy_modes_tracing():
        return any(
            isinstance(x, Tensor) and forward_ad.unpack_dual(x, level=0).tangent is not None
            for x in args
        )


def _kernel(op: Any, function: type[torch.autograd.Function], rule: Rule) -> Callable[..., Any]:
    # Function.apply inspects signatures and transforms on every call; neither is needed.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def run(keyset: Any, *args: Any) -> Any:
        tangent = _has_tangent(args)
        if not (tangent or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))):
            return _below(op, keyset, args)
        if rule.prepare is not None:
            args = rule.prepare(args)
        if not torch._C._are_functorch_transforms_active():
            return apply(*args, _Call(keyset, tangent, None))
        with enable_single_level_autograd_function():
            return apply(*args, _Call(keyset, tangent, torch.is_grad_enabled()))

    return run


@contextlib.contextmanager
def _next_level(grad_enabled: bool) -> Iterator[None]:
    """Restore the caller's modes, which autograd disabled for `forward`, for the next level."""
    _levels.passed += 1
    try:
        with torch.set_grad_enabled(grad_enabled), forward_ad._set_fwd_grad_enabled(True):
            yield
    finally:
        _levels.passed -= 1


def _function(op: Any, impl: Callable[..., Any], rule: Rule) -> type[torch.autograd.Function]:
    name = op._schema.name

    def forward(ctx: Any, *inputs: Any) -> Any:
        *args, call = inputs
        if call.keyset is None:
            output = impl(*args)
        elif call.grad_enabled is None:
            output = _below(op, call.keyset, args)
        else:
            with _next_level(call.grad_enabled):
                output = _below(op, call.keyset, args)
        ctx.requested = dispatch.requested()
        ctx.inner = _levels.passed > 0
        ctx.transformed = call.grad_enabled is not None or ctx.inner or call.tangent
        if rule.setup_context is not None:
            rule.setup_context(ctx, args, output)
        return output

    def backward(ctx: Any, *grads: Any) -> Any:
        if rule.backward is None:
            raise RuntimeError(
                f"{name} has no derivative (double backward); {rule.instead} is twice "
                "differentiable"
            )
        # A backward uses the backend requested in its forward, wherever it is called.
        with dispatch.use_requested(ctx.requested):
            return *rule.backward(ctx, *grads), None

    def jvp(ctx: Any, *tangents: Any) -> Any:
        if rule.jvp is None:
            raise RuntimeError(
                f"{name} has no forward-mode derivative (jvp, dual tensors); {rule.instead} has one"
            )
        return rule.jvp(ctx, *tangents[:-1])

    members = {"forward": forward, "backward": backward, "jvp": jvp}
    return type(
        name.replace("::", "_"),
        (torch.autograd.Function,),
        {key: staticmethod(member) for key, member in members.items()},
    )


def _in_place_kernel(op: Any, rule: Rule) -> Callable[..., Any]:
    names = [x.name for x in op._schema.arguments]

    def run(keyset: Any, *args: Any) -> Any:
        if (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)) or _has_tangent(args):
            tensors = [(name, x) for name, x in zip(names, args, strict=True) if _is_tensor(x)]
            name = next((n for n, x in tensors if x.requires_grad or _has_tangent((x,))), names[0])
            raise RuntimeError(
                f"{name}: got a tensor that requires grad or has a tangent; needed: none, as "
                f"{op._schema.name} writes in place and has no derivative (torch.no_grad(), or "
                f"{rule.instead})"
            )
        return _below(op, keyset, args)

    return run


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def _refused_vmap(op: Any, rule: Rule) -> Callable[..., Any]:
    def run(info: Any, in_dims: Any, *args: Any) -> Any:
        raise RuntimeError(
            f"{op._schema.name} writes in place and has no vmap; {rule.instead} has one"
        )

    return run


def _vmap(op: Any) -> Callable[..., Any]:
    """The vmap rule: one call per element of the mapped dimension."""

    def run(info: Any, in_dims: Any, *args: Any) -> Any:
        def element(i: int) -> Any:
            return op(
                *(
                    x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x
                    for x, dim in zip(args, in_dims, strict=True)
                )
            )

        results = [element(i) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return stacked, (0,) * len(stacked)

    return run
