"""The shipped checkpoints are what their records say, and the commands that make them run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from torch import Generator

from afd.lab.discriminator import MotionBackbone
from afd.lab.physics import measure
from afd.lab.pretrain import EXCLUDED_GRAVITY, any_motion, main, motion_labels
from afd.lab.shipped import checkpoint_path
from afd.lab.simulator import PROMPTS, TARGET_GRAVITY, attribute_table, sample_videos
from afd.lab.student import ToyStudent
from afd.rollout import rollout

LIMITS = {"base": 2_200_000, "endless": 2_200_000, "motion": 200_000}


@pytest.mark.parametrize("name", LIMITS)
def test_a_shipped_file_is_small_and_has_the_recorded_hash(name: str) -> None:
    path = checkpoint_path(name)
    about = json.loads(path.with_suffix(".json").read_text())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == about["sha256"]
    assert {"seed", "steps", "batch", "rate"} <= about["settings"].keys()
    assert path.stat().st_size < LIMITS[name]


@pytest.mark.parametrize("what", ["base", "endless-base", "motion-backbone"])
def test_the_commands_write_a_checkpoint_and_its_record(what: str, tmp_path: Path) -> None:
    out = tmp_path / "made.safetensors"
    main([what, "--steps", "2", "--batch", "4", "--out", str(out)])
    (MotionBackbone if what == "motion-backbone" else ToyStudent).load(str(out))
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["settings"]["steps"] == 2


def test_the_backbone_never_sees_the_targets_gravity() -> None:
    low, high = EXCLUDED_GRAVITY
    assert low < TARGET_GRAVITY < high
    track, shown = any_motion(4000, Generator().manual_seed(0))
    assert shown.min() >= 2
    assert shown.max() <= 14
    # In free flight the second difference of height is gravity itself.
    second = motion_labels(track)[..., 5] / 2
    steady = (second[:, 1:4] - second[:, :1]).abs().amax(1) < 1e-4
    gravity = second[steady, 0]
    assert len(gravity) > 500
    assert not ((gravity > low + 1e-3) & (gravity < high - 1e-3)).any()


def test_the_shipped_base_follows_prompts_under_too_weak_a_gravity() -> None:
    prompts = list(PROMPTS) * 2
    videos = rollout(ToyStudent.load(), prompts, range(len(prompts)))
    metrics = measure(videos, prompts)
    assert metrics["adh"] > 0.95
    assert metrics["rend"] < 0.035
    assert metrics["fit_res"] < 0.2
    assert metrics["g_mae"] > 0.15


def test_the_shipped_backbone_reads_motion_and_not_the_look() -> None:
    table = attribute_table(list(PROMPTS))
    backbone = MotionBackbone.load().requires_grad_(False)
    clean, nuis, other = (
        backbone(sample_videos(table, "target", look, Generator().manual_seed(seed))[0])
        for look, seed in (("clean", 0), ("nuis", 0), ("clean", 1))
    )
    assert clean.std() > 0.5
    # The same clip in another look is nearer than another throw of the same prompt.
    assert float((nuis - clean).square().mean()) < 0.5 * float((other - clean).square().mean())
