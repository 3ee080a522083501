"""The whole configuration of a run: typed sections, one YAML file, `k=v` overrides.

`load_config` is the only door. A key that no section knows is an error that names the key, where
it came from and the closest known names; a bad value names the field, what came and what is needed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, overload

import yaml
from pydantic import BaseModel, Field, ValidationError

from afd.section import Count, Natural, Positive, Section
from afd.teachers.config import TeacherConfig


class ConfigError(ValueError):
    """The configuration is wrong; the message says which key, what came and what is needed."""


Kind = TypeVar("Kind", bound=Section)


class VideoConfig(Section):
    """What a teacher's clip becomes before the trainer sees it."""

    frames: Count = Field(default=12, description="frames per video the trainer sees")
    height: Count = Field(default=16, description="rows of a frame in pixels")
    width: Count = Field(default=16, description="columns of a frame in pixels")
    fps: Positive | None = Field(
        default=None,
        description="resample clips to this rate (nearest frame in time); null: as they come",
    )
    short: Literal["error", "repeat"] = Field(
        default="error",
        description="a clip that ends too early: refuse it, or repeat its last frame",
    )


class StudentConfig(Section):
    """The small causal student and how it samples."""

    checkpoint: str = Field(
        default="base",
        description="safetensors file of the start weights; 'base' is the shipped one",
    )
    steps: list[float] = Field(
        default=[1.0, 0.9375, 0.833, 0.625],
        min_length=1,
        description="denoising times, descending in (0, 1], first one 1",
    )


class DiscriminatorConfig(Section):
    """The prompt-conditioned scorer D(video, prompt) and its optimizer."""

    backbone: Literal["motion", "scratch", "random"] = Field(
        default="motion",
        description="frozen pretrained motion features, all trained from scratch, or frozen random",
    )
    checkpoint: str = Field(
        default="motion",
        description="safetensors file of the motion backbone; 'motion' is the shipped one",
    )
    loss: Literal["bt", "gan"] = Field(
        default="bt", description="Bradley-Terry on prompt-matched pairs, or the vanilla GAN loss"
    )
    learning_rate: float = Field(default=1e-3, ge=0, description="AdamW learning rate")
    betas: tuple[float, float] = Field(default=(0.5, 0.99), description="AdamW betas")
    weight_decay: float = Field(default=1e-4, ge=0, description="AdamW weight decay")
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
    score_looks: int = Field(
        default=4, ge=1, description="looks averaged in a score (1: the video as is)"
    )
    beginnings: bool = Field(
        default=True,
        description="also rank by the first quarters of a clip, before a bounce can hide the fall",
    )
    warmup_steps: int = Field(
        default=30, ge=0, description="critic steps before the first student step"
    )
    steps_per_update: int = Field(default=2, ge=0, description="critic steps per student step")


class StudentOptimizerConfig(Section):
    """How every method updates the student."""

    learning_rate: float = Field(default=1e-4, ge=0, description="AdamW learning rate")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW betas")
    weight_decay: float = Field(default=1e-4, ge=0, description="AdamW weight decay")
    cosine_steps: int = Field(
        default=700, ge=1, description="steps over which the rate falls as a cosine to 5 %"
    )
    grad_clip: float = Field(default=1.0, gt=0, description="largest gradient norm")


class AfdConfig(StudentOptimizerConfig):
    """On-policy adversarial flow distillation: advantage, NFT step, old policy, optimizer."""

    samples_per_prompt: int = Field(default=4, ge=1, description="rollouts per prompt (G)")
    advantage: Literal["score", "random"] = Field(
        default="score", description="from the discriminator, or random numbers (a control)"
    )
    baseline: Literal["batch", "group", "teacher", "ema"] = Field(
        default="group", description="what is subtracted from a score to get its advantage"
    )
    normalize: Literal["batch", "group", "none"] = Field(
        default="batch", description="whose standard deviation divides the advantage"
    )
    adv_clip: float = Field(
        default=2.0, gt=0, description="advantages are clipped to ± this before r"
    )
    nft_beta: float = Field(
        default=1.0, gt=0, description="how far v± lie from v_old towards v_theta"
    )
    prior_weight: float = Field(default=1e-4, ge=0, description="weight of |v_theta - v_ref|²")
    prior_by_r: bool = Field(default=False, description="weigh the prior of a video by its r")
    weighting: Literal["x0_adaptive", "velocity"] = Field(
        default="x0_adaptive",
        description="error in x0 space with adaptive weights, or plain velocity",
    )
    timesteps: Literal["student", "uniform", "shifted"] = Field(
        default="student",
        description="t from the student's own steps, uniform, or shifted towards noise",
    )
    timestep_per: Literal["video", "chunk"] = Field(
        default="chunk", description="one t per video or chunk"
    )
    draws: int = Field(default=2, ge=1, description="(t, noise) draws per rollout and update")
    context: Literal["recompute", "own_context", "shared_context"] = Field(
        default="shared_context",
        description="who computes the clean context of v, and with which gradient",
    )
    old: Literal["ema", "current"] = Field(
        default="ema", description="the policy that rolls out and anchors the NFT branches"
    )
    old_decay: float = Field(
        default=0.95, ge=0, lt=1, description="largest decay of the old policy's EMA"
    )
    old_decay_slope: float = Field(
        default=0.02,
        ge=0,
        description="decay at step s is min(old_decay, slope · (s - old_decay_start))",
    )
    old_decay_start: int = Field(default=0, ge=0, description="decay is 0 up to this step")
    physics_every: int = Field(
        default=10,
        ge=1,
        description="updates between logs of how far the score ranks by physics (toy prompts only)",
    )


class SftConfig(StudentOptimizerConfig):
    """Supervised flow matching on the teacher's videos: the baseline."""

    draws: int = Field(default=4, ge=1, description="(t, noise) draws per teacher video and update")
    timesteps: Literal["student", "uniform", "shifted"] = Field(
        default="shifted",
        description="t from the student's own steps, uniform, or shifted towards noise",
    )
    context_noise: float = Field(
        default=0.1, ge=0, description="largest noise level of the clean context"
    )
    ema_decay: float = Field(default=0.95, ge=0, lt=1, description="EMA of the evaluated policy")


class EvaluationConfig(Section):
    """Measuring the student on held-out seeds."""

    kind: Literal["physics", "none"] = Field(
        default="physics",
        description="physics: the toy task's exact metrics on held-out seeds; none: no evaluation",
    )
    every: Natural = Field(
        default=50,
        description="evaluate before the first update and after every so many; 0 only at the end",
    )
    videos: Count = Field(default=576, description="held-out videos of the final evaluation")
    curve_videos: Count = Field(
        default=144, description="held-out videos of each evaluation on the way"
    )
    seed: Natural = Field(
        default=1_000_000, description="seed of the held-out noise; the trainer never draws from it"
    )
    samples: Natural = Field(
        default=36, description="videos of the final evaluation kept in samples.safetensors"
    )


class LoggingConfig(Section):
    """What a run writes about itself."""

    every: Count = Field(
        default=10,
        description="a line in train.log after every so many updates (metrics.jsonl has them all)",
    )
    tensorboard: bool = Field(
        default=True, description="write TensorBoard event files beside metrics.jsonl"
    )
    progress: bool = Field(
        default=True, description="show a progress bar where there is a terminal"
    )


class CheckpointConfig(Section):
    """When the whole state of a run is saved."""

    every: Natural = Field(
        default=100, description="save after every so many updates; 0 only at the end and on Ctrl-C"
    )
    keep: Count = Field(default=2, description="how many of the newest checkpoints stay on disk")


class RunConfig(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        default="run", description="name of the run; letters, digits, dot, dash, underscore"
    )
    out: Path | None = Field(default=None, description="run folder; null is runs/<name>")
    method: Literal["afd", "sft"] = Field(
        default="afd",
        description="afd: adversarial flow distillation, sft: fit the teacher's videos",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="seed of everything the run draws"
    )
    steps: Count = Field(default=400, description="optimizer updates of the student")
    prompts_per_step: Count = Field(
        default=8, description="prompts, each with its teacher video, in one update"
    )
    threads: Natural = Field(default=1, description="CPU threads; 0 leaves torch's choice")
    video: VideoConfig = VideoConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    afd: AfdConfig = AfdConfig()
    sft: SftConfig = SftConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def run_dir(self) -> Path:
        """The run folder: `out`, or runs/<name>."""
        return self.out if self.out is not None else Path("runs") / self.name

    @property
    def teacher_dir(self) -> Path:
        """The teacher's folder: `teacher.path`, or <run_dir>/teacher."""
        return self.teacher.path if self.teacher.path is not None else self.run_dir / "teacher"


# A resumed run may differ from its checkpoint here and nowhere else: none of these changes a number
# of the updates already made.
FREE_KEYS = ("name", "out", "steps", "logging", "checkpoint", "teacher.fetch")


@overload
def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig: ...
@overload
def load_config(path: Path | str, overrides: Sequence[str], kind: type[Kind]) -> Kind: ...
def load_config(
    path: Path | str, overrides: Sequence[str] = (), kind: type[Section] = RunConfig
) -> Section:
    """Read a YAML file, apply `dotted.key=value` overrides (values are YAML), check everything.

    `kind` is the root section, RunConfig where none is named.

    Raises ConfigError naming the key, what came, what is needed and where it came from.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path}: not valid YAML ({error})") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"config {path}: holds {type(data).__name__}, needs keys and values")
    return make_config(data, overrides, str(path), kind)


@overload
def make_config(
    data: dict[str, Any], overrides: Sequence[str] = (), origin: str = "configuration"
) -> RunConfig: ...
@overload
def make_config(
    data: dict[str, Any], overrides: Sequence[str], origin: str, kind: type[Kind]
) -> Kind: ...
def make_config(
    data: dict[str, Any],
    overrides: Sequence[str] = (),
    origin: str = "configuration",
    kind: type[Section] = RunConfig,
) -> Section:
    """Check plain data (as YAML gives it) plus overrides. `origin` names it in errors."""
    data = _copy(data)
    came_from: dict[str, str] = {}
    for override in overrides:
        came_from[_apply(data, override)] = f"override {override!r}"
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = [_explain(dict(detail), came_from, origin, kind) for detail in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain data that YAML, JSON and torch.save(weights_only) all take."""
    return config.model_dump(mode="json")


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, as written to <run>/config.yaml."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def flatten(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested data."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two plain configurations outside FREE_KEYS, one sentence a key."""
    a, b = dict(flatten(old)), dict(flatten(new))
    free = tuple(f"{key}." for key in FREE_KEYS)
    keys = [k for k in sorted(a.keys() | b.keys()) if not f"{k}.".startswith(free)]
    absent = "(absent)"
    return [
        f"{k}: {a.get(k, absent)!r} there, {b.get(k, absent)!r} now"
        for k in keys
        if a.get(k, absent) != b.get(k, absent)
    ]


def _copy(data: dict[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, dict) else v for k, v in data.items()}


def _apply(data: dict[str, Any], override: str) -> str:
    """Set one `dotted.key=value` in nested data; returns the dotted key."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: needs the form key=value or section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {text!r} is not valid YAML ({error})") from None
    where = data
    for i, part in enumerate(parts[:-1]):
        if where.get(part) is None:
            where[part] = {}
        where = where[part]
        if not isinstance(where, dict):
            section = ".".join(parts[: i + 1])
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
    where[parts[-1]] = value
    return ".".join(parts)


def _explain(
    detail: dict[str, Any], came_from: dict[str, str], origin: str, kind: type[Section]
) -> str:
    """One line for one pydantic error."""
    key = ".".join(str(part) for part in detail["loc"])
    source = next((s for k, s in came_from.items() if k == key or key.startswith(k + ".")), origin)
    if detail["type"] == "extra_forbidden":
        return f"{source}: unknown key {key!r}; {_suggest(key, kind)}"
    if detail["type"] == "value_error":
        return f"{source}: {detail['msg'].removeprefix('Value error, ')}"
    return f"{source}: {key} is {detail['input']!r}; {detail['msg']}"


def _suggest(key: str, kind: type[Section]) -> str:
    """The closest known keys by their last part (the same section first), else the section's."""
    known = known_keys(kind)
    section, _, end = key.rpartition(".")

    def closeness(candidate: str) -> float:
        other_section, _, other_end = candidate.rpartition(".")
        near = difflib.SequenceMatcher(None, end, other_end).ratio()
        return near + 0.05 * (section == other_section)

    ranked = sorted(known, key=closeness, reverse=True)
    best = closeness(ranked[0])
    if best >= 0.6:
        return (
            "did you mean " + " or ".join(k for k in ranked[:3] if closeness(k) > best - 0.1) + "?"
        )
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    return "known here: " + ", ".join(siblings)


def known_keys(kind: type[Section] = RunConfig) -> list[str]:
    """Every dotted key of a root section, sections included."""
    return list(_keys(kind, ""))


def _keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
