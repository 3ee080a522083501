"""Settings of the discriminators, one section per kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import Self

from afd.config.base import Count, Natural, Positive, Section, Share
from afd.discriminators.base import DiscriminatorConfig
from afd.discriminators.windows import WindowedConfig
from afd.hub import missing_path, missing_source, pinned

# What is read of a hub's model: of a released VideoAlign, and of the model that it was made from.
CHECKPOINT_FILES = ("model_config.json", "checkpoint-*")
BASE_FILES = ("config.json", "tokenizer*", "vocab.json", "merges.txt")


class PairConfig(DiscriminatorConfig):
    """Settings of a discriminator that learns from pairs in micro-batches."""

    learning_rate_warmup: Natural = Field(
        default=0, description="updates over which the rate rises linearly to learning_rate"
    )
    grad_clip: Positive = Field(default=1.0, description="largest gradient norm")
    micro_batch: Count | None = Field(
        default=None,
        description="pairs (or videos, when scoring) per pass; null: one pass",
    )


class VideoAlignFiles(Section):
    """Settings of a released VideoAlign: the files that it is loaded from, and its dtype."""

    checkpoint: Path | None = Field(
        default=None, description="folder of the released VideoReward checkpoint, or its model.pth"
    )
    checkout: Path | None = Field(
        default=None,
        description="folder of the VideoAlign code with its prompt template; null: our template",
    )
    base: str = Field(
        default="Qwen/Qwen2-VL-2B-Instruct",
        description="folder or hub name of the configuration and tokenizer it was made from",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="dtype of the frozen weights and their arithmetic"
    )

    def pinned(self) -> Self:
        update: dict[str, object] = {"base": pinned(self.base, BASE_FILES)}
        if self.checkpoint is not None:
            update["checkpoint"] = Path(pinned(str(self.checkpoint), CHECKPOINT_FILES))
        return self.model_copy(update=update)

    @property
    def source(self) -> tuple[object, ...]:
        """Sections of equal sources share one frozen network."""
        return (self.checkpoint, self.checkout, self.base, self.dtype)

    def missing_files(self, key: str) -> Iterator[str]:
        """Yield a sentence for each file that a run would not find or would have to download.

        `key`: dotted key of the section, for the sentence.
        """
        what = "the released VideoReward checkpoint"
        yield from missing_path(f"{key}.checkpoint", self.checkpoint, what)
        yield from missing_source(f"{key}.base", self.base)
        if self.checkout is None:
            yield f"{key}.checkout is null: our own prompt template, not the released one"
        else:
            yield from missing_path(f"{key}.checkout", self.checkout, "VideoAlign's code")


class VideoAlignConfig(VideoAlignFiles, PairConfig, WindowedConfig):
    """A VideoAlign (Qwen2-VL) reward model whose LoRA and reward head are trained further."""

    builder: ClassVar[str] = "afd.discriminators.videoalign.discriminator:build"
    packages: ClassVar[tuple[str, ...]] = ("transformers", "peft")

    kind: Literal["videoalign"] = Field(
        default="videoalign", description="a VideoAlign reward model that is trained further"
    )
    head: Literal["TA", "sum"] = Field(
        default="TA",
        description="the score: text alignment, or VQ + MQ + TA. VQ and MQ do not depend on the "
        "prompt, which comes after them in the input of a causal model",
    )
    lora_rank: Count = Field(default=64, description="rank of the trained LoRA")
    lora_alpha: Count = Field(default=128, description="LoRA's weight is alpha / rank")
    window: Positive | None = Field(
        default=None,
        description="seconds of a window: an update ranks one random window of each pair, the "
        "score is the mean over windows that overlap by half, each with the prompt; null: the "
        "whole clip",
    )
    gradient_checkpointing: bool = Field(
        default=True, description="keep one activation per layer and recompute the rest"
    )

    def missing(self) -> Iterator[str]:
        yield from self.missing_files("discriminator")


class LatentConfig(PairConfig, WindowedConfig):
    """A small network on latents, trained from scratch."""

    builder: ClassVar[str] = "afd.discriminators.latent:build"

    kind: Literal["latent"] = Field(default="latent", description="a small network on latents")
    learning_rate: float = Field(default=2e-4, ge=0, description="AdamW learning rate")
    betas: tuple[Share, Share] = Field(default=(0.5, 0.99), description="AdamW betas")
    width: Count = Field(default=64, description="channels of the first layer; a multiple of 4")
