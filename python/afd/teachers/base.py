"""The black box: a teacher answers a request with the path of a finished video, nothing else.

No scores, latents, trajectories or parameters cross this border, so a folder of clips, a separate
process and a paid service all look the same to the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """One question to the teacher. `draw` numbers repeated questions with the same prompt."""

    prompt: str
    draw: int = 0


class Teacher(Protocol):
    """What the trainer may ask."""

    @property
    def requests(self) -> Sequence[Request]:
        """Everything worth asking, in a fixed order: one entry per distinct answer."""
        ...

    def answer(self, request: Request) -> Path:
        """The finished video for a request. Raises Unanswered if this one has none, TeacherError
        if the teacher cannot go on."""
        ...
