"""The task's metrics read the simulator's own videos right."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Generator, Tensor

from afd.lab.config import PhysicsRewardConfig
from afd.lab.metrics import rank_agreement, within_group_correlation
from afd.lab.physics import (
    DEFINITIONS,
    fit,
    frechet_distance,
    measure,
    measure_each,
    seam_jerk,
    spread,
    track_ball,
)
from afd.lab.rewards import PhysicsReward
from afd.lab.simulator import (
    BOUNCE,
    DOMAINS,
    PROMPTS,
    attribute_table,
    colour_table,
    fall,
    render,
    sample_videos,
)

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


def test_drag_is_a_law_beside_gravity() -> None:
    found = {
        name: measure(world(name, "clean")[0], PROMPTS_4, domain=DOMAINS["both"])
        for name in ("gravity", "drag", "both")
    }
    assert found["both"]["phys"] < 0.03
    assert found["both"]["phys_x"] < 0.03
    assert found["both"]["traj_fd"] < 0.2
    assert found["both"]["adh"] == 1.0
    assert found["gravity"]["phys"] < 0.03
    assert found["gravity"]["phys_x"] > 0.2
    assert found["drag"]["phys"] > 0.7
    assert found["drag"]["phys_x"] < 0.03


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


def test_kinks_are_told_by_where_they_are() -> None:
    """Second differences at frames 1 to 10 of 12; chunks of three begin at 0, 3, 6 and 9."""
    inside, across = torch.zeros(2, 10), torch.zeros(2, 10)
    inside[:, [0, 3, 6, 9]] = 4.0
    across[:, [1, 2, 4, 5, 7, 8]] = 4.0
    assert seam_jerk(inside) == 0
    assert seam_jerk(across) == float("inf")
    assert seam_jerk(inside + across) == 1
    assert seam_jerk(inside + across / 4) == pytest.approx(0.5)


def test_a_ball_that_jumps_between_chunks_has_a_seam_jerk() -> None:
    table, generator = attribute_table(PROMPTS_4), Generator().manual_seed(3)
    _, track_NF2 = sample_videos(table, "target", "clean", generator)
    jumping = track_NF2.clone()
    jumping[:, 3:6, 0] += 0.4
    jumping[:, 9:, 0] += 0.4
    colour = colour_table(table[:, 0])
    smooth, kinked = (
        measure(render(track, colour), PROMPTS_4)["seam_jerk"] for track in (track_NF2, jumping)
    )
    assert smooth < 1.3
    assert kinked > 1.3 * smooth


def test_a_measurement_follows_the_laws_of_its_domain() -> None:
    prompts = list(PROMPTS)
    table = attribute_table(prompts)
    video_BFCHW = sample_videos(table, "endless", "clean", Generator().manual_seed(0))[0]
    found = {}
    for name, domain in product(("phys", "adh"), ("endless", "gravity")):
        config = PhysicsRewardConfig(measure=name, domain=domain)
        found[name, domain] = float(PhysicsReward(config).score(video_BFCHW, prompts).mean())
    assert found["phys", "endless"] > -0.03 > found["phys", "gravity"]
    assert found["adh", "endless"] == 1 > found["adh", "gravity"]
