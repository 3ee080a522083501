"""The whole configuration of a run: typed sections, one YAML file, `k=v` overrides.

`load_config` is the only door. A key that no section knows is an error that names the key, where
it came from and the closest known names; a bad value names the field, what came and what is needed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


class ConfigError(ValueError):
    """The configuration is wrong; the message says which key, what came and what is needed."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class VideoConfig(Section):
    frames: Count = 12
    """Frames per video the trainer sees."""
    height: Count = 16
    """Rows of a frame in pixels."""
    width: Count = 16
    """Columns of a frame in pixels."""
    fps: Positive | None = None
    """Resample clips to this rate (nearest frame in time); null takes frames as they come."""
    short: Literal["error", "repeat"] = "error"
    """A clip that ends too early: refuse it, or repeat its last frame."""


class TeacherConfig(Section):
    kind: Literal["folder", "simulator"] = "simulator"
    """folder: read finished videos; simulator: first let a separate process write them."""
    path: Path | None = None
    """The teacher's folder; null is <out>/teacher (simulator only)."""
    manifest: str | None = None
    """Manifest inside the folder (.jsonl, .csv or .txt); null finds prompts.jsonl, .csv or .txt."""
    style: Literal["clean", "nuis", "mark", "outline", "noise"] = "nuis"
    """Simulator: the look of its renderings."""
    count: Count = 200
    """Simulator: how many videos it writes."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Simulator: seed of its throws and looks."""

    @model_validator(mode="after")
    def _folder_needs_a_path(self) -> TeacherConfig:
        if self.kind == "folder" and self.path is None:
            raise ValueError("teacher.kind=folder needs teacher.path, the folder with the videos")
        return self


class StudentConfig(Section):
    base: Path | None = None
    """Checkpoint of the pretrained student; null is the one shipped with the package."""


class DiscriminatorConfig(Section):
    backbone: Literal["motion", "scratch", "random"] = "motion"
    """motion: frozen and pretrained; scratch: trained whole; random: frozen, untrained."""


class AfdConfig(Section):
    lr: Positive = 1e-4
    """AdamW learning rate of the student."""


class SftConfig(Section):
    lr: Positive = 1e-4
    """AdamW learning rate of the student."""


class EvaluationConfig(Section):
    kind: Literal["physics", "none"] = "physics"
    """physics: the toy task's exact metrics on held-out seeds; none: no evaluation."""
    every: Annotated[int, Field(ge=0)] = 50
    """Evaluate before the first update and after every so many; 0 only at the end."""
    videos: Count = 576
    """Held-out videos of the final evaluation."""
    curve_videos: Count = 144
    """Held-out videos of each evaluation on the way."""
    seed: Annotated[int, Field(ge=0)] = 1_000_000
    """Seed of the held-out noise; the trainer never draws from it."""
    samples: Annotated[int, Field(ge=0)] = 36
    """Videos of the final evaluation kept in samples.safetensors."""


class LoggingConfig(Section):
    every: Count = 10
    """Write a line to train.log after every so many updates (metrics.jsonl has every update)."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    progress: bool = True
    """Show a progress bar where there is a terminal."""


class CheckpointConfig(Section):
    every: Annotated[int, Field(ge=0)] = 100
    """Save after every so many updates; 0 only at the end and on Ctrl-C."""
    keep: Count = 2
    """How many of the newest checkpoints stay on disk."""


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; letters, digits, dot, dash, underscore."""
    out: Path | None = None
    """Run folder; null is runs/<name>."""
    method: Literal["afd", "sft"] = "afd"
    """afd: on-policy adversarial flow distillation; sft: flow matching on the teacher's videos."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything the run draws."""
    steps: Count = 400
    """Optimizer updates of the student."""
    prompts_per_step: Count = 8
    """Prompts, each with its teacher video, in one update."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 leaves torch's choice."""
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
FREE_KEYS = ("name", "out", "steps", "logging", "checkpoint")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `dotted.key=value` overrides (values are YAML), check everything.

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
    return make_config(data, overrides, origin=str(path))


def make_config(
    data: dict[str, Any], overrides: Sequence[str] = (), origin: str = "configuration"
) -> RunConfig:
    """Check plain data (as YAML gives it) plus overrides. `origin` names it in errors."""
    data = _copy(data)
    came_from: dict[str, str] = {}
    for override in overrides:
        came_from[_apply(data, override)] = f"override {override!r}"
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        lines = [_explain(dict(detail), came_from, origin) for detail in error.errors()]
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
    keys = [k for k in sorted(a.keys() | b.keys()) if k.split(".")[0] not in FREE_KEYS]
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


def _explain(detail: dict[str, Any], came_from: dict[str, str], origin: str) -> str:
    """One line for one pydantic error."""
    key = ".".join(str(part) for part in detail["loc"])
    source = next((s for k, s in came_from.items() if k == key or key.startswith(k + ".")), origin)
    if detail["type"] == "extra_forbidden":
        return f"{source}: unknown key {key!r}; {_suggest(key)}"
    if detail["type"] == "value_error":
        return f"{source}: {detail['msg'].removeprefix('Value error, ')}"
    return f"{source}: {key} is {detail['input']!r}; {detail['msg']}"


def _suggest(key: str) -> str:
    """The closest known keys (by their last part and as a whole), else all of the section."""
    known = known_keys()

    def closeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        ends = difflib.SequenceMatcher(None, key.split(".")[-1], candidate.split(".")[-1]).ratio()
        return max(whole, ends)

    ranked = sorted(known, key=closeness, reverse=True)
    best = closeness(ranked[0])
    if best >= 0.6:
        return (
            "did you mean " + " or ".join(k for k in ranked[:3] if closeness(k) > best - 0.1) + "?"
        )
    section = key[: key.rfind(".") + 1]
    siblings = [k for k in known if k.startswith(section) and "." not in k[len(section) :]]
    return "known here: " + ", ".join(siblings)


def known_keys() -> list[str]:
    """Every dotted key of RunConfig, sections included."""
    return list(_keys(RunConfig, ""))


def _keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
