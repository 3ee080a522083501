"""Settings of several teachers together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from afd.config.base import ByKind, Count, Natural, Positive, Section
from afd.hub import missing_path, shipped_text
from afd.teachers.config import TeacherConfig
from afd.teachers.forecast import Forecast, MixForecast

TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]


class MixedConfig(Section):
    """One of several teachers."""

    name: TeacherName = Field(description="its name in metrics and files, its folder by default")
    source: Annotated[TeacherConfig, ByKind("teachers", without=("mix", "prompts"))] = Field(
        description="the teacher: a section with a kind of its own"
    )
    prompts: Path | None = Field(
        default=None, description="text file of those of its prompts that are used; null: all"
    )
    weight: Positive = Field(
        default=1.0,
        description="route: how often it is drawn; ensemble: of its advantages; relative to others",
    )
    final_weight: Positive | None = Field(
        default=None, description="the weight after weight_updates updates; null: it stays"
    )
    weight_updates: Natural = Field(
        default=0, description="updates over which the weight goes to final_weight, evenly"
    )
    price_usd: float | None = Field(
        default=None, ge=0, description="price of one of its videos; null: what its source says"
    )

    def weight_at(self, update: int) -> float:
        """Its weight in an update, from 0."""
        if self.final_weight is None:
            return self.weight
        done = min(1.0, update / self.weight_updates) if self.weight_updates else 1.0
        return self.weight + done * (self.final_weight - self.weight)


class MixConfig(TeacherConfig):
    """Several teachers, of which each answers its own prompts or all answer the same."""

    opener: ClassVar[str] = "afd.teachers.mix:open_teacher"

    kind: Literal["mix"] = Field(default="mix", description="several teachers together")
    mode: Literal["route", "ensemble"] = Field(
        default="route",
        description="route: a prompt belongs to one teacher; ensemble: prompts are shared, and the "
        "discriminator has a head for each teacher",
    )
    teachers: list[MixedConfig] = Field(min_length=1, description="the teachers, in order")
    per_prompt: Count | None = Field(
        default=None, description="ensemble: teachers that are asked for a prompt; null: all"
    )
    resample: bool = Field(
        default=False,
        description="take teachers whose videos differ in size or rate; all are scaled and "
        "resampled as `video` says",
    )

    @model_validator(mode="after")
    def _consistent(self) -> MixConfig:
        names = [one.name for one in self.teachers]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"teacher.teachers: got the name {twice[0]} twice; needed: different")
        if self.per_prompt is not None and not (
            self.mode == "ensemble" and self.per_prompt <= len(names)
        ):
            raise ValueError(
                f"teacher.per_prompt: got {self.per_prompt} with mode={self.mode} and "
                f"{len(names)} teachers; needed: mode=ensemble and at most their number"
            )
        for one in self.teachers:
            if one.final_weight is not None and not one.weight_updates:
                raise ValueError(
                    f"teacher.teachers.{one.name}.weight_updates: got 0 with final_weight; "
                    "needed: the updates over which the weight changes"
                )
        return self

    def folder_of(self, one: MixedConfig, folder: Path) -> Path:
        """Where one teacher's videos are stored."""
        return one.source.path if one.source.path is not None else folder / one.name

    def weights_at(self, update: int) -> dict[str, float]:
        """The teachers' weights in an update, with sum 1."""
        found = {one.name: one.weight_at(update) for one in self.teachers}
        total = sum(found.values())
        return {name: weight / total for name, weight in found.items()}

    def forecast(self, folder: Path, drawn: int) -> Forecast:
        shares = self.weights_at(0)
        asked = self.per_prompt or len(self.teachers)
        parts = []
        for one in self.teachers:
            part = drawn * (
                shares[one.name] if self.mode == "route" else asked / len(self.teachers)
            )
            forecast = one.source.forecast(self.folder_of(one, folder), max(1, round(part)))
            parts.append((one.name, forecast, one.price_usd))
        return MixForecast.of(parts)

    def missing(self, folder: Path) -> Iterator[str]:
        for one in self.teachers:
            yield from one.source.missing(self.folder_of(one, folder))
            if one.prompts is not None:
                key = f"teacher.teachers.{one.name}.prompts"
                yield from missing_path(key, shipped_text(one.prompts), "the prompts that are used")

    @property
    def patience_s(self) -> float:
        return max(one.source.patience_s for one in self.teachers)
