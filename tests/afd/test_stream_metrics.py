"""The toy task's metrics by position in a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from afd.config.run import make_config
from afd.errors import ConfigError
from afd.lab.simulator import (
    ATTRIBUTES,
    TARGET_GRAVITY,
    apply_look,
    attribute_table,
    colour_table,
    trajectories,
)
from afd.lab.stream_metrics import StreamPhysicsMetrics, clip_metrics
from afd.rollout import rollout
from afd.trainer.evaluate import make_evaluator

PROMPTS = [a.prompt for a in ATTRIBUTES]
SETTINGS = {"evaluation": {"kind": "physics_stream", "clips": 3}, "student": {"window": 12}}


def long_videos(gravity: float, frames: int = 120) -> Tensor:
    """Exact videos of every prompt, ten training lengths long."""
    table = attribute_table(PROMPTS)
    g = torch.full((len(table),), gravity)
    track = trajectories(table, g, Generator().manual_seed(0), frames=frames)
    return apply_look("clean", track, colour_table(table[:, 0]), Generator().manual_seed(0))


def test_exact_physics_is_exact_at_every_position_and_other_physics_is_not() -> None:
    right, wrong = long_videos(TARGET_GRAVITY), long_videos(0.12)
    for at in range(0, 120, 12):
        found = clip_metrics(right[:, at : at + 12], PROMPTS)
        assert found["phys"] < 0.12
        assert found["rend"] < 0.05
        assert found["colour"] == 1
        if at < 24:
            assert clip_metrics(wrong[:, at : at + 12], PROMPTS)["phys"] > 3 * found["phys"]
    swapped = clip_metrics(right[:, :12], PROMPTS[::-1])
    assert swapped["colour"] == pytest.approx(1 / 3, abs=0.01)


def test_the_clips_are_those_of_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(SETTINGS)
    student, _ = config.student.build(config.video)
    seen: list[Tensor] = []

    def noted(video_BFCHW: Tensor, *args: Any) -> dict[str, float]:
        seen.append(video_BFCHW)
        return {"phys": float(len(seen)), "rend": 0.5}

    monkeypatch.setattr("afd.lab.stream_metrics.clip_metrics", noted)
    evaluate = make_evaluator(config, lambda: torch.empty(0))
    assert isinstance(evaluate, StreamPhysicsMetrics)
    result = evaluate(student, 4)
    seeds = [config.evaluation.seed + i for i in range(4)]
    steps = config.student.denoising_steps
    whole = rollout(student, PROMPTS[:4], seeds, frames=36, denoising_steps=steps)
    torch.testing.assert_close(torch.cat(seen, 1), whole, rtol=1e-3, atol=1e-3)
    assert result.metrics["phys"] == 2
    assert [result.metrics[f"phys@{k}"] for k in (1, 2, 3)] == [1, 2, 3]
    assert result.pictures_BFHWC.shape[:2] == (4, 12)


def test_only_the_toy_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.kind: got physics, which measures the toy"):
        make_config({"student": {"kind": "wan"}, **{"evaluation": SETTINGS["evaluation"]}})
