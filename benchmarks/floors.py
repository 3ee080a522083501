"""What the machine's memory can do, measured in the same interleaved run as the ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Floor:
    """A stream over memory: its name, the bytes one call moves, and the call (input set index)."""

    name: str
    bytes: int
    run: Callable[[int], object]


def floors(nbytes: int, device: str, sets: int) -> tuple[Floor, Floor]:
    """A 5-read-1-write stream and a copy that each move about `nbytes` per call.

    The stream is our compiled core's on the CPU and a Triton kernel on CUDA. A CPU without the
    core gets a 3-read-1-write `torch.addcmul`, and its name says so. The values are ones and
    zeros-free, so that no machine can shortcut them.
    """
    count = max(nbytes // 24, 1)
    buffers = [
        [torch.rand(count, device=device) + 0.5 for _ in range(6)] for _ in range(max(sets, 1))
    ]
    flat = [torch.rand(max(nbytes // 8, 1), device=device) + 0.5 for _ in range(2)]
    copy = Floor("copy", 8 * flat[0].numel(), lambda _: flat[1].copy_(flat[0]))
    return _stream(buffers, device), copy


def _stream(buffers: list[list[torch.Tensor]], device: str) -> Floor:
    count = buffers[0][0].numel()
    if device == "cuda":
        from benchmarks.stream_triton import stream_5r1w

        return Floor(
            "stream 5R1W (Triton)",
            24 * count,
            lambda i: stream_5r1w(buffers[i][:5], buffers[i][5]),
        )
    stream = _native_stream()
    if stream is not None:
        return Floor("stream 5R1W (native)", 24 * count, lambda i: stream(*buffers[i]))
    return Floor(
        "stream 3R1W (torch.addcmul)",
        16 * count,
        lambda i: torch.addcmul(buffers[i][0], buffers[i][1], buffers[i][2], out=buffers[i][5]),
    )


def _native_stream() -> Callable[..., object] | None:
    try:
        from afd_kernels import native
    except ImportError:
        return None
    return getattr(native, "stream_5r1w", None)
