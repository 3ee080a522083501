"""The discriminator on latents: it learns, it reads the prompt, and its state is whole."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from afd.discriminators.base import DifferentiableDiscriminator, pair_metrics
from afd.discriminators.config import LatentConfig
from afd.discriminators.latent import LatentDiscriminator
from afd.distributed import join
from tests.afd.together import together
from tests.tolerances import NETWORK_REORDERED

CHANNELS, TEXT = 4, 24
WORDS = ("left", "right")
PAIRS = list(WORDS) * 8


def encode(prompts: Sequence[str]) -> Tensor:
    """Two rows of a random table per word, two of padding."""
    table = torch.randn(len(WORDS), 2, TEXT, generator=Generator().manual_seed(0))
    out = torch.zeros(len(prompts), 4, TEXT)
    for row, prompt in zip(out, prompts, strict=True):
        if prompt in WORDS:
            row[:2] = table[WORDS.index(prompt)]
    return out


def moving(prompts: Sequence[str], seed: int, *, wrong: bool) -> Tensor:
    """A bar in noise [B, 4, C, 8, 8] that moves in its prompt's direction, or the opposite one.

    Right and wrong videos of both prompts together are the same videos.
    """
    draw = Generator().manual_seed(seed)
    video = 0.5 * torch.randn(len(prompts), 4, CHANNELS, 8, 8, generator=draw)
    start = torch.randint(8, (len(prompts),), generator=draw).tolist()
    for i, prompt in enumerate(prompts):
        step = -1 if (prompt == "left") != wrong else 1
        for frame in range(4):
            video[i, frame, :, :, (start[i] + step * frame) % 8] += 1.5
    return video


def make(seed: int = 0, **changes: Any) -> LatentDiscriminator:
    config = LatentConfig(**{"width": 16, "learning_rate": 1e-3, **changes})
    return LatentDiscriminator(encode, config, channels=CHANNELS, text_dim=TEXT, seed=seed)


def train(discriminator: LatentDiscriminator, steps: int) -> None:
    for seed in range(steps):
        right, wrong = (moving(PAIRS, seed + 1000 * w, wrong=bool(w)) for w in (0, 1))
        discriminator.step(right, wrong, PAIRS)


@pytest.mark.parametrize("loss", ["bt", "gan"])
def test_it_learns_a_motion_that_only_the_prompt_makes_right(loss: str) -> None:
    discriminator = make(loss=loss)
    train(discriminator, 60)
    right = discriminator.score(moving(PAIRS, 7777, wrong=False), PAIRS)
    wrong = discriminator.score(moving(PAIRS, 8888, wrong=True), PAIRS)
    assert pair_metrics(right, wrong)["accuracy"] > 0.9
    # The same video under the other prompt is a wrong one.
    swapped = [WORDS[1 - WORDS.index(word)] for word in PAIRS]
    other = discriminator.score(moving(PAIRS, 7777, wrong=False), swapped)
    assert float((right > other).float().mean()) > 0.9


def test_it_keeps_the_protocol_and_scores_without_a_gradient() -> None:
    discriminator: DifferentiableDiscriminator = make()
    video = moving(PAIRS, 0, wrong=False)
    score = discriminator.score(video, PAIRS)
    assert score.shape == (len(PAIRS),)
    assert not score.requires_grad
    assert torch.equal(score, discriminator.score(video, PAIRS))
    assert discriminator.step(video, -video, PAIRS).keys() == {
        "loss",
        "grad_norm",
        "accuracy",
        "margin",
    }


def test_every_weight_learns_and_latents_get_gradients() -> None:
    discriminator = make()
    video = moving(PAIRS, 0, wrong=False).requires_grad_()
    discriminator.differentiable_score(video, PAIRS).sum().backward()
    assert float(video.grad.abs().min(0).values.max()) > 0
    assert all(float(p.grad.abs().max()) > 0 for p in discriminator.net.parameters())


def test_padding_of_a_prompt_is_not_read() -> None:
    video = moving(PAIRS, 0, wrong=False)
    discriminator = make()
    longer = LatentDiscriminator(
        lambda prompts: torch.nn.functional.pad(encode(prompts), (0, 0, 0, 9)),
        discriminator.config,
        channels=CHANNELS,
        text_dim=TEXT,
    )
    found, expected = longer.score(video, PAIRS), discriminator.score(video, PAIRS)
    torch.testing.assert_close(found, expected, **NETWORK_REORDERED)
    assert discriminator.score(video[:1], [""]).isfinite().all()


def test_pieces_make_the_same_update_as_the_whole() -> None:
    grads = []
    for size in (None, 3):
        discriminator = make(micro_batch=size)
        discriminator.step(moving(PAIRS, 0, wrong=False), moving(PAIRS, 1, wrong=True), PAIRS)
        grads.append([p.grad for p in discriminator.net.parameters()])
    for whole, pieces in zip(*grads, strict=True):
        torch.testing.assert_close(pieces, whole, **NETWORK_REORDERED)


def shared_updates() -> list[tuple[dict[str, float], list[Any]]]:
    """By each loss an update on five pairs, of which this process has its share."""
    found = []
    with join("cpu") as ranks:
        own, prompts = ranks.share(5), PAIRS[:5]
        right, wrong = moving(prompts, 0, wrong=False), moving(prompts, 1, wrong=True)
        for loss in ("bt", "gan"):
            discriminator = make(loss=loss, micro_batch=2)
            discriminator.ranks = ranks
            metrics = discriminator.step(right[own], wrong[own], prompts[own])
            found.append((metrics, [p.grad.numpy() for p in discriminator.net.parameters()]))
    return found


def test_two_processes_make_the_update_of_one() -> None:
    both = together(2, shared_updates)
    for (metrics, whole), *parts in zip(shared_updates(), *both, strict=True):
        assert parts[0][0] == parts[1][0] == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        for one, other, alone in zip(parts[0][1], parts[1][1], whole, strict=True):
            assert (one == other).all()
            torch.testing.assert_close(torch.tensor(one), torch.tensor(alone), **NETWORK_REORDERED)


def test_a_saved_discriminator_continues_with_the_same_bits() -> None:
    first, second = make(seed=1), make(seed=2)
    train(first, 2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for discriminator in (first, second):
        train(discriminator, 2)
    video = moving(PAIRS, 5, wrong=False)
    assert torch.equal(first.score(video, PAIRS), second.score(video, PAIRS))


def test_each_teacher_has_a_head_with_a_taste_of_its_own() -> None:
    discriminator, names = make(), ["right"] * 8 + ["wrong"] * 8
    discriminator.with_teachers(["right", "wrong"])
    for seed in range(60):
        right, wrong = (moving(PAIRS, seed + 1000 * w, wrong=bool(w)) for w in (0, 1))
        # What one teacher shows is what the other does not.
        first = torch.cat([right[:8], wrong[8:]])
        metrics = discriminator.step(first, torch.cat([wrong[:8], right[8:]]), PAIRS, names)
    assert {"accuracy/right", "margin/wrong"} <= metrics.keys()
    right, wrong = moving(PAIRS, 7777, wrong=False), moving(PAIRS, 8888, wrong=True)

    def margin(name: str) -> Tensor:
        heads = [name] * len(PAIRS)
        return discriminator.score(right, PAIRS, heads) - discriminator.score(wrong, PAIRS, heads)

    assert (margin("right") > 0).float().mean() > 0.9
    assert (margin("wrong") < 0).float().mean() > 0.9
    both = [discriminator.score(right, PAIRS, [name] * len(PAIRS)) for name in ("right", "wrong")]
    torch.testing.assert_close(discriminator.score(right, PAIRS), torch.stack(both).mean(0))
    again = make(seed=1)
    again.with_teachers(["right", "wrong"])
    again.load_state_dict(copy.deepcopy(discriminator.state_dict()))
    assert torch.equal(again.score(right, PAIRS, names), discriminator.score(right, PAIRS, names))
    with pytest.raises(ValueError, match="teachers: got 'other'"):
        discriminator.score(right, PAIRS, ["other"] * len(PAIRS))


def test_scoring_between_steps_changes_nothing() -> None:
    plain, asked = make(), make()
    for discriminator in (plain, asked):
        train(discriminator, 1)
        if discriminator is asked:
            discriminator.score(moving(PAIRS, 5, wrong=False), PAIRS)
        train(discriminator, 1)
    for a, b in zip(plain.net.parameters(), asked.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_layer_is_spectrally_normalised() -> None:
    discriminator = make()
    train(discriminator, 20)
    # The estimate follows the largest singular value closely, not exactly.
    for name, module in discriminator.net.named_modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.Linear):
            largest = torch.linalg.matrix_norm(module.weight.detach().flatten(1), 2)
            assert float(largest) < 1.2, name


@pytest.mark.parametrize("shape", [(1, 1, CHANNELS, 1, 1), (2, 7, CHANNELS, 5, 9)])
def test_any_size_of_latent_has_a_score(shape: tuple[int, ...]) -> None:
    assert make().score(torch.randn(shape), PAIRS[: shape[0]]).isfinite().all()


def test_building_one_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make()
    assert torch.equal(torch.rand(3), expected)


def test_wrong_calls_name_the_argument() -> None:
    discriminator, video = make(), moving(PAIRS, 0, wrong=False)
    with pytest.raises(ValueError, match="prompts"):
        discriminator.score(video, PAIRS[:3])
    with pytest.raises(ValueError, match="student_BFCHW"):
        discriminator.step(video, video[:, :2], PAIRS)
    with pytest.raises(ValueError, match="width"):
        make(width=18)
