"""Build the training method of a run (student, codec, discriminator) from its configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from afd.cache import Store
from afd.config.run import RunConfig
from afd.discriminators.base import DifferentiableDiscriminator
from afd.distributed import ALONE, Ranks
from afd.errors import ConfigError
from afd.hub import missing_path
from afd.methods.afd import Afd, Watch
from afd.methods.base import Method
from afd.methods.config import StudentOptimizerConfig
from afd.methods.dmd import Dmd
from afd.methods.gan import Gan
from afd.methods.sft import Sft
from afd.models.codec import Codec
from afd.models.low_rank import LowRank, joined, negated
from afd.models.network import CausalNetwork
from afd.models.policies import PRETRAINED, REFERENCE, Released, make_policies
from afd.models.sharding import sequence_over, shard_over
from afd.models.student import Student
from afd.models.wan.types import WanConfig
from afd.registry import find
from afd.rewards.base import OnlineConfig, Term, online
from afd.teachers.mix_config import MixConfig
from afd.trainer.origin import Start, carry_on, start_of

_log = logging.getLogger("afd")


def build_method(config: RunConfig, ranks: Ranks = ALONE, prompts: Sequence[str] = ()) -> Method:
    """Build the method of a run on the rank's device, from its initial checkpoints and seed.

    `prompts`: all prompts of the run; a text encoder embeds them before anything else is loaded.
    Raises ConfigError, naming the key, for incompatible parts, unsuitable files and missing
    packages.
    """
    start = None if config.student.init is None else start_of(config.student, config.run_dir)
    stacked = bool(parents_of(config, start))
    student, codec = build_student(config, ranks, prompts, start, stacked=stacked)
    discriminator = None
    if config.method in ("afd", "gan") and config.discriminator is not None:
        discriminator = build_discriminator(config, student, ranks, prompts)
        _give_heads(config, discriminator)
        if config.video.codec_match and discriminator.input_space == "latents":
            _log.info("video.codec_match has no effect: the discriminator's input is latents")
    rewards = build_rewards(config, student, discriminator, prompts)
    return assemble(config, student, codec, discriminator, rewards, ranks, start)


def _give_heads(config: RunConfig, discriminator: DifferentiableDiscriminator) -> None:
    """Give the discriminator a head for each teacher of an ensemble."""
    teacher = config.teacher
    if not isinstance(teacher, MixConfig) or teacher.mode != "ensemble":
        return
    give = getattr(discriminator, "with_teachers", None)
    if give is None:
        raise ConfigError(
            f"discriminator.kind: got {discriminator.config.kind}, which has no head for each "
            "teacher (with_teachers); needed: another kind, or teacher.mode=route"
        )
    give([one.name for one in teacher.teachers])


def assemble(
    config: RunConfig,
    student: Student,
    codec: Codec,
    discriminator: DifferentiableDiscriminator | None,
    rewards: Sequence[Term] = (),
    ranks: Ranks = ALONE,
    start: Start | None = None,
) -> Method:
    """Build the method of a run from its parts; `discriminator` is None if the method has none, and
    `start` if the student starts from its checkpoint alone."""
    section = config.student
    method: StudentOptimizerConfig = getattr(config, config.method)
    names, parents = frozen_versions(config), parents_of(config, start)
    released = None
    if PRETRAINED in names and start is not None and not parents:
        released = _released(config, start)
    policies = make_policies(
        student,
        (*(name for name in method.versions if name != REFERENCE), *names),
        trained=method.trained,
        lora=section.lora,
        seed=config.seed,
        shard=_sharding(config, student, ranks),
        released=released,
        parents=parents,
    )
    shared: dict[str, Any] = {
        "denoising_steps": section.denoising_steps,
        "first_chunk_steps": section.first_chunk_steps,
        "context_noise": section.context_noise,
        "codec": codec,
        "video": config.video,
        "ranks": ranks,
        "rollout_batch": section.rollout_batch,
        "rollout_overlap": section.rollout_overlap,
        "seed": config.seed,
    }
    if config.method != "dmd":
        shared["replay"] = config.replay
    if config.method == "sft":
        return Sft(policies, config.sft, **shared)
    if config.method == "dmd":
        return Dmd(policies, config.dmd, **shared)
    if config.method == "gan":
        assert discriminator is not None
        return Gan(policies, discriminator, config.gan, **shared)
    watch = _watch(config, ranks)
    mix = config.teacher
    if isinstance(mix, MixConfig) and mix.mode == "ensemble" and discriminator is not None:
        shared["teachers"] = mix.weights_at
    return Afd(policies, discriminator, config.afd, watch=watch, rewards=rewards, **shared)


def frozen_versions(config: RunConfig) -> list[str]:
    """The frozen versions of the student that its prior and its replay need."""
    method: StudentOptimizerConfig = getattr(config, config.method)
    wanted = set(method.references) | ({"previous"} if config.replay.fraction else set())
    found = []
    if "previous" in wanted or (wanted and config.student.init is None):
        found.append(REFERENCE)
    if "pretrained" in wanted and config.student.init is not None:
        found.append(PRETRAINED)
    return found


def parents_of(config: RunConfig, start: Start | None) -> list[LowRank]:
    """The parents' adapters that a run keeps beside the released weights; none if it folds them.
    Raises ConfigError if they cannot be kept."""
    if start is None or config.student.parents != "stacked":
        return []
    return start.stack(config.student.init)


def _released(config: RunConfig, start: Start) -> Released:
    """What leads from the start of a run back to the released weights."""
    if start.changes is not None and config.student.lora is not None:
        return negated(joined(start.changes))
    return config.student.load_network().state_dict()


def _watch(config: RunConfig, ranks: Ranks) -> Watch | None:
    """The run's hook for logging metrics of rollouts and their scores, or None."""
    if config.evaluation.kind == "none":
        return None
    watch: Watch | None = find("metrics", config.evaluation.kind).watch(config.evaluation, ranks)
    return watch


def _sharding(config: RunConfig, student: Student, ranks: Ranks) -> Callable[[Any], object] | None:
    if config.parallel.weights != "fsdp" or ranks.processes == 1:
        return None
    return shard_over(ranks, student.dtype)


def build_student(
    config: RunConfig,
    ranks: Ranks = ALONE,
    prompts: Sequence[str] = (),
    start: Start | None = None,
    *,
    stacked: bool = False,
) -> tuple[Student, Codec]:
    """Build the student, able to encode `prompts`, and its codec to pixels.

    `start`: that of `student.init`, if it is loaded already. `stacked`: keep the released weights,
    beside which its changes become adapters.
    """
    section = config.student
    with _config_errors("student"):
        check_size(config)
        student, codec = section.build(
            config.video,
            prompts,
            device=ranks.device,
            store=Store.of(config.cache),
            ranks=ranks,
        )
    if section.init is not None and not stacked:
        start = start or start_of(section, config.run_dir)
        student.net.load_state_dict(start.network.state_dict())
    student.net.checkpoint_blocks = section.checkpoint_blocks
    refuse_shared_videos(config, student.net)
    student.net.sequence = sequence_over(ranks)
    return student.to(ranks.device), codec


def refuse_shared_videos(config: RunConfig, network: CausalNetwork) -> None:
    """Raise ConfigError if processes are to share a video (`parallel.sequence`) and cannot."""
    if config.parallel.sequence > 1 and not network.shares_sequences:
        raise ConfigError(
            f"parallel.sequence: got {config.parallel.sequence}; needed: 1, as "
            f"{type(network).__name__} computes each video in one process"
        )


def check_files(config: RunConfig) -> None:
    """Check the student's files by their headers, before anything that costs hours or money.

    Raises ConfigError for one that is missing or unreadable.
    """
    section = config.student
    if section.init is None:
        section.require_weights()
    else:
        for sentence in missing_path("student.init", section.init, "what the run starts from"):
            raise ConfigError(sentence)
    _sizes(config)


def _sizes(config: RunConfig) -> WanConfig:
    """The network's sizes. Raises ConfigError for files of another network."""
    try:
        return config.student.sizes()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        raise ConfigError(text if text.startswith("student.") else f"student: {text}") from error


def student_waits(config: RunConfig) -> int:
    """Number of updates before the student's first."""
    if config.method == "dmd":
        dmd = config.dmd
        return max(0, -(-dmd.score_warmup_updates // dmd.score_updates) - 1)
    found = config.discriminator if config.method in ("afd", "gan") else None
    weights = [config.rewards[name].weight for name in online(config.rewards)]
    return 0 if found is None or 0 in weights else found.warmup_updates


def not_training(config: RunConfig) -> str | None:
    """One sentence if every update of the run comes before the student's first; else None."""
    waits = student_waits(config)
    if config.updates > waits:
        return None
    key = "dmd.score_warmup_updates" if config.method == "dmd" else "discriminator.warmup_updates"
    return (
        f"updates: got {config.updates}, and the student's first is update {waits + 1}: it will "
        f"not learn; needed: more updates, or a smaller {key}"
    )


def check_size(config: RunConfig) -> None:
    """Raise ConfigError if the student was made for videos of another size, its heads do not divide
    over the processes of a video, or its window or AFD's streams do not fit."""
    video, size = config.video, config.student.video_size()
    given = (video.frames, video.height, video.width)
    if size is not None and given != size:
        raise ConfigError(
            f"video.frames, video.height, video.width: got {', '.join(map(str, given))}; needed: "
            f"{', '.join(map(str, size))}, those of the {config.student.kind} student"
        )
    parts = config.parallel.sequence
    if parts > 1 and (heads := _sizes(config).num_heads) % parts:
        raise ConfigError(
            f"parallel.sequence: got {parts}; needed: a divisor of the student's {heads} heads"
        )
    try:
        if config.student.window is not None:
            config.student.check_window()
        if config.method == "afd":
            _check_stream(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_stream(config: RunConfig) -> None:
    """Raise ValueError unless the frames of AFD's streams, clips and windows fit."""
    afd, window = config.afd, config.student.window
    frames = config.student.latent_frames(config.video.frames)
    chunk = config.student.chunk_frames
    if afd.stream_frames is None:
        longest = frames
    else:
        longest = afd.stream_frames
        if window is None:
            raise ValueError(
                f"student.window: got null; needed: the frames that are kept, as "
                f"afd.stream_frames={longest} rolls on without growing"
            )
        if longest < frames or longest % chunk:
            raise ValueError(
                f"afd.stream_frames: got {longest}; needed: a multiple of the chunk {chunk}, at "
                f"least the {frames} frames of a clip"
            )
        if longest == frames and (afd.stream_start or afd.stream_switch is not None):
            raise ValueError(
                f"afd.stream_frames: got {longest}, the frames of a clip; needed: more with "
                "afd.stream_start or afd.stream_switch, which are about clips in longer streams"
            )
    trained = afd.train_window
    if trained is not None and (trained > frames or trained % chunk):
        raise ValueError(
            f"afd.train_window: got {trained}; needed: a multiple of the chunk {chunk}, at most "
            f"the {frames} frames of a clip"
        )
    kept = afd.context == "shared_context" and afd.keep_context
    if kept and window is not None and longest > window:
        raise ValueError(
            f"afd.keep_context: got true; needed: false, as a cache of student.window={window} "
            f"does not hold the {longest} frames of a rollout"
        )


def build_discriminator(
    config: RunConfig, student: Student, ranks: Ranks = ALONE, prompts: Sequence[str] = ()
) -> DifferentiableDiscriminator:
    """Build the configured discriminator, able to encode `prompts`."""
    assert config.discriminator is not None
    with _config_errors("discriminator"):
        discriminator = config.discriminator.build(
            student, config.video, prompts, seed=config.seed, ranks=ranks
        )
        if config.discriminator.init is not None:
            carry_on(discriminator, config.discriminator.init)
    return discriminator


def build_rewards(
    config: RunConfig,
    student: Student,
    discriminator: object | None = None,
    prompts: Sequence[str] = (),
) -> list[Term]:
    """Build the configured rewards, each able to score `prompts`."""
    terms: list[Term] = []
    beside = [] if discriminator is None else [discriminator]
    for name, section in config.rewards.items():
        reward = None
        if not isinstance(section, OnlineConfig):
            with _config_errors(f"rewards.{name}"):
                reward = section.build(student, config.video, prompts, beside=beside)
            beside.append(reward)
        terms.append(Term(name, section.weight, reward))
    return terms


@contextmanager
def _config_errors(section: str) -> Iterator[None]:
    """Re-raise loading errors as a ConfigError that names the configuration section."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{section}: {error}") from error
