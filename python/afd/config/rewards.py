"""Checks of a run's `rewards` against its other sections."""

from __future__ import annotations

from collections.abc import Mapping

from afd.config.parallel import ParallelConfig
from afd.discriminators.base import DiscriminatorConfig
from afd.methods.config import AfdConfig, ReplayConfig
from afd.models.config import StudentConfig
from afd.rewards.base import ONLINE, OnlineConfig, RewardConfig, online
from afd.teachers.config import TeacherConfig
from afd.teachers.mix_config import MixConfig


def check_teacher(
    method: str,
    discriminator: DiscriminatorConfig | None,
    teacher: TeacherConfig,
    evaluation_kind: str,
) -> None:
    """Raise ValueError for a teacher without videos in a run that uses them."""
    if teacher.robust.on and (method != "afd" or discriminator is None):
        raise ValueError(
            f"teacher.robust: got settings with method={method}"
            f"{'' if discriminator else ' and no discriminator'}; needed: method=afd with a "
            "discriminator, whose loss they change"
        )
    if isinstance(teacher, MixConfig):
        _check_mix(method, discriminator, teacher)
    if teacher.gives_videos:
        return
    if method != "afd" or discriminator is not None:
        raise ValueError(
            f"teacher.kind: got {teacher.kind}, which has no videos; needed: another kind, or "
            "method=afd with discriminator=null and rewards"
        )
    if evaluation_kind == "physics":
        raise ValueError(
            f"teacher.kind: got {teacher.kind}, which has no videos; needed: another kind, or "
            "evaluation.kind other than physics, which compares with them"
        )


def _check_mix(method: str, discriminator: DiscriminatorConfig | None, teacher: MixConfig) -> None:
    for one in teacher.teachers:
        if not one.source.gives_videos:
            raise ValueError(
                f"teacher.teachers.{one.name}.source.kind: got {one.source.kind}, which has no "
                "videos; needed: another kind"
            )
        if one.source.robust.on:
            raise ValueError(
                f"teacher.teachers.{one.name}.source.robust: got settings; needed: in "
                "teacher.robust, for all teachers together"
            )
    if teacher.mode == "ensemble" and (method != "afd" or discriminator is None):
        raise ValueError(
            f"teacher.mode: got ensemble with method={method}"
            f"{'' if discriminator else ' and no discriminator'}; needed: method=afd with a "
            "discriminator, or teacher.mode=route"
        )


def check_advantages(teacher: TeacherConfig, afd: AfdConfig) -> None:
    """Raise ValueError for advantages that several teachers' heads cannot give."""
    if not isinstance(teacher, MixConfig) or teacher.mode != "ensemble":
        return
    if afd.normalize == "none":
        raise ValueError(
            "afd.normalize: got none with teacher.mode=ensemble; needed: another, as every "
            "teacher's advantages are standardised before the sum"
        )
    if afd.baseline in ("teacher", "ema"):
        raise ValueError(
            f"afd.baseline: got {afd.baseline} with teacher.mode=ensemble; needed: group or batch, "
            "as every teacher's head has a baseline of its own"
        )


def check_cached(
    replay: ReplayConfig,
    method: str,
    discriminator: DiscriminatorConfig | None,
    teacher: TeacherConfig,
) -> None:
    """Raise ValueError for a run that cannot train on earlier teachers' videos."""
    if not replay.fraction or replay.teacher == "none":
        return
    if not replay.videos:
        raise ValueError(
            "replay.teacher: got cached without replay.videos; needed: the folders of the videos"
        )
    wrong = None
    if method != "afd" or discriminator is None:
        wrong = f"method={method}{'' if discriminator else ' and no discriminator'}"
    elif isinstance(teacher, MixConfig) and teacher.mode == "ensemble":
        wrong = "teacher.mode=ensemble, whose heads are of teachers that give every prompt"
    elif teacher.robust.on:
        wrong = "teacher.robust, which keeps account of the teacher's own videos"
    if wrong is not None:
        raise ValueError(
            f"replay.teacher: got cached with {wrong}; needed: none, or method=afd with a "
            "discriminator and a single or routed teacher without teacher.robust"
        )


def check_rewards(
    method: str,
    discriminator: DiscriminatorConfig | None,
    rewards: Mapping[str, RewardConfig],
    afd: AfdConfig,
    student: StudentConfig,
) -> None:
    """Raise ValueError, naming the key, for rewards that the run cannot use."""
    if method != "afd":
        if method == "gan" and discriminator is None:
            raise ValueError("discriminator: got null; needed: a section, for method=gan")
        if rewards:
            raise ValueError(
                f"rewards: got {', '.join(rewards)} with method={method}; needed: method=afd"
            )
        return
    of_discriminator = online(rewards)
    if len(of_discriminator) > 1:
        raise ValueError(
            f"rewards: got kind=discriminator in {' and '.join(of_discriminator)}; needed: once"
        )
    if discriminator is None and of_discriminator:
        raise ValueError(
            f"rewards.{of_discriminator[0]}: got kind=discriminator with discriminator=null; "
            "needed: a discriminator, or another kind"
        )
    if discriminator is not None and not of_discriminator and ONLINE in rewards:
        raise ValueError(
            f"rewards.{ONLINE}: got kind={rewards[ONLINE].kind} beside the run's discriminator; "
            "needed: another name, or kind=discriminator"
        )
    frozen = {name: s for name, s in rewards.items() if not isinstance(s, OnlineConfig)}
    for name, section in frozen.items():
        try:
            section.check_student(student)
        except ValueError as error:
            raise ValueError(f"rewards.{name}.{error}") from None
    optimised = [name for name, section in frozen.items() if section.weight > 0]
    counts = discriminator is not None and all(rewards[n].weight > 0 for n in of_discriminator)
    if not counts and not optimised and (afd.advantage != "random" or not rewards):
        raise ValueError(
            "rewards: got none with a positive weight; needed: one, or a discriminator that counts"
        )
    if afd.prior_share < 1 and len(frozen) + (discriminator is not None) < 2:
        raise ValueError(
            f"afd.prior_share: got {afd.prior_share:g} with a single reward; needed: 1, or two "
            "rewards that can disagree"
        )
    if afd.prior_share < 1 and afd.advantage == "random":
        raise ValueError(
            f"afd.prior_share: got {afd.prior_share:g} with afd.advantage=random, which has no "
            "scores that disagree; needed: 1, or afd.advantage=score"
        )
    if afd.baseline == "teacher" and (optimised or not counts):
        raise ValueError(
            f"afd.baseline: got teacher with rewards ({', '.join(rewards)}); needed: group, batch "
            "or ema, as only the discriminator scores the teacher's videos"
        )


def check_afd(
    afd: AfdConfig, teacher: TeacherConfig, parallel: ParallelConfig, prompts: int
) -> None:
    """Raise ValueError if AFD cannot learn from this teacher, in these processes or from so many
    prompts an update, as set."""
    check_advantages(teacher, afd)
    check_delay(afd, parallel, teacher)
    if afd.stream_switch is not None and prompts < 2:
        raise ValueError(
            f"afd.stream_switch: got {afd.stream_switch} with updates of one prompt of the "
            "teacher; needed: prompts_per_update of 2 or more, as a stream begins under another "
            "prompt of its update"
        )


def check_delay(afd: AfdConfig, parallel: ParallelConfig, teacher: TeacherConfig) -> None:
    """Raise ValueError if rollouts cannot be made an update ahead (`afd.async`)."""
    if afd.delay and (parallel.weights == "fsdp" or parallel.sequence > 1):
        raise ValueError(
            f"afd.async: got 1 with parallel.weights={parallel.weights} and parallel.sequence="
            f"{parallel.sequence}; needed: 0, or ddp and 1, as the passes of sharded weights and "
            "shared videos would wait for each other in two threads"
        )
    if afd.delay and teacher.robust.on:
        raise ValueError(
            "afd.async: got 1 with teacher.robust; needed: 0, as what an update finds out about "
            "the videos changes the next draw"
        )
