"""The jobs of an `afd sample` run, one per video: prompts, seed, prefix and prompt switches."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from afd.config.base import Section
from afd.errors import ConfigError
from afd.files import json_rows, read_text
from afd.rollout import SwitchMode
from afd.sampling.config import SampleConfig

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class PromptSwitch(NamedTuple):
    """A change of prompt at a chunk of a video; modes as in `afd.rollout.Switch`."""

    chunk: int
    prompt: str
    mode: SwitchMode = "plain"

    def record(self) -> list[Any]:
        """Plain data, as in a prompt file."""
        return [self.chunk, self.prompt, *([] if self.mode == "plain" else [self.mode])]


def _switches(given: object) -> tuple[PromptSwitch, ...]:
    """The switches of a line; raises ValueError in one sentence."""
    modes = get_args(SwitchMode)
    form = f"[chunk, prompt] or [chunk, prompt, mode] with mode one of {', '.join(modes)}"
    if not isinstance(given, list | tuple):
        raise ValueError(f"got {_short(given)}; needed: a list of {form}")
    switches: dict[int, PromptSwitch] = {}
    for entry in given:
        match entry:
            case [int(chunk), str(prompt)] | [int(chunk), str(prompt), "plain"]:
                switch = PromptSwitch(chunk, prompt)
            case [int(chunk), str(prompt), str(mode)] if mode in modes:
                switch = PromptSwitch(chunk, prompt, cast("SwitchMode", mode))
            case _:
                raise ValueError(f"got {_short(entry)}; needed: {form}")
        if isinstance(switch.chunk, bool) or not 0 <= switch.chunk < 2**31:
            raise ValueError(f"got {_short(entry)}; needed: a chunk that counts from 0")
        if not switch.prompt.strip():
            raise ValueError(f"got {_short(entry)}; needed: a prompt that is not blank")
        if switch.chunk in switches:
            raise ValueError(f"got two switches at chunk {switch.chunk}; needed: at most one")
        switches[switch.chunk] = switch
    return tuple(switches.values())


def _short(given: object) -> str:
    return ascii(given)[:80]


class Line(Section):
    """A line of a .jsonl prompt file; paths in it are relative to that file's folder."""

    prompt: Annotated[str, Field(min_length=1)]
    # Short enough to be a file name with -<seed>.mp4.partial appended.
    name: Annotated[str, Field(pattern=_NAME, max_length=200)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    image: Path | None = None
    video: Path | None = None
    switches: Annotated[tuple[PromptSwitch, ...], BeforeValidator(_switches)] = ()

    @model_validator(mode="after")
    def _text(self) -> Line:
        if not self.prompt.strip():
            raise ValueError("the prompt is blank")
        for prompt in (self.prompt, *(switch.prompt for switch in self.switches)):
            # Text that no tokenizer accepts, such as undecodable bytes from a command line.
            if "\0" in prompt or not _encodable(prompt):
                raise ValueError("the prompt contains a zero byte, or bytes that are not UTF-8")
        return self


@dataclass(frozen=True)
class Job:
    """One video to make. `name` is its file name without the suffix."""

    name: str
    prompt: str
    seed: int
    image: Path | None = None
    video: Path | None = None
    switches: tuple[PromptSwitch, ...] = ()

    @property
    def prompts(self) -> list[str]:
        """All prompts of the video."""
        return [self.prompt, *(switch.prompt for switch in self.switches)]

    @property
    def recaches(self) -> dict[int, SwitchMode]:
        """The modes of the switches that recache, by chunk."""
        return {s.chunk: s.mode for s in sorted(self.switches) if s.mode != "plain"}

    def prompt_at(self, chunk: int) -> str:
        """The prompt of a chunk."""
        before = [switch.prompt for switch in sorted(self.switches) if switch.chunk <= chunk]
        return before[-1] if before else self.prompt

    def record(self, config: SampleConfig) -> dict[str, Any]:
        """Everything that determines the video; stored in its file."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "switches": [switch.record() for switch in self.switches],
            "prefix": None if self.prefix is None else str(self.prefix),
            "settings": config.settings(),
        }

    @property
    def prefix(self) -> Path | None:
        return self.image or self.video


def read_jobs(config: SampleConfig) -> list[Job]:
    """`samples` jobs per prompt, in the order of the prompts, with consecutive seeds.

    Raises:
        ConfigError: no prompts, a bad line (with file and line number), or a duplicate video name.
    """
    jobs: dict[str, Job] = {}
    for index, line in enumerate(_lines(config)):
        for sample in range(config.samples):
            seed = config.seed + index * config.samples + sample
            seed = seed if line.seed is None else line.seed + sample
            if seed >= 2**63:
                raise ConfigError(f"seed: video {index + 1} has {seed}; needed: below 2**63")
            own = line.image is not None or line.video is not None
            job = Job(
                name=_name(index, line, seed, config.samples),
                prompt=line.prompt,
                seed=seed,
                image=line.image if own else config.image,
                video=line.video if own else config.video,
                switches=line.switches,
            )
            if job.name in jobs:
                raise ConfigError(f"prompts: two videos have the name {job.name}")
            jobs[job.name] = job
    return list(jobs.values())


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _name(index: int, line: Line, seed: int, samples: int) -> str:
    if line.name is not None:
        return line.name if samples == 1 else f"{line.name}-{seed}"
    words = re.sub(r"[^a-z0-9]+", "-", line.prompt.lower()).strip("-")[:40].strip("-")
    return "-".join(part for part in (f"{index:04d}", words, str(seed)) if part)


def _lines(config: SampleConfig) -> Iterator[Line]:
    given = config.prompts
    if given is None or not given:
        raise ConfigError("prompts: not given; needed: a .txt or .jsonl file, a prompt, or a list")
    if isinstance(given, list):
        for number, prompt in enumerate(given, 1):
            if not prompt.strip():
                raise ConfigError(f"prompts: number {number} of the list is empty")
            yield _line(f"prompts: number {number} of the list", {"prompt": prompt})
        return
    path = Path(given)
    if path.suffix not in (".txt", ".jsonl"):
        if os.path.isfile(given):  # Path.is_file raises if a prompt is too long for a name
            raise ConfigError(
                f"prompts: got the file {given}; needed: its name to end in .txt or .jsonl"
            )
        yield _line("prompts", {"prompt": given})
        return
    try:
        text = read_text(path)
    except ValueError as error:
        raise ConfigError(f"prompts {path}: {error}") from error
    if not text.strip():
        raise ConfigError(f"prompts {path}: contains no prompts")
    if path.suffix == ".txt":
        # Not splitlines, which also splits at separators that a prompt may contain.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _line(f"prompts {path}:{number}", {"prompt": line.strip()})
        return
    for number, row in json_rows(text):
        where = f"prompts {path}:{number}"
        if isinstance(row, str):
            raise ConfigError(f"{where}: not valid JSON ({row})")
        yield _files_of(_line(where, row), path, where)


def _line(where: str, row: dict[str, Any]) -> Line:
    try:
        return Line.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))[:80] or "the line"
        known = ", ".join(Line.model_fields)
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {key}: {message}; known are {known}") from None


def _files_of(line: Line, path: Path, where: str) -> Line:
    """A line with its paths resolved relative to the prompt file."""
    if line.image is not None and line.video is not None:
        raise ConfigError(f"{where}: got image and video; needed: one of them")
    named = {key: getattr(line, key) for key in ("image", "video")}
    inside = {k: _inside(path, where, k, v) for k, v in named.items() if v is not None}
    return line.model_copy(update=inside)


def _inside(path: Path, where: str, key: str, named: Path) -> Path:
    """Resolve a path of a line; it must be in or below the prompt file's folder."""
    file = path.parent / named
    try:
        inside = file.resolve().is_relative_to(path.parent.resolve())
    except (OSError, RuntimeError) as error:  # a symbolic-link loop
        raise ConfigError(f"{where}: {key}: {named} cannot be found ({error})") from error
    if not inside:
        raise ConfigError(
            f"{where}: {key}: {named} lies outside {path.parent}, the folder of the list"
        )
    return file
