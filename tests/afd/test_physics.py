"""The task's metrics read the simulator's own videos right."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from afd.lab.metrics import rank_agreement, within_group_correlation
from afd.lab.physics import (
    DEFINITIONS,
    fit,
    frechet_distance,
    measure,
    measure_each,
    spread,
    track_ball,
)
from afd.lab.simulator import BOUNCE, PROMPTS, attribute_table, fall, sample_videos

PROMPTS_4 = list(PROMPTS) * 4


def world(domain: str, look: str) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(11)
    return sample_videos(attribute_table(PROMPTS_4), domain, look, generator)


# Look -> bounds on the track's error and on phys, both in px.
@pytest.mark.parametrize(
    ("look", "track_error", "phys"),
    [("clean", 0.04, 0.03), ("nuis", 0.05, 0.03), ("mark", 0.05, 0.03), ("outline", 0.1, 0.06)],
)
def test_the_teacher_obeys_its_own_physics_in_every_look(
    look: str, track_error: float, phys: float
) -> None:
    videos, tracks = world("target", look)
    found, _ = track_ball(videos)
    assert float((found - tracks).norm(dim=-1).mean()) < track_error
    metrics = measure(videos, PROMPTS_4, training_tracks_MF2=tracks)
    assert metrics.keys() == DEFINITIONS.keys()
    assert metrics["phys"] < phys
    assert metrics["g_mae"] < 0.008
    assert metrics["fit_res"] < 0.1
    assert metrics["adh"] == 1.0
    assert metrics["nn"] < 2 * track_error
    assert metrics["traj_fd"] < 0.2
    assert 1.0 < metrics["motion"] < 1.3
    assert (metrics["rend"] < 0.005) == (look == "clean")


def test_noise_does_not_lose_the_ball() -> None:
    videos, _ = world("target", "noise")
    metrics = measure(videos, PROMPTS_4)
    assert metrics["phys"] < 0.5
    assert metrics["adh"] > 0.9


def test_the_source_world_is_far_from_the_target() -> None:
    videos, _ = world("source", "clean")
    metrics = measure(videos, PROMPTS_4)
    assert metrics["g_mae"] > 0.15
    assert metrics["phys"] > 0.7
    assert metrics["traj_fd"] > 4
    assert metrics["fit_res"] < 0.05
    assert metrics["adh"] == 1.0


@pytest.mark.parametrize("gravity", [0.0, 0.1, 0.36, 0.55])
def test_the_fit_finds_gravity_through_bounces(gravity: float) -> None:
    y0, vy = torch.tensor([4.0, 11.0, 7.3]), torch.tensor([0.05, -0.7, 0.3])
    curves = fall(y0, vy, torch.tensor(gravity), torch.tensor(BOUNCE))
    found, rmse = fit("free", curves)
    assert rmse.max() < 0.01
    assert (found[:, 2] - gravity).abs().max() < 0.005


def test_swapped_prompts_are_not_adhered_to() -> None:
    videos, _ = world("target", "clean")
    metrics = measure(videos, PROMPTS_4[1:] + PROMPTS_4[:1])
    assert metrics["adh"] == 0.0


def test_the_frechet_distance_is_zero_to_itself_and_the_squared_shift_of_the_mean() -> None:
    points = torch.randn(500, 4, generator=Generator().manual_seed(0))
    assert frechet_distance(points, points) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(points, points + 3) == pytest.approx(36, rel=1e-6)


def test_the_spread_is_measured_inside_a_prompt_only() -> None:
    tracks = torch.zeros(4, 12, 2)
    tracks[2:] = 100.0
    tracks[1, :, 0] = 3.0
    assert spread(tracks, torch.tensor([0, 0, 1, 1])) == pytest.approx(1.5)


def test_a_score_that_is_physics_agrees_with_physics_inside_a_group() -> None:
    videos, _ = world("source", "clean")
    prompts = [PROMPTS_4[0]] * 4 + [PROMPTS_4[1]] * 4
    picked = videos[:8]
    score = -measure_each(picked).phys
    assert rank_agreement(score, picked, prompts, 4)["agreement/phys"] == pytest.approx(1, abs=1e-5)
    assert rank_agreement(score, picked, ["no such prompt"] * 8, 4) == {}
    # A difference between groups alone is no agreement.
    between = torch.tensor([0.0, 0, 1, 1])
    assert within_group_correlation(between, between, 2) == 0


def test_a_video_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"video: \(2, 12, 3, 8, 8\) came"):
        measure_each(torch.zeros(2, 12, 3, 8, 8))
