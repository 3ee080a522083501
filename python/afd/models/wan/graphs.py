"""A student's streaming passes as CUDA graphs: one launch instead of some hundred per pass.

What changes between replays lies in memory that stays where it is: the chunk, the modulation of its
time, the position and its rotary table. A graph is then known by how much of the cache is in use,
so there is one per chunk index and kind of pass (and adapter), and a single one for all chunks of a
full ring.
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

# Runs before a capture: libraries make their handles and kernels are compiled, which may not be
# captured. They write to the cache what the replay writes again.
WARMUPS = 2


@dataclass(frozen=True)
class _Recorded:
    """One pass with its inputs and its output in fixed memory."""

    x_BFCHW: Tensor
    times: TimeTable
    out_BFCHW: Tensor | None
    replay: Callable[[], Any]


class FixedPasses:
    """`CausalWan.forward_cached` with every input in fixed memory; a replay runs the pass again.

    What `GraphedPasses` does without the graphs, so it also runs where there are none. Another
    cache starts anew; a cache that is reset keeps its passes. The weights are read where they lie:
    after an update in place only `KVCache.reset` is needed.
    """

    def __init__(self, net: CausalWan) -> None:
        self._net = net
        self._cache: KVCache | None = None
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}

    @property
    def count(self) -> int:
        """Passes recorded for the present cache."""
        return len(self._recorded)

    @torch.no_grad()
    def __call__(
        self, x_BFCHW: Tensor, t_11: Tensor, cache: KVCache, start: int, context: bool
    ) -> Tensor | None:
        """As `forward_cached`; the result is memory of its own."""
        if cache is not self._cache:
            self._recorded.clear()
            self._cache = cache
        cache.seek(start, x_BFCHW.shape[1])
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
        # The next replay overwrites the output, and a student may hand it out as a finished chunk.
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
    """`FixedPasses` whose passes are captured at their first use and replayed from then on.

    Raises:
        ValueError: where the network is not on a CUDA device.
    """

    def __init__(self, net: CausalWan) -> None:
        super().__init__(net)
        device = net.patch_embedding.weight.device
        require(device.type == "cuda", "cuda_graphs", str(device), "a network on a CUDA device")
        # Replays never overlap, so all graphs share the memory of their intermediates.
        self._pool = torch.cuda.graph_pool_handle()
        # Of the network's device. PyTorch's default is one stream for the whole process, of the
        # device that was current at its first capture.
        self._stream = torch.cuda.Stream(device)

    def _record(
        self, x_BFCHW: Tensor, times: TimeTable, cache: KVCache, context: bool
    ) -> _Recorded:
        # Streams and captures are the current device's, which need not be the network's.
        with torch.cuda.device(x_BFCHW.device):
            stream = self._stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    self._net.streamed(x_BFCHW, times, cache, context)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Not "global": a thread that records an earlier chunk may wait for its event meanwhile.
            mode = "thread_local"
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode=mode):
                out = self._net.streamed(x_BFCHW, times, cache, context)
        return _Recorded(x_BFCHW, times, out, graph.replay)


def _tensors(times: TimeTable) -> list[Tensor]:
    return [times.embed_BFD, *times.mods]
