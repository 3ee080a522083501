"""Typed settings of the discriminators that score real videos and latents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from afd.section import Count, Natural, Positive, Section


class CriticConfig(Section):
    """The loss and the optimizer of a discriminator."""

    loss: Literal["bt", "gan"] = Field(
        default="bt", description="Bradley-Terry on prompt-matched pairs, or the vanilla GAN loss"
    )
    learning_rate: float = Field(default=5e-6, ge=0, description="AdamW learning rate")
    learning_rate_warmup: Natural = Field(
        default=0, description="updates over which the rate rises linearly to learning_rate"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW betas")
    weight_decay: float = Field(default=1e-4, ge=0, description="AdamW weight decay")
    grad_clip: Positive = Field(default=1.0, description="largest gradient norm")
    micro_batch: Count | None = Field(
        default=None,
        description="pairs (or videos, when scoring) per pass; null: all at once",
    )


class VideoAlignConfig(CriticConfig):
    """A VideoAlign (Qwen2-VL) reward model that learns on: LoRA and the reward head."""

    head: Literal["TA", "sum"] = Field(
        default="TA",
        description="the score: text alignment, or VQ + MQ + TA. VQ and MQ alone do not see the "
        "prompt, which comes after them in the input of a causal model",
    )
    lora_rank: Count = Field(default=64, description="rank of the trained LoRA")
    lora_alpha: Count = Field(default=128, description="LoRA's weight is alpha / rank")
    gradient_checkpointing: bool = Field(
        default=True, description="keep one activation per layer and compute the others again"
    )


class LatentConfig(CriticConfig):
    """A small network on latents, trained from scratch."""

    learning_rate: float = Field(default=2e-4, ge=0, description="AdamW learning rate")
    betas: tuple[float, float] = Field(default=(0.5, 0.99), description="AdamW betas")
    width: Count = Field(default=64, description="channels of the first layer; a multiple of 4")
