"""A student's streaming passes as CUDA graphs: one launch instead of some hundred per pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afd.models.causal_wan import CausalWan
from afd.models.kv_cache import KVCache
from afd.models.wan_block import TimeTable
from afd_kernels.contracts import require


@dataclass(frozen=True)
class _Captured:
    graph: Any
    out: Tensor | None


class GraphedPasses:
    """Captures each pass of one cache at its first use and replays it from then on.

    A pass is known by the chunk's shape, its time, how much of the cache is in use, and whether it
    is a context pass: with a window these are few however long the stream, and streams that reuse
    the cache (`KVCache.reset`) reuse the graphs. Another cache starts anew. The weights' modulation
    at each time is kept with the graphs, so make a new object after an update of the weights.

    An output is overwritten by the next replay of the same pass.
    """

    def __init__(self, net: CausalWan) -> None:
        device = net.patch_embedding.weight.device
        require(device.type == "cuda", "cuda_graphs", str(device), "a network on a CUDA device")
        self._net = net
        self._pool = torch.cuda.graph_pool_handle()
        self._cache: KVCache | None = None
        self._graphs: dict[tuple[Any, ...], _Captured] = {}
        self._times: dict[float, TimeTable] = {}
        self._inputs: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, x_BFCHW: Tensor, t: float, t_11: Tensor, cache: KVCache, start: int, context: bool
    ) -> Tensor | None:
        """`CausalWan.forward_cached` at time t (`t_11` on the device)."""
        if cache is not self._cache:
            self._graphs.clear()
            self._cache = cache
        cache.seek(start, x_BFCHW.shape[1])
        shape = tuple(x_BFCHW.shape)
        # Every pass of a shape reads the same memory; its replay is ordered after the copy.
        x = self._inputs.setdefault(shape, torch.empty_like(x_BFCHW))
        x.copy_(x_BFCHW)
        if t not in self._times:
            self._times[t] = self._net.time_table(t_11)
        key = (shape, t, cache.valid, context)
        if key not in self._graphs:
            self._graphs[key] = self._captured(x, self._times[t], cache, context)
        captured = self._graphs[key]
        captured.graph.replay()
        return captured.out

    def _captured(self, x: Tensor, times: TimeTable, cache: KVCache, context: bool) -> _Captured:
        # Kernels are compiled and libraries make their handles in a first pass, which may not be
        # captured. It writes to the cache what the replay writes again.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._net.streamed(x, times, cache, context)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = self._net.streamed(x, times, cache, context)
        return _Captured(graph, out)
