"""The videos of an `afd sample` run: prompts, seeds, prefixes and prompt switches, one job each."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from afd.config import ConfigError
from afd.sample_config import SampleConfig
from afd.section import Section

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Line(Section):
    """A line of a .jsonl file of prompts; files it names are relative to the list's folder."""

    prompt: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(pattern=_NAME)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    image: Path | None = None
    video: Path | None = None
    # From which chunk on which prompt.
    switches: tuple[tuple[Annotated[int, Field(ge=0)], str], ...] = ()


@dataclass(frozen=True)
class Job:
    """One video. `name` is its file's, without the suffix."""

    name: str
    prompt: str
    seed: int
    image: Path | None = None
    video: Path | None = None
    switches: tuple[tuple[int, str], ...] = ()

    @property
    def prompts(self) -> list[str]:
        """Every prompt of the video."""
        return [self.prompt, *(prompt for _, prompt in self.switches)]

    def prompt_at(self, chunk: int) -> str:
        """The prompt of a chunk."""
        before = [text for first, text in sorted(self.switches) if first <= chunk]
        return before[-1] if before else self.prompt

    def record(self, config: SampleConfig) -> dict[str, Any]:
        """Everything the video depends on; written into its file."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "switches": [list(switch) for switch in self.switches],
            "prefix": None if self.prefix is None else str(self.prefix),
            "settings": config.settings(),
        }

    @property
    def prefix(self) -> Path | None:
        return self.image or self.video


def read_jobs(config: SampleConfig) -> list[Job]:
    """`samples` jobs for every prompt, in the order of the prompts; seeds count on.

    Raises:
        ConfigError: no prompts, a bad line (named by file and number), or two videos of one name.
    """
    jobs: dict[str, Job] = {}
    for index, line in enumerate(_lines(config)):
        for sample in range(config.samples):
            seed = config.seed + index * config.samples + sample
            seed = seed if line.seed is None else line.seed + sample
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
                raise ConfigError(f"prompts: two videos are named {job.name}")
            jobs[job.name] = job
    return list(jobs.values())


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
            yield Line(prompt=prompt)
        return
    path = Path(given)
    if path.suffix not in (".txt", ".jsonl"):
        if os.path.isfile(given):  # not Path's, which raises for a prompt as long as no name is
            raise ConfigError(
                f"prompts: got the file {given}; needed: its name to end in .txt or .jsonl"
            )
        yield Line(prompt=given)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts {path}: cannot be read ({error})") from error
    # Not splitlines, which also cuts at separators that a prompt may hold.
    numbered = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"prompts {path}: holds none")
    for number, line in numbered:
        yield Line(prompt=line.strip()) if path.suffix == ".txt" else _parsed(path, number, line)


def _parsed(path: Path, number: int, line: str) -> Line:
    try:
        parsed = Line.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise ConfigError(f"prompts {path}:{number}: not valid JSON ({error})") from None
    except ValidationError as error:
        told = error.errors()[0]
        where = ".".join(map(str, told["loc"])) or "the line"
        known = ", ".join(Line.model_fields)
        raise ConfigError(
            f"prompts {path}:{number}: {where}: {told['msg']}; known are {known}"
        ) from None
    if parsed.image is not None and parsed.video is not None:
        raise ConfigError(f"prompts {path}:{number}: got image and video; needed: one of them")
    return parsed.model_copy(
        update={
            key: _inside(path, number, key, named)
            for key in ("image", "video")
            if (named := getattr(parsed, key)) is not None
        }
    )


def _inside(path: Path, number: int, key: str, named: Path) -> Path:
    """A file that a line names: beside the list or below, so that no list reads other files."""
    file = path.parent / named
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise ConfigError(
            f"prompts {path}:{number}: {key}: {named} lies outside {path.parent}, the folder of "
            "the list"
        )
    return file
