"""Typed settings common to all teachers, the interface to open one, and the sections of a folder
and of a list of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from rich.console import Console

from afd.config.base import Count, Section, Share
from afd.errors import TeacherError
from afd.hub import missing_path
from afd.registry import load
from afd.teachers.forecast import Forecast
from afd.teachers.manifest import read_manifest

if TYPE_CHECKING:
    from afd.teachers.base import Teacher
    from afd.video.config import VideoConfig


class RobustConfig(Section):
    """What a run does about a teacher's videos that may be wrong; nothing by default."""

    trim: Share = Field(
        default=0.0,
        description="share of the videos, those with the highest smoothed loss, that is left out "
        "of the discriminator's loss",
    )
    after: Count = Field(default=2, description="visits of a video before it can be left out")
    new: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.3, description="weight of a visit's loss in the smoothed one"
    )
    downweight: bool = Field(
        default=False, description="weigh each video by the audit's trust in it"
    )
    audit: Path | None = Field(
        default=None,
        description="downweight: the audit.json of `afd teacher audit`; null: the checks that need "
        "no network, made when the run begins",
    )
    balance: bool = Field(
        default=False,
        description="draw videos so that brightness and the like are as in the student's",
    )

    @property
    def on(self) -> bool:
        return self.trim > 0 or self.downweight or self.balance


class TeacherConfig(Section):
    """Base class of every teacher's section.

    A subclass overrides `open` (docs/EXTENDING.md); built-in ones name the function in `opener`, as
    "module:name".
    """

    opener: ClassVar[str]
    # Whether it has videos, and not prompts alone.
    gives_videos: ClassVar[bool] = True

    kind: str = Field(description="name of the teacher in the registry")
    path: Path | None = Field(
        default=None, description="the teacher's folder; null is <out>/teacher (not for folder)"
    )
    robust: RobustConfig = RobustConfig()

    def open(self, video: VideoConfig, folder: Path, console: Console | None = None) -> Teacher:
        """Open the teacher, whose videos are stored in `folder`. Raises TeacherError."""
        return load(self.opener)(self, video, folder, console or Console())

    def forecast(self, folder: Path, drawn: int) -> Forecast:
        """Estimate what a run that draws `drawn` requests will ask for, offline and read-only."""
        return Forecast(self.kind, 0, 0, 0, drawn)

    def missing(self, folder: Path) -> Iterator[str]:
        """Yield a message for each input that a run needs and that is missing."""
        yield from ()

    @property
    def patience_s(self) -> float:
        """The most seconds that one answer may take."""
        return 0.0


class FolderConfig(TeacherConfig):
    """Finished videos in a folder."""

    opener: ClassVar[str] = "afd.teachers.folder:open_teacher"

    kind: Literal["folder"] = Field(default="folder", description="read finished videos")
    manifest: Path | None = Field(
        default=None,
        description="which file holds which prompt; null finds prompts.jsonl, .csv, .txt in path",
    )

    @model_validator(mode="after")
    def _needs(self) -> FolderConfig:
        if self.path is None:
            raise ValueError("teacher.kind=folder needs teacher.path, the folder with the videos")
        return self

    def forecast(self, folder: Path, drawn: int) -> Forecast:
        try:
            listed = len(read_manifest(folder, self.manifest)[1])
        except TeacherError:  # `missing` reports it
            listed = 0
        return Forecast(self.kind, listed, listed, 0, min(drawn, listed or drawn))

    def missing(self, folder: Path) -> Iterator[str]:
        yield from missing_path("teacher.path", folder, "the folder of the teacher's videos")
        if not folder.exists():
            return
        try:
            manifest, entries, problems = read_manifest(folder, self.manifest)
        except TeacherError as error:
            yield str(error)
            return
        gone = [f"{file}: no such file" for _, file, _ in entries if not _is_file(folder, file)]
        for wrong in (problems, gone):
            if wrong:
                yield f"teacher manifest {manifest}: {len(wrong)} wrong, such as {wrong[0]}"
        if not entries and not problems:
            yield f"teacher manifest {manifest}: lists no video"


class PromptsConfig(TeacherConfig):
    """Prompts without videos, for runs that learn from rewards alone (discriminator: null)."""

    opener: ClassVar[str] = "afd.teachers.prompts:open_teacher"
    gives_videos: ClassVar[bool] = False

    kind: Literal["prompts"] = Field(default="prompts", description="prompts without videos")
    path: Path | None = Field(default=None, description="text file with a prompt on each line")

    @model_validator(mode="after")
    def _needs(self) -> PromptsConfig:
        if self.path is None:
            raise ValueError("teacher.kind=prompts needs teacher.path, a file with a prompt a line")
        return self

    def missing(self, folder: Path) -> Iterator[str]:
        yield from missing_path("teacher.path", folder, "the file with a prompt on each line")
        if folder.is_dir():
            yield f"teacher.path: got {folder}, a directory; needed: a text file"


def _is_file(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except (OSError, ValueError):  # too long, or with a NUL character
        return False
