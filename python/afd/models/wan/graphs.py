"""A student's streaming passes as CUDA graphs: one launch instead of some hundred per pass.

Inputs that change between replays are in fixed memory: the chunk, the modulation of its time, the
position and its rotary table. Graphs are keyed by how much of the cache is in use, so there is one
per chunk index and kind of pass (and adapter), and a single one for all chunks of a full ring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afd.models.wan.kv_cache import KVCache
from afd.models.wan.network import CausalWan
from afd.models.wan.types import TimeTable
from afd_kernels.contracts import require

# Runs before a capture, in which libraries create handles and kernels are compiled; neither can be
# captured. They write the same cache slots as the replay.
WARMUPS = 2


@dataclass(frozen=True)
class _Recorded:
    """One recorded pass, with its inputs and output in fixed memory."""

    x_BFCHW: Tensor
    times: TimeTable
    out_BFCHW: Tensor | None
    replay: Callable[[], Any]


class FixedPasses:
    """`CausalWan.forward_cached` with every input in fixed memory; a replay reruns the pass.

    The logic of `GraphedPasses` without CUDA graphs, so it runs on any device. A different cache,
    or one that has moved to other memory, discards all recorded passes; resetting a cache keeps
    them. Weights are read in place: after an in-place update only `KVCache.reset` is needed.
    """

    def __init__(self, net: CausalWan) -> None:
        self._net = net
        self._cache: KVCache | None = None
        self._memory = 0
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}

    @property
    def count(self) -> int:
        """Number of passes recorded for the current cache."""
        return len(self._recorded)

    @torch.no_grad()
    def __call__(
        self, x_BFCHW: Tensor, t_11: Tensor, cache: KVCache, start: int, context: bool
    ) -> Tensor | None:
        """Like `forward_cached`; the result is a new tensor."""
        cache.seek(start, x_BFCHW.shape[1])
        if cache is not self._cache or cache.memory != self._memory:
            self._recorded.clear()
            self._cache, self._memory = cache, cache.memory
        times = self._net.streaming_times(t_11, cache)
        adapters = self._net.adapters
        version = None if adapters is None else adapters.active
        key = (cache.valid, x_BFCHW.shape, times.embed_BFD.shape, context, version)
        if key not in self._recorded:
            own = TimeTable(times.embed_BFD.clone(), [mods.clone() for mods in times.mods])
            self._recorded[key] = self._record(x_BFCHW.clone(), own, cache, context)
        recorded = self._recorded[key]
        recorded.x_BFCHW.copy_(x_BFCHW)
        torch._foreach_copy_(_tensors(recorded.times), _tensors(times))
        recorded.replay()
        # Cloned, as the next replay overwrites the output and a student may return it as a finished
        # chunk.
        return None if recorded.out_BFCHW is None else recorded.out_BFCHW.clone()

    def _record(
        self, x_BFCHW: Tensor, times: TimeTable, cache: KVCache, context: bool
    ) -> _Recorded:
        out = self._net.streamed(x_BFCHW, times, cache, context)

        def replay() -> None:
            again = self._net.streamed(x_BFCHW, times, cache, context)
            if out is not None and again is not None:
                out.copy_(again)

        return _Recorded(x_BFCHW, times, out, replay)


class GraphedPasses(FixedPasses):
    """`FixedPasses` that captures each pass as a CUDA graph on first use and then replays it.

    Raises:
        ValueError: if the network is not on a CUDA device.
    """

    def __init__(self, net: CausalWan) -> None:
        super().__init__(net)
        device = net.patch_embedding.weight.device
        require(device.type == "cuda", "cuda_graphs", str(device), "a network on a CUDA device")
        # Replays never overlap, so all graphs share one pool for intermediates.
        self._pool = torch.cuda.graph_pool_handle()
        # On the network's device. PyTorch's default capture stream is one per process, on the
        # device that was current at the first capture.
        self._stream = torch.cuda.Stream(device)

    def _record(
        self, x_BFCHW: Tensor, times: TimeTable, cache: KVCache, context: bool
    ) -> _Recorded:
        # Streams and captures use the current device, which may not be the network's.
        with torch.cuda.device(x_BFCHW.device):
            stream = self._stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    self._net.streamed(x_BFCHW, times, cache, context)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Not "global": a thread that records an earlier chunk may be waiting for its event.
            mode = "thread_local"
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode=mode):
                out = self._net.streamed(x_BFCHW, times, cache, context)
        return _Recorded(x_BFCHW, times, out, graph.replay)


def _tensors(times: TimeTable) -> list[Tensor]:
    return [times.embed_BFD, *times.mods]
