"""A run's use of `teacher.robust`: what is known at its beginning, and the fate of every clip."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afd.audit.audit import audit, read_trust
from afd.audit.clip import of_tensor
from afd.audit.collect import read_all
from afd.audit.probe import balance, statistics
from afd.config.run import RunConfig
from afd.distributed import Ranks
from afd.errors import ConfigError
from afd.files import write_json
from afd.listing import log_all
from afd.methods.base import Method
from afd.methods.robust import Robust
from afd.teachers.base import Request, Teacher
from afd.trainer.evaluate import rolled

# The file of the run folder, and the student's videos that the drawing is balanced against.
FATES, ROLLOUTS, FIRST_SEED = "teacher_clips.json", 72, 3_000_000
_log = logging.getLogger("afd")


class Mitigation:
    """The state of `teacher.robust` in a run.

    Attributes:
        robust: weights of the teacher's videos, in the order of `teacher.requests`.
    """

    def __init__(self, config: RunConfig, teacher: Teacher, ranks: Ranks) -> None:
        self.config, self.teacher, self.ranks = config, teacher, ranks
        self.robust = Robust(config.teacher.robust, len(teacher.requests))
        self._numbers = {request: n for n, request in enumerate(teacher.requests)}
        self._written: Any = None

    def begin(self, method: Method) -> None:
        """Find the weights that hold for the whole run, before its first update."""
        settings, requests = self.config.teacher.robust, list(self.teacher.requests)
        if not settings.downweight and not settings.balance:
            return
        # A teacher that works on demand has to answer: a clip that is not there has no weight.
        paths = self.ranks.same(
            [str(self.teacher.answer(r)) for r in requests] if self.ranks.main else None
        )
        named = [(path, r.prompt, Path(path)) for path, r in zip(paths, requests, strict=True)]
        clips = [] if settings.audit and not settings.balance else read_all(named)
        if settings.downweight:
            trust = self._given(paths) if settings.audit else audit(clips).trusted
            self.robust.trust_N = torch.tensor(trust, dtype=torch.float64)
            doubted = [
                f"{path} ({request.prompt!r}): trust {value:.2f}"
                for request, path, value in zip(requests, paths, trust, strict=True)
                if value < 0.5
            ]
            log_all(_log, logging.INFO, "teacher clip %s", doubted)
        if settings.balance:
            self.robust.draw_N = torch.tensor(self._balanced(method, clips), dtype=torch.float64)

    def _given(self, paths: Sequence[str]) -> list[float]:
        file = self.config.teacher.robust.audit
        assert file is not None
        known = read_trust(file)
        absent = [path for path in paths if Path(path).name not in known]
        if absent:
            raise ConfigError(
                f"teacher.robust.audit {file}: has {len(absent)} of the teacher's clips not, such "
                f"as {Path(absent[0]).name}; needed: an audit of this teacher"
            )
        return [known[Path(path).name] for path in paths]

    def _balanced(self, method: Method, clips: Sequence[Any]) -> list[float]:
        prompts = [self.teacher.requests[i % len(clips)].prompt for i in range(ROLLOUTS)]
        seeds = [FIRST_SEED + i for i in range(ROLLOUTS)]
        with method.evaluation_policy() as policy:
            x0 = torch.cat(list(rolled(policy, self.config, prompts, seeds, [*range(ROLLOUTS)])))
        videos = method.codec.decode(x0).cpu()
        rate = self.config.video.rate
        made = [of_tensor(v, p, "", rate) for v, p in zip(videos, prompts, strict=True)]
        weights = np.ones(len(clips))
        usable = [i for i, clip in enumerate(clips) if clip.problem is None]
        if len(usable) >= 5:
            of_teacher = statistics([clips[i] for i in usable])
            weights[usable] = balance(of_teacher, statistics(made))
        found: list[float] = self.ranks.same(weights.tolist())
        return found

    def drawn(self, usual: Sequence[float], units: Sequence[Request]) -> list[float]:
        """How often each unit is drawn: as usual, times the mean weight of its videos."""
        if self.robust.draw_N is None:
            return list(usual)
        expand = getattr(self.teacher, "expand", lambda request: [request])
        found = []
        for weight, unit in zip(usual, units, strict=True):
            own = [float(self.robust.draw_N[self._numbers[r]]) for r in expand(unit)]
            found.append(weight * sum(own) / len(own))
        return found

    def write(self, update: int) -> None:
        """Write every clip's fate into the run folder, if any has changed."""
        robust = self.robust
        now = robust.trimmed_N.tolist()
        if now == self._written and update < self.config.updates:
            return
        self._written = now
        rows = []
        for n, request in enumerate(self.teacher.requests):
            rows.append(
                {
                    "prompt": request.prompt,
                    "draw": request.draw,
                    "teacher": request.teacher,
                    "left_out": now[n],
                    "loss": round(float(robust.loss_N[n]), 6),
                    "visits": int(robust.seen_N[n]),
                    "trust": 1.0 if robust.trust_N is None else float(robust.trust_N[n]),
                    "drawn": 1.0 if robust.draw_N is None else float(robust.draw_N[n]),
                }
            )
        write_json(self.config.run_dir / FATES, {"update": update, "clips": rows})


def draw_weights(
    config: RunConfig, teacher: Teacher, units: Sequence[Request], mitigation: Mitigation | None
) -> Callable[[int], Sequence[float]] | None:
    """How often the sampler draws each of `units`, after so many draws; None: equally often."""
    of_mix = getattr(teacher, "weights", None)
    if of_mix is None and (mitigation is None or not config.teacher.robust.balance):
        return None

    def weights(drawn: int) -> Sequence[float]:
        update = drawn // config.taught
        usual = of_mix(update) if of_mix is not None else [1.0] * len(units)
        return usual if mitigation is None else mitigation.drawn(usual, units)

    return weights
