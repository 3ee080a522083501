"""The teacher's side of the loop: start it, draw requests, decode each answer once.

Shape letters: P prompts, F frames, C = 3, H rows, W columns.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from afd.config import RunConfig, VideoConfig
from afd.teachers.base import Request, Teacher, TeacherError, Unanswered
from afd.teachers.config import API_KINDS
from afd.teachers.folder import FolderTeacher
from afd.video import from_uint8, read_video, to_uint8

if TYPE_CHECKING:
    from afd.teachers.api import ApiTeacher

# Requests offered for prefetching at a time; the teacher takes as many as it wants.
AHEAD = 256
_log = logging.getLogger("afd")


def open_teacher(config: RunConfig, console: Console | None = None) -> Teacher:
    """The teacher a configuration asks for; a simulator first writes its folder, once.

    A paid service answers from its folder and buys what is missing (docs/TEACHERS.md).
    """
    if config.teacher.kind in API_KINDS:
        return open_api_teacher(config)
    if config.teacher.kind == "simulator":
        _simulate(config, console or Console())
    video = config.video
    frames = video.frames if video.short == "error" else 1
    teacher = FolderTeacher(
        config.teacher_dir, config.teacher.manifest, frames=frames, fps=video.fps
    )
    _log.info("teacher %s: %d videos", teacher.folder, len(teacher.requests))
    return teacher


def open_api_teacher(config: RunConfig) -> ApiTeacher:
    """The paid service of a configuration."""
    # Only who buys needs the HTTP client.
    from afd.teachers.api import ApiTeacher

    video = config.video
    frames = video.frames if video.short == "error" else 1
    return ApiTeacher(config.teacher, config.teacher_dir, frames=frames, fps=video.fps)


class Sampler:
    """Requests in seeded random order, every one once before any comes again.

    The order of round k depends on (seed, k) only, so the cursor is the whole state.
    """

    def __init__(self, requests: Sequence[Request], seed: int) -> None:
        self._requests = list(requests)
        self._seed = seed
        self._round = 0
        self._position = 0
        self._order = self._shuffled()

    def draw(self, count: int) -> list[Request]:
        """The next `count` requests."""
        drawn = []
        for _ in range(count):
            if self._position == len(self._order):
                self._round, self._position = self._round + 1, 0
                self._order = self._shuffled()
            drawn.append(self._requests[self._order[self._position]])
            self._position += 1
        return drawn

    def peek(self, count: int) -> list[Request]:
        """What the next draw gives, as far as this round goes."""
        return [self._requests[i] for i in self._order[self._position : self._position + count]]

    def state_dict(self) -> dict[str, Any]:
        return {"round": self._round, "position": self._position, "of": len(self._requests)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved cursor; refuses one of a teacher with another number of videos."""
        if state["of"] != len(self._requests):
            raise TeacherError(
                f"the checkpoint was made with {state['of']} teacher videos, "
                f"the folder holds {len(self._requests)} now"
            )
        self._round, self._position = state["round"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        # Odd multiplier: distinct (seed, round) pairs of one run never share a generator.
        mixed = (self._seed + 0x9E3779B97F4A7C15 * (self._round + 1)) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        return torch.randperm(len(self._requests), generator=generator).tolist()


class Videos:
    """A teacher's answers as tensors. Each file is decoded once and kept as bytes (3·F·H·W)."""

    def __init__(self, teacher: Teacher, video: VideoConfig) -> None:
        self._teacher = teacher
        self._video = video
        self._decoded: dict[Request, Tensor] = {}

    def draw(self, sampler: Sampler, count: int, ahead: int = 0) -> list[Request]:
        """The sampler's next `count` requests that have an answer.

        Requests without one are skipped and logged; TeacherError if none is left. `ahead`: how
        many more will be drawn at most; a teacher that takes long begins with them now.
        """
        prefetch = getattr(self._teacher, "prefetch", None)
        drawn: list[Request] = []
        skipped = 0
        while len(drawn) < count:
            if prefetch is not None:
                prefetch(sampler.peek(min(AHEAD, count - len(drawn) + ahead)))
            request = sampler.draw(1)[0]
            try:
                self._teacher.answer(request)
            except Unanswered as reason:
                skipped += 1
                _log.warning("skipped: %s", reason)
                if skipped > len(self._teacher.requests):
                    raise TeacherError(f"no request has an answer, the last: {reason}") from None
            else:
                drawn.append(request)
        return drawn

    def fetch(self, requests: Sequence[Request]) -> Tensor:
        """float32 [P, F, 3, H, W] in [-1, 1], one video per request."""
        return from_uint8(torch.stack([self._one(request) for request in requests]))

    def _one(self, request: Request) -> Tensor:
        if request not in self._decoded:
            video, path = self._video, self._teacher.answer(request)
            video_FCHW = read_video(
                path,
                frames=video.frames,
                height=video.height,
                width=video.width,
                fps=video.fps,
                short=video.short,
            )
            self._decoded[request] = to_uint8(video_FCHW)
        return self._decoded[request]


def _simulate(config: RunConfig, console: Console) -> None:
    """Let a separate process write the teacher's folder (it appears whole or not at all).

    What was asked for is noted beside the folder, never in it, so that a folder made for other
    settings is refused instead of used.
    """
    folder = config.teacher_dir
    asked = config.teacher.model_dump(include={"style", "count", "seed"})
    note = folder.with_name(folder.name + ".request.json")
    if folder.exists():
        made = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else "something else"
        if made != asked:
            raise TeacherError(
                f"teacher folder {folder}: was made for {made}, this run asks for {asked}; "
                "choose another teacher.path= or out=, or teacher.kind=folder to use it as it is"
            )
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(asked), encoding="utf-8")
    command = [sys.executable, "-m", "afd.teachers.simulator", "--out", str(folder)]
    for key, value in asked.items():
        command += [f"--{key}", str(value)]
    with console.status(f"teacher process writes {asked['count']} videos"):
        process = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if process.returncode != 0:
        reason = process.stderr.strip()
        raise TeacherError(f"the teacher's process ended with {process.returncode}: {reason}")
