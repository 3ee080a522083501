"""Noise sources of streams, one per rollout call.

Shape letters: B videos, c frames of one chunk, C channels, H x W latent size; K chunks, S draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from afd import ops

# (chunk, step) -> standard normal noise [B, c, C, H, W]; step 0 is the chunk's initial noise.
NoiseSource = Callable[[int, int], Tensor]
# First frame and number of frames of every chunk.
Layout = tuple[tuple[int, int], ...]


def seeded_noise(seeds: Sequence[int] | Tensor, shape: tuple[int, ...]) -> NoiseSource:
    """CPU noise from one generator per video, so that a video does not depend on its batch."""
    generators = [Generator().manual_seed(int(seed)) for seed in seeds]

    def draw(chunk: int, step: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators])

    return draw


def counted_noise(
    seeds: Sequence[int],
    layout: Layout,
    draws: int,
    frame_shape: tuple[int, int, int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> NoiseSource:
    """Counter-based noise that depends only on (seed of the video, chunk, step).

    It is independent of the batch, the device and earlier draws: every draw is a separate Philox
    stream (`afd.ops.forward_noise`). All keys are on the device before the first draw, so drawing
    never synchronises. `draws` is the largest number of draws of a chunk, one per step.
    """
    keys_KSB = torch.tensor(
        [
            [[_key(seed, chunk, step) for seed in seeds] for step in range(draws)]
            for chunk in range(len(layout))
        ],
        dtype=torch.int64,
    ).to(device)
    pure_B = torch.ones(len(seeds), device=device)
    blanks = {
        count: torch.zeros(len(seeds), count, *frame_shape, device=device, dtype=dtype)
        for count in {count for _, count in layout}
    }

    def draw(chunk: int, step: int) -> Tensor:
        blank = blanks[layout[chunk][1]]
        return ops.forward_noise(blank, pure_B, seed=keys_KSB[chunk, step], layout="BFCHW")

    return draw


def _key(seed: int, chunk: int, step: int) -> int:
    """Mix the three into a 64-bit key (int64) with SplitMix64's finalizer (Steele et al. 2014)."""
    key = 0
    for word in (seed, chunk, step):
        key = (key + word + 0x9E3779B97F4A7C15) % 2**64
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
        key ^= key >> 31
    return key - 2**64 if key >= 2**63 else key
