"""Decoding and rating beside the rollout: the bits of one after another, and no thread left."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from afd.config.run import differences
from afd.methods.generation import Streaming
from afd.methods.inputs import ENCODERS, InputPipeline
from afd.methods.rollouts import Rollouts, roll_out
from afd.models.codec import Pixels
from afd.models.student import Student
from afd.rewards.base import Term
from afd.video.config import VideoConfig
from tests.afd.tiny_methods import (
    WAN_STEPS,
    Brightness,
    make_afd,
    step,
    toy_batch,
    toy_student,
    wan_batch,
    wan_student,
    weights,
)
from tests.fake_cuda import fake_cuda

STEPS = [1.0, 0.625]


class Slow(Pixels):
    """A decoder that takes as long as it is told, notes its threads and may break."""

    def __init__(self, seconds: float = 0.0, breaks_at: int | None = None) -> None:
        self.seconds, self.breaks_at = seconds, breaks_at
        self.threads: list[str] = []
        self.inside = 0

    def decode(self, latent_BFCHW: Tensor) -> Tensor:
        self.inside += 1
        assert self.inside == 1, "one at a time"
        assert not torch.is_grad_enabled()
        self.threads.append(threading.current_thread().name)
        time.sleep(self.seconds)
        if len(self.threads) - 1 == self.breaks_at:
            raise RuntimeError("decoder out of order")
        self.inside -= 1
        return latent_BFCHW.tanh()


def rolled(
    student: Student, batch: Any, pipeline: InputPipeline, overlap: bool, width: int | None = 1
) -> Rollouts:
    steps = WAN_STEPS if student.frame_shape[0] != 3 else STEPS
    streaming = Streaming(steps, batch=width, overlap=overlap)
    generator = Generator().manual_seed(0)
    return roll_out(student, batch, 3, generator, streaming, to_input=pipeline)


def preparing() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("afd prepare")]


@pytest.mark.parametrize("codec_match", [False, True])
def test_beside_or_after_the_bits_are_the_same(codec_match: bool) -> None:
    video = VideoConfig(codec_match=codec_match)
    rewards = [Brightness(), Brightness("latents", -1.0)]
    found = []
    for overlap in (False, True):
        codec = Slow(0.002)
        pipeline = InputPipeline(None, codec, video, rewards)
        found.append(rolled(toy_student(), toy_batch(), pipeline, overlap))
        names = {name.startswith("afd prepare") for name in codec.threads}
        assert names == {overlap}
    apart, beside = found
    assert torch.equal(apart.x0_BFCHW, beside.x0_BFCHW)
    for mine, theirs in ((apart.inputs, beside.inputs), (apart.ratings, beside.ratings)):
        assert len(mine) == len(theirs) == 2
        for one, other in zip(mine, theirs, strict=True):
            assert len(one) == 6
            assert torch.equal(one, other)
    assert not preparing()


@pytest.mark.parametrize("kind", ["toy", "wan"])
def test_whole_updates_are_the_same(kind: str) -> None:
    """With a discriminator and a frozen reward, over two updates."""
    found = []
    for overlap in (False, True):
        how = {
            "rollout_batch": 1,
            "rollout_overlap": overlap,
            "rewards": [Term("b", 0.5, Brightness("latents"))],
        }
        method = make_afd(toy_student() if kind == "toy" else wan_student(), how=how)
        make = toy_batch if kind == "toy" else wan_batch
        metrics = [step(method, make(number)) for number in range(2)]
        found.append((metrics, weights(method, "theta")))
    assert found[0][0] == found[1][0]
    for key, value in found[0][1].items():
        assert torch.equal(value, found[1][1][key]), key


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")
def test_on_a_gpu_only_the_threads_wait_for_the_decoder() -> None:
    rewards = [Brightness(), Brightness("latents", -1.0)]
    found = []
    for device in ("cpu", "cuda"):
        with fake_cuda() if device == "cuda" else nullcontext() as machine:
            student = wan_student(torch.bfloat16).to(device)
            pipeline = InputPipeline(None, Slow(), None, rewards)
            made = rolled(student, wan_batch(), pipeline, True)
            found.append((made.x0_BFCHW.cpu(), *made.inputs, *made.ratings))
            if machine is not None:
                assert not [line for _, line in machine.waits if "methods/inputs" in line]
                assert made.x0_BFCHW.device.type == "cuda"
    for mine, theirs in zip(*found, strict=True):
        assert mine.device.type == "cpu"
        assert torch.equal(mine, theirs)


def test_a_resumed_run_may_change_it() -> None:
    one, other = ({"student": {"rollout_overlap": value}} for value in (True, False))
    assert differences(one, other) == []


def test_a_single_batch_needs_no_thread() -> None:
    codec = Slow()
    rolled(toy_student(), toy_batch(), InputPipeline(None, codec, None, [Brightness()]), True, None)
    assert codec.threads == [threading.current_thread().name]


@pytest.mark.parametrize("at", [0, 2, 5])
def test_an_error_of_the_thread_is_raised_by_the_rollout(at: int) -> None:
    pipeline = InputPipeline(None, Slow(breaks_at=at), None, [Brightness()])
    with pytest.raises(RuntimeError, match="decoder out of order"):
        rolled(toy_student(), toy_batch(), pipeline, True)
    assert not preparing()


def test_an_interrupted_rollout_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the third video, while the first two are being decoded."""
    student, passes = toy_student(), 0
    denoise = student.denoise

    def interrupted(*given: Any) -> Tensor:
        nonlocal passes
        passes += 1
        if passes > 2 * 4 * len(STEPS):
            raise KeyboardInterrupt
        return denoise(*given)

    monkeypatch.setattr(student, "denoise", interrupted)
    codec = Slow(0.05)
    with pytest.raises(KeyboardInterrupt):
        rolled(student, toy_batch(), InputPipeline(None, codec, None, [Brightness()]), True)
    assert not preparing()
    assert 1 <= len(codec.threads) <= 2


def test_the_videos_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow decoder slows the rollout instead of piling up videos."""
    codec, ahead = Slow(0.02), []
    pipeline = InputPipeline(None, codec, None, [Brightness()])
    finish = pipeline.finish
    finished = 0

    def counted(decoded: Any) -> Any:
        nonlocal finished
        finished += 1
        return finish(decoded)

    monkeypatch.setattr(pipeline, "finish", counted)
    student = toy_student()
    encode = student.encode

    def noted(prompts: list[str]) -> Tensor:
        ahead.append(len(ahead) - finished)
        return encode(prompts)

    monkeypatch.setattr(student, "encode", noted)
    streaming = Streaming(STEPS, batch=1)
    roll_out(student, toy_batch(), 8, Generator().manual_seed(0), streaming, to_input=pipeline)
    assert len(ahead) == 16
    assert max(ahead) <= ENCODERS + 1
