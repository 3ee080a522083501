"""One pass through the network: what its self-attention reads, and how a clip's keys are placed.

Shape letters: B batch, L tokens, h heads, d head channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afd.models.wan.kv_cache import KVCache
from afd.models.wan.types import LayerKV
from afd.ops import Intervals


@dataclass(frozen=True)
class ClipKeys:
    """How a pass's own keys are placed among those that its queries attend to (`intervals.Clip`).

    Attributes:
        past: per layer keys and values that come before the pass's own, in one tensor with them.
        clean: tokens of the pass's own, the past included, before its noisy chunks.
        sink: tokens of the sink, a copy of which precedes every noisy chunk; 0: none does.
        chunk: tokens of a noisy chunk.
    """

    past: list[LayerKV] | None = None
    clean: int = 0
    sink: int = 0
    chunk: int = 0

    def placed(self, layer: int, own: LayerKV, context: list[LayerKV] | None) -> LayerKV:
        """Keys and values of a layer in their places. `context`: precedes them in other memory."""
        k, v = own
        if self.past is not None:
            k, v = (torch.cat(pair, 1) for pair in zip(self.past[layer], own, strict=True))
        if not self.sink:
            return k, v
        first_k, first_v = (k, v) if context is None else context[layer]
        return self._with_sink(k, first_k), self._with_sink(v, first_v)

    def _with_sink(self, x_BLhd: Tensor, first_BLhd: Tensor) -> Tensor:
        clean, noisy = (
            x_BLhd[:, : self.clean],
            x_BLhd[:, self.clean :].unflatten(1, (-1, self.chunk)),
        )
        sink = first_BLhd[:, None, : self.sink].expand(-1, noisy.shape[1], -1, -1, -1)
        return torch.cat([clean, torch.cat([sink, noisy], 2).flatten(1, 2)], 1)


@dataclass(frozen=True)
class Pass:
    """Inputs and options of self-attention in one pass.

    Attributes:
        rope: rotary table of the pass's tokens.
        intervals: the keys each query attends to.
        context: per layer, keys and values that precede those of the pass; or
        cache: to which the pass appends its keys and values, and from which it reads all.
        keep: return the pass's keys and values; otherwise each layer's are freed.
        keys_only: compute only keys and values in the last layer.
        keys: where a clip's own keys stand; None: as they come.
        last: (tokens, frames, intervals): the last layer skips this many leading tokens and
            frames, and uses these intervals.
    """

    rope: Tensor
    intervals: Intervals
    context: list[LayerKV] | None = None
    cache: KVCache | None = None
    keep: bool = False
    keys_only: bool = False
    keys: ClipKeys | None = None
    last: tuple[int, int, Intervals] | None = None
