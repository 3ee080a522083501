"""VideoAlign on windows of a clip: what a score sees, and which windows a step draws."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afd.discriminators.config import VideoAlignConfig
from afd.discriminators.videoalign.discriminator import VideoAlignDiscriminator
from afd.distributed import Ranks
from afd.video.config import VideoConfig
from tests.afd.test_videoalign import FAST, load, make
from tests.afd.tiny_videoalign import PROMPTS, write_released
from tests.tolerances import NETWORK_REORDERED


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_released(tmp_path_factory.mktemp("videoalign") / "one")


# Of the tiny model's clips: eight sampled frames, of which a window has four.
CLIP = VideoConfig(frames=64, fps=16)
WINDOW = {"window": 2.0}


def windowed(folder: Path, seed: int = 0, **changes: Any) -> Any:
    settings = VideoAlignConfig(**{**FAST, **WINDOW, **changes})
    return VideoAlignDiscriminator(load(folder), settings, video=CLIP, seed=seed)


def eight(seed: int = 0, count: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 8, 3, 40, 36, generator=draw) * 2 - 1


def test_a_score_is_the_mean_over_windows_that_overlap_by_half(released: Path) -> None:
    whole, parts, video = make(released), windowed(released), eight()
    expected = [whole.score(video[:, start : start + 4], PROMPTS) for start in (0, 2, 4)]
    torch.testing.assert_close(
        parts.score(video, PROMPTS), torch.stack(expected).mean(0), **NETWORK_REORDERED
    )
    assert torch.equal(parts.score(video[:, :4], PROMPTS), expected[0])


def test_a_step_ranks_the_same_random_window_of_both_videos(released: Path) -> None:
    discriminator = windowed(released)
    frames = torch.arange(8.0).view(1, 8, 1, 1, 1).expand(40, 8, 3, 1, 1)
    teacher, student = discriminator.excerpts(frames, frames + 100)
    assert teacher.shape == student.shape == (40, 4, 3, 1, 1)
    assert torch.equal(teacher + 100, student)
    first = teacher[:, 0, 0, 0, 0]
    assert set(first.tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert torch.equal(teacher[:, :, 0, 0, 0], first[:, None] + torch.arange(4.0))
    again, _ = windowed(released).excerpts(frames, frames)
    assert torch.equal(again, teacher)
    assert not torch.equal(discriminator.excerpts(frames, frames)[0], teacher)


def test_windows_are_drawn_for_the_pairs_of_all_processes(released: Path) -> None:
    class Second(Ranks):
        def gather(self, x: Tensor) -> Tensor:
            return torch.cat([torch.tensor([3]), x])

    frames = torch.arange(8.0).view(1, 8, 1, 1, 1).expand(5, 8, 3, 1, 1)
    every, _ = windowed(released).excerpts(frames, frames)
    second = windowed(released)
    second.ranks = Second(rank=1, world=2)
    own, _ = second.excerpts(frames[3:], frames[3:])
    assert torch.equal(own, every[3:])


def test_windows_learn_to_rank_and_continue_with_the_same_bits(released: Path) -> None:
    first, second = windowed(released, seed=1), windowed(released, seed=2)
    losses = [first.step(eight(), eight(seed=1), PROMPTS)["loss"] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for discriminator in (first, second):
        discriminator.step(eight(seed=2), eight(seed=3), PROMPTS)
    assert torch.equal(first.score(eight(), PROMPTS), second.score(eight(), PROMPTS))


def test_a_window_has_an_even_number_of_sampled_frames() -> None:
    wan = VideoConfig(frames=81, height=480, width=832, fps=16)
    assert VideoAlignConfig(window=2.0).window_frames(wan, 10, 2) == 4
    assert VideoAlignConfig(window=0.1).window_frames(wan, 10, 2) == 2
    assert VideoAlignConfig(window=2.6).window_frames(wan, 10, 2) == 6
    assert VideoAlignConfig().window_frames(wan, 10, 2) is None
