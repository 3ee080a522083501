"""Scores of windows: what a window is, what its score sees, and whom the option is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from afd.config.run import make_config
from afd.discriminators.windows import window_starts, windows
from afd.errors import ConfigError
from afd.lab.config import ToyDiscriminatorConfig
from afd.lab.discriminator import ToyDiscriminator
from afd.video.config import VideoConfig
from tests.afd.test_discriminators import TWENTY, videos
from tests.afd.test_latent_discriminator import PAIRS, make, moving, train
from tests.tolerances import NETWORK_REORDERED

FRAME = 1 / 16  # seconds of a frame of the toy


def toy(**settings: Any) -> ToyDiscriminator:
    return ToyDiscriminator(ToyDiscriminatorConfig(**{"random_looks": False, **settings}), seed=1)


@pytest.mark.parametrize(
    ("frames", "size", "starts"),
    [
        (12, 3, list(range(10))),
        (12, 12, [0]),
        (12, 1, list(range(12))),
        (10, 4, [0, 2, 4, 6]),
        (21, 8, [0, 4, 8, 12, 13]),
    ],
)
def test_windows_overlap_by_half_and_end_with_the_clip(
    frames: int, size: int, starts: list[int]
) -> None:
    assert window_starts(frames, size) == starts
    x = torch.arange(2 * frames).view(2, frames)
    assert torch.equal(windows(x, size)[:, :, 0], x[:, starts])
    assert torch.equal(windows(x, size)[:, -1], x[:, -size:])


def test_a_window_is_so_many_seconds_in_pixels_and_in_latents() -> None:
    config = ToyDiscriminatorConfig(window=2.0)
    video = VideoConfig(frames=81, height=480, width=832, fps=16)
    assert config.window_frames(video, 81) == 32
    assert config.window_frames(video, 21) == 8
    assert config.window_frames(VideoConfig(frames=81, fps=8), 81) == 16
    assert ToyDiscriminatorConfig(window=None).window_frames(video, 81) is None
    assert ToyDiscriminatorConfig(window=FRAME).window_frames(video, 21) == 1


@pytest.mark.parametrize("backbone", ["motion", "scratch"])
@pytest.mark.parametrize("frames", [1, 3, 5])
def test_the_toys_score_is_the_sum_of_the_scores_of_its_windows(backbone: Any, frames: int) -> None:
    scorer = toy(backbone=backbone, window=frames * FRAME)
    video = videos("target")
    with torch.no_grad():
        inputs, text = scorer.net.inputs(video), scorer._text(TWENTY)
        per_frame = scorer.net.per_frame(inputs)
        parts = [
            scorer.net.summed(per_frame[:, start : start + frames], text)
            for start in window_starts(12, frames)
        ]
    assert all(part.shape == (20,) for part in parts)
    torch.testing.assert_close(
        scorer.score(video, TWENTY), torch.stack(parts).sum(0), **NETWORK_REORDERED
    )


def test_one_window_of_the_whole_clip_is_the_score_of_the_clip() -> None:
    whole, window = toy(window=None), toy(window=12 * FRAME)
    assert torch.equal(
        whole.score(videos("target"), TWENTY), window.score(videos("target"), TWENTY)
    )
    assert make().score(moving(PAIRS, 0, wrong=False), PAIRS).shape == (len(PAIRS),)


def test_a_score_of_latents_is_the_sum_of_the_scores_of_its_windows() -> None:
    # Four latent frames: windows of two, one apart.
    windowed, whole = make(window=2 * 12 / 16 / 4), make()
    video = moving(PAIRS, 0, wrong=False)
    parts = [whole.score(video[:, start : start + 2], PAIRS) for start in (0, 1, 2)]
    torch.testing.assert_close(
        windowed.score(video, PAIRS), torch.stack(parts).sum(0), **NETWORK_REORDERED
    )


def test_windows_of_latents_learn_a_motion_that_only_the_prompt_makes_right() -> None:
    discriminator = make(window=2 * 12 / 16 / 4)
    train(discriminator, 60)
    right = discriminator.score(moving(PAIRS, 7777, wrong=False), PAIRS)
    wrong = discriminator.score(moving(PAIRS, 8888, wrong=True), PAIRS)
    assert float((right > wrong).float().mean()) > 0.9


@pytest.mark.parametrize("kind", ["toy", "latent"])
def test_a_window_longer_than_the_clip_is_refused(kind: str) -> None:
    given = {"discriminator": {"kind": kind, "window": 1}}
    with pytest.raises(ConfigError, match=r"window: got 1 s; needed: at most 0\.75 s"):
        make_config(given)
    make_config(given, ["discriminator.window=0.06"])
    make_config(given, ["video.frames=16"])
    make_config(given, ["method=sft"])
    with pytest.raises(ValueError, match=r"needed: at most 0\.75 s"):
        ToyDiscriminator(ToyDiscriminatorConfig(window=0.76))
    with pytest.raises(ValueError, match=r"size: got 5; needed: 1 to 4"):
        windows(torch.zeros(1, 4), 5)


@pytest.mark.parametrize("window", ["0", "-1", ".inf", "true"])
def test_a_window_that_is_no_duration_is_refused(window: str) -> None:
    with pytest.raises(ConfigError, match=r"discriminator\.window"):
        make_config({}, [f"discriminator.window={window}"])


def test_methods_have_their_own_defaults_and_take_others() -> None:
    afd, gan, sft = (make_config({"method": method}) for method in ("afd", "gan", "sft"))
    assert (afd.updates, gan.updates, sft.updates) == (160, 400, 400)
    assert (afd.discriminator.window, gan.discriminator.window) == (3 * FRAME, None)
    assert (afd.discriminator.warmup_updates, gan.discriminator.warmup_updates) == (10, 30)
    given = ["method=gan", "discriminator.window=0.25", "updates=7"]
    own = make_config({}, given)
    assert (own.discriminator.window, own.discriminator.warmup_updates, own.updates) == (
        0.25,
        30,
        7,
    )
    # The written configuration of a run gives the same run.
    from afd.config.run import plain

    assert make_config(plain(gan)) == gan
    assert make_config({"updates": None}).updates == 160
