"""The parts that training and a later evaluation of a run share: teacher, prompts, metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from afd.cache import Store
from afd.config.run import FREE_KEYS, RunConfig, plain
from afd.data.prompts import prompts_of
from afd.data.videos import Videos
from afd.distributed import Ranks
from afd.errors import ConfigError
from afd.methods.base import Batch, Method
from afd.models.codec import redecodes
from afd.teachers.base import Request, Teacher
from afd.trainer import checkpoint
from afd.trainer.evaluate import (
    Evaluator,
    Sets,
    each_set,
    evaluation_prompts,
    every_prompt,
    make_evaluator,
)


def open_teacher(config: RunConfig, console: Console, ranks: Ranks) -> Teacher:
    """Open the teacher on the main process first: it creates a simulator's folder, which the other
    processes then read."""
    if ranks.main:
        teacher = config.open_teacher(console)
    ranks.barrier()
    return teacher if ranks.main else config.open_teacher(console)


def open_videos(config: RunConfig, method: Method, teacher: Teacher, ranks: Ranks) -> Videos:
    latents = method.input_space == "latents" or redecodes(method.codec)
    return Videos(
        teacher,
        config.video,
        input_space=method.input_space,
        prepare=method.prepare,
        codec=method.codec,
        # Pixels are not cached, so a run on pixels needs no cache folder.
        store=Store.of(config.cache) if latents else None,
        ranks=ranks,
        accept=config.checkpoint.accept_changed_inputs,
    )


def refuse_single_prompt(config: RunConfig, teacher: Teacher) -> None:
    """Raise ConfigError if streams are to switch their prompt and the teacher has only one."""
    wanted = config.method == "afd" and config.afd.stream_switch is not None
    if wanted and len({request.prompt for request in teacher.requests}) < 2:
        raise ConfigError(
            f"afd.stream_switch: got {config.afd.stream_switch} with a teacher of one prompt; "
            "needed: two or more prompts, as a stream begins under another one than its own"
        )


def _clips(videos: Videos, teacher: Teacher) -> Tensor:
    """All clips of the teacher, float32 [N, F, 3, H, W] in [-1, 1]."""
    return torch.stack([videos.clip(request) for request in teacher.requests])


def prompts_asked(config: RunConfig, teacher: Teacher) -> list[str]:
    """All prompts that the run will embed."""
    asked = [request.prompt for request in teacher.requests]
    held_out = every_prompt(config, teacher.requests)
    return list(dict.fromkeys([*asked, *held_out, *replayed_prompts(config)]))


def replayed_prompts(config: RunConfig) -> list[str]:
    """The prompts that a run replays; empty without replay."""
    path = config.replay.prompts
    return prompts_of("replay.prompts", path) if config.replay.fraction and path else []


def build_evaluator(
    config: RunConfig, method: Method, teacher: Teacher, videos: Videos, ranks: Ranks
) -> Evaluator | None:
    found: dict[str, Evaluator] = {}
    for name, one in each_set(config).items():
        evaluator = make_evaluator(
            one,
            lambda: _clips(videos, teacher),
            codec=method.codec,
            discriminator=getattr(method, "discriminator", None),
            prompts=evaluation_prompts(one, teacher.requests),
            ranks=ranks,
            rewards=getattr(method, "terms", ()),
        )
        if evaluator is not None:
            found[name] = evaluator
    return Sets(found) if found.keys() - {""} else found.get("")


def restore(
    path: Path,
    method: Method,
    config: RunConfig,
    ranks: Ranks,
    free_keys: Sequence[str] = FREE_KEYS,
) -> dict[str, Any]:
    """Restore a method from a checkpoint; returns the whole state."""
    into = {"method_state": method.state_dict()}
    how: dict[str, Any] = {"config": plain(config), "into": into, "ranks": ranks}
    how["free_keys"] = free_keys
    state = checkpoint.load(path, method=method.name, **how)
    method.load_state_dict(state["method_state"])
    return state


@dataclass(frozen=True)
class Drawn:
    """What has been drawn for an update.

    Attributes:
        asked: its first request.
        teachers: number of requests to each of several teachers.
        cursor: where the draws were before it.
    """

    batch: Batch
    asked: Request
    teachers: Counter[str]
    cursor: dict[str, Any]
