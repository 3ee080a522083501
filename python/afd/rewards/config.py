"""Settings of the built-in rewards that need no student in particular."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from afd.config.base import Count
from afd.hub import missing_path, missing_source
from afd.rewards.base import RewardConfig


class VideoAlignRewardConfig(RewardConfig):
    """One of the ratings of a frozen VideoAlign model.

    Rewards from the same files share one network, also with a VideoAlign discriminator, and those
    on the same frames share one pass.
    """

    builder: ClassVar[str] = "afd.rewards.videoalign:build"
    packages: ClassVar[tuple[str, ...]] = ("transformers",)

    kind: Literal["videoalign"] = Field(
        default="videoalign", description="a rating of a frozen VideoAlign"
    )
    head: Literal["VQ", "MQ", "TA", "sum"] = Field(
        default="MQ",
        description="visual quality, motion quality, text alignment, or their sum; z-scores by the "
        "checkpoint's own mean and standard deviation",
    )
    grey: bool = Field(
        default=False, description="rate grey frames, so that colour cannot buy motion quality"
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
    micro_batch: Count | None = Field(
        default=None,
        description="videos per pass; null: all at once. A shared network has the first one's, or "
        "the discriminator's",
    )

    @property
    def source(self) -> tuple[object, ...]:
        """Rewards and discriminators with equal sources are of one frozen network."""
        return (self.checkpoint, self.checkout, self.base, self.dtype)

    def missing(self, key: str) -> Iterator[str]:
        what = "the released VideoReward checkpoint"
        yield from missing_path(f"{key}.checkpoint", self.checkpoint, what)
        yield from missing_source(f"{key}.base", self.base)
        if self.checkout is None:
            yield f"{key}.checkout is null: our own prompt template, not the released one"
        else:
            yield from missing_path(f"{key}.checkout", self.checkout, "VideoAlign's code")
