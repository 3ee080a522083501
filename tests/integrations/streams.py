"""Tiny streams by afd and by diffusers' classes, for the tests of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from afd.integrations.diffusers import (
    CausalWanPipeline,
    CausalWanTransformer3DModel,
    SelfForcingScheduler,
)
from afd.models.wan.student import WanStudent
from afd.rollout import stream, stream_layout
from tests.afd.test_rollout import FOUR
from tests.afd.test_text import LENGTH

FRAMES, SEEDS = 6, [1, 2]
# Of a student between a real text encoder and a real autoencoder, both tiny.
SIZES: dict[str, Any] = {"in_dim": 16, "out_dim": 16, "text_dim": 24, "text_len": LENGTH}


def text(batch: int = 2, seed: int = 7) -> Tensor:
    return torch.randn(batch, 5, 12, generator=torch.Generator().manual_seed(seed))


def generators(seeds: list[int] = SEEDS) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


def pipeline(student: WanStudent, scheduler: Any = None, steps: Any = FOUR) -> CausalWanPipeline:
    pipe = CausalWanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler or SelfForcingScheduler(steps),
        transformer=CausalWanTransformer3DModel.from_network(student.net),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: CausalWanPipeline, frames: int = FRAMES, **options: Any) -> Tensor:
    """Latents [B, F, C, H, W]."""
    options = {"prompt_embeds": text()} | options
    if "generator" not in options:
        options.setdefault("seeds", SEEDS)
    made = pipe(
        height=32, width=48, num_frames=4 * frames - 3, output_type="latent", **options
    ).frames
    return made.transpose(1, 2)


def streamed(
    student: WanStudent, frames: int = FRAMES, steps: Any = FOUR, **options: Any
) -> Tensor:
    noise = student.noise_source(SEEDS, stream_layout(student, frames), len(steps))
    chunks = stream(student, text(), noise, frames=frames, denoising_steps=steps, **options)
    return torch.cat(list(chunks), 1)
