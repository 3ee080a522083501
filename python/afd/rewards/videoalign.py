"""Ratings of a frozen VideoAlign as rewards: motion quality, visual quality, text alignment.

Shape letters: B videos, N sampled frames, C = 3, H x W pixels.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from afd.discriminators.videoalign.discriminator import VideoAlignDiscriminator, load_released
from afd.discriminators.videoalign.model import VideoAlign
from afd.hub import weights_digest
from afd.models.student import Student
from afd.rewards.base import Reward
from afd.rewards.config import VideoAlignRewardConfig
from afd.video.config import VideoConfig

# Weights of red, green and blue in the luma of BT.601.
LUMA = (0.299, 0.587, 0.114)


class Frozen(Protocol):
    """A released VideoAlign: one loaded for rewards, or the base of a discriminator."""

    @property
    def start(self) -> str:
        """Digest of the released weights."""
        ...

    def prepare(self, video_BFCHW: Tensor) -> Tensor: ...

    def released_ratings(self, seen_BNCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Normalised VQ, MQ, TA and Overall, [B] each."""
        ...


class FrozenVideoAlign:
    """A separately loaded VideoAlign (see `Frozen`)."""

    def __init__(
        self, scorer: VideoAlign, *, video_fps: float = 16.0, micro_batch: int | None = None
    ) -> None:
        self.scorer, self.video_fps, self.micro_batch = scorer, video_fps, micro_batch
        weights = {**dict(scorer.network.named_parameters()), "rm_head": scorer.head_OD}
        self.start = weights_digest(weights)

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        """Sample the input frames: about two per second."""
        return self.scorer.settings.preprocessing.choose(video_BFCHW, self.video_fps)

    def released_ratings(self, seen_BNCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return self.scorer.ratings_of(seen_BNCHW, prompts, micro_batch=self.micro_batch)


class Passes:
    """Passes of one frozen network, each shared by all rewards that ask for it.

    The latest pass on coloured frames and on grey ones is remembered while its input exists.
    """

    def __init__(self, network: Frozen) -> None:
        self.network = network
        self._latest: dict[
            bool, tuple[weakref.ref[Tensor], tuple[str, ...], dict[str, Tensor]]
        ] = {}

    def ratings(
        self, seen_BNCHW: Tensor, prompts: Sequence[str], *, grey: bool
    ) -> dict[str, Tensor]:
        """Normalised VQ, MQ, TA and Overall, [B] each, of sampled frames in [-1, 1]."""
        asked = tuple(prompts)
        if grey in self._latest:
            seen, of, ratings = self._latest[grey]
            if seen() is seen_BNCHW and of == asked:
                return ratings
        shown = as_grey(seen_BNCHW) if grey else seen_BNCHW
        ratings = self.network.released_ratings(shown, prompts)
        self._latest[grey] = (weakref.ref(seen_BNCHW), asked, ratings)
        return ratings


class VideoAlignReward(Reward):
    """One rating of a frozen VideoAlign (see `Reward`)."""

    def __init__(self, passes: Passes, config: VideoAlignRewardConfig) -> None:
        self.passes, self.config = passes, config
        self.identity = passes.network.start

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        """Sample the input frames: about two per second."""
        return self.passes.network.prepare(video_BFCHW)

    @property
    def prepared_by(self) -> object:
        return self.passes.network

    @torch.no_grad()
    def score(self, input_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        head = "Overall" if self.config.head == "sum" else self.config.head
        return self.passes.ratings(input_BFCHW, prompts, grey=self.config.grey)[head].float()


def as_grey(video_BNCHW: Tensor) -> Tensor:
    """The luma of BT.601 in all three colours."""
    luma_C11 = torch.tensor(LUMA, device=video_BNCHW.device).view(3, 1, 1)
    return (video_BNCHW * luma_C11).sum(2, keepdim=True).expand_as(video_BNCHW)


def build(
    config: VideoAlignRewardConfig,
    student: Student,
    video: VideoConfig,
    prompts: Sequence[str] = (),
    *,
    beside: Sequence[object] = (),
) -> VideoAlignReward:
    """Build the reward from its configuration (`RewardConfig.build`)."""
    if config.checkpoint is None:
        raise ValueError(
            "checkpoint: not given; needed: the folder of the released VideoReward "
            "(KwaiVGI/VideoReward on the hub)"
        )
    passes = next(
        (r.passes for r in beside if isinstance(r, VideoAlignReward) and _same(r, config)), None
    )
    passes = passes or Passes(_network(config, student, video, prompts, beside))
    return VideoAlignReward(passes, config)


def _network(
    config: VideoAlignRewardConfig,
    student: Student,
    video: VideoConfig,
    prompts: Sequence[str],
    beside: Sequence[object],
) -> Frozen:
    """The discriminator's released network if it has the same files, else a separate one."""
    for other in beside:
        if isinstance(other, VideoAlignDiscriminator) and _same(other, config):
            return other
    scorer = load_released(config, student.device, prompts)
    return FrozenVideoAlign(scorer, video_fps=video.rate, micro_batch=config.micro_batch)


def _same(
    other: VideoAlignReward | VideoAlignDiscriminator, config: VideoAlignRewardConfig
) -> bool:
    return other.config.source == config.source
