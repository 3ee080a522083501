"""Evaluate a run's newest checkpoint again, or what it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from rich.console import Console

from afd.config.run import FREE_KEYS, RunConfig
from afd.distributed import Ranks, join
from afd.errors import ConfigError
from afd.trainer import checkpoint
from afd.trainer.build import build_method
from afd.trainer.evaluate import Evaluation
from afd.trainer.parts import build_evaluator, open_teacher, open_videos, prompts_asked, restore
from afd.trainer.run_folder import load_run, with_commits


def evaluate_run(
    folder: Path, videos: int | None = None, overrides: Sequence[str] = ()
) -> Evaluation:
    """Evaluate the newest checkpoint of a run on held-out seeds, without changing the folder.

    `overrides` may change `evaluation` and config.FREE_KEYS; ConfigError for any other key.
    """
    config = load_run(folder, overrides)
    return evaluate_with(config, videos)


def evaluate_with(
    config: RunConfig, videos: int | None = None, *, start: bool = False
) -> Evaluation:
    """Evaluate the newest checkpoint of a run as `config.evaluation` has it; `start`: what the run
    starts from instead."""
    if config.threads:
        torch.set_num_threads(config.threads)
    with join(config.device, patience_s=2 * config.teacher.patience_s) as ranks:
        # Any number of processes can evaluate: they share videos if they divide as in training.
        if ranks.processes % config.parallel.sequence == 0:
            ranks = ranks.in_parts(config.parallel.sequence)
        return _evaluate(with_commits(config, ranks), videos, ranks, start)


def _evaluate(config: RunConfig, videos: int | None, ranks: Ranks, start: bool) -> Evaluation:
    folder, path = config.run_dir, None
    teacher = open_teacher(config, Console(quiet=True), ranks)
    method = build_method(config, ranks, prompts_asked(config, teacher))
    if not start:
        path = checkpoint.latest(folder / "checkpoints", ranks)
    with closing(open_videos(config, method, teacher, ranks)) as clips:
        evaluate = build_evaluator(config, method, teacher, clips, ranks)
        if (path is None and not start) or evaluate is None:
            why = "has evaluation.kind=none" if evaluate is None else "has no checkpoint"
            raise ConfigError(f"run folder {folder}: {why}, nothing to evaluate")
        if path is not None:
            restore(path, method, config, ranks, (*FREE_KEYS, "evaluation"))
        with method.evaluation_policy() as policy:
            return evaluate(policy, videos or config.evaluation.videos)
