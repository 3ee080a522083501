"""Streaming generation: chunk by chunk, few denoising steps each, with a key/value cache.

Shape letters: B videos, F frames, C channels, H x W pixels, c frames of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor

from afd.models.kv_cache import KVCache
from afd.models.toy import ToyStudent

STEPS = (1.0, 0.9375, 0.833, 0.625)
# (chunk, step) -> standard normal noise [B, c, C, H, W]; step 0 is the chunk's initial noise.
NoiseSource = Callable[[int, int], Tensor]


def seeded_noise(seeds: Sequence[int] | Tensor, shape: tuple[int, ...]) -> NoiseSource:
    """Noise from one generator per video, so a video does not depend on its batch."""
    generators = [Generator().manual_seed(int(seed)) for seed in seeds]

    def draw(chunk: int, step: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators])

    return draw


def check_steps(steps: Sequence[float]) -> None:
    if not steps or steps[0] != 1.0 or any(b >= a for a, b in pairwise(steps)):
        raise ValueError(f"steps: {list(steps)} came, times falling from 1 are needed")
    if steps[-1] <= 0:
        raise ValueError(f"steps: the last is {steps[-1]}, more than 0 is needed")


@torch.no_grad()
def stream(
    student: ToyStudent,
    text_BLE: Tensor,
    noise: NoiseSource,
    *,
    frames: int | None = None,
    steps: Sequence[float] = STEPS,
    cache: KVCache | None = None,
) -> Iterator[Tensor]:
    """Yield finished chunks [B, c, C, H, W] one after another.

    Each chunk starts as noise and is denoised at the times of `steps`: predict the clean chunk,
    mix it with fresh noise for the next time; the last prediction is the result. A context pass
    then puts the finished chunk into the cache; after the last chunk nothing would read it.
    Pass a `cache` (from `student.new_cache`) to read the context afterwards.
    """
    check_steps(steps)
    frames = frames or student.config.frames
    if frames % student.chunk:
        raise ValueError(
            f"frames: {frames} came, a multiple of the chunk {student.chunk} is needed"
        )
    cache = cache or student.new_cache(text_BLE, frames)
    for chunk, start in enumerate(range(0, frames, student.chunk)):
        x_t = noise(chunk, 0)
        for step, t in enumerate(steps):
            x0 = student.denoise(x_t, t, cache, start)
            if step + 1 < len(steps):
                next_t = steps[step + 1]
                x_t = (1 - next_t) * x0 + next_t * noise(chunk, step + 1)
        yield x0
        if start + student.chunk < frames:
            student.remember(x0, cache, start)


def rollout(
    student: ToyStudent,
    prompts: list[str],
    seeds: Sequence[int] | Tensor,
    *,
    frames: int | None = None,
    steps: Sequence[float] = STEPS,
    batch: int = 256,
) -> Tensor:
    """Whole videos [B, F, C, H, W], one per prompt and seed."""
    if len(prompts) != len(seeds):
        raise ValueError(f"seeds: {len(seeds)} came for {len(prompts)} prompts")
    toy = student.config
    shape = (student.chunk, toy.wan.in_dim, toy.height, toy.width)
    videos = []
    for first in range(0, len(prompts), batch):
        part = slice(first, first + batch)
        noise = seeded_noise(seeds[part], shape)
        text = student.encode(prompts[part])
        videos.append(torch.cat(list(stream(student, text, noise, frames=frames, steps=steps)), 1))
    return torch.cat(videos)
