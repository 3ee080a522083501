"""Prompts of earlier domains in every update, with those videos of their teachers that exist."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd.config.run import RunConfig
from afd.data.sampler import Sampler
from afd.data.videos import Videos
from afd.distributed import Ranks
from afd.errors import TeacherError
from afd.methods.base import Method
from afd.teachers.base import Request
from afd.teachers.folder import open_folder
from afd.teachers.manifest import MANIFESTS
from afd.trainer.parts import open_videos, replayed_prompts

_log = logging.getLogger("afd")
# A replayed prompt, and where its video is.
Listed = list[tuple[str, str]]


class CachedTeacher:
    """Earlier teachers' finished videos of replayed prompts, as a `Teacher` that makes none."""

    def __init__(self, listed: Sequence[Sequence[str]]) -> None:
        self._files: dict[Request, Path] = {}
        self.of: dict[str, list[Request]] = {}
        for prompt, path in listed:
            held = self.of.setdefault(prompt, [])
            held.append(Request(prompt, len(held)))
            self._files[held[-1]] = Path(path)

    @property
    def requests(self) -> Sequence[Request]:
        return list(self._files)

    @property
    def listed(self) -> Listed:
        return [(request.prompt, str(path)) for request, path in self._files.items()]

    def answer(self, request: Request) -> Path:
        return self._files[request]


class Replay:
    """The replayed prompts of a run, each drawn as often as the others.

    The videos are listed when the run begins, and a checkpoint holds the list: the run is the same
    whatever is added to the teachers' folders meanwhile.
    """

    def __init__(self, config: RunConfig, method: Method, ranks: Ranks) -> None:
        self._config, self._method, self._ranks = config, method, ranks
        self.prompts = replayed_prompts(config)
        self.sampler = Sampler([Request(prompt) for prompt in self.prompts], config.seed)
        self._teacher: CachedTeacher | None = None
        self._videos: Videos | None = None

    def begin(self) -> None:
        """List the videos, for a run that has no checkpoint. Every process must call this."""
        if self._config.replay.teacher == "cached":
            found = find_videos(self._config, self.prompts) if self._ranks.main else None
            self._open(self._ranks.same(found))

    def _open(self, listed: Sequence[Sequence[str]]) -> None:
        self._teacher = CachedTeacher(listed)
        self._videos = open_videos(self._config, self._method, self._teacher, self._ranks)
        _log.info(
            "replay: %d of %d prompts have a video of an earlier teacher (%d videos); the others "
            "are replayed by the prior alone",
            len(self._teacher.of),
            len(self.prompts),
            len(self._teacher.requests),
        )

    def draw(self, update: int) -> tuple[list[str], list[Request]]:
        """The prompts of an update, and videos for those that have any, one each in turn."""
        prompts = [request.prompt for request in self.sampler.draw(self._config.replayed)]
        if self._teacher is None:
            return prompts, []
        held = [self._teacher.of[prompt] for prompt in prompts if prompt in self._teacher.of]
        if self._config.parallel.weights == "fsdp":
            # Every pass of a sharded network involves all processes.
            del held[len(held) // self._ranks.world * self._ranks.world :]
        return prompts, [videos[update % len(videos)] for videos in held]

    def fetch(self, requests: Sequence[Request]) -> Tensor:
        """The videos as the method's input (`Videos.fetch`), on the CPU."""
        assert self._videos is not None
        return self._videos.fetch(requests) if requests else torch.empty(0)

    def state_dict(self) -> dict[str, Any]:
        """Every process must call this."""
        state = self.sampler.state_dict()
        if self._teacher is None or self._videos is None:
            return state
        return state | {"listed": self._teacher.listed, "videos": self._videos.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], *, same: bool) -> None:
        """Restore a `state_dict`; not `same`: only its videos, as the prompts are others."""
        if "listed" in state:
            self._open(state["listed"])
            assert self._videos is not None
            self._videos.load_state_dict(state["videos"])
        if same:
            self.sampler.load_state_dict(dict(state))

    def close(self) -> None:
        if self._videos is not None:
            self._videos.close()


def find_videos(config: RunConfig, prompts: Sequence[str]) -> Listed:
    """The videos of some prompts in `replay.videos`, from their manifests. No ledger is opened, and
    nothing is bought. Raises TeacherError for a video that cannot be used."""
    wanted, found = {" ".join(prompt.split()): prompt for prompt in prompts}, Listed()
    for place in config.replay.videos:
        there = place.is_file() or any((place / name).is_file() for name in MANIFESTS)
        if not there:
            _log.warning(
                "replay.videos: %s is not there, or has no manifest of videos; none is used", place
            )
            continue
        folder, manifest = (place.parent, place) if place.is_file() else (place, None)
        try:
            teacher = open_folder(folder, manifest, config.video)
        except TeacherError as error:
            raise TeacherError(f"replay.videos: {error}") from None
        for request in teacher.requests:
            prompt = wanted.get(" ".join(request.prompt.split()))
            if prompt is not None:
                found.append((prompt, str(teacher.answer(request))))
    return found
