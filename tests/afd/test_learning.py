"""The headline in small: finished videos alone teach the student gravity, and not the look."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from afd.config.run import make_config
from afd.lab.physics import measure
from afd.lab.simulator import PROMPTS, attribute_table, sample_videos
from afd.lab.student import ToyStudent
from afd.methods.base import Batch
from afd.rollout import rollout
from afd.trainer.build import build_method

UPDATES = 130
HELD_OUT = list(PROMPTS) * 6


def evaluate(student: ToyStudent) -> dict[str, float]:
    seeds = range(10**6, 10**6 + len(HELD_OUT))
    return measure(rollout(student, HELD_OUT, seeds), HELD_OUT)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_afd_takes_the_fall_and_leaves_the_look_where_sft_takes_both() -> None:
    prompts = (list(PROMPTS) * 6)[:200]
    table = attribute_table(prompts)
    teacher, _ = sample_videos(table, "target", "nuis", Generator().manual_seed(0))
    base = evaluate(ToyStudent.load())
    after = {}
    for name in ("afd", "sft"):
        method = build_method(make_config({"method": name}))
        generator = Generator().manual_seed(1)
        for step in range(UPDATES):
            pick = torch.randint(len(prompts), (8,), generator=generator)
            batch = Batch(step, [prompts[i] for i in pick], teacher[pick])
            method.rollout(batch)
            metrics = method.discriminator_step(batch) | method.student_step(batch)
        assert metrics["student/loss"] > 0
        with method.evaluation_policy() as policy:
            after[name] = evaluate(policy)
    afd, sft = after["afd"], after["sft"]
    assert afd["g_mae"] < 0.75 * base["g_mae"]
    assert afd["phys"] < 0.75 * base["phys"]
    assert afd["rend"] < base["rend"] + 0.01
    assert afd["adh"] > 0.95
    assert sft["rend"] > base["rend"] + 0.08
