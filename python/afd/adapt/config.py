"""The file of a sequence: a base configuration and the domains that a student learns in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from afd.config.base import Count, Folder, Section
from afd.config.run import EntryName, EvaluationSet


class Column(EvaluationSet):
    """A held-out set, a column of the matrix, and the metric that stands for it."""

    metric: str | None = Field(
        default=None, description="its metric in the tables; null: the first that is measured"
    )
    better: Literal["lower", "higher"] = Field(
        default="lower", description="which values of the metric are better"
    )

    def evaluated(self) -> EvaluationSet:
        """The held-out set alone."""
        own = EvaluationSet.model_fields
        return EvaluationSet(**{key: value for key, value in self if key in own})


class DomainConfig(Section):
    """A teacher with its prompts, and how long the student learns from it."""

    name: EntryName = Field(description="name of its run folder, and of its column")
    teacher: dict[str, Any] = Field(description="the teacher section of its run")
    prompts: Path | None = Field(
        default=None,
        description="text file of the teacher's prompts that later domains replay; null: all",
    )
    updates: Count | None = Field(default=None, description="updates of its run; null: the base's")
    overrides: list[str] = Field(default=[], description="k=v for its run alone")
    evaluation: Column | None = Field(
        default=Column(), description="its held-out set; null: it has no column"
    )


class SequenceConfig(Section):
    """Settings of a sequence of domains."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] = Field(
        description="name of the sequence"
    )
    out: Folder | None = Field(default=None, description="its folder; null is runs/<name>")
    base: Path = Field(
        description="what every run begins with: a path from this file's folder, or a shipped name"
    )
    overrides: list[str] = Field(default=[], description="k=v for the runs of all domains")
    discriminator: Literal["fresh", "carried"] = Field(
        default="fresh", description="a new discriminator per domain, or that of the one before"
    )
    domains: list[DomainConfig] = Field(min_length=1, description="in the order of learning")
    sets: dict[EntryName, Column] = Field(
        default={}, description="further columns, such as neutral prompts, by name"
    )

    @model_validator(mode="after")
    def _names(self) -> SequenceConfig:
        names = [domain.name for domain in self.domains]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"domains: {', '.join(twice)} stands twice; needed: a name of its own for each, "
                "since a sequence goes through a domain once"
            )
        both = sorted(set(names) & self.sets.keys())
        if both:
            raise ValueError(f"sets: {', '.join(both)} is a domain's name; needed: another")
        if not self.columns:
            raise ValueError("domains: none has an evaluation, and sets is empty; needed: a column")
        return self

    @property
    def columns(self) -> dict[str, Column]:
        """Every column by name: those of the domains in their order, then the others."""
        own = {d.name: d.evaluation for d in self.domains if d.evaluation is not None}
        return {**own, **self.sets}


def split(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Overrides of the sequence itself (name, out) by key, and those of its runs."""
    own: dict[str, str] = {}
    runs = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key in ("name", "out"):
            own[key] = value
        else:
            runs.append(override)
    return own, runs
