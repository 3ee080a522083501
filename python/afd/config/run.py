"""The configuration of a run: typed sections, one YAML file, `k=v` overrides.

`load_config` is the entry point. The error for an unknown key names the key, its origin and the
closest known names; that for an invalid value names the field, the value and what is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, overload

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from rich.console import Console

from afd.config.base import ByKind, Count, Folder, Natural, Section, Threads, of_default_kind
from afd.config.keys import NAMED, described, known_keys, parts_of, suggest, types_of, with_named
from afd.config.keys import sections_of as sections_of
from afd.config.parallel import ONE_WORD, ParallelConfig
from afd.config.rewards import check_afd, check_cached, check_rewards, check_teacher
from afd.config.shipped import find_config
from afd.config.yaml import MAX_BYTES, parse_yaml, yaml_text
from afd.discriminators.base import DiscriminatorConfig
from afd.errors import ConfigError, YamlError
from afd.listing import shown
from afd.methods.config import AfdConfig, DmdConfig, GanConfig, ReplayConfig, SftConfig
from afd.models.config import StudentConfig
from afd.registry import find
from afd.rewards.base import RewardConfig
from afd.teachers.base import Teacher
from afd.teachers.config import TeacherConfig
from afd.video.config import VideoConfig

Kind = TypeVar("Kind", bound=Section)
# Names of rewards and of held-out sets are parts of metric names and of dotted keys.
EntryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]


# Updates of a run of the laptop task, by method (docs/ABLATIONS.md).
UPDATES = {"afd": 160, "sft": 400, "gan": 400, "dmd": 400}


class EvaluationSet(Section):
    """One of several held-out sets; null: as `evaluation` has it."""

    kind: str | None = Field(default=None, description="its metrics")
    prompts: Path | None = Field(default=None, description="video: .txt file of its prompts")
    domain: str | None = Field(default=None, description="physics: the domain that is measured")
    seed: Natural | None = Field(default=None, description="seed of its noise")


class EvaluationConfig(Section):
    """Evaluation of the student on held-out seeds."""

    kind: str = Field(
        default="physics",
        description="physics: the toy task's exact metrics on held-out seeds; physics_stream: by "
        "position in long streams; video: motion, and "
        "motion quality as the untouched VideoAlign rates it; none: no evaluation; or an installed "
        "package's metrics",
    )
    prompts: Path | None = Field(
        default=None, description="video: .txt file of held-out prompts; null: the teacher's first"
    )
    every: Natural = Field(
        default=50,
        description="updates between evaluations, the first before training; 0: only at the end",
    )
    videos: Count = Field(default=576, description="held-out videos of the final evaluation")
    curve_videos: Count = Field(
        default=144, description="held-out videos of each evaluation during training"
    )
    seed: Natural = Field(
        default=1_000_000, description="seed of the held-out noise, which training never uses"
    )
    samples: Natural = Field(
        default=36, description="videos of the final evaluation kept in samples.safetensors"
    )
    clips: Count = Field(
        default=20, description="physics_stream: training lengths of a held-out stream"
    )
    domain: str | None = Field(
        default=None,
        description="physics: the toy domain whose prompts, physics and look are measured; null: "
        "gravity, with the distance to the training videos",
    )
    sets: dict[EntryName, EvaluationSet] = Field(
        default={},
        description="several held-out sets by name, measured in the place of one; the name and a "
        "slash begin the names of their metrics",
    )

    def each(self) -> dict[str, EvaluationConfig]:
        """The settings of every set by name, or of the only one under an empty name."""
        if not self.sets:
            return {"": self}
        own = {n: {k: v for k, v in s if v is not None} for n, s in self.sets.items()}
        return {n: self.model_copy(update={**changed, "sets": {}}) for n, changed in own.items()}


class LoggingConfig(Section):
    """Logs and progress output of a run."""

    every: Count = Field(
        default=10,
        description="log a line every this many updates (metrics.jsonl has all of them)",
    )
    tensorboard: bool = Field(
        default=True, description="write TensorBoard event files beside metrics.jsonl"
    )
    wandb: str | None = Field(
        default=None, description="also write to this Weights & Biases project, if installed"
    )
    videos_every: Natural = Field(
        default=0,
        description="write teacher and student side by side, with scores, every this many "
        "updates; 0: never",
    )
    progress: bool = Field(default=True, description="show a progress bar on a terminal")


class CheckpointConfig(Section):
    """When the full state of a run is saved."""

    every: Natural = Field(
        default=100, description="save every this many updates; 0: only at the end and on Ctrl-C"
    )
    keep: Count = Field(default=2, description="number of newest checkpoints to keep")
    accept_changed_inputs: bool = Field(
        default=False,
        description="continue although a teacher video or another input file has changed; each is "
        "named in the log",
    )


class RunConfig(Section):
    """Configuration of a training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] = Field(
        default="run", description="name of the run; letters, digits, dot, dash, underscore"
    )
    out: Folder | None = Field(default=None, description="run folder; null is runs/<name>")
    method: Literal["afd", "sft", "gan", "dmd"] = Field(
        default="afd",
        description="afd: adversarial flow distillation, sft: fit the teacher's videos, gan: "
        "through the last denoising step, dmd: score-free distribution matching",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="seed of all random numbers of the run"
    )
    updates: Count = Field(
        default=None,
        validate_default=True,
        description="updates of the run, those of the discriminator alone included; null: the "
        "method's own number on the laptop task (afd 160, others 400)",
    )
    prompts_per_update: Count = Field(
        default=8, description="prompts, each with its teacher video, in one update"
    )
    threads: Threads = Field(default=1, description="CPU threads; 0: torch's default")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        default="auto", description="auto: cuda if available, one GPU per process"
    )
    parallel: ParallelConfig = ParallelConfig()
    cache: Folder | None = Field(
        default=None,
        description="folder of text embeddings and teacher latents; null is ~/.cache/afd",
    )
    video: VideoConfig = VideoConfig()
    teacher: Annotated[TeacherConfig, ByKind("teachers", "simulator")] = of_default_kind()
    student: Annotated[StudentConfig, ByKind("students", "toy")] = of_default_kind()
    discriminator: Annotated[
        DiscriminatorConfig | None, ByKind("discriminators", "toy", optional=True)
    ] = of_default_kind()
    rewards: dict[EntryName, Annotated[RewardConfig, ByKind("rewards")]] = Field(
        default={},
        description="method=afd: frozen scores beside the discriminator, each a section by kind "
        "under its own name; kind=discriminator sets the discriminator's weight",
    )
    afd: AfdConfig = AfdConfig()
    sft: SftConfig = SftConfig()
    gan: GanConfig = GanConfig()
    dmd: DmdConfig = DmdConfig()
    replay: ReplayConfig = ReplayConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("updates", mode="before")
    @classmethod
    def _updates_of_the_method(cls, value: Any, info: ValidationInfo) -> Any:
        return UPDATES.get(info.data.get("method", ""), 1) if value is None else value

    @field_validator("discriminator")
    @classmethod
    def _discriminator_of_the_method(
        cls, value: DiscriminatorConfig | None, info: ValidationInfo
    ) -> DiscriminatorConfig | None:
        return value and value.for_method(info.data.get("method", ""))

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        """Reject sections that are incompatible."""
        for name, evaluation in self.evaluation.each().items():
            where = f"evaluation.sets.{name}" if name else "evaluation"
            if evaluation.kind == "none":
                continue
            try:
                metrics = find("metrics", evaluation.kind)
            except ConfigError as error:
                raise ValueError(f"{where}.kind: {error}, none") from None
            metrics.check(self.student)
            metrics.check_domain(where, evaluation.domain)
        if self.method in ("afd", "gan") and self.discriminator is not None:
            self.discriminator.check_student(self.student)
            self.discriminator.check_video(self.video)
        check_rewards(self.method, self.discriminator, self.rewards, self.afd, self.student)
        check_teacher(self.method, self.discriminator, self.teacher, self.evaluation.kind)
        if self.method == "afd":
            check_afd(self.afd, self.teacher, self.parallel, self.taught)
        self.student.check_video(self.video)
        weight = getattr(getattr(self, self.method), "prior_weight", 0.0)
        self.replay.check(self.method, self.prompts_per_update, weight)
        check_cached(self.replay, self.method, self.discriminator, self.teacher)
        return self

    @property
    def replayed(self) -> int:
        """Number of an update's prompts that are replayed."""
        return self.replay.count(self.prompts_per_update)

    @property
    def taught(self) -> int:
        """Number of an update's prompts that have the teacher's video."""
        return self.prompts_per_update - self.replayed

    @field_validator("rewards", mode="before")
    @classmethod
    def _without_nulls(cls, rewards: Any) -> Any:
        """Drop entries that are null: an override may take a reward out of a file."""
        if not isinstance(rewards, dict):
            return rewards
        return {name: section for name, section in rewards.items() if section is not None}

    @property
    def run_dir(self) -> Path:
        """The run folder: `out`, or runs/<name>."""
        return self.out if self.out is not None else Path("runs") / self.name

    @property
    def teacher_dir(self) -> Path:
        """The teacher's folder: `teacher.path`, or <run_dir>/teacher."""
        return self.teacher.path if self.teacher.path is not None else self.run_dir / "teacher"

    def open_teacher(self, console: Console | None = None) -> Teacher:
        """Open the run's teacher. Raises TeacherError if it cannot be used."""
        return self.teacher.open(self.video, self.teacher_dir, console)


# Keys of earlier versions, which are rejected with a hint at their new names.
RENAMED = {
    "steps": ("updates", "student.denoising_steps"),
    "prompts_per_step": ("prompts_per_update",),
    "student.steps": ("student.denoising_steps",),
    "version": ("weights",),
    "discriminator.warmup_steps": ("discriminator.warmup_updates",),
    "dmd.score_warmup_steps": ("dmd.score_warmup_updates",),
    **{f"{m}.cosine_steps": (f"{m}.cosine_updates",) for m in ("afd", "sft", "gan", "dmd")},
}

# The only keys in which a resumed run may differ from its checkpoint: none of them affects the
# results of updates already made.
FREE_KEYS = (
    "name",
    "out",
    "updates",
    "logging",
    "checkpoint",
    "teacher.fetch",
    "cache",
    "device",
    "parallel",
    "student.rollout_overlap",
)


@overload
def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig: ...
@overload
def load_config(path: Path | str, overrides: Sequence[str], kind: type[Kind]) -> Kind: ...
def load_config(
    path: Path | str, overrides: Sequence[str] = (), kind: type[Section] = RunConfig
) -> Section:
    """Read a YAML file, apply `dotted.key=value` overrides (values are YAML) and validate.

    `path` is a file or the name of a shipped configuration (`afd configs`).
    `kind` is the root section, by default RunConfig.

    Raises ConfigError naming the key, the value given, what is needed and the origin.
    """
    found = find_config(path)
    return make_config(read_yaml(found), overrides, str(found), kind)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file; ConfigError if it contains anything else."""
    where = f"config {shown(str(path), 400)}"
    try:
        with path.open("rb") as file:
            # One byte more than allowed; a device or pipe may be endless.
            text = file.read(MAX_BYTES + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read ({_reason(error)})") from error
    data = parse_value(text, where)
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: contains {type(data).__name__}, needs keys and values")
    return data


def parse_value(text: str, where: str) -> Any:
    """Parse YAML text to a plain value; raises ConfigError, whose message begins with `where`."""
    try:
        return parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{where}: not valid YAML ({error})") from None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        line = 1 + error.object[: error.start].count(b"\n")
        return f"line {line}: byte {error.object[error.start]:#04x} is not UTF-8"
    return str(error)  # a zero byte in a path


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
    """Validate plain data (as parsed from YAML) with overrides. `origin` names it in errors."""
    data = _copy(data)
    came_from: dict[str, str] = {}
    for override in overrides:
        came_from[_apply(data, override, kind)] = _named(override)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = [_explain(dict(detail), came_from, origin, kind) for detail in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain data for YAML, JSON and torch.save(weights_only)."""
    return config.model_dump(mode="json")


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, as written to <run>/config.yaml."""
    return yaml_text(plain(config))


def flatten(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested data."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(
    old: dict[str, Any], new: dict[str, Any], free_keys: Sequence[str] = FREE_KEYS
) -> list[str]:
    """Differences between two plain configurations outside `free_keys`, one sentence per key.

    A key that `old` lacks, as an earlier version wrote it, has its default.
    """
    b = dict(flatten(new))
    a = {k: v for k, v in flatten(_completed(old)) if k in b} | dict(flatten(old))
    free = tuple(f"{key}." for key in free_keys)
    keys, absent = sorted(a.keys() | b.keys()), "(absent)"
    found = [
        f"{k}: {a.get(k, absent)!r} there, {b.get(k, absent)!r} now"
        for k in keys
        if a.get(k, absent) != b.get(k, absent) and not f"{k}.".startswith(free)
    ]
    # The first reward is another one in another order.
    order, now = list(old.get("rewards") or {}), list(new.get("rewards") or {})
    if order == now or sorted(order) != sorted(now):
        return found
    return [*found, f"rewards: in the order {', '.join(order)} there, {', '.join(now)} now"]


def _completed(data: dict[str, Any]) -> dict[str, Any]:
    with suppress(ConfigError):  # keys of an earlier version that are gone
        return plain(make_config(data))
    return data


def _copy(data: dict[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, dict) else v for k, v in data.items()}


def _named(override: str) -> str:
    return f"override {shown(override)}"


def _apply(data: dict[str, Any], override: str, kind: type[Section]) -> str:
    """Set one `dotted.key=value` in nested data; returns the dotted key."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{_named(override)}: needs the form key=value or section.key=value")
    for section, word in ONE_WORD.items():
        if isinstance(data.get(section), str):
            data[section] = {word: data[section]}
        if parts == [section] and not text.startswith("{"):
            parts = [section, word]
    value = _value(text, override, types_of(kind, parts))
    where = data
    for i, part in enumerate(parts[:-1]):
        if where.get(part) is None:
            where[part] = {}
        where = where[part]
        if not isinstance(where, dict):
            section = ".".join(parts[: i + 1])
            raise ConfigError(f"{_named(override)}: {section} is a value, not a section")
    where[parts[-1]] = value
    return ".".join(parts)


def _value(text: str, override: str, annotations: Sequence[Any]) -> Any:
    """An override's value: parsed as YAML, or taken literally if the key is a path or free text.

    For such keys YAML would truncate "a #1" and misread "a: b", [x], 2026 and *x. Quoted values,
    null, and a list if the key takes one, are parsed as YAML for every key.
    """
    kinds = {part for annotation in annotations for part in parts_of(annotation)}
    literal = bool(kinds & {str, Path})
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    listed = list in kinds and text.startswith("[")
    if literal and not (quoted or listed or text in ("", "~", "null")):
        return text
    try:
        return parse_value(text, f"{_named(override)}: {shown(text)}")
    except ConfigError:
        if literal and quoted:
            return text  # a literal name that begins and ends with a quote
        raise


def _explain(
    detail: dict[str, Any], came_from: dict[str, str], origin: str, kind: type[Section]
) -> str:
    """One line for one pydantic error."""
    key = ".".join(map(str, detail["loc"]))
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        # A check of several keys names one of them: whole, or within the section it is a check of.
        named = message.partition(":")[0]
        if key and with_named(f"{key}.{named}", kind) in known_keys(kind):
            key, message = f"{key}.{named}", f"{key}.{message}"
        elif with_named(named, kind) in known_keys(kind):
            key = named
    # The most specific of what was given: a key itself before a section that holds it.
    held = [k for k in came_from if k == key or key.startswith(k + ".")]
    source = came_from[max(held, key=len)] if held else origin
    if detail["type"] == "extra_forbidden":
        named = with_named(key, kind)
        if named in known_keys(kind):
            section = named.rpartition(".")[0].replace(NAMED, str(detail["loc"][1]))
            return f"{source}: key {key!r} belongs to another {section}.kind"
        for new in RENAMED.get(key, ()):
            if new in known_keys(kind):
                return f"{source}: unknown key {key!r}; it is {new} now"
        name = str(detail["loc"][1]) if named != key else NAMED
        suggestion = suggest(named[:200], kind).replace(NAMED, name)
        return f"{source}: unknown key {shown(key)}; {suggestion}"
    if detail["type"] == "kind":
        # Its kind comes from where it is given, or is missing where its other keys are given.
        given = [s for k, s in came_from.items() if k.startswith(f"{key}.")]
        return f"{came_from.get(f'{key}.kind', (given or [source])[0])}: {key}.{detail['msg']}"
    if detail["type"] == "value_error":
        return f"{source}: {message}"
    if detail["type"] == "missing":
        return f"{source}: {key} is missing; needed: {described(key, kind)}"
    return f"{source}: {key} is {shown(detail['input'])}; {detail['msg']}"
