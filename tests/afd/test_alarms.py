"""Signs that take more than one update or evaluation to be seen, and what to do about them."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from afd.trainer.collapse import REF_DEVIATION
from afd.trainer.health import OLD_DEVIATION, USUAL_AFTER, Signs, signs


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="afd")
    return caplog


def said(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records]


def test_motion_that_falls_below_the_bases_is_told_once(log: pytest.LogCaptureFixture) -> None:
    watch = Signs()
    for step, motion in enumerate([10.0, 12.0, 8.0, 6.0, 5.0, 9.0, 4.0]):
        watch.evaluated(step, {"motion": motion})
    assert [line.split(":")[0] for line in said(log)] == ["update 3", "update 6"]
    assert "motion fell to 6, 60% of the base's 10: inspect the videos" in log.text


def test_seams_that_bend_more_than_the_bases_are_told(log: pytest.LogCaptureFixture) -> None:
    watch = Signs()
    for step, jerk in enumerate([0.8, 1.1, 1.24, 1.26, 1.3, 1.0]):
        watch.evaluated(step, {"seam_jerk": jerk})
    assert [line.split(":")[0] for line in said(log)] == ["update 3"]
    assert "seam_jerk rose from the base's 0.8 to 1.26" in log.text
    for step, jerk in enumerate([1.6, 1.9, 2.1]):
        watch = watch if step else Signs()
        watch.evaluated(step, {"seam_jerk": jerk})
    assert len(said(log)) == 2


@pytest.mark.parametrize(
    ("key", "what", "limit"),
    [("student/v_rms", "velocities", 0.05), ("student/x0_rms", "videos", 0.1)],
)
@pytest.mark.parametrize(("part", "told"), [(1.1, True), (0.9, False), (-0.9, False), (-1.1, True)])
def test_a_size_that_changes_too_much_is_told(
    log: pytest.LogCaptureFixture, key: str, what: str, limit: float, part: float, told: bool
) -> None:
    size = 1 + part * limit
    watch = Signs()
    for step in range(150):
        watch.updated(step, {key: 1.0 if step < 50 else size})
    assert len(said(log)) == told
    if told:
        assert f"the RMS of the {what} is" in log.text
        assert f"({key})" in log.text


def test_leaving_the_reference_faster_than_at_constant_speed_is_told(
    log: pytest.LogCaptureFixture,
) -> None:
    """A squared distance grows quadratically at constant speed, here after a warm-up."""
    steady, breaking = Signs(), Signs()
    for step in range(1000):
        steady.updated(step, {REF_DEVIATION: 1e-7 * max(0, step - 10) ** 2})
    assert said(log) == []
    for step in range(300):
        breaking.updated(step, {REF_DEVIATION: 1e-3 * 1.1 ** max(0, step - 200)})
    assert len(said(log)) == 1
    assert 220 < int(said(log)[0].split(":")[0].removeprefix("update ")) < 240
    assert "times that of 50 updates ago" in log.text


def test_a_frozen_rating_that_falls_while_the_margin_shrinks_is_reward_hacking(
    log: pytest.LogCaptureFixture,
) -> None:
    watch = Signs()
    # (margin of the updates, then the untouched MQ): learning, then fooling.
    for step, (margin, rating) in enumerate([(2.0, 0.0), (1.5, 0.3), (1.0, 0.25), (0.2, 0.1)]):
        for _ in range(60):
            watch.updated(step, {"discriminator/margin": margin})
        watch.evaluated(step, {"MQ": rating})
    assert len(said(log)) == 1
    assert said(log)[0].startswith("update 3: the untouched VideoAlign's MQ fell from 0.30 to 0.10")
    assert "go back to the best checkpoint" in said(log)[0]


def test_a_rating_that_falls_with_the_score_is_another_matter(
    log: pytest.LogCaptureFixture,
) -> None:
    watch = Signs()
    for step, (margin, rating) in enumerate([(1.0, 0.3), (1.5, 0.0), (2.0, -0.3)]):
        for _ in range(60):
            watch.updated(step, {"discriminator/margin": margin})
        watch.evaluated(step, {"MQ": rating})
    assert said(log) == []


def test_a_student_that_runs_away_from_its_old_policy_is_told(
    log: pytest.LogCaptureFixture,
) -> None:
    watch = Signs()
    for step in range(USUAL_AFTER + 100):
        watch.updated(step, {OLD_DEVIATION: 1e-5 if step < USUAL_AFTER + 50 else 1e-3})
    (line,) = said(log)
    assert "times as far from the old policy as in its first" in line
    assert int(line.split()[1].rstrip(":")) >= USUAL_AFTER + 50


def test_rollouts_that_become_alike_are_reported_once(log: pytest.LogCaptureFixture) -> None:
    watch = Signs()
    for step in range(200):
        # Half of it is not yet a sign, nor is one batch of easy prompts.
        value = 0.14 if step < 50 else 0.075 if step < 120 else 0.05
        watch.updated(step, {"student/diversity": 0.01 if step == 40 else value})
    (line,) = said(log)
    assert "the distance between rollouts of a prompt fell to" in line
    assert "raise afd.prior_weight" in line
    assert int(line.split()[1].rstrip(":")) > 120


def test_growing_from_nothing_to_the_usual_size_is_no_sign(log: pytest.LogCaptureFixture) -> None:
    watch = Signs()
    for step in range(300):
        watch.updated(step, {OLD_DEVIATION: 1e-5 * min(1.0, step / 40)})
    assert said(log) == []


def test_a_resumed_run_remembers_what_it_has_said(log: pytest.LogCaptureFixture) -> None:
    updates: list[dict[str, Any]] = [
        {"update": step, "phase_s": {"rollout": 1.0}, "student/r_mean": 0.97} for step in (1, 2, 3)
    ]
    evaluations = [
        {"update": 0, "metrics": {"motion": 10.0}},
        {"update": 2, "metrics": {"motion": 4.0}},
    ]
    watch = Signs()
    watch.replay(updates, evaluations)
    watch.updated(4, {"student/r_mean": 0.97})
    watch.evaluated(4, {"motion": 4.0})
    assert said(log) == []
    watch.updated(5, {"student/r_mean": 0.5})
    watch.updated(6, {"student/r_mean": 0.97})
    assert [line.split(":")[0] for line in said(log)] == ["update 6"]


def test_every_sign_says_what_to_do() -> None:
    trouble = {
        "discriminator/margin": 9.0,
        "discriminator/accuracy": 1.0,
        "student/zero_std_groups": 0.5,
    }
    found = dict(signs({**trouble, "student/r_mean": 0.99})) | dict(signs({"student/r_mean": 0.0}))
    advice = ("lower", "raise", "compare")
    assert len(found) == 5
    assert all(any(word in sentence for word in advice) for sentence in found.values())


def together(agreement: float, mean: float, margin: float, std: float = 0.1) -> dict[str, float]:
    """An update's metrics of a discriminator and of a frozen reward beside it."""
    reward = {"agreement": agreement, "mean": mean, "std": std}
    return {"discriminator/margin": margin, **{f"reward/mq/{k}": v for k, v in reward.items()}}


def test_a_frozen_reward_that_stays_against_the_discriminator_is_an_alarm(
    log: pytest.LogCaptureFixture,
) -> None:
    watch = Signs()
    for step in range(60):
        # Groups of four are noisy: single updates cross zero either way.
        watch.updated(step, together(0.3 + (-1) ** step * 0.6, 1.0, 1.0))
    assert said(log) == []
    for step in range(60, 120):
        watch.updated(step, together(-0.3 + (-1) ** step * 0.3, 1.0, 1.0))
    (line,) = said(log)
    assert "frozen reward mq rank the videos of a prompt against each other" in line
    assert "look at the videos" in line


def test_the_first_updates_are_no_alarm_and_a_rewardless_run_has_none(
    log: pytest.LogCaptureFixture,
) -> None:
    watch = Signs()
    for step in range(19):
        watch.updated(step, together(-1.0, -step, -step))
    alone = Signs()
    for step in range(100):
        alone.updated(step, {"discriminator/margin": -step / 10, "agreement/phys": 0.5})
    assert said(log) == []
    watch.updated(19, together(-1.0, -19, -19))
    assert len(said(log)) == 1


def test_a_frozen_reward_that_falls_while_the_margin_shrinks_is_a_fooled_discriminator(
    log: pytest.LogCaptureFixture,
) -> None:
    for shrinks in (False, True):
        watch = Signs()
        for step in range(200):
            late = max(0, step - 100) / 100
            margin = 2 - step / 100 if shrinks else 2 + late
            watch.updated(step, together(0.1, min(step, 100) / 100 - 0.5 * late, margin))
        assert len(said(log)) == int(shrinks)
    (line,) = said(log)
    assert "frozen reward mq fell from 0.9" in line
    assert "give rewards.mq a weight" in line


def test_the_alarms_state_is_rebuilt_from_the_lines_of_a_run(
    log: pytest.LogCaptureFixture,
) -> None:
    lines = [{"update": step, **together(-0.5, 1.0, 1.0)} for step in range(30)]
    watch = Signs()
    watch.replay(lines, [])
    watch.updated(30, together(-0.5, 1.0, 1.0))
    assert said(log) == []  # already reported
