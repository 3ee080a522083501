"""The trainer: one visible step, and everything that makes it safe to interrupt.

A run is a pure function of its configuration: stopping it anywhere (Ctrl-C, kill -9, power cut) and
continuing gives the same numbers and weights, bit by bit, as never having stopped.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from rich.console import Console

from afd import doctor
from afd.config import ConfigError, RunConfig, differences, load_config, plain, to_yaml
from afd.methods.base import Batch, Method
from afd.methods.build import build_method
from afd.teachers.base import Teacher
from afd.training import checkpoint
from afd.training.evaluate import Evaluation, make_evaluator, write_samples
from afd.training.logging import Lines, Signs, Timers, log_to, progress_bar
from afd.training.stop import stop_request
from afd.training.teacher import Sampler, Videos, open_teacher

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger("afd")


class Outcome(Enum):
    """How `train` ended."""

    FINISHED = "finished"
    ALREADY_FINISHED = "already finished"
    STOPPED = "stopped"


class TrainingError(RuntimeError):
    """A run cannot go on; the message says at which step and why."""


def train(
    config: RunConfig,
    *,
    method: Method | None = None,
    teacher: Teacher | None = None,
    console: Console | None = None,
) -> Outcome:
    """Start a run, or continue it where its newest checkpoint stands.

    `method` and `teacher` replace what the configuration names (for one's own). A finished run is
    never touched: it returns ALREADY_FINISHED. Raises ConfigError where the run folder holds a run
    of another configuration, TeacherError for a bad teacher, TrainingError for a loss or metric
    that is not finite.
    """
    console = console or Console()
    out = config.run_dir
    refuse_another_run(out, config)
    if (out / "DONE").exists():
        return Outcome.ALREADY_FINISHED
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out), log_to(out / "train.log", console):
        if config.threads:
            torch.set_num_threads(config.threads)
        (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        facts = doctor.inspect()
        (out / "doctor.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        _log.info("%s: %s, %d updates, seed %d", out, config.method, config.steps, config.seed)
        for op, state in facts["ops"].items():
            _log.info("op %s runs on backend %s", op, state["chosen"])
        checkpoint.seed_everything(config.seed)
        trainer = Trainer(
            config, method or build_method(config), teacher or open_teacher(config, console)
        )
        try:
            return trainer.run(console)
        finally:
            trainer.close()


def load_run(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of the run in a folder; `overrides` may change config.FREE_KEYS only."""
    return load_config(folder / "config.yaml", [*overrides, f"out={json.dumps(str(folder))}"])


def evaluate_run(folder: Path, videos: int | None = None) -> Evaluation:
    """Measure the newest checkpoint of a run on held-out seeds; nothing in the folder changes."""
    config = load_run(folder)
    teacher, method = open_teacher(config), build_method(config)
    path = checkpoint.latest(folder / "checkpoints")
    every = Videos(teacher, config.video)
    evaluate = make_evaluator(config, lambda: every.fetch(teacher.requests))
    if path is None or evaluate is None:
        why = "has no checkpoint" if path is None else "has evaluation.kind=none"
        raise ConfigError(f"run folder {folder}: {why}, so there is nothing to evaluate")
    state = checkpoint.load(path, method=method.name, config=plain(config))
    method.load_state_dict(state["method_state"])
    with method.evaluation_policy() as policy:
        return evaluate(policy, videos or config.evaluation.videos)


class Trainer:
    """State of one run between two updates."""

    def __init__(self, config: RunConfig, method: Method, teacher: Teacher) -> None:
        self.config, self.method, self.out = config, method, config.run_dir
        self.sampler = Sampler(teacher.requests, config.seed)
        self.videos = Videos(teacher, config.video)
        self.evaluate = make_evaluator(config, lambda: self.videos.fetch(teacher.requests))
        self.step = 0
        self.elapsed_s = 0.0
        self.checkpoints = self.out / "checkpoints"
        self._restore()
        self.metrics = Lines(self.out / "metrics.jsonl", self.step)
        self.evaluations = Lines(self.out / "evaluation.jsonl", self.step)
        self.board = self._open_board() if config.logging.tensorboard else None

    def run(self, console: Console) -> Outcome:
        """All remaining updates, then the final evaluation."""
        config, signs, timers = self.config, Signs(), Timers()
        began = time.perf_counter() - self.elapsed_s
        bar_args = (config.name, config.steps, self.step, console, config.logging.progress)
        with stop_request() as stop, progress_bar(*bar_args) as bar:
            if self.step == 0:
                self._evaluate_on_the_way(timers)
            while self.step < config.steps and not stop:
                metrics = self._update(timers)
                self._evaluate_on_the_way(timers)
                phase_s = timers.take()
                self.elapsed_s = time.perf_counter() - began
                self._record(metrics, phase_s)
                signs.look(self.step, metrics)
                bar.advance(phase_s)
                if _due(self.step, config.checkpoint.every) or stop or self.step == config.steps:
                    self._save()
            if self.step < config.steps:
                self._save()
                _log.info("stopped after update %d; continue: afd resume %s", self.step, self.out)
                return Outcome.STOPPED
        self._finish()
        return Outcome.FINISHED

    def _update(self, timers: Timers) -> dict[str, float]:
        """The whole algorithm at a glance: ask, roll out, train the critic, train the student."""
        method = self.method
        with timers("teacher"):
            count = self.config.prompts_per_step
            ahead = (self.config.steps - self.step - 1) * count
            requests = self.videos.draw(self.sampler, count, ahead)
            prompts = [request.prompt for request in requests]
            batch = Batch(self.step, prompts, self.videos.fetch(requests))
        if method.needs_rollout:
            with timers("rollout"):
                method.rollout(batch)
        metrics: dict[str, float] = {}
        if method.needs_critic:
            with timers("critic"):
                metrics |= method.critic_step(batch)
        with timers("student"):
            metrics |= method.student_step(batch)
        self.step += 1
        return metrics

    def _record(self, metrics: dict[str, float], phase_s: dict[str, float]) -> None:
        """One line of metrics.jsonl: `step` counts the updates made so far."""
        bad = [key for key, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"update {self.step}: {', '.join(f'{k} = {metrics[k]}' for k in bad)}; the newest "
                f"checkpoint is {checkpoint.latest(self.checkpoints)}"
            )
        line = {"step": self.step, "time_s": round(self.elapsed_s, 3), "phase_s": phase_s}
        self.metrics.write(line | metrics)
        if self.board is not None:
            for key, value in metrics.items():
                self.board.add_scalar(key, value, self.step)
            for phase, seconds in phase_s.items():
                self.board.add_scalar(f"phase_s/{phase}", seconds, self.step)
        if _due(self.step, self.config.logging.every):
            shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
            _log.debug("update %d: %s", self.step, shown)

    def _evaluate_on_the_way(self, timers: Timers) -> None:
        """A point of the curve, if one is due here and not on file already."""
        every = self.config.evaluation.every
        if self.evaluate is None or not _due(self.step, every) or self.step == self.config.steps:
            return
        if self.step not in self.evaluations.steps:
            with timers("evaluate"), self.method.evaluation_policy() as policy:
                result = self.evaluate(policy, self.config.evaluation.curve_videos)
            self._record_evaluation(result)

    def _record_evaluation(self, result: Evaluation) -> None:
        self.evaluations.write(
            {
                "step": self.step,
                "seed": self.config.seed,
                "method": self.config.method,
                "videos": result.count,
                "metrics": result.metrics,
            }
        )
        if self.board is not None:
            for key, value in result.metrics.items():
                self.board.add_scalar(f"evaluation/{key}", value, self.step)
        shown = "  ".join(f"{key} {value:.3f}" for key, value in result.metrics.items())
        _log.info("evaluation after update %d: %s", self.step, shown)

    def _finish(self) -> None:
        """The final evaluation on the full held-out set, its samples, and DONE last of all."""
        if self.evaluate is not None:
            evaluation = self.config.evaluation
            with self.method.evaluation_policy() as policy:
                result = self.evaluate(policy, evaluation.videos)
            if self.step not in self.evaluations.steps:
                self._record_evaluation(result)
            write_samples(self.out / "samples.safetensors", result, evaluation.samples)
        self.metrics.sync()
        self.evaluations.sync()
        (self.out / "DONE").write_text(f"{self.step} updates, {self.elapsed_s:.1f} s\n")
        _log.info("finished: %d updates in %.1f s", self.step, self.elapsed_s)

    def _save(self) -> None:
        """Everything the next update depends on. The lines up to here reach the disk before it."""
        self.metrics.sync()
        self.evaluations.sync()
        state = {
            "step": self.step,
            "method": self.method.name,
            "config": plain(self.config),
            "elapsed_s": self.elapsed_s,
            "method_state": self.method.state_dict(),
            "random": checkpoint.random_state(),
            "sampler": self.sampler.state_dict(),
        }
        checkpoint.save(self.checkpoints, state, keep=self.config.checkpoint.keep)

    def _restore(self) -> None:
        """Go to the newest whole checkpoint, if there is one."""
        path = checkpoint.latest(self.checkpoints)
        if path is None:
            return
        state = checkpoint.load(path, method=self.method.name, config=plain(self.config))
        self.method.load_state_dict(state["method_state"])
        self.sampler.load_state_dict(state["sampler"])
        checkpoint.set_random_state(state["random"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        _log.info("continuing after update %d from %s", self.step, path)

    def _open_board(self) -> SummaryWriter:
        # Imported here because it takes seconds, also of a run that does not want it.
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.out / "tensorboard"), purge_step=self.step + 1)

    def close(self) -> None:
        self.metrics.close()
        self.evaluations.close()
        if self.board is not None:
            self.board.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def refuse_another_run(out: Path, config: RunConfig) -> None:
    """A run folder belongs to one configuration; a finished one also to its number of updates."""
    path = out / "config.yaml"
    if not path.is_file():
        return
    there, now = yaml.safe_load(path.read_text(encoding="utf-8")), plain(config)
    wrong = differences(there, now)
    if (out / "DONE").exists() and there["steps"] != now["steps"]:
        wrong.append(f"steps: {there['steps']} there (finished), {now['steps']} now")
    if wrong:
        listed = "\n".join(f"  {line}" for line in wrong)
        raise ConfigError(f"run folder {out}: holds another run:\n{listed}\nchoose another out=")


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Two processes must not write one run folder; the lock goes with the process."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"run folder {out}: another process is training here") from None
        yield
