"""The black-box teacher interface: a request is answered with the path of a finished video.

No scores, latents, trajectories or parameters cross this interface, so a folder of clips, a
separate process and a paid service all look the same to the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """One request to the teacher. `draw` numbers repeated requests for the same prompt; `teacher`:
    which of several is asked."""

    prompt: str
    draw: int = 0
    teacher: str = ""


class Teacher(Protocol):
    """The interface of a teacher."""

    @property
    def requests(self) -> Sequence[Request]:
        """All available requests, in a fixed order: one per distinct answer."""
        ...

    def answer(self, request: Request) -> Path:
        """The path of the finished video for a request. Raises Unanswered if this request has none,
        TeacherError if the teacher cannot continue."""
        ...
