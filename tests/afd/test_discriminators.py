"""The discriminator: its losses, its penalty, what it can and cannot see, and its state."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from afd.discriminators.base import bradley_terry_loss, gan_loss, gradient_penalty, pair_metrics
from afd.lab.augmentation import random_look
from afd.lab.config import ToyDiscriminatorConfig
from afd.lab.discriminator import MotionBackbone, ToyDiscriminator
from afd.lab.simulator import PROMPTS, attribute_table, sample_videos

TWENTY = list(PROMPTS)[:20]


def videos(domain: str, look: str = "clean", seed: int = 0) -> Tensor:
    generator = Generator().manual_seed(seed)
    return sample_videos(attribute_table(TWENTY), domain, look, generator)[0]


def discriminator(**settings: Any) -> ToyDiscriminator:
    return ToyDiscriminator(ToyDiscriminatorConfig(**settings), seed=1)


@pytest.fixture
def random_motion(tmp_path: Path) -> str:
    """A backbone file, so that these tests do not need the shipped one."""
    torch.manual_seed(0)
    path = tmp_path / "motion.safetensors"
    MotionBackbone().save(path)
    return str(path)


def test_the_losses_are_what_their_names_say() -> None:
    teacher, student = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
    expected = -(math.log(1 / (1 + math.exp(-1))) + math.log(1 / (1 + math.exp(3)))) / 2
    assert float(bradley_terry_loss(teacher, student)) == pytest.approx(expected)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    both = bce(teacher, torch.ones(2)) + bce(student, torch.zeros(2))
    assert float(gan_loss(teacher, student)) == pytest.approx(float(both))
    assert pair_metrics(teacher, student) == {"accuracy": 0.5, "margin": -1.0}


def test_the_penalty_is_the_squared_gradient_norm() -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    weight = torch.randn(4, 5)
    penalty = gradient_penalty((x * weight).sum((1, 2)), x)
    assert float(penalty) == pytest.approx(float(weight.square().sum()), rel=1e-5)


@pytest.mark.parametrize("backbone", ["motion", "scratch", "random"])
@pytest.mark.parametrize("loss", ["bt", "gan"])
def test_every_kind_of_discriminator_makes_a_step(
    backbone: Any, loss: Any, random_motion: str
) -> None:
    scorer = discriminator(backbone=backbone, loss=loss, checkpoint=random_motion)
    frozen = {k: v.clone() for k, v in scorer.net.state_dict().items() if "backbone" in k}
    metrics = scorer.step(videos("target"), videos("source"), TWENTY)
    assert metrics.keys() == {"loss", "accuracy", "margin"}
    score = scorer.score(videos("source"), TWENTY)
    assert score.shape == (20,)
    assert not score.requires_grad
    for name, value in frozen.items():
        assert torch.equal(value, scorer.net.state_dict()[name])


def test_it_learns_to_rank_the_teacher_above_the_source() -> None:
    scorer = discriminator(backbone="scratch")
    for seed in range(40):
        scorer.step(videos("target", seed=seed), videos("source", seed=seed + 100), TWENTY)
    better = scorer.score(videos("target", seed=900), TWENTY)
    worse = scorer.score(videos("source", seed=901), TWENTY)
    assert pair_metrics(better, worse)["accuracy"] > 0.8


def test_a_saved_discriminator_continues_with_the_same_bits(random_motion: str) -> None:
    first, second = (discriminator(checkpoint=random_motion) for _ in range(2))
    first.step(videos("target"), videos("source"), TWENTY)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for scorer in (first, second):
        scorer.step(videos("target", seed=3), videos("source", seed=4), TWENTY)
    assert torch.equal(
        first.score(videos("target"), TWENTY), second.score(videos("target"), TWENTY)
    )


def test_building_a_discriminator_leaves_the_global_random_numbers_alone(
    random_motion: str,
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    discriminator(checkpoint=random_motion)
    assert torch.equal(torch.rand(3), expected)


def test_a_random_look_changes_the_picture_and_not_its_bounds() -> None:
    clean = videos("target")
    other = random_look(clean, Generator().manual_seed(0))
    assert other.shape == clean.shape
    assert other.abs().max() <= 1
    assert (other - clean).abs().mean() > 0.1
    assert torch.equal(other, random_look(clean, Generator().manual_seed(0)))
    assert torch.equal(random_look(clean, Generator(), strength=0.0), clean)


def test_without_looks_a_score_has_no_randomness(random_motion: str) -> None:
    scorer = discriminator(random_looks=False, checkpoint=random_motion)
    clean = videos("target")
    assert torch.equal(scorer.score(clean, TWENTY), scorer.score(clean, TWENTY))


def test_a_beginning_hides_what_comes_later() -> None:
    scorer = discriminator(backbone="scratch", random_looks=False)
    one = videos("target")
    other = one.clone()
    other[:, 6:] = videos("source")[:, 6:]
    halves = torch.full((20,), 2)
    assert torch.equal(scorer._beginning(one, halves), scorer._beginning(other, halves))
    assert not torch.equal(scorer._beginning(one, halves + 1), scorer._beginning(other, halves + 1))
    assert torch.equal(scorer._beginning(one, halves + 2), one)


def test_a_shared_look_is_the_same_for_all() -> None:
    same = videos("target")[:1].repeat(5, 1, 1, 1, 1)
    for seed in range(6):
        looked = random_look(same, Generator().manual_seed(seed), shared=True)
        assert torch.equal(looked, looked[:1].expand_as(looked))
