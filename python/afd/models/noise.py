"""Noise sources of streams, one per rollout call.

Shape letters: B videos, c frames of one chunk, C channels, H x W latent size; K chunks, S draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Generator, Tensor

from afd import ops

# (chunk, step) -> standard normal noise [B, c, C, H, W]; step 0 is the chunk's initial noise.
NoiseSource = Callable[[int, int], Tensor]
# First frame and number of frames of every chunk.
Layout = tuple[tuple[int, int], ...]
# Chunks whose keys an endless stream of `counted_noise` moves to the device together.
KEYS_AHEAD = 256


@dataclass(frozen=True)
class EndlessLayout:
    """The layout of a stream without end: indexed and iterated like a `Layout`.

    Attributes:
        chunk: frames of a chunk.
        first_alone: the first frame is its own chunk.
    """

    chunk: int
    first_alone: bool = False

    def __getitem__(self, index: int) -> tuple[int, int]:
        if not self.first_alone or self.chunk == 1:
            return index * self.chunk, self.chunk
        return (0, 1) if index == 0 else (1 + (index - 1) * self.chunk, self.chunk)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (self[index] for index in count())


def seeded_noise(seeds: Sequence[int] | Tensor, shape: tuple[int, ...]) -> NoiseSource:
    """CPU noise from one generator per video, so that a video does not depend on its batch."""
    generators = [Generator().manual_seed(int(seed)) for seed in seeds]

    def draw(chunk: int, step: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators])

    return draw


def counted_noise(
    seeds: Sequence[int],
    layout: Layout | EndlessLayout,
    draws: int,
    frame_shape: tuple[int, int, int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> NoiseSource:
    """Counter-based noise that depends only on (seed of the video, chunk, step).

    It is independent of the batch, the device and earlier draws: every draw is a separate Philox
    stream (`afd.ops.forward_noise`). All keys are on the device before the first draw, so drawing
    never synchronises; those of an endless layout are moved there `KEYS_AHEAD` chunks at a time,
    and only the newest are kept. `draws` is the largest number of draws of a chunk, one per step.
    """
    ahead = len(layout) if isinstance(layout, tuple) else KEYS_AHEAD

    def keys(block: int) -> Tensor:
        chunks = range(block * ahead, (block + 1) * ahead)
        listed = [[[_key(seed, c, s) for seed in seeds] for s in range(draws)] for c in chunks]
        return torch.tensor(listed, dtype=torch.int64).to(device)

    pure_B = torch.ones(len(seeds), device=device)
    kept = {0: keys(0)}
    blanks: dict[int, Tensor] = {}

    def draw(chunk: int, step: int) -> Tensor:
        block, place = divmod(chunk, ahead)
        if block not in kept:
            kept.clear()
            kept[block] = keys(block)
        frames = layout[chunk][1]
        if frames not in blanks:
            shape = (len(seeds), frames, *frame_shape)
            blanks[frames] = torch.zeros(shape, device=device, dtype=dtype)
        seed_B = kept[block][place, step]
        return ops.forward_noise(blanks[frames], pure_B, seed=seed_B, layout="BFCHW")

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
