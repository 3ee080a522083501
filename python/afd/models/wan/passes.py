"""One pass through the network: what its self-attention reads, and how a clip's keys are placed.

Shape letters: B batch, L tokens, h heads, d head channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afd import ops
from afd.models.wan.block import EPS, Attention
from afd.models.wan.kv_cache import KVCache
from afd.models.wan.sequence import SequenceGroup
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
        rope: rotary table of the pass's tokens, of a sequence group those of this process.
        intervals: the keys each query attends to.
        tokens: those of a frame.
        sequence: the processes that compute the pass together.
        context: per layer, keys and values that precede those of the pass; or
        cache: to which the pass appends its keys and values, and from which it reads all.
        keep: return the pass's keys and values; otherwise each layer's are freed.
        keys_only: compute only keys and values in the last layer.
        keys: where a clip's own keys stand; None: as they come.
        last: (frames, intervals): the last layer skips this many leading frames, and uses these
            intervals.
    """

    rope: Tensor
    intervals: Intervals
    tokens: int
    sequence: SequenceGroup | None = None
    context: list[LayerKV] | None = None
    cache: KVCache | None = None
    keep: bool = False
    keys_only: bool = False
    keys: ClipKeys | None = None
    last: tuple[int, Intervals] | None = None

    @property
    def own_tokens(self) -> int:
        """Tokens of a frame that this process has outside self-attention."""
        return self.tokens if self.sequence is None else self.sequence.own(self.tokens)

    def placed(
        self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, LayerKV, LayerKV | tuple[None, None]]:
        """Norm and rotate a layer's raw q and k, each [B, L, h, d], and put its keys in place.

        Returns the queries, the keys and values in the pass's own memory or its cache, and those
        that precede them.
        """
        norms = attention.norm_q.weight, attention.norm_k.weight
        cache = self.cache
        if cache is not None and self.sequence is None:
            q = ops.qk_norm_rope_append_(
                q,
                k,
                v,
                *norms,
                self.rope,
                *cache.self_kv[layer],
                cache.position,
                tokens_per_frame=cache.tokens_per_frame,
                sink_frames=cache.append_sink,
                eps=EPS,
            )
            return q, cache.view(layer), cache.past(layer)
        q, k = ops.qk_norm_rope(q, k, *norms, self.rope, eps=EPS)
        if self.sequence is not None:
            q, k, v = self.sequence.to_heads((q, k, v), self.tokens)
        if cache is not None:
            cache.append(layer, k, v)
            return q, cache.view(layer), cache.past(layer)
        own = k, v
        if self.keys is not None:
            own = self.keys.placed(layer, own, self.context)
        return q, own, (None, None) if self.context is None else self.context[layer]

    def attended(
        self, q: Tensor, own: LayerKV, context: LayerKV | tuple[None, None], seen: Intervals
    ) -> Tensor:
        """Attention of `placed` queries to these keys, [B, L, h, d] as the raw ones were."""
        # Continuations of one past are one stream of the attention.
        queries = q.reshape(len(own[0]), -1, *q.shape[2:])
        k_context, v_context = context
        out, _ = ops.block_attention(queries, *own, seen, k_context=k_context, v_context=v_context)
        out = out.view(q.shape)
        return out if self.sequence is None else self.sequence.to_tokens(out, self.tokens)
