"""Ratings of a frozen VideoAlign as rewards: values, and the networks and passes they share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afd.config.run import make_config
from afd.discriminators.config import VideoAlignConfig
from afd.discriminators.videoalign.discriminator import build as build_discriminator
from afd.discriminators.videoalign.model import VideoAlign
from afd.distributed import ALONE
from afd.errors import ConfigError
from afd.methods.inputs import InputPipeline
from afd.models.codec import Pixels
from afd.planning.plan import make_plan
from afd.rewards.config import VideoAlignRewardConfig
from afd.rewards.videoalign import VideoAlignReward, as_grey
from afd.trainer.build import build_rewards
from afd.trainer.evaluate import Evaluated, VideoMetrics
from afd.video.config import VideoConfig
from tests.afd.tiny_videoalign import PROMPTS, clips, seen, write_released
from tests.tolerances import NETWORK_REORDERED

VIDEO = VideoConfig(frames=17, height=48, width=72, fps=16)


class OnCpu:
    device = torch.device("cpu")


STUDENT: Any = OnCpu()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = write_released(tmp_path_factory.mktemp("videoalign") / "one")
    here = {"checkpoint": str(folder / "root"), "base": str(folder / "base")}
    return {**here, "dtype": "float32"}


def built(config: Any, discriminator: object | None = None) -> dict[str, VideoAlignReward]:
    terms = build_rewards(config, STUDENT, discriminator, PROMPTS)
    return {t.name: t.reward for t in terms if isinstance(t.reward, VideoAlignReward)}


def configured(files: dict[str, str], **rewards: dict[str, Any]) -> Any:
    sections = {name: {"kind": "videoalign", **files, **held} for name, held in rewards.items()}
    return make_config(
        {
            "student": {"kind": "wan"},
            "video": {"frames": 81, "height": 480, "width": 832, "fps": 16},
            "evaluation": {"kind": "none"},
            "discriminator": None,
            "rewards": sections,
        }
    )


ASTROLABE: dict[str, dict[str, Any]] = {
    "mq": {"head": "MQ", "grey": True},
    "vq": {"head": "VQ"},
    "ta": {"head": "TA"},
    "all": {"head": "sum"},
}


def test_rewards_are_the_released_ratings_of_one_network_in_two_passes(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, passes = [], []
    load, rate = VideoAlign.load, VideoAlign.ratings_of
    monkeypatch.setattr(VideoAlign, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    monkeypatch.setattr(
        VideoAlign, "ratings_of", lambda self, *a, **k: passes.append(1) or rate(self, *a, **k)
    )
    rewards = built(configured(files, **ASTROLABE))
    assert len(loads) == 1
    to_input = InputPipeline(None, Pixels(), VIDEO, list(rewards.values()))
    inputs = to_input.finish(to_input.decode(clips()))
    assert len(inputs) == 1
    assert inputs[0].shape == (2, 4, 3, 48, 72)
    found = {
        name: reward.score(inputs[to_input.place(reward)], PROMPTS)
        for name, reward in rewards.items()
    }
    assert len(passes) == 2
    colour = rewards["vq"].passes.network.released_ratings(inputs[0], PROMPTS)
    grey = rewards["vq"].passes.network.released_ratings(as_grey(inputs[0]), PROMPTS)
    expected = {"mq": grey["MQ"], "vq": colour["VQ"], "ta": colour["TA"], "all": colour["Overall"]}
    for name, score_B in found.items():
        assert score_B.dtype == torch.float32
        assert torch.equal(score_B, expected[name].float()), name
    assert not torch.equal(grey["MQ"], colour["MQ"])
    # Another input, or other prompts, is another pass; so is the same one once it has gone.
    count = len(passes)
    rewards["ta"].score(seen(seed=3), PROMPTS)
    rewards["ta"].score(inputs[0], PROMPTS[::-1])
    assert len(passes) == count + 2


def test_grey_frames_differ_in_brightness_alone() -> None:
    video = seen()
    grey = as_grey(video)
    assert grey.shape == video.shape
    assert torch.equal(grey[:, :, 0], grey[:, :, 2])
    torch.testing.assert_close(as_grey(grey), grey)
    assert float(grey.abs().max()) <= 1


def test_a_reward_reads_the_frozen_base_of_a_discriminator_of_the_same_files(
    files: dict[str, str],
) -> None:
    section = VideoAlignConfig(**files, lora_rank=4, learning_rate=3e-2)
    discriminator = build_discriminator(section, STUDENT, VIDEO, PROMPTS)
    config = configured(files, ta={"head": "TA"}, vq={"head": "VQ"})
    shared, own = built(config, discriminator), built(config)
    assert shared["ta"].passes.network is discriminator
    to_input = InputPipeline(discriminator, Pixels(), VIDEO, list(shared.values()))
    assert len(to_input.finish(to_input.decode(clips()))) == 1
    video = seen()

    def ta(rewards: dict[str, VideoAlignReward]) -> Tensor:
        return rewards["ta"].score(video.clone(), PROMPTS)

    before = ta(shared)
    torch.testing.assert_close(before, ta(own), **NETWORK_REORDERED)
    online = discriminator.score(video, PROMPTS)
    discriminator.step(video, seen(seed=5), PROMPTS)
    assert not torch.equal(discriminator.score(video, PROMPTS), online)
    assert torch.equal(ta(shared), before)
    assert shared["ta"].identity == own["ta"].identity == discriminator.start
    # Other files, or another dtype, are another network.
    other = configured({**files, "dtype": "bfloat16"}, ta={"head": "TA"})
    assert built(other, discriminator)["ta"].passes.network is not discriminator


def test_what_is_missing_is_named_by_its_reward(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.mq: checkpoint: not given; needed"):
        built(configured({}, mq={}))
    absent = {**files, "checkpoint": str(tmp_path / "gone")}
    with pytest.raises(ConfigError, match=r"rewards\.mq: .*gone"):
        built(configured(absent, mq={}))
    missing = make_plan(configured(absent, mq={})).missing
    assert any(line.startswith("rewards.mq.checkpoint: ") for line in missing)
    assert VideoAlignRewardConfig().packages == ("transformers",)


def test_the_plan_counts_networks_passes_and_decodes(files: dict[str, str]) -> None:
    plan = make_plan(configured(files, **ASTROLABE))
    parts = {part.name: part for part in plan.memory}
    (network,) = (part for part in plan.memory if part.name == "VideoAlign of rewards")
    assert network.note == "frozen weights of rewards mq, vq, ta, all"
    assert {"decode", "autoencoder"} <= parts.keys()
    assert not {"encode", "discriminator", "VideoAlign training"} & parts.keys()
    phases = {phase.name: phase for phase in plan.phases}
    assert phases["rewards"].note == "2 passes on 32 videos: mq; vq, ta, all"
    assert {"rollout", "decode", "rewards", "student"} == phases.keys()
    one = make_plan(configured(files, vq={"head": "VQ"})).phases
    flop = {phase.name: phase.flop for phase in one}
    assert phases["rewards"].flop == 2 * flop["rewards"]
    # Beside a discriminator of the same files no other network is loaded.
    data = configured(files, vq={"head": "VQ"}).model_dump(mode="json")
    data["discriminator"] = {"kind": "videoalign", **files}
    beside = make_plan(make_config(data))
    assert "VideoAlign of rewards" not in {part.name for part in beside.memory}
    assert "1 pass on 32 videos: vq" in [phase.note for phase in beside.phases]


def test_held_out_videos_are_rated_by_every_reward_in_as_few_passes(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(files, **ASTROLABE)
    terms = build_rewards(config, STUDENT, None, PROMPTS)
    passes, rate = [], VideoAlign.ratings_of
    monkeypatch.setattr(
        VideoAlign, "ratings_of", lambda self, *a, **k: passes.append(1) or rate(self, *a, **k)
    )
    video = VIDEO.model_copy(update={"codec_match": True})
    seen_by = config.model_copy(update={"video": video})
    run = Evaluated(seen_by, lambda: clips(), Pixels(), None, PROMPTS, ALONE, terms)
    row = VideoMetrics(run).measure(clips(count=1), PROMPTS[0])
    assert row.keys() == {"motion", "dynamic", *(f"reward/{name}" for name in ASTROLABE)}
    assert len(passes) == 2
    # The codec's artefacts are part of what was rated in training.
    plain = replace(run, config=config.model_copy(update={"video": VIDEO}))
    assert VideoMetrics(plain).measure(clips(count=1), PROMPTS[0])["reward/mq"] != row["reward/mq"]
