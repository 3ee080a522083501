"""Typed settings of the discriminators: one section per kind, with a loss and an optimizer each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from afd.config.base import Count, Natural, Positive, Section, Share


class CriticConfig(Section):
    """The loss, the optimizer and the pace of a discriminator."""

    loss: Literal["bt", "gan"] = Field(
        default="bt", description="Bradley-Terry on prompt-matched pairs, or the vanilla GAN loss"
    )
    learning_rate: float = Field(default=5e-6, ge=0, description="AdamW learning rate")
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), description="AdamW betas")
    weight_decay: float = Field(default=1e-4, ge=0, description="AdamW weight decay")
    warmup_steps: Natural = Field(
        default=0, description="updates of the run in which only the discriminator learns"
    )
    steps_per_update: Natural = Field(default=1, description="its steps in one update of the run")


class ToyDiscriminatorConfig(CriticConfig):
    """The laptop-size scorer."""

    kind: Literal["toy"] = Field(default="toy", description="the laptop-size scorer")
    backbone: Literal["motion", "scratch", "random"] = Field(
        default="motion",
        description="frozen pretrained motion features, all trained from scratch, or frozen random",
    )
    checkpoint: str = Field(
        default="motion",
        description="safetensors file of the motion backbone; 'motion' is the shipped one",
    )
    learning_rate: float = Field(default=1e-3, ge=0, description="AdamW learning rate")
    betas: tuple[Share, Share] = Field(default=(0.5, 0.99), description="AdamW betas")
    warmup_steps: Natural = Field(
        default=30, description="updates of the run in which only the discriminator learns"
    )
    steps_per_update: Natural = Field(default=2, description="its steps in one update of the run")
    r1: float = Field(
        default=0.1, ge=0, description="weight of the squared gradient norm at the teacher's inputs"
    )
    noise: float = Field(
        default=0.2,
        ge=0,
        description="std of noise on the features (scratch: on the pixels) in training",
    )
    random_looks: bool = Field(
        default=True, description="re-render both inputs under random contrast, tint and texture"
    )
    score_looks: Count = Field(
        default=4, description="looks averaged in a score (1: the video as is)"
    )
    beginnings: bool = Field(
        default=True,
        description="also rank by the first quarters of a clip, before a bounce can hide the fall",
    )


class PairConfig(CriticConfig):
    """A discriminator that learns from pairs in pieces."""

    learning_rate_warmup: Natural = Field(
        default=0, description="updates over which the rate rises linearly to learning_rate"
    )
    grad_clip: Positive = Field(default=1.0, description="largest gradient norm")
    micro_batch: Count | None = Field(
        default=None,
        description="pairs (or videos, when scoring) per pass; null: all at once",
    )


class VideoAlignConfig(PairConfig):
    """A VideoAlign (Qwen2-VL) reward model that learns on: LoRA and the reward head."""

    kind: Literal["videoalign"] = Field(
        default="videoalign", description="a VideoAlign reward model that learns on"
    )
    checkpoint: Path | None = Field(
        default=None, description="folder of the released VideoReward checkpoint, or its model.pth"
    )
    checkout: Path | None = Field(
        default=None,
        description="folder of the VideoAlign code, whose prompt template is read; null: our own",
    )
    base: str = Field(
        default="Qwen/Qwen2-VL-2B-Instruct",
        description="folder or hub name of the configuration and tokenizer it was made from",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="what the frozen weights are kept and computed in"
    )
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


class LatentConfig(PairConfig):
    """A small network on latents, trained from scratch."""

    kind: Literal["latent"] = Field(default="latent", description="a small network on latents")
    learning_rate: float = Field(default=2e-4, ge=0, description="AdamW learning rate")
    betas: tuple[Share, Share] = Field(default=(0.5, 0.99), description="AdamW betas")
    width: Count = Field(default=64, description="channels of the first layer; a multiple of 4")
