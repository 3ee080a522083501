"""From a configuration to its method: student, codec, discriminator and versions of the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from afd.cache import Store
from afd.discriminators.base import DifferentiableCritic
from afd.discriminators.config import VideoAlignConfig
from afd.discriminators.latent import LatentCritic
from afd.distributed import ALONE, Ranks
from afd.errors import ConfigError
from afd.hub import need
from afd.lab.discriminator import ToyCritic
from afd.lab.student import ToyStudent
from afd.methods import afd
from afd.methods.afd import Afd
from afd.methods.base import Method
from afd.methods.dmd import Dmd
from afd.methods.gan import Gan
from afd.methods.sft import Sft
from afd.models.codec import Codec, Pixels
from afd.models.config import DTYPES, ToyStudentConfig, WanStudentConfig
from afd.models.policies import make_policies
from afd.models.student import Student
from afd.models.wan.loading import load_wan
from afd.models.wan.network import CausalWan

if TYPE_CHECKING:
    from afd.config.run import RunConfig

_log = logging.getLogger("afd")
# Frames per second of clips that are taken as they come.
RATE = 16.0


def build_method(config: RunConfig, ranks: Ranks = ALONE, prompts: Sequence[str] = ()) -> Method:
    """The method of a run, from its start checkpoints and seed, on the rank's device.

    `prompts`: what the run will ask for; a text encoder embeds them before anything else is loaded.
    Raises ConfigError, with the key, for parts that do not fit together, files that are not what is
    needed and packages that are missing.
    """
    student, codec = build_student(config, ranks, prompts)
    critic = None
    if config.method in ("afd", "gan"):
        critic = build_critic(config, student, ranks, prompts)
        if config.video.codec_match and critic.sees == "latent":
            _log.info("video.codec_match does nothing here: the discriminator sees latents")
    names, trained = versions(config)
    section = config.student
    policies = make_policies(
        student,
        names,
        trained=trained,
        lora=section.lora,
        seed=config.seed,
        shard=_sharding(config, student, ranks),
    )
    shared: dict[str, Any] = {
        "steps": section.steps,
        "codec": codec,
        "video": config.video,
        "ranks": ranks,
        "rollout_batch": section.rollout_batch,
        "seed": config.seed,
    }
    if section.kind == "wan":
        shared["first_steps"] = section.first_chunk_steps
        shared["context_noise"] = section.context_noise
    if config.method == "sft":
        return Sft(policies, config.sft, **shared)
    if config.method == "dmd":
        return Dmd(policies, config.dmd, **shared)
    assert critic is not None
    if config.method == "gan":
        return Gan(policies, critic, config.gan, **shared)
    return Afd(policies, critic, config.afd, **shared)


def _sharding(
    config: RunConfig, student: Student, ranks: Ranks
) -> Callable[[CausalWan], object] | None:
    if config.parallel != "fsdp" or ranks.world == 1:
        return None
    from afd.models.sharding import shard_over

    return shard_over(ranks, student.dtype)


def versions(config: RunConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The versions of the student's weights that a method keeps, and those it trains."""
    if config.method == "afd":
        return afd.versions(config.afd), ("theta",)
    if config.method == "sft":
        return ("theta", "ema"), ("theta",)
    kind, weight = (
        (Gan, config.gan.prior_weight) if config.method == "gan" else (Dmd, config.dmd.prior_weight)
    )
    return kind.versions + (("ref",) if weight > 0 else ()), kind.trained


# --- student ---


def build_student(
    config: RunConfig, ranks: Ranks = ALONE, prompts: Sequence[str] = ()
) -> tuple[Student, Codec]:
    """The student, which knows the prompts, and what stands between its space and pixels."""
    section = config.student
    student: Student
    codec: Codec = Pixels()
    with _config_errors("student"):
        if section.kind == "toy":
            student = toy_student(config, section)
        else:
            student, codec = _wan(config, section, ranks, prompts)
    student.net.checkpoint_blocks = section.checkpoint_blocks
    return student.to(ranks.device), codec


def toy_student(config: RunConfig, section: ToyStudentConfig) -> ToyStudent:
    """The toy from its checkpoint; ConfigError where the videos are of another size."""
    student, video = ToyStudent.load(section.checkpoint), config.video
    size = student.config.frames, student.config.height, student.config.width
    if (video.frames, video.height, video.width) != size:
        raise ConfigError(
            f"video.frames, video.height, video.width: got {video.frames}, {video.height}, "
            f"{video.width}; needed: {', '.join(map(str, size))}, those of the toy student"
        )
    return student


def _wan(
    config: RunConfig, section: WanStudentConfig, ranks: Ranks, prompts: Sequence[str]
) -> tuple[Student, Codec]:
    if section.checkpoint is None:
        raise ConfigError("student.checkpoint: not given; needed: the student's weights")
    video = config.video
    return load_wan(
        section,
        prompts,
        height=video.height // 8,
        width=video.width // 8,
        frames=1 + (video.frames - 1) // 4,
        device=ranks.device,
        store=Store.of(config.cache),
        ranks=ranks,
    )


# --- discriminator ---


def build_critic(
    config: RunConfig, student: Student, ranks: Ranks = ALONE, prompts: Sequence[str] = ()
) -> DifferentiableCritic:
    """The discriminator that a configuration names, if it can read the prompts."""
    section = config.discriminator
    with _config_errors("discriminator"):
        if section.kind == "toy":
            return ToyCritic(section, config.video.frames, seed=config.seed, ranks=ranks)
        if section.kind == "videoalign":
            return _videoalign(config, section, ranks, prompts)
        wan = student.net.config
        return LatentCritic(
            lambda prompts: student.encode(list(prompts)),
            section,
            channels=wan.in_dim,
            text_dim=wan.text_dim,
            device=ranks.device,
            seed=config.seed,
            ranks=ranks,
        )


def _videoalign(
    config: RunConfig, section: VideoAlignConfig, ranks: Ranks, prompts: Sequence[str]
) -> DifferentiableCritic:
    need("discriminator.kind=videoalign", "transformers", "peft")
    from afd.discriminators.videoalign.discriminator import VideoAlignCritic
    from afd.discriminators.videoalign.model import VideoAlign

    if section.checkpoint is None:
        raise ConfigError(
            "discriminator.checkpoint: not given; needed: the folder of the released VideoReward "
            "(KwaiVGI/VideoReward on the hub)"
        )
    scorer = VideoAlign.load(
        str(section.checkpoint),
        base=section.base,
        videoalign=section.checkout,
        dtype=DTYPES[section.dtype],
        device=ranks.device,
    )
    for prompt in prompts:  # now, and not in the update that asks it
        scorer.prompts.request(prompt)
    rate = config.video.fps or RATE
    return VideoAlignCritic(scorer, section, video_fps=rate, seed=config.seed, ranks=ranks)


@contextmanager
def _config_errors(section: str) -> Iterator[None]:
    """A part that cannot be loaded is a wrong configuration: say in which section."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{section}: {error}") from error
