"""The training loop: one explicit update, with exact resumption after any interruption.

A run is a pure function of its configuration: stopping it anywhere (Ctrl-C, kill -9, power cut) and
resuming gives bitwise the same numbers and weights as an uninterrupted run. Under torchrun every
process computes its part of each update (afd.distributed); the main process writes the files.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor

from afd import machine
from afd.audit.start import warn_of_clips
from afd.config.run import RunConfig, differences, plain
from afd.data.inputs import inputs_of, refuse_other_inputs
from afd.data.sampler import Sampler
from afd.distributed import ALONE, Ranks, join
from afd.errors import StorageError, TeacherError, TrainingError, VideoError
from afd.files import DISK, what_failed, write_json, write_text
from afd.listing import counted
from afd.methods.base import Batch, Method, Shown, earlier_prompts
from afd.teachers.base import Request, Teacher
from afd.trainer import checkpoint
from afd.trainer.build import build_method, check_files, check_size, not_training
from afd.trainer.evaluate import (
    Evaluation,
    every_prompt,
    rolled,
    write_samples,
)
from afd.trainer.logging import Timers, log_to, progress_bar
from afd.trainer.metrics import Records
from afd.trainer.mitigation import Mitigation, draw_weights
from afd.trainer.parts import (
    Drawn,
    build_evaluator,
    open_teacher,
    open_videos,
    prompts_asked,
    refuse_single_prompt,
    restore,
)
from afd.trainer.replay import Replay
from afd.trainer.run_folder import (
    DONE,
    RunFolder,
    finished,
    lengthen,
    refuse_another_run,
    refuse_idle_processes,
    run_folder,
    with_commits,
)
from afd.trainer.run_folder import load_run as load_run
from afd.trainer.side_by_side import write_side_by_side
from afd.trainer.stop import stop_request
from afd.video import to_uint8

_log = logging.getLogger("afd")


class Outcome(Enum):
    """The outcome of `train`."""

    FINISHED = "finished"
    ALREADY_FINISHED = "already finished"
    STOPPED = "stopped"


def train(
    config: RunConfig,
    *,
    method: Method | None = None,
    teacher: Teacher | None = None,
    console: Console | None = None,
) -> Outcome:
    """Start a run, or resume it from its newest checkpoint.

    `method` and `teacher`, if given, replace the configured ones (for custom implementations). A
    finished run is never modified: ALREADY_FINISHED is returned. Raises ConfigError if the run
    folder holds a run of another configuration, TeacherError for a bad teacher, TrainingError for a
    non-finite loss or metric, StorageError if the run folder is no longer writable or has gone.
    """
    out = config.run_dir
    patience_s = 2 * config.teacher.patience_s
    with join(config.device, patience_s=patience_s, parts=config.parallel.sequence) as ranks:
        config = with_commits(config, ranks)
        if ranks.main:
            refuse_another_run(out, config)
        if ranks.same(finished(out, config.updates)):
            return Outcome.ALREADY_FINISHED
        refuse_idle_processes(config, ranks.world)
        console = console or Console(quiet=not ranks.main)
        with _home(config, console, ranks) as home:
            if method is None:
                check_size(config)
                check_files(config)
            lengthen(out, config.updates, ranks)
            if config.threads:
                torch.set_num_threads(config.threads)
            checkpoint.seed_everything(config.seed)
            teacher = teacher or open_teacher(config, console, ranks)
            refuse_single_prompt(config, teacher)
            method = method or build_method(config, ranks, prompts_asked(config, teacher))
            trainer = Trainer(config, method, teacher, ranks, home)
            if ranks.main and trainer.update == 0 and config.teacher.gives_videos:
                warn_of_clips(teacher, config.video)
            try:
                return trainer.run(console)
            except OSError as error:
                raise _stopped_by_disk(error, trainer) from error
            finally:
                trainer.close()


def _stopped_by_disk(error: OSError, trainer: Trainer) -> Exception:
    """Convert a write error in the run folder to a StorageError; return other errors unchanged."""
    own = error.filename is not None and Path(error.filename).is_relative_to(trainer.out)
    if error.errno not in DISK and not own:
        return error
    newest = trainer.newest
    saved = "nothing is saved yet" if newest is None else f"the newest checkpoint is {newest}"
    remedy = DISK.get(error.errno or 0, "resolve this")
    if trainer.home is not None and trainer.home.gone:
        remedy = "the run folder was moved or removed: restore it"
    return StorageError(
        f"{what_failed(error)}; {remedy} and continue: afd resume {trainer.out} ({saved})"
    )


@contextmanager
def _home(config: RunConfig, console: Console, ranks: Ranks) -> Iterator[RunFolder | None]:
    """Open the run folder for the block; the main process locks it, logs there and writes its
    config.yaml."""
    if not ranks.main:
        _log.addHandler(logging.NullHandler())
        yield None
        return
    out = config.run_dir
    with run_folder(config) as home, log_to(out / "train.log", console):
        facts = machine.inspect()
        write_json(out / "doctor.json", facts)
        updates = counted(config.updates, "update")
        _log.info("%s: %s, %s, seed %d", out, config.method, updates, config.seed)
        if (sentence := not_training(config)) is not None:
            _log.warning("%s", sentence)
        if ranks.processes > 1:
            shared = f", {ranks.parts} for each video" if ranks.parts > 1 else ""
            _log.info("%d processes, %s%s", ranks.processes, config.parallel.weights, shared)
        for op, state in facts["ops_by_device"][ranks.device.type].items():
            _log.info("op %s runs on backend %s", op, state["chosen"])
        yield home


class Trainer:
    """Runs the updates of one run and holds its state between them."""

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        teacher: Teacher,
        ranks: Ranks = ALONE,
        home: RunFolder | None = None,
    ) -> None:
        self.config, self.method, self.out, self.ranks = config, method, config.run_dir, ranks
        self.teacher, self.home = teacher, home
        self.robust = Mitigation(config, teacher, ranks) if config.teacher.robust.on else None
        units = getattr(teacher, "units", teacher.requests)
        self.numbers = {request: n for n, request in enumerate(teacher.requests)}
        self.sampler = Sampler(
            units, config.seed, draw_weights(config, teacher, units, self.robust)
        )
        self.videos = open_videos(config, method, teacher, ranks)
        self.evaluate = build_evaluator(config, method, teacher, self.videos, ranks)
        self.replay = Replay(config, method, ranks) if config.replay.fraction else None
        replayed = [] if self.replay is None else self.replay.prompts
        self.inputs = inputs_of(method, every_prompt(config, teacher.requests), replayed)
        self.update = 0
        # Drawn, and not yet the past: a checkpoint holds the cursor before it.
        self.coming: Drawn | None = None
        self.delayed = getattr(method, "ahead", None) is not None
        self.elapsed_s = 0.0
        self.checkpoints = self.out / "checkpoints"
        if self.robust is not None and checkpoint.latest(self.checkpoints, ranks) is None:
            self.robust.begin(method)
            self.sampler.restart()
        self.newest: Path | None = None
        records = self._restore()
        self.records = Records(config, self.update, records) if ranks.main else None
        self.evaluated = set(ranks.same(sorted(self.records.evaluated) if self.records else []))

    def run(self, console: Console) -> Outcome:
        """Run all remaining updates, then the final evaluation."""
        config = self.config
        began = time.perf_counter() - self.elapsed_s
        bar_args = (config.name, config.updates, self.update, console, config.logging.progress)
        with stop_request() as stop, progress_bar(*bar_args) as bar:
            timers = Timers(bar.begins)
            if self.update == 0:
                self._evaluate_on_the_way(timers)
            # A signal may reach only one process, or reach the processes in different updates.
            stopping = self.ranks.any(bool(stop))
            while self.update < config.updates and not stopping:
                metrics = self._update(timers)
                self._evaluate_on_the_way(timers)
                if _due(self.update, config.logging.videos_every):
                    with timers("evaluate"):
                        self._show()
                phase_s = timers.take()
                self.elapsed_s = time.perf_counter() - began
                self._record(metrics, phase_s)
                bar.advance(phase_s)
                gone = self.home is not None and self.home.gone
                stopping = self.ranks.any(bool(stop) or gone)
                last = stopping or self.update == config.updates
                if last or _due(self.update, config.checkpoint.every):
                    self._save()
                if gone:
                    raise StorageError(
                        f"run folder {self.out}: was moved or removed while the run wrote there; "
                        f"its state after update {self.update} was written to the old path, "
                        f"without the earlier metrics: afd resume {self.out}"
                    )
            if self.update < config.updates:
                if self.update == 0:
                    self._save()
                _log.info("stopped after update %d; continue: afd resume %s", self.update, self.out)
                return Outcome.STOPPED
        self._finish()
        return Outcome.FINISHED

    def _update(self, timers: Timers) -> dict[str, float]:
        """One update: draw requests, roll out, train the discriminator, train the student."""
        method = self.method
        following: Drawn | None = None
        with timers("teacher"), self._saved_without_videos():
            this = self.coming = self.coming or self._next(self.update)
            if self.delayed and self.update + 1 < self.config.updates:
                following = self._next(self.update + 1)
        self.drawn, batch = this, this.batch
        if method.needs_rollout:
            with timers("rollout"):
                method.rollout(batch)
                if self.delayed:
                    cast("Any", method).roll_ahead(None if following is None else following.batch)
        metrics: dict[str, float] = {}
        if method.needs_discriminator:
            with timers("discriminator"):
                metrics |= method.discriminator_step(batch)
        with timers("student"):
            metrics |= method.student_step(batch)
        self.update += 1
        self.coming = following
        metrics |= {f"teacher/{name}/videos": float(n) for name, n in sorted(this.teachers.items())}
        if self.robust is not None and self.ranks.main:
            self.robust.write(self.update)
        return metrics

    @property
    def _needs_teacher(self) -> bool:
        """Whether the method uses the teacher's videos, and not its prompts alone."""
        return getattr(self.method, "needs_teacher", True)

    @contextmanager
    def _saved_without_videos(self) -> Iterator[None]:
        """Save the state of the latest update if the teacher fails to provide the next videos."""
        samplers = [self.sampler, *([] if self.replay is None else [self.replay.sampler])]
        cursors = [sampler.state_dict() for sampler in samplers]
        try:
            yield
        except (TeacherError, VideoError):
            # With several processes the other ones are waiting for this failed one, so saving,
            # which is collective, would hang.
            if self.update > 0 and self.ranks.processes == 1:
                for sampler, cursor in zip(samplers, cursors, strict=True):
                    sampler.load_state_dict(cursor)
                self._save()
                _log.info("saved after update %d; continue: afd resume %s", self.update, self.out)
            raise

    def _next(self, update: int) -> Drawn:
        """This process's share of an update's prompts, with the teacher's videos."""
        cursor = self._cursor()
        count = self.config.taught
        ahead = (self.config.updates - update - 1) * count
        replayed, cached = ([], []) if self.replay is None else self.replay.draw(update)
        total = count + len(cached)
        own = self.ranks.share(total)
        if self._needs_teacher:
            requests = self.videos.draw(self.sampler, count, ahead)
            each = len(requests) // count  # teachers that are asked for a prompt
            asked = [*requests, *cached]
            mine = asked[own.start * each : own.stop * each]
            videos = self._fetch(mine, len(requests) - own.start * each)
        else:
            asked = requests = self.sampler.draw(count)
            each, mine = 1, requests[own]
            videos = torch.empty(len(mine), 0)
        every = [request.prompt for request in asked[::each]]
        batch = Batch(
            update,
            every[own],
            videos,
            first=own.start,
            total=total,
            cached=len(cached),
            earlier=earlier_prompts(every)[own],
            teachers=[request.teacher for request in mine],
            clips=[self.numbers.get(request, 0) for request in mine],
            robust=None if self.robust is None else self.robust.robust,
        )
        if replayed:
            own = self.ranks.share(len(replayed))
            prompts = replayed[own]
            nothing = torch.empty(len(prompts), 0)
            total = len(replayed)
            batch.replay = Batch(update, prompts, nothing, first=own.start, total=total)
        teachers = Counter(request.teacher for request in requests if request.teacher)
        return Drawn(batch, requests[0], teachers, cursor)

    def _cursor(self) -> dict[str, Any]:
        """Where the draws of requests and of replayed prompts are."""
        replay = {} if self.replay is None else self.replay.sampler.state_dict()
        return {"sampler": self.sampler.state_dict(), "replay": replay}

    def _fetch(self, requests: Sequence[Request], own: int) -> Tensor:
        """The videos of requests, of which the first `own` are to the run's teacher and the others
        to earlier ones."""
        own = max(0, min(own, len(requests)))
        parts = [self.videos.fetch(requests[:own])] if own else []
        if self.replay is not None and own < len(requests):
            parts.append(self.replay.fetch(requests[own:]))
        return torch.cat(parts)

    def _record(self, metrics: dict[str, float], phase_s: dict[str, float]) -> None:
        bad = [key for key, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"update {self.update}: {', '.join(f'{k} = {metrics[k]}' for k in bad)}; "
                f"the newest checkpoint is {self.newest}"
            )
        if self.records is not None:
            self.records.update(self.update, metrics, phase_s, self.elapsed_s)

    def _evaluate_on_the_way(self, timers: Timers) -> None:
        """Evaluate for the curve, if due at this update and not yet recorded."""
        every = self.config.evaluation.every
        if not _due(self.update, every) or self.update in (self.config.updates, *self.evaluated):
            return
        with timers("evaluate"):
            self._evaluate(self.config.evaluation.curve_videos)

    def _evaluate(self, videos: int) -> Evaluation | None:
        """Measure held-out videos, shared between the processes; recorded once per update."""
        if self.evaluate is None:
            return None
        with self.method.evaluation_policy() as policy:
            result = self.evaluate(policy, videos)
        if self.records is not None and self.update not in self.evaluated:
            self.records.evaluation(self.update, result)
        self.evaluated.add(self.update)
        return result

    def _show(self) -> None:
        """Write the teacher's and the student's video of the update's first prompt, for viewing."""
        shown = self.method.shown
        if shown is None:  # a method without rollouts
            prompt, seed = self.drawn.asked.prompt, self.config.evaluation.seed
            with self.method.evaluation_policy() as policy:
                (x0_1FCHW,) = rolled(policy, self.config, [prompt], [seed], [0])
            shown = Shown(prompt, x0_1FCHW[0])
        if self.records is None:
            return
        # This scoring method does not draw from the run's random generators.
        score = getattr(getattr(self.method, "discriminator", None), "differentiable_score", None)
        with torch.no_grad():
            if score is not None and shown.score is not None:
                first_1FCHW = self.drawn.batch.teacher_BFCHW[:1]
                shown = replace(shown, teacher_score=float(score(first_1FCHW, [shown.prompt])))
            (student,) = self.method.codec.decode(shown.x0_FCHW[None].to(self.ranks.device))
        asked = self.drawn.asked
        left = to_uint8(self.videos.clip(asked)).numpy() if self._needs_teacher else None
        right = to_uint8(student).numpy()
        fps = self.config.video.rate
        folder = self.out / "videos"
        try:
            path, video_FHWC = write_side_by_side(folder, left, right, shown, self.update, fps)
        except OSError as error:  # these videos are only for viewing
            _log.warning(
                "videos: cannot be written (%s); continuing without them", what_failed(error)
            )
            return
        self.records.video(self.update, path, video_FHWC, fps)

    def _finish(self) -> None:
        """Run the final evaluation on the full held-out set; write its samples and, last, DONE."""
        result = self._evaluate(self.config.evaluation.videos)
        if self.records is None:
            return
        if result is not None:
            write_samples(self.out, result, self.config.evaluation.samples)
        self.records.sync()
        updates = counted(self.update, "update")
        write_text(self.out / DONE, f"{updates}, {self.elapsed_s:.1f} s\n")
        _log.info("finished: %s in %.1f s", updates, self.elapsed_s)

    def _save(self) -> None:
        """Save everything the next update depends on, after flushing all metrics to disk."""
        if self.home is not None and self.home.gone:
            self.home.make_again()
        if self.records is not None:
            self.records.sync()
        cursor = self._cursor() if self.coming is None else self.coming.cursor
        replay = None if self.replay is None else self.replay.state_dict() | cursor["replay"]
        state = {
            "update": self.update,
            "method": self.method.name,
            "config": plain(self.config),
            "written_by": checkpoint.written_by() | {"processes": self.ranks.processes},
            "elapsed_s": self.elapsed_s,
            "method_state": self.method.state_dict(),
            "random": self.ranks.each(checkpoint.random_state()),
            "sampler": cursor["sampler"],
            "replay": replay,
            "teacher": _state_of(self.teacher),
            "videos": self.videos.state_dict(),
            "robust": None if self.robust is None else self.robust.robust.state_dict(),
            "inputs": self.inputs,
            "records": None if self.records is None else self.records.state_dict(),
        }
        keep = self.config.checkpoint.keep
        self.newest = checkpoint.save(self.checkpoints, state, keep=keep, ranks=self.ranks)

    def _restore(self) -> dict[str, Any] | None:
        """Restore the newest complete checkpoint, if any; returns the state of the records."""
        path = checkpoint.latest(self.checkpoints, self.ranks)
        if path is None:
            if self.replay is not None:
                self.replay.begin()
            return None
        state = restore(path, self.method, self.config, self.ranks)
        if state["teacher"] is not None:
            cast("Any", self.teacher).load_state_dict(state["teacher"])
        if self.robust is not None and state.get("robust") is not None:
            self.robust.robust.load_state_dict(state["robust"])
        self.sampler.load_state_dict(state["sampler"])
        accept = self.config.checkpoint.accept_changed_inputs
        refuse_other_inputs(state["inputs"], self.inputs, accept=accept)
        if self.replay is not None:
            key = "replay.prompts"
            same = state["inputs"].get(key) == self.inputs[key]
            self.replay.load_state_dict(state["replay"], same=same)
        self.videos.load_state_dict(state["videos"])
        checkpoint.set_random_state(state["random"], self.ranks.process)
        self.update, self.elapsed_s, self.newest = state["update"], state["elapsed_s"], path
        _log.info("continuing after update %d from %s", self.update, path)
        for line in differences(state["config"], plain(self.config), ("name", "out")):
            _log.info("changed: %s", line)
        before = state["written_by"]["processes"]
        if before != self.ranks.processes:
            _log.info("processes: %d now, %d before", self.ranks.processes, before)
        return dict(state["records"])

    def close(self) -> None:
        close = getattr(self.method, "close", None)
        if close is not None:
            close()
        self.videos.close()
        if self.replay is not None:
            self.replay.close()
        if self.records is not None:
            self.records.close()


def _state_of(teacher: Teacher) -> dict[str, Any] | None:
    """The state of a paid teacher (its spending); None for teachers without state."""
    ask = getattr(teacher, "state_dict", None)
    return None if ask is None else ask()


def _due(update: int, every: int) -> bool:
    return every > 0 and update % every == 0
