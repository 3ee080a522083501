"""Several teachers as one: requests name the teacher that they are for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rich.console import Console

from afd.errors import TeacherError
from afd.hub import shipped_text
from afd.teachers.base import Request, Teacher
from afd.teachers.mix_config import MixConfig, MixedConfig
from afd.teachers.prompts import PromptsTeacher
from afd.video.config import VideoConfig
from afd.video.source import opened
from afd.video.timeline import decoded

_log = logging.getLogger("afd")


class MixTeacher:
    """Routes every request to its teacher.

    Attributes:
        requests: one per video of every teacher.
        units: what a batch is drawn from. Routed, these are `requests`; of an ensemble a unit is a
            prompt, without a teacher, which `expand` turns into a request to each of its teachers.
    """

    def __init__(self, config: MixConfig, teachers: Mapping[str, Teacher]) -> None:
        self.config, self.teachers = config, dict(teachers)
        own = {name: self._used(name) for name in self.teachers}
        self._expanded: dict[Request, list[Request]] = {}
        if config.mode == "route":
            self._refuse_shared(own)
        else:
            self._expanded = self._units(own)
        self.requests: Sequence[Request] = [r for listed in own.values() for r in listed]
        self.units: Sequence[Request] = list(self._expanded) or self.requests

    def expand(self, request: Request) -> list[Request]:
        """The requests to single teachers that a drawn one stands for."""
        return self._expanded.get(request, [request])

    def answer(self, request: Request) -> Path:
        """The path of a teacher's video. Raises TeacherError as that teacher does."""
        if request.teacher not in self.teachers:
            raise TeacherError(
                f"teacher: got a request for {request.teacher!r}; needed: one of "
                f"{', '.join(self.teachers)}"
            )
        return self.teachers[request.teacher].answer(_plain(request))

    def ready(self, request: Request) -> bool:
        """Whether the answer is available without waiting."""
        ask = getattr(self.teachers[request.teacher], "ready", None)
        return ask is None or bool(ask(_plain(request)))

    def prefetch(self, requests: Sequence[Request]) -> None:
        """Have the teachers that work on demand start on these."""
        asked = [one for request in requests for one in self.expand(request)]
        for name, teacher in self.teachers.items():
            start = getattr(teacher, "prefetch", None)
            if start is not None:
                start([_plain(request) for request in asked if request.teacher == name])

    def weights(self, update: int) -> list[float]:
        """How often each of `units` is drawn in an update, relative to the others."""
        if self.config.mode == "ensemble":
            return [1.0] * len(self.units)
        shares = self.config.weights_at(update)
        counts = {name: sum(r.teacher == name for r in self.units) for name in shares}
        return [shares[r.teacher] / counts[r.teacher] for r in self.units]

    def state_dict(self) -> dict[str, Any]:
        """The states of teachers that have one."""
        asked = {name: getattr(one, "state_dict", None) for name, one in self.teachers.items()}
        return {name: None if ask is None else ask() for name, ask in asked.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, held in state.items():
            if held is not None:
                restore: Any = self.teachers[name]
                restore.load_state_dict(held)

    def _used(self, name: str) -> list[Request]:
        """A teacher's requests, as far as their prompts are used."""
        (config,) = (one for one in self.config.teachers if one.name == name)
        given = self.teachers[name].requests
        wanted = used_prompts(config)
        if wanted is None:
            return [Request(r.prompt, r.draw, name) for r in given]
        unknown = [prompt for prompt in wanted if prompt not in {r.prompt for r in given}]
        if unknown:
            raise TeacherError(
                f"teacher.teachers.{name}.prompts {config.prompts}: has {len(unknown)} prompts of "
                f"no video of {name}, such as {unknown[0]!r}"
            )
        return [Request(r.prompt, r.draw, name) for r in given if r.prompt in wanted]

    def _refuse_shared(self, own: dict[str, list[Request]]) -> None:
        owner: dict[str, str] = {}
        for name, requests in own.items():
            for request in requests:
                if owner.setdefault(request.prompt, name) != name:
                    raise TeacherError(
                        f"teacher.teachers: the prompt {request.prompt!r} belongs to "
                        f"{owner[request.prompt]} and to {name}; needed: one teacher each with "
                        "mode=route (teacher.teachers.<name>.prompts chooses), or mode=ensemble"
                    )

    def _units(self, own: dict[str, list[Request]]) -> dict[Request, list[Request]]:
        """Of every prompt as many units as its most diligent teacher has videos of it."""
        by_prompt: dict[str, dict[str, list[Request]]] = {}
        for name, requests in own.items():
            for request in requests:
                by_prompt.setdefault(request.prompt, {}).setdefault(name, []).append(request)
        asked = self.config.per_prompt or len(own)
        units = {}
        for prompt, videos in by_prompt.items():
            if len(videos) < asked:
                lacking = [name for name in own if name not in videos]
                raise TeacherError(
                    f"teacher.teachers: {', '.join(lacking)} has no video of the prompt "
                    f"{prompt!r}; needed: a video by each of {asked} teachers with mode=ensemble"
                )
            names = list(videos)
            turns = len(names) if asked < len(names) else 1
            for number in range(turns * max(map(len, videos.values()))):
                draw, turn = divmod(number, turns)
                chosen = islice(cycle(names), turn, turn + asked)
                units[Request(prompt, number)] = [
                    videos[name][draw % len(videos[name])] for name in chosen
                ]
        return units


def used_prompts(config: MixedConfig) -> list[str] | None:
    """The prompts of a teacher that are used; None: all. Raises TeacherError."""
    if config.prompts is None:
        return None
    key = f"teacher.teachers.{config.name}.prompts"
    return list(
        dict.fromkeys(r.prompt for r in PromptsTeacher(shipped_text(config.prompts), key).requests)
    )


def _plain(request: Request) -> Request:
    """The request as its teacher knows it."""
    return Request(request.prompt, request.draw)


def open_teacher(
    config: MixConfig, video: VideoConfig, folder: Path, console: Console
) -> MixTeacher:
    """Open all teachers of a configuration (`TeacherConfig.open`)."""
    teachers = {
        one.name: one.source.open(video, config.folder_of(one, folder), console)
        for one in config.teachers
    }
    mixed = MixTeacher(config, teachers)
    if not config.resample:
        _refuse_unlike(mixed)
    elif video.fps is None:
        raise TeacherError(
            "video.fps: got null with teacher.resample=true; needed: the rate of all videos"
        )
    _log.info("teacher: %s of %s", config.mode, ", ".join(teachers))
    return mixed


def _refuse_unlike(mixed: MixTeacher) -> None:
    """Raise TeacherError if the first finished videos of two teachers differ in size or rate."""
    known: dict[str, tuple[tuple[int, int], float]] = {}
    for name in mixed.teachers:
        own = (r for r in mixed.requests if r.teacher == name)
        first = next((r for r in own if mixed.ready(r)), None)
        if first is None:
            continue
        with opened(mixed.answer(first)) as source:
            frame = next(decoded(source)).frame
            rate = round(float(source.stream.average_rate or 0), 2)
            known[name] = (frame.height, frame.width), rate
    (name, wanted), *others = known.items() or [("", ((0, 0), 0.0))]
    for other, found in others:
        if found != wanted:
            a, b = (f"{h}x{w} at {rate:g} a second" for (h, w), rate in (wanted, found))
            raise TeacherError(
                f"teacher.teachers: the videos of {name} are {a}, those of {other} {b}; needed: "
                "one size and rate, or teacher.resample=true with video.fps"
            )
