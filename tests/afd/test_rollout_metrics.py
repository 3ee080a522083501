"""Metrics of the rollouts: their size, the spread within a prompt, the velocity's size."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from afd.methods.rollout_metrics import rollout_metrics
from tests.afd.tiny_methods import make_afd, step, toy_batch, toy_student


def test_they_are_their_definitions() -> None:
    x0 = torch.randn(6, 4, 2, 3, 3, generator=Generator().manual_seed(0), dtype=torch.float64)
    found = rollout_metrics(x0, 3)
    assert found["student/x0_rms"] == pytest.approx(float(x0.square().mean().sqrt()))
    pairs = [(a + 3 * p, b + 3 * p) for p in (0, 1) for a in range(3) for b in range(a)]
    apart = torch.stack([(x0[a] - x0[b]).square().mean() for a, b in pairs])
    assert found["student/diversity"] == pytest.approx(float(apart.mean().sqrt()), rel=1e-6)


def test_equal_videos_have_no_spread_and_single_ones_no_such_metric() -> None:
    x0 = torch.ones(4, 3, 1, 2, 2)
    assert rollout_metrics(x0, 4) == {"student/x0_rms": 1.0, "student/diversity": 0.0}
    assert rollout_metrics(x0, 1).keys() == {"student/x0_rms"}


@pytest.mark.parametrize("chunks", [None, 2])
def test_every_update_has_them_with_the_velocity(chunks: int | None) -> None:
    sizes = []
    for micro_batch in (None, 1):
        method = make_afd(toy_student(), chunks_per_update=chunks, micro_batch=micro_batch)
        metrics = step(method, toy_batch())
        assert method.shown is not None
        assert metrics["student/diversity"] > 0
        assert metrics["student/x0_rms"] > 0
        sizes.append(metrics["student/v_rms"])
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-4)
    # v = noise - x0 at best: about unit noise and the videos' size.
    assert 0.5 < sizes[0] < 3
