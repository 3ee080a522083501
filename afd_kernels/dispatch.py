"""Which backend runs an op here, and why the others do not.

The order is fixed; the first backend whose `refuse(...)` returns None runs. An explicit request
(`use_backend`) that cannot be met raises with every reason; the automatic choice falls through
and logs each reason once.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("native", "triton", "reference")
OPS = ("forward_noise", "nft_loss")

_log = logging.getLogger("afd")
_requested: ContextVar[str | None] = ContextVar("afd_backend", default=None)
_logged: set[str] = set()


def backend_module(op: str, backend: str) -> ModuleType:
    """The module that implements `op` on `backend`, e.g. afd_kernels.nft_loss.native_impl."""
    suffix = "" if backend == "reference" else "_impl"
    return importlib.import_module(f"afd_kernels.{op}.{backend}{suffix}")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Runs every op of the block on `backend`, or raises where that backend refuses."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; needed: one of {', '.join(BACKENDS)}")
    token = _requested.set(backend)
    try:
        yield
    finally:
        _requested.reset(token)


def explain(op: str, *tensors: torch.Tensor | None) -> dict[str, str | None]:
    """For each backend the sentence with which it refuses these inputs, or None where it runs."""
    return {name: _refusal(op, name, tensors) for name in BACKENDS}


def pick(op: str, *tensors: torch.Tensor | None) -> ModuleType:
    """The backend module that runs `op` on these inputs.

    Raises:
        RuntimeError: when the requested backend refuses; the message holds every reason.
    """
    requested = _requested.get()
    for name in (requested,) if requested else BACKENDS:
        reason = _refusal(op, name, tensors)
        if reason is None:
            return backend_module(op, name)
        if not requested and (line := f"{op}: {name} backend not used: {reason}") not in _logged:
            _logged.add(line)
            _log.info(line)
    reasons = "; ".join(f"{n}: {why or 'would run'}" for n, why in explain(op, *tensors).items())
    raise RuntimeError(f"{op}: backend {requested!r} was requested and cannot run it ({reasons})")


def report(device: str = "cpu") -> dict[str, dict[str, str]]:
    """Per op, which backend a plain bfloat16/float32 call on `device` uses, and each refusal."""
    sample = torch.empty(1, 1, device="meta")
    table: dict[str, dict[str, str]] = {}
    for op in OPS:
        reasons = {name: backend_module_reason(op, name, device, sample) for name in BACKENDS}
        chosen = next(name for name, reason in reasons.items() if reason is None)
        table[op] = {"chosen": chosen} | {n: why or "available" for n, why in reasons.items()}
    return table


def backend_module_reason(op: str, name: str, device: str, sample: torch.Tensor) -> str | None:
    """Why `name` cannot run a plain float32 call of `op` on `device`, or None."""
    return _refusal(op, name, (sample,), device)


def _refusal(
    op: str, name: str, tensors: tuple[torch.Tensor | None, ...], device: str | None = None
) -> str | None:
    try:
        module = backend_module(op, name)
    except ImportError as error:
        return f"cannot import it ({error})"
    given = [x for x in tensors if x is not None]
    kind = device or given[0].device.type
    dtypes = {x.dtype for x in given}
    refuse: Any = module.refuse
    return refuse(kind, dtypes)
