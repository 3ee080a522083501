"""Settings of the methods, one section each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from afd.config.base import Count, Natural, Positive, Section, Share
from afd.rollout import SwitchMode

Timesteps = Literal["student", "uniform", "shifted", "logit_normal"]
# The level of a noisy copy may also come from a list in the configuration.
Listed = Literal["student", "uniform", "shifted", "logit_normal", "list"]
# Noise level of a copy: at 0 there is nothing to denoise.
Level = Annotated[float, Field(gt=0, le=1)]


# What a prior holds on to: the released weights, or those that the run started from. They are the
# same without student.init.
Reference = Literal["pretrained", "previous"]


def _references(value: Any) -> Any:
    """Refuse what is no reference in one sentence, where a union would have one per branch."""
    names = ("pretrained", "previous")
    given = value if isinstance(value, dict) else {value: 1.0} if isinstance(value, str) else {}
    weights = [w for w in given.values() if isinstance(w, int | float) and not isinstance(w, bool)]
    good = all(0 < weight < math.inf for weight in weights) and len(weights) == len(given)
    if not given or not good or any(name not in names for name in given):
        needed = "pretrained, previous, or positive weights of one or both"
        raise PydanticCustomError("references", "needed: {needed}", {"needed": needed})
    return value


def _shared_chunks(value: Any) -> Any:
    """Refuse what is no shared prefix in one sentence."""
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not (value is None or number or value in ("random", "last")):
        needed = "a number of chunks from 1, random, last, or null"
        raise PydanticCustomError("shared_chunks", "needed: {needed}", {"needed": needed})
    return value


SharedChunks = Annotated[int | Literal["random", "last"] | None, BeforeValidator(_shared_chunks)]
References = Annotated[Reference | dict[Reference, Positive], BeforeValidator(_references)]
_REFERENCE = (
    "what v_ref is of: the released weights, or the previous result, that student.init gave; or "
    "both with weights that multiply prior_weight, such as {pretrained: 0.5, previous: 0.5}"
)


# DMD's velocity fields, fitted to the teacher's videos and to the student's videos.
FIELDS = ("real", "fake")


class ReplayConfig(Section):
    """Prompts of earlier domains in every update: on the student's own rollouts for them, the loss
    is the prior to what the run started from; and AFD where an earlier teacher's video exists, if
    that is asked for."""

    fraction: Share = Field(
        default=0.0, description="share of the prompts of an update that are replayed"
    )
    prompts: Path | None = Field(default=None, description="text file with a prompt on each line")
    weight: Positive | None = Field(
        default=None,
        description="weight of |v_theta - v_ref|² on them; null: the method's prior_weight",
    )
    teacher: Literal["none", "cached"] = Field(
        default="none",
        description="cached: those with a finished video in `videos` are trained by AFD, too; "
        "nothing is bought",
    )
    videos: list[Path] = Field(
        default=[], description="cached: folders of earlier teachers, or manifests in them"
    )

    def count(self, prompts: int) -> int:
        """Number of replayed prompts among the `prompts` of an update."""
        return round(self.fraction * prompts)

    def check(self, method: str, prompts: int, prior_weight: float) -> None:
        """Raise ValueError if a run of this method, prior and update cannot replay."""
        if self.fraction == 0:
            return
        if method == "dmd":
            raise ValueError(
                f"replay.fraction: got {self.fraction:g} with method=dmd; needed: 0, or "
                "method=afd, sft or gan"
            )
        if self.prompts is None:
            raise ValueError(
                f"replay.fraction: got {self.fraction:g} without replay.prompts; needed: the file "
                "with the prompts"
            )
        if not 0 < self.count(prompts) < prompts:
            raise ValueError(
                f"replay.fraction: got {self.fraction:g}, {self.count(prompts)} of the {prompts} "
                "prompts of an update; needed: at least one, and at least one of the teacher's"
            )
        if self.weight is None and prior_weight == 0:
            raise ValueError(
                f"replay.weight: not given, and method={method} has no prior_weight; needed: the "
                "weight of the prior on the replayed prompts"
            )


class StudentOptimizerConfig(Section):
    """Settings of the student's optimizer, common to all methods."""

    learning_rate: float = Field(default=1e-4, ge=0, description="AdamW learning rate")
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), description="AdamW betas")
    weight_decay: float = Field(default=1e-4, ge=0, description="AdamW weight decay")
    warmup_updates: Natural = Field(
        default=0, description="updates over which the rate rises linearly"
    )
    cosine_updates: Count | None = Field(
        default=700,
        description="updates over which the rate falls as a cosine to 5 %; null: constant",
    )
    grad_clip: Positive = Field(default=1.0, description="largest gradient norm")
    micro_batch: Count | None = Field(
        default=None,
        description="videos per pass; gradients are accumulated over the passes; null: one pass",
    )

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions of the student's weights that the method keeps (`make_policies`)."""
        return ("theta", "ema")

    @property
    def trained(self) -> tuple[str, ...]:
        """The versions that an optimizer updates."""
        return ("theta",)

    @property
    def references(self) -> dict[Reference, float]:
        """The references of the prior with their weights; empty without a prior."""
        given: Any = getattr(self, "prior_reference", None)
        if given is None or getattr(self, "prior_weight", 0) == 0:
            return {}
        return dict(given) if isinstance(given, dict) else {given: 1.0}


class TimesConfig(StudentOptimizerConfig):
    """Settings for drawing noise levels."""

    draws: Count = Field(default=1, description="(t, noise) draws per video and update")
    timesteps: Listed = Field(
        default="student",
        description="t from the student's denoising steps, uniform, shifted towards noise (5u / "
        "(1 + 4u)), logit-normal (sigmoid of a normal number), or from timestep_list",
    )
    timestep_list: list[Level] | None = Field(
        default=None,
        min_length=1,
        description="timesteps=list: noise levels in (0, 1], drawn uniformly",
    )
    logit_mean: float = Field(default=0.0, description="logit_normal: mean of the normal number")
    logit_std: Positive = Field(default=1.0, description="logit_normal: its standard deviation")
    timestep_per: Literal["video", "chunk"] = Field(
        default="chunk", description="one t per video or chunk"
    )
    chunks_per_update: Count | None = Field(
        default=None, description="chunks of each video in an update, drawn at random; null: all"
    )

    @model_validator(mode="after")
    def _list(self) -> TimesConfig:
        if (self.timesteps == "list") != (self.timestep_list is not None):
            raise ValueError(
                f"timesteps: got {self.timesteps} with timestep_list={self.timestep_list}; needed: "
                "timesteps=list with a timestep_list, or neither"
            )
        return self


if TYPE_CHECKING:
    _Delayed = TimesConfig
else:
    # Python's keyword cannot be the name of a field in a class statement.
    _Delayed = create_model(
        "_Delayed",
        __base__=TimesConfig,
        **{
            "async": (
                Annotated[int, Field(ge=0, le=1)],
                Field(
                    default=0,
                    description="updates between rollout and training: 1: an update trains on "
                    "rollouts of the policy as it was before the update before, which are made "
                    "while that one trains",
                ),
            )
        },
    )


class AfdConfig(_Delayed):
    """On-policy adversarial flow distillation: advantage, NFT loss, old policy, optimizer."""

    learning_rate: float = Field(default=3e-4, ge=0, description="AdamW learning rate")
    warmup_updates: Natural = Field(
        default=20, description="updates over which the rate rises linearly"
    )
    cosine_updates: Count | None = Field(
        default=130,
        description="updates over which the rate falls as a cosine to 5 %; null: constant",
    )
    draws: Count = Field(default=2, description="(t, noise) draws per rollout and update")
    samples_per_prompt: Count = Field(default=4, description="rollouts per prompt (G)")
    best: Natural | None = Field(
        default=None,
        description="videos of a prompt, those with the highest advantages, that the student "
        "learns from; the discriminator learns from all; both null: all; one null: 0",
    )
    worst: Natural | None = Field(default=None, description="likewise, with the lowest ones")
    group_from_chunk: SharedChunks = Field(
        default=None,
        description="the rollouts of a prompt share all chunks before this one, generated once, "
        "and the update is about the rest; random: another one in every update, 0 included; last: "
        "only the last chunk differs; null: whole videos",
    )
    stream_frames: Count | None = Field(
        default=None,
        description="latent frames of a stream that the rollouts roll on to, past the training "
        "length; an update is about a clip of it, of the training length, at a place that is drawn "
        "for every update; needs student.window; null: the clip is the whole video",
    )
    stream_start: Share = Field(
        default=0.0,
        description="stream_frames: probability that an update takes the stream's first clip in "
        "place of a drawn one",
    )
    stream_switch: SwitchMode | None = Field(
        default=None,
        description="stream_frames: every stream begins under another prompt of its update and "
        "switches to its own at a chunk that is drawn for every update, at the latest where the "
        "clip begins; how the frames in the window follow the switch, as in afd sample "
        "(docs/SAMPLING.md); null: one prompt",
    )
    train_window: Count | None = Field(
        default=None,
        description="stream_frames: last latent frames of the clip that carry weight in the "
        "update; null: all of the clip",
    )
    advantage: Literal["score", "random"] = Field(
        default="score", description="from the scores, or random numbers (a control)"
    )
    baseline: Literal["batch", "group", "teacher", "ema"] = Field(
        default="group", description="what is subtracted from a score to get its advantage"
    )
    normalize: Literal["batch", "group", "global", "rank", "none"] = Field(
        default="batch",
        description="advantages are divided by the standard deviation of the differences to the "
        "baseline, over the batch or the prompt's group, or of all scores (global); rank: ranks "
        "within the group replace the scores; none: not divided",
    )
    combine: Literal["rewards", "advantages"] = Field(
        default="rewards",
        description="several rewards: the advantage of their weighted sum, or the weighted sum of "
        "the advantages of each, which are independent of its units (GDPO)",
    )
    diversity_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of a video's distance to the mean video of its prompt, beside the sum "
        "of the scores and in units of its standard deviation within prompts",
    )
    adv_clip: Positive = Field(default=2.0, description="advantages are clipped to ± this before r")
    adv_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = Field(
        default="all",
        description="all: advantages unchanged; positive_only, negative_only: all others set to 0; "
        "one_only: positive ones set to 1, all others to 0; binary: only their sign",
    )
    nft_beta: Positive = Field(default=1.0, description="how far v± lie from v_old towards v_theta")
    prior_weight: float = Field(default=2.0, ge=0, description="weight of |v_theta - v_ref|²")
    prior_reference: References = Field(default="pretrained", description=_REFERENCE)
    prior_by_r: bool = Field(default=False, description="weight the prior of a video by its r")
    prior_space: Literal["velocity", "x0"] = Field(
        default="velocity", description="the prior compares velocities, or the clean videos x0"
    )
    prior_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="largest share of the videos that have a prior: those that the first reward "
        "ranks highest relative to the other rewards; prior_weight applies to the mean of their "
        "priors; 1: all",
    )
    weighting: Literal["x0_adaptive", "x0", "velocity"] = Field(
        default="x0_adaptive",
        description="error in x0 space with adaptive weights or without, or plain velocity",
    )
    context: Literal["recompute", "own_context", "shared_context", "noisy"] = Field(
        default="shared_context",
        description="who computes the clean context of v, and with which gradient; noisy: chunks "
        "attend to the earlier noisy chunks of their own pass, and there is no clean context",
    )
    keep_context: bool = Field(
        default=True,
        description="shared_context: keep the rollouts' caches for the update; false: the old "
        "policy recomputes the context, a micro-batch at a time",
    )
    old: Literal["ema", "current"] = Field(
        default="ema", description="the policy that rolls out and anchors the NFT branches"
    )
    old_decay: float = Field(
        default=0.95, ge=0, lt=1, description="largest decay of the old policy's EMA"
    )
    old_decay_slope: float = Field(
        default=0.01,
        ge=0,
        description="decay at update s is min(old_decay, slope · (s - old_decay_start))",
    )
    old_decay_start: Natural = Field(default=0, description="decay is 0 up to this update")
    ema_decay: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="largest decay (at update s at most 0.02 s) of the EMA of the student that is "
        "evaluated and exported; null: the old policy is evaluated",
    )

    @property
    def delay(self) -> int:
        """The value of the key async."""
        return int(getattr(self, "async"))

    @property
    def versions(self) -> tuple[str, ...]:
        wanted = {
            "theta": True,
            "old": self.old == "ema",
            "behind": self.delay > 0,
            "ema": self.ema_decay is not None,
            "ref": self.prior_weight > 0,
        }
        return tuple(name for name, needed in wanted.items() if needed)

    @property
    def learnt_per_prompt(self) -> int:
        """Videos of each prompt that the student learns from."""
        if self.best is None and self.worst is None:
            return self.samples_per_prompt
        return (self.best or 0) + (self.worst or 0)

    @model_validator(mode="after")
    def _groups(self) -> AfdConfig:
        if not 1 <= self.learnt_per_prompt <= self.samples_per_prompt:
            raise ValueError(
                f"afd.best, afd.worst: got {self.best}, {self.worst}; needed: together from 1 to "
                f"afd.samples_per_prompt={self.samples_per_prompt}, or null"
            )
        if self.learnt_per_prompt < self.samples_per_prompt and self.prior_share < 1:
            raise ValueError(
                f"afd.prior_share: got {self.prior_share:g}; needed: 1 with afd.best, afd.worst"
            )
        if self.samples_per_prompt == 1 and {"group", "rank"} & {self.baseline, self.normalize}:
            raise ValueError(
                "afd.samples_per_prompt: got 1; needed: 2 or more, or afd.baseline and "
                "afd.normalize other than group and rank, which need several videos"
            )
        if self.diversity_weight > 0 and (self.samples_per_prompt == 1 or self.prior_share < 1):
            raise ValueError(
                f"afd.diversity_weight: got {self.diversity_weight}; needed: 0, or two or more "
                "afd.samples_per_prompt and afd.prior_share=1, whose ranks compare rewards alone"
            )
        if self.group_from_chunk is not None and self.baseline != "group":
            raise ValueError(
                f"afd.baseline: got {self.baseline}; needed: group with afd.group_from_chunk, "
                "which compares videos of one beginning"
            )
        if self.group_from_chunk is not None and self.context == "noisy":
            raise ValueError(
                "afd.context: got noisy; needed: another with afd.group_from_chunk, where the "
                "chunks of the update attend to clean earlier ones"
            )
        for key in ("train_window", "stream_start", "stream_switch"):
            given = getattr(self, key)
            if given and self.stream_frames is None:
                raise ValueError(f"afd.{key}: got {given} without afd.stream_frames; needed: both")
        if self.stream_frames is not None and self.context == "noisy":
            raise ValueError(
                "afd.context: got noisy; needed: another with afd.stream_frames, where a clip "
                "attends to what the stream held before it"
            )
        if self.combine == "advantages" and self.baseline in ("teacher", "ema"):
            raise ValueError(
                f"afd.baseline: got {self.baseline}; needed: group or batch with "
                "afd.combine=advantages, where every reward has its own baseline"
            )
        if self.context == "noisy" and self.chunks_per_update is not None:
            raise ValueError(
                f"afd.chunks_per_update: got {self.chunks_per_update}; needed: null with "
                "afd.context=noisy, where every chunk attends to all earlier chunks of its pass"
            )
        return self


class SftConfig(TimesConfig):
    """Supervised flow matching on the teacher's videos: a baseline."""

    draws: Count = Field(default=4, description="(t, noise) draws per teacher video and update")
    timesteps: Listed = Field(
        default="shifted",
        description="t from the student's denoising steps, uniform, shifted towards noise (5u / "
        "(1 + 4u)), logit-normal (sigmoid of a normal number), or from timestep_list",
    )
    loss: Literal["x0", "velocity"] = Field(
        default="x0",
        description="x0: squared error of the clean video over max(t, 0.1); velocity: of the "
        "velocity, as in flow matching",
    )
    context_noise: float = Field(
        default=0.1, ge=0, description="largest noise level of the clean context"
    )
    ema_decay: float = Field(
        default=0.95,
        ge=0,
        lt=1,
        description="largest decay of the evaluated EMA of the student; at update s at most 0.02 s",
    )


class LastStepConfig(StudentOptimizerConfig):
    """Settings of methods that backpropagate through the student's last denoising step."""

    samples_per_prompt: Count = Field(default=1, description="rollouts per prompt")
    context: Literal["own_context", "recompute"] = Field(
        default="own_context",
        description="whether gradients stop at the clean context or go through it",
    )
    prior_weight: float = Field(default=0.0, ge=0, description="weight of |v_theta - v_ref|²")
    prior_reference: References = Field(default="pretrained", description=_REFERENCE)
    ema_decay: float = Field(
        default=0.95,
        ge=0,
        lt=1,
        description="largest decay of the evaluated EMA of the student; at update s at most 0.02 s",
    )

    @property
    def versions(self) -> tuple[str, ...]:
        return ("theta", "ema", *(("ref",) if self.prior_weight > 0 else ()))


class GanConfig(LastStepConfig):
    """GAN loss softplus(-D) on the student's videos: a baseline.

    Rate and prior are tuned on the toy: at higher rates, or without a prior, its videos stop
    following the prompt.
    """

    learning_rate: float = Field(default=1e-5, ge=0, description="AdamW learning rate")
    prior_weight: float = Field(default=10.0, ge=0, description="weight of |v_theta - v_ref|²")


class DmdConfig(LastStepConfig):
    """Score-free distribution matching; the definition is ours (see afd.methods.dmd)."""

    score_learning_rate: float = Field(
        default=4e-4, ge=0, description="AdamW learning rate of the real and the fake network"
    )
    score_loss: Literal["x0", "velocity"] = Field(
        default="x0",
        description="loss that fits them: x0: squared error of the clean video over max(t, 0.1); "
        "velocity: of the velocity, as in flow matching",
    )
    score_updates: Count = Field(default=3, description="updates of both per update of the student")
    score_warmup_updates: Natural = Field(
        default=20, description="their updates before the first update of the student"
    )
    timesteps: Timesteps = Field(
        default="shifted", description="noise levels at which real and fake are fitted and compared"
    )
    t_range: tuple[float, float] = Field(
        default=(0.02, 0.98), description="noise levels of the comparison are clamped to this range"
    )

    @model_validator(mode="after")
    def _range(self) -> DmdConfig:
        low, high = self.t_range
        if not 0 <= low <= high <= 1:
            raise ValueError(f"dmd.t_range: got {low}, {high}; needed: two rising times in [0, 1]")
        return self

    @property
    def versions(self) -> tuple[str, ...]:
        theta, ema, *ref = super().versions
        return (theta, ema, *FIELDS, *ref)

    @property
    def trained(self) -> tuple[str, ...]:
        return ("theta", *FIELDS)
