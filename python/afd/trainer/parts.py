"""Opens the parts of a run on its processes: teacher, videos, evaluation."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor

from afd.cache import Store
from afd.config.run import RunConfig
from afd.data.videos import Videos
from afd.distributed import Ranks
from afd.errors import ConfigError
from afd.methods.base import Method
from afd.teachers.base import Teacher
from afd.trainer.evaluate import Evaluator, evaluation_prompts, make_evaluator


def refuse_idle_processes(config: RunConfig, ranks: Ranks) -> None:
    prompts, world = config.prompts_per_update, ranks.world
    if prompts < world:
        raise ConfigError(f"prompts_per_update is {prompts}; {world} processes need one each")
    # Every forward and backward pass of a sharded network involves all processes.
    if config.parallel == "fsdp" and prompts % world:
        raise ConfigError(
            f"prompts_per_update is {prompts}; parallel=fsdp needs a multiple of {world} "
            "(processes)"
        )


def open_teacher(config: RunConfig, console: Console, ranks: Ranks) -> Teacher:
    """Open the teacher on the main process first: it creates a simulator's folder, which the other
    processes then read."""
    if ranks.main:
        teacher = config.open_teacher(console)
    ranks.barrier()
    return teacher if ranks.main else config.open_teacher(console)


def open_videos(config: RunConfig, method: Method, teacher: Teacher, ranks: Ranks) -> Videos:
    return Videos(
        teacher,
        config.video,
        input_space=method.input_space,
        prepare=method.prepare,
        codec=method.codec,
        # Pixels are not cached, so a run on pixels needs no cache folder.
        store=Store.of(config.cache) if method.input_space == "latents" else None,
        ranks=ranks,
        accept=config.checkpoint.accept_changed_inputs,
    )


def _clips(videos: Videos, teacher: Teacher) -> Tensor:
    """All clips of the teacher, float32 [N, F, 3, H, W] in [-1, 1]."""
    return torch.stack([videos.clip(request) for request in teacher.requests])


def all_prompts(config: RunConfig, teacher: Teacher) -> list[str]:
    """All prompts that the run will embed."""
    asked = [request.prompt for request in teacher.requests]
    return list(dict.fromkeys([*asked, *evaluation_prompts(config, teacher.requests)]))


def evaluator(
    config: RunConfig, method: Method, teacher: Teacher, videos: Videos, ranks: Ranks
) -> Evaluator | None:
    return make_evaluator(
        config,
        lambda: _clips(videos, teacher),
        codec=method.codec,
        discriminator=getattr(method, "discriminator", None),
        prompts=evaluation_prompts(config, teacher.requests),
        ranks=ranks,
        rewards=getattr(method, "terms", ()),
    )
