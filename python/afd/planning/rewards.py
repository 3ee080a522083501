"""What a run's frozen rewards hold and compute."""

from __future__ import annotations

from collections.abc import Mapping

from afd.discriminators.base import DiscriminatorConfig
from afd.discriminators.config import VideoAlignConfig
from afd.rewards.base import OnlineConfig, RewardConfig
from afd.rewards.config import VideoAlignRewardConfig


def frozen(rewards: Mapping[str, RewardConfig]) -> dict[str, RewardConfig]:
    """The entries of `rewards` other than the online discriminator."""
    return {name: s for name, s in rewards.items() if not isinstance(s, OnlineConfig)}


def networks(
    rewards: Mapping[str, RewardConfig], discriminator: DiscriminatorConfig | None
) -> list[tuple[str, list[str]]]:
    """The VideoAlign networks loaded for rewards alone: dtype, and the rewards that share it."""
    held: dict[tuple[object, ...], list[str]] = {}
    for name, section in rewards.items():
        if isinstance(section, VideoAlignRewardConfig):
            held.setdefault(section.source, []).append(name)
    if isinstance(discriminator, VideoAlignConfig):
        it = discriminator
        held.pop((it.checkpoint, it.checkout, it.base, it.dtype), None)
    return [(str(source[-1]), names) for source, names in held.items()]


def shared_passes(rewards: Mapping[str, RewardConfig]) -> list[list[str]]:
    """The passes of VideoAlign on every video: the rewards that each serves."""
    served: dict[tuple[object, ...], list[str]] = {}
    for name, section in rewards.items():
        if isinstance(section, VideoAlignRewardConfig):
            served.setdefault((*section.source, section.grey), []).append(name)
    return list(served.values())
