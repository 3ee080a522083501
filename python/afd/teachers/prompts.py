"""A list of prompts in the place of a teacher, for runs that learn from rewards alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from afd.errors import TeacherError
from afd.teachers.base import Request
from afd.teachers.config import PromptsConfig
from afd.video.config import VideoConfig


class PromptsTeacher:
    """Requests without answers: one per line of a text file."""

    def __init__(self, path: Path, key: str = "teacher.path") -> None:
        """`key`: the configuration's, for errors."""
        self.path = path
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise TeacherError(f"{key} {path}: cannot be read ({error})") from None
        lines = [line.strip() for line in text.split("\n")]
        # A prompt that is listed twice is drawn twice as often.
        draws: dict[str, int] = {}
        self._requests = []
        for prompt in filter(None, lines):
            draws[prompt] = draws.get(prompt, -1) + 1
            self._requests.append(Request(prompt, draws[prompt]))
        if not self._requests:
            raise TeacherError(f"{key} {path}: holds no prompt; needed: one a line")

    @property
    def requests(self) -> Sequence[Request]:
        """One request per line, in the file's order."""
        return self._requests

    def answer(self, request: Request) -> Path:
        """Raise TeacherError: there are no videos."""
        raise TeacherError(f"teacher.path {self.path}: lists prompts; it has no videos")


def open_teacher(
    config: PromptsConfig, video: VideoConfig, folder: Path, console: Console
) -> PromptsTeacher:
    """Open the list of a configuration (`TeacherConfig.open`)."""
    return PromptsTeacher(folder)
