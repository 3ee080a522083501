"""Backend selection for ops, with the reasons why a backend is not used.

The order is fixed: an op runs on the first backend for which `refuse(device, dtypes)` and, if it is
defined, `unfit(tensors)` return None. An explicit request (`use_backend`) that cannot be met raises
with every reason; the automatic choice falls through and logs each reason once.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

# Each op's backends, in the order in which they are tried. Preferring native for qk_norm_rope and
# adaln on a GPU is based on prediction, not measurement: its machine code has about as many
# instructions per token as Triton's in the forwards, and fewer in the backwards
# (tests/offline/predicted.py).
_FUSED = ("native", "triton", "reference")
OPS: dict[str, tuple[str, ...]] = {
    "forward_noise": _FUSED,
    "nft_loss": _FUSED,
    "block_attention": ("library", "triton", "reference"),
    "qk_norm_rope": _FUSED,
    "adaln": _FUSED,
}
BACKENDS = ("native", "library", "triton", "reference")

_log = logging.getLogger("afd")


class Request:
    """One `use_backend` block; compared by identity."""

    def __init__(self, backend: str, ops: tuple[str, ...]) -> None:
        self.backend, self.ops = backend, ops


# Active requests of this thread and task, innermost last.
_requested: ContextVar[tuple[Request, ...]] = ContextVar("afd_requested", default=())
_logged: set[tuple[str, str, str]] = set()


@contextmanager
def use_backend(backend: str, *ops: str) -> Iterator[None]:
    """Runs `ops` (every op if none is named) on `backend` inside the block.

    If the backend refuses, the op raises. The innermost request for an op takes precedence. The
    request applies to this thread and asyncio task. Tasks created inside inherit it; threads do not
    (`contextvars.copy_context().run` passes it on). A backward uses the requests of its forward,
    wherever it is called; in a compiled graph, those active where it runs.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; needed: one of {', '.join(BACKENDS)}")
    for op in ops:
        if op not in OPS:
            raise ValueError(f"ops: got {op!r}; needed: one of {', '.join(OPS)}")
    request = Request(backend, ops)
    _requested.set((*_requested.get(), request))
    try:
        yield
    finally:
        # Not ContextVar.reset: generators may exit their blocks out of order or in another context.
        _requested.set(tuple(x for x in _requested.get() if x is not request))


def requested() -> tuple[Request, ...]:
    """The requests active here, to be passed to `use_requested` elsewhere."""
    return _requested.get()


@contextmanager
def use_requested(requests: tuple[Request, ...]) -> Iterator[None]:
    """Runs the block with exactly these requests, such as a backward with those of its forward.

    Autograd runs backwards of CUDA ops on its own threads, which start without requests.
    """
    before = _requested.get()
    _requested.set(requests)
    try:
        yield
    finally:
        _requested.set(before)


def explain(
    op: str, device: str, dtypes: set[torch.dtype], tensors: Sequence[torch.Tensor] = ()
) -> dict[str, str | None]:
    """Per backend, the reason why it refuses such inputs, or None if it can run them.

    `tensors`: the op's first inputs; reasons may then also concern their widths, strides and
    addresses.
    """
    if op not in OPS:
        raise ValueError(f"op: got {op!r}; needed: one of {', '.join(OPS)}")
    reasons = {name: _refusal(op, name, device, frozenset(dtypes)) for name in OPS[op]}
    for name, reason in reasons.items():
        if tensors and reason is None and (looks := _looks(op, name)) is not None:
            reasons[name] = looks.unfit(tensors)
    return reasons


def requested_backend(op: str) -> str | None:
    """The backend requested for `op` by the active blocks, or None."""
    requests = _requested.get()
    if not requests:
        return None
    return next((x.backend for x in reversed(requests) if not x.ops or op in x.ops), None)


def pick(op: str, *tensors: torch.Tensor | None) -> Any:
    """The backend module that runs `op` on these inputs.

    Raises:
        RuntimeError: if the requested backend refuses; the message lists every reason.
    """
    given = [x for x in tensors if x is not None]
    device, dtypes = given[0].device.type, frozenset(x.dtype for x in given)
    requested = requested_backend(op)
    for name in (requested,) if requested else OPS[op]:
        reason = _refusal(op, name, device, dtypes)
        if reason is None and (looks := _looks(op, name)) is not None:
            reason = looks.unfit(given)
        if reason is None:
            return _module(op, name)
        if not requested and (op, name, reason) not in _logged:
            _logged.add((op, name, reason))
            _log.info("%s: %s backend not used: %s", op, name, reason)
    states = explain(op, device, set(dtypes), given)
    reasons = "; ".join(f"{name}: {why or 'would run'}" for name, why in states.items())
    raise RuntimeError(f"{op}: backend {requested!r} was requested and cannot run it ({reasons})")


def report(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, dict[str, str]]:
    """Per op, the backend chosen on `device` for `dtype`, and a description of each backend."""
    table: dict[str, dict[str, str]] = {}
    for op in OPS:
        reasons = explain(op, device, {dtype})
        chosen = next(name for name, why in reasons.items() if why is None)
        table[op] = {"chosen": chosen}
        for name, why in reasons.items():
            table[op][name] = why or _available(op, name, device, dtype)
    return table


def _available(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    """ "available", and for a backend with a choice of its own, what it would run."""
    describe = getattr(_module(op, backend), "describe", None)
    return "available" if describe is None else f"available: {describe(device, dtype)}"


@functools.cache
def _module(op: str, backend: str) -> Any:
    suffix = "" if backend == "reference" else "_impl"
    return importlib.import_module(f"afd_kernels.{op}.{backend}{suffix}")


@functools.cache
def _looks(op: str, backend: str) -> Any | None:
    """The backend's module if it also inspects the tensors, else None."""
    module = _module(op, backend)
    return module if hasattr(module, "unfit") else None


@functools.cache
def _refusal(op: str, backend: str, device: str, dtypes: frozenset[torch.dtype]) -> str | None:
    if backend not in OPS[op]:
        return f"{op} has no {backend} backend"
    try:
        module = _module(op, backend)
    except ImportError as error:
        return f"cannot import it ({error})"
    reason: str | None = module.refuse(device, set(dtypes))
    return reason
