"""Memory-bandwidth floors, measured in the same interleaved run as the ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_kernels import native


@dataclass(frozen=True)
class Floor:
    """A memory stream: the bytes moved per call, and the call (index of the buffer set)."""

    bytes: int
    run: Callable[[int], object]


def streams(nbytes: int, device: str, sets: int) -> dict[str, Floor]:
    """Five-read-one-write streams that move about `nbytes` per call: the floor is the fastest.

    CUDA: a Triton kernel. CPU: our compiled core's, with ordinary and with non-temporal stores;
    without the core `torch.addcmul`, which reads three, as its name indicates.
    """
    count = max(nbytes // 24, 1)
    buffers = [[_random(count, device) for _ in range(6)] for _ in range(sets)]
    if device == "cuda":
        from benchmarks.stream_triton import stream_5r1w

        return {"5R1W": Floor(24 * count, lambda i: stream_5r1w(buffers[i][:5], buffers[i][5]))}
    if native.why_missing() is not None:

        def addcmul(i: int) -> Tensor:
            a, b, c, *_, out = buffers[i]
            return torch.addcmul(a, b, c, out=out)

        return {"3R1W torch.addcmul": Floor(16 * count, addcmul)}

    def through_core(non_temporal: bool) -> Callable[[int], object]:
        return lambda i: native.stream_5r1w(
            buffers[i][:5], buffers[i][5], non_temporal=non_temporal
        )

    return {
        "5R1W": Floor(24 * count, through_core(False)),
        "5R1W non-temporal": Floor(24 * count, through_core(True)),
    }


def copy(nbytes: int, device: str) -> Floor:
    """A copy that reads and writes about `nbytes` in total."""
    count = max(nbytes // 8, 1)
    source, target = _random(count, device), _random(count, device)
    return Floor(8 * count, lambda _: target.copy_(source))


def _random(count: int, device: str) -> Tensor:
    return torch.rand(count, device=device)
