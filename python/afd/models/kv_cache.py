"""Preallocated key/value cache of one streaming rollout.

Shape letters: B batch, H heads, S token slots, L text tokens, d head channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LayerKV = tuple[Tensor, Tensor]  # keys (normed, rotated) and values, each [B, H, tokens, d]


@dataclass
class KVCache:
    """Keys and values of the frames seen so far, and of the prompt, for every layer.

    Positions are Python integers, so a rollout never waits for the device. A chunk's denoising
    steps and its context pass write the same slots; what a later chunk sees is the last write.
    """

    self_kv: list[LayerKV]
    cross_kv: list[LayerKV]
    tokens_per_frame: int

    @property
    def frames(self) -> int:
        """How many frames fit."""
        return self.self_kv[0][0].shape[2] // self.tokens_per_frame

    def write(self, layer: int, k_BHLd: Tensor, v_BHLd: Tensor, start: int) -> LayerKV:
        """Store new tokens from slot `start` on; return views of everything up to their end."""
        end = start + k_BHLd.shape[2]
        k_BHSd, v_BHSd = self.self_kv[layer]
        k_BHSd[:, :, start:end] = k_BHLd
        v_BHSd[:, :, start:end] = v_BHLd
        return k_BHSd[:, :, :end], v_BHSd[:, :, :end]


def allocate(
    cross_kv: list[LayerKV], batch: int, heads: int, head_dim: int, frames: int, tokens: int
) -> KVCache:
    """Empty cache for `frames` frames of `tokens` tokens; dtype and device of the text keys."""
    like = cross_kv[0][0]

    def empty() -> Tensor:
        shape = (batch, heads, frames * tokens, head_dim)
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    return KVCache([(empty(), empty()) for _ in cross_kv], cross_kv, tokens)
