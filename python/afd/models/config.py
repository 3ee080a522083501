"""Typed settings of the students: which network, from where, and how it samples and is adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from afd.config.base import Count, Positive, Section
from afd.schedules import ShiftedFlow, check_steps

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class LoraConfig(Section):
    """Low-rank adapters on every linear layer of the blocks (PEFT)."""

    rank: Count = Field(default=256, description="rank of the adapters")
    alpha: Count = Field(default=256, description="an adapter's weight is alpha / rank")


class StudentConfig(Section):
    """What all students have."""

    lora: LoraConfig | None = Field(
        default=None, description="train low-rank adapters; null: every weight"
    )
    checkpoint_blocks: bool = Field(
        default=False,
        description="keep only what lies between blocks and compute the rest again in the backward",
    )
    rollout_batch: Count | None = Field(
        default=None, description="videos streamed together in a rollout; null: all at once"
    )


class ToyStudentConfig(StudentConfig):
    """The laptop-size student."""

    kind: Literal["toy"] = Field(default="toy", description="the laptop-size student")
    checkpoint: str = Field(
        default="base",
        description="safetensors file of the start weights; 'base' is the shipped one",
    )
    steps: list[float] = Field(
        default=[1.0, 0.9375, 0.833, 0.625],
        min_length=1,
        description="denoising times, descending in (0, 1], first one 1",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ToyStudentConfig:
        check_steps(self.steps)
        return self


class WanParts(Section):
    """Where a Wan student's parts are, and how it denoises: the same for training and sampling."""

    ema: bool | None = Field(
        default=None,
        description="of a .pt file: true generator_ema, false generator, null the average if any",
    )
    head_dim: Count | None = Field(
        default=None, description="channels of a head; null: as config.json says, else 128"
    )
    pretrained: str = Field(
        default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        description="folder or hub name (a @commit pins it) with text_encoder/, tokenizer/, vae/",
    )
    text_encoder: str | None = Field(default=None, description="another source; null: pretrained")
    tokenizer: str | None = Field(
        default=None, description="folder of its own; null: where the text encoder comes from"
    )
    vae: str | None = Field(default=None, description="another source; null: pretrained")
    text_len: Count = Field(default=512, description="tokens of a prompt, padding included")
    chunk: Count = Field(default=3, description="latent frames denoised together; 1: framewise")
    steps: list[float] = Field(
        default=[1000, 750, 500, 250],
        description="denoising steps before the warp, falling from 1000 (toy: times from 1)",
    )
    first_chunk_steps: list[float] | None = Field(
        default=None, description="the steps of the first chunk; null: steps"
    )
    shift: Positive = Field(default=5.0, description="shift of the table of noise levels")
    context_noise: float = Field(
        default=0.0, ge=0, le=1000, description="time that the context pass is told"
    )
    vae_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="what the autoencoder computes in"
    )


class WanStudentConfig(WanParts, StudentConfig):
    """A released causal student, its text encoder and its autoencoder."""

    kind: Literal["wan"] = Field(description="a Self-Forcing or Causal-Forcing student")
    checkpoint: Path | None = Field(
        default=None, description=".pt file, diffusers folder or .safetensors of the start weights"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16",
        description="what the network computes in; trained weights are kept in float32",
    )
    lora: LoraConfig | None = Field(
        default=LoraConfig(), description="train low-rank adapters; null: every weight"
    )
    checkpoint_blocks: bool = Field(
        default=True,
        description="keep only what lies between blocks and compute the rest again in the backward",
    )
    rollout_batch: Count | None = Field(
        default=1, description="videos streamed together in a rollout; null: all at once"
    )

    @model_validator(mode="after")
    def _consistent(self) -> WanStudentConfig:
        for steps in (self.steps, self.first_chunk_steps):
            if steps is not None:
                check_steps(steps, first=1000)
                ShiftedFlow(self.shift).warp(steps)
        return self

    @property
    def network(self) -> dict[str, Any]:
        """The fields of WanConfig that no checkpoint holds."""
        return {"chunk": self.chunk, "text_len": self.text_len}
