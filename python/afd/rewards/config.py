"""Settings of the built-in rewards that need no student in particular."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from afd.config.base import Count
from afd.discriminators.config import VideoAlignFiles
from afd.rewards.base import RewardConfig


class VideoAlignRewardConfig(VideoAlignFiles, RewardConfig):
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
    micro_batch: Count | None = Field(
        default=None,
        description="videos per pass; null: one pass. A shared network uses the first reward's, or "
        "the discriminator's",
    )

    def missing(self, key: str) -> Iterator[str]:
        yield from self.missing_files(key)
