"""What collective calls of an update send; a module, because processes import it."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from afd.config.run import RunConfig, make_config
from afd.distributed import join
from afd.methods.copies import Place, draw_place
from afd.planning.plan import student_net
from afd.planning.work import Work
from afd.trainer.build import build_method
from tests.afd.distributed import sharing
from tests.afd.tiny_methods import toy_batch

c10d, functional = torch.ops.c10d, torch.ops._c10d_functional


class Sent(TorchDispatchMode):
    """Bytes that this process sends, by collective call. `reduced`: numbers of the student's
    gradients, as all-reduces of other sizes are not counted."""

    def __init__(self, reduced: int) -> None:
        super().__init__()
        self.reduced, self.bytes = reduced, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is c10d._allgather_base_.default:
            self.bytes["all-gather"] += args[0].nbytes - args[1].nbytes
        elif func is c10d.allgather_.default and args[1][0].is_floating_point():
            self.bytes["all-gather"] += (len(args[0][0]) - 1) * args[1][0].nbytes
        elif func is c10d._reduce_scatter_base_.default:
            self.bytes["reduce-scatter"] += args[1].nbytes - args[0].nbytes
        elif func is functional.all_to_all_single.default:
            self.bytes["all-to-all"] += args[0].nbytes * (len(args[1]) - 1) // len(args[1])
        elif func is c10d.allreduce_.default and args[0][0].numel() == self.reduced:
            world = torch.distributed.get_world_size()
            self.bytes["all-reduce"] += 2 * args[0][0].nbytes * (world - 1) // world
        return func(*args, **(kwargs or {}))


def sent(runs: list[dict[str, Any]], reduced: list[int]) -> list[dict[str, float]]:
    """Bytes sent in one update of each run, in the mean over the places of its clips."""
    with join("cpu") as ranks:
        return [_sent(*one, ranks) for one in zip(runs, reduced, strict=True)]


def _sent(data: dict[str, Any], reduced: int, ranks: Any) -> dict[str, float]:
    config = make_config(data)
    ranks = ranks.in_parts(config.parallel.sequence)
    batch = sharing(toy_batch(), ranks)
    total: dict[str, float] = defaultdict(float)
    for place, often in places_of(config):
        method = build_method(config, ranks)
        given = draw_place if place is None else lambda *_, place=place: place
        with patch("afd.methods.afd.draw_place", given), Sent(reduced) as counted:
            method.rollout(batch)
            method.discriminator_step(batch)
            method.student_step(batch)
        for name, count in counted.bytes.items():
            total[name] += often * count
    return dict(total)


def places_of(config: RunConfig) -> list[tuple[Place | None, float]]:
    """All places of an update on streams and how often it has each, each with a switch to its
    prompt; else the drawn one."""
    if config.afd.stream_switch is None:
        return [(None, 1.0)]
    found = Work(config, student_net(config), 2).places.all
    # Streams of one chunk more than a clip: a switch is at chunk 1.
    assert [place.clip for place in found] == [0, 1]
    start = config.afd.stream_start + (1 - config.afd.stream_start) / 2
    switched = [replace(place, switch=place.clip or None) for place in found]
    return list(zip(switched, (start, 1 - start), strict=True))
