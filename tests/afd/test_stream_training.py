"""Training on clips of long streams: what they are, what they attend to, what they cost."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Generator, Tensor

from afd.config.run import load_config, make_config
from afd.errors import ConfigError
from afd.hub import CONFIGS
from afd.methods.config import AfdConfig
from afd.methods.copies import Place, draw_place
from afd.methods.generation import Streaming
from afd.methods.inputs import InputPipeline
from afd.methods.rollouts import Rollouts, roll_out
from afd.models.student import Student
from afd.rollout import STEPS, stream, stream_layout
from afd.sampling.config import SampleConfig
from afd.trainer.build import build_method
from afd.trainer.loop import Outcome, train
from benchmarks import harness
from tests.afd.test_quickstart import SMALL
from tests.afd.tiny_methods import (
    WAN_STEPS,
    Brightness,
    make_afd,
    make_sft,
    step,
    toy_batch,
    toy_student,
    wan_batch,
    wan_student,
    weights,
)
from tests.tolerances import NETWORK_REORDERED as SAME

WINDOW = {"window": 9, "sink": 3}
CHUNKS, CHUNK = 4, 3


def student_of(kind: str, **changes: Any) -> Student:
    """With a window of 9 frames and a sink of 3; its videos have 12."""
    if kind == "wan":
        return wan_student(**{**WINDOW, **changes})
    student = toy_student()
    student.net.config = replace(student.net.config, **{**WINDOW, **changes})
    return student


def rolled(student: Student, kind: str, place: Place, **how: Any) -> Rollouts:
    batch, steps = (toy_batch(), STEPS) if kind == "toy" else (wan_batch(), WAN_STEPS)
    streaming = Streaming(steps, batch=how.pop("batch", None))
    return roll_out(student, batch, 2, Generator().manual_seed(5), streaming, place=place, **how)


@pytest.mark.parametrize("kind", ["toy", "wan"])
@pytest.mark.parametrize(("clip", "batch"), [(1, None), (5, 1), (8, 3)])
def test_a_clip_is_cut_from_the_stream_of_its_seed(kind: str, clip: int, batch: int | None) -> None:
    student = student_of(kind)
    found = rolled(student, kind, Place(clip=clip), batch=batch)
    steps = STEPS if kind == "toy" else WAN_STEPS
    seeds = torch.randint(2**62, (4,), generator=Generator().manual_seed(5))
    frames = (clip + CHUNKS) * CHUNK
    for i, seed in enumerate(seeds.tolist()):
        words = student.encode([found.prompts[i]])
        noise = student.noise_source([seed], stream_layout(student, frames), len(steps))
        chunks = list(stream(student, words, noise, frames=frames, denoising_steps=steps))
        expected = torch.cat(chunks, 1)[0, clip * CHUNK :].float()
        torch.testing.assert_close(found.x0_BFCHW[i], expected, rtol=1e-3, atol=1e-4)
    assert found.start_frame == clip * CHUNK
    past = found.past(torch.arange(4))
    assert past is not None
    per_frame = past[0][0].shape[1] // min(9, clip * CHUNK)
    assert past[0][0].shape[1] == per_frame * min(9, clip * CHUNK)


@pytest.mark.parametrize("fork", [5, 6, 8])
@pytest.mark.parametrize("batch", [None, 1])
def test_a_group_of_clips_shares_the_stream_before_they_differ(
    fork: int, batch: int | None
) -> None:
    student = student_of("wan")
    clip = 5
    found = rolled(student, "wan", Place(clip, fork, fork - clip), batch=batch)
    seeds = torch.randint(2**62, (4,), generator=Generator().manual_seed(5)).tolist()
    layout, frames = stream_layout(student, 27), 27
    for i, seed in enumerate(seeds):
        words = student.encode([found.prompts[i]])
        first = student.noise_source([seeds[i - i % 2]], layout, 4)
        own = student.noise_source([seed], layout, 4)

        def noise(chunk: int, at: int, first: Any = first, own: Any = own) -> Tensor:
            return first(chunk, at) if chunk < fork else own(chunk, at)

        chunks = list(stream(student, words, noise, frames=frames, denoising_steps=WAN_STEPS))
        expected = torch.cat(chunks, 1)[0, clip * CHUNK :].float()
        torch.testing.assert_close(found.x0_BFCHW[i], expected, rtol=1e-3, atol=1e-4)


def test_clips_are_drawn_over_the_whole_stream_and_windows_end_with_them() -> None:
    config = AfdConfig(stream_frames=24, train_window=6)
    generator = Generator().manual_seed(0)
    places = [draw_place(config, CHUNKS, CHUNK, generator) for _ in range(200)]
    assert {place.clip for place in places} == {0, 1, 2, 3, 4}
    assert {(place.fork, place.first) for place in places} == {(None, 2)}
    begins = AfdConfig(stream_frames=24, stream_start=0.75)
    first = [draw_place(begins, CHUNKS, CHUNK, generator).clip == 0 for _ in range(400)]
    assert sum(first) / 400 == pytest.approx(0.75 + 0.25 / 5, abs=0.06)
    both = AfdConfig(stream_frames=24, group_from_chunk="random")
    places = [draw_place(both, CHUNKS, CHUNK, generator) for _ in range(500)]
    assert {p.first for p in places} == {0, 1, 2, 3}
    assert all((p.fork or 0) == p.clip + p.first for p in places)


@pytest.mark.parametrize("kind", ["toy", "wan"])
def test_all_contexts_agree_on_a_clip_while_the_policies_are_one(kind: str) -> None:
    losses = {}
    for context in ("recompute", "own_context", "shared_context"):
        method = make_afd(
            student_of(kind),
            context=context,
            keep_context=False,
            stream_frames=36,
            train_window=6,
            micro_batch=3,
        )
        metrics = step(method, toy_batch() if kind == "toy" else wan_batch())
        losses[context] = metrics["student/loss"]
        assert metrics["student/from_chunk"] >= 2
        assert metrics["student/grad_norm"] > 0
    assert losses["own_context"] == pytest.approx(losses["recompute"], rel=1e-4)
    assert losses["shared_context"] == pytest.approx(losses["recompute"], rel=1e-4)


def test_the_velocity_at_the_streams_own_noise_is_the_one_that_made_the_clip() -> None:
    """The update sees, at the last denoising step's input, what the rollout saw: same past, same
    window, same positions."""
    student = student_of("wan")
    found = rolled(student, "wan", Place(clip=6), keep_last_inputs=True)
    assert found.last_inputs_BFCHW is not None
    (level,) = student.levels(WAN_STEPS)[-1:]
    past, video_B = found.past(torch.arange(4)), found.x0_BFCHW
    context = student.clean_context(video_B, found.text_BLE, past=past, start_frame=18)
    t_BK = torch.full((4, 1), level.t / 1000)
    out = student.predict(found.last_inputs_BFCHW, t_BK, found.text_BLE, context, start_frame=18)
    x0 = student.x0_from_output(out, found.last_inputs_BFCHW, level.sigma)
    torch.testing.assert_close(x0[:, :CHUNK], video_B[:, :CHUNK], **SAME)
    torch.testing.assert_close(x0, video_B, rtol=1e-3, atol=1e-4)


def test_memory_does_not_depend_on_the_length_of_the_stream() -> None:
    student = student_of("toy").requires_grad_(False)
    peaks = {
        times: harness.peak_mib(
            lambda _, times=times: rolled(student, "toy", Place(clip=(times - 1) * CHUNKS)), "cpu"
        )
        for times in (3, 10, 30)
    }
    assert peaks[30] <= 1.01 * peaks[10] <= 1.02 * peaks[3]


def test_an_update_of_a_longer_stream_takes_the_same_memory() -> None:
    peaks = {}
    for times in (4, 16):
        method = make_afd(student_of("toy"), keep_context=False, stream_frames=12 * times)
        step(method, toy_batch())

        def update(_: int, method: Any = method, times: int = times) -> object:
            place = Place(clip=(times - 1) * CHUNKS)
            with method.policies.using("old") as student:
                method._rollouts = roll_out(
                    student,
                    toy_batch(),
                    2,
                    method.generator,
                    method.streaming,
                    to_input=method.to_input,
                    place=place,
                )
            return method.discriminator_step(toy_batch()), method.student_step(toy_batch())

        peaks[times] = harness.peak_mib(update, "cpu")
    assert peaks[16] == pytest.approx(peaks[4], rel=0.01)


def test_a_resumed_run_on_streams_continues_with_the_same_bits() -> None:
    settings: dict[str, Any] = {
        "keep_context": False,
        "stream_frames": 24,
        "group_from_chunk": "random",
    }
    whole = make_afd(student_of("toy"), **settings)
    for number in range(2):
        step(whole, toy_batch(number))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = make_afd(student_of("toy"), seed=99, **settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for number in range(2, 4):
        assert step(whole, toy_batch(number)) == step(resumed, toy_batch(number))
    for name, value in weights(whole, "theta").items():
        assert torch.equal(value, weights(resumed, "theta")[name])


def test_sft_trains_with_a_window() -> None:
    method = make_sft(student_of("toy"))
    before = weights(method, "theta")
    step(method, toy_batch())
    assert any(not torch.equal(x, before[k]) for k, x in weights(method, "theta").items())


def test_the_long_streams_file_trains_and_measures_by_position(tmp_path: Path) -> None:
    few = [*SMALL, "afd.stream_frames=24", "evaluation.clips=2", "evaluation.every=0"]
    config = load_config(CONFIGS / "long_streams.yaml", [f"out={tmp_path / 'run'}", *few])
    assert train(config, console=Console(file=io.StringIO())) is Outcome.FINISHED
    (line,) = (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()
    metrics = json.loads(line)["metrics"]
    assert metrics["phys"] == pytest.approx((metrics["phys@1"] + metrics["phys@2"]) / 2)
    assert {"rend@2", "colour@2", "fit_res@1"} <= metrics.keys()


# --- what the scorers are given ---


class Fourfold:
    """A codec whose first latent frame is one video frame, and every other one four."""

    identity = "fourfold"

    def encode(self, video_BFCHW: Tensor) -> Tensor:
        return video_BFCHW[:, ::4] + 100

    def decode(self, latent_BFCHW: Tensor) -> Tensor:
        return latent_BFCHW.repeat_interleave(4, 1)[:, 3:]


def test_scorers_see_a_clip_as_they_see_the_teachers() -> None:
    """As many frames as its latents have on their own, the last ones of the stream, and latents
    that come from them."""
    latent = torch.arange(9.0).view(1, 9, 1, 1, 1).expand(1, 9, 3, 2, 2)
    both: Any = [Brightness("latents"), Brightness("pixels")]
    pipeline = InputPipeline(None, Fourfold(), None, both)  # type: ignore[arg-type]
    spaces = pipeline.decode(latent[:, 3:], latent[:, :3])
    assert spaces["pixels"].shape[1] == 1 + 4 * 5
    frames = spaces["pixels"][0, :, 0, 0, 0].tolist()
    assert frames == [3.0, *(float(i) for i in range(4, 9) for _ in range(4))]
    assert spaces["latents"][0, :, 0, 0, 0].tolist() == [103, 104, 105, 106, 107, 108]
    whole = pipeline.decode(latent[:, 3:])
    assert torch.equal(whole["latents"], latent[:, 3:])


# --- configuration ---

ON = {"student": {"window": 9, "sink": 3}, "evaluation": {"kind": "none"}}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["student.window=5"], "student.window: got 5; needed: at least sink . chunk = 6"),
        (["student.window=null"], "student.sink: got 3; needed: 0, as there is no window"),
        (
            ["student={kind: toy}", "afd.stream_frames=24"],
            "student.window: got null; needed: the frames that are kept",
        ),
        (["afd.stream_frames=25"], "afd.stream_frames: got 25; needed: a multiple of the chunk 3"),
        (["afd.stream_frames=9"], "afd.stream_frames: got 9; .*at least the 12 frames of a clip"),
        (
            ["afd.stream_frames=12", "afd.stream_start=0.5"],
            "afd.stream_frames: got 12, the frames of a clip; needed: more",
        ),
        (["afd.train_window=6"], "afd.train_window: got 6 without afd.stream_frames"),
        (["afd.stream_start=0.5"], "afd.stream_start: got 0.5 without afd.stream_frames"),
        (
            ["afd.stream_frames=24", "afd.train_window=5"],
            "afd.train_window: got 5; needed: a multiple of the chunk 3, at most the 12",
        ),
        (
            ["afd.stream_frames=24", "afd.keep_context=true"],
            "afd.keep_context: got true; needed: false, as a cache of student.window=9",
        ),
        (["afd.stream_frames=24", "afd.context=noisy"], "afd.context: got noisy; needed: another"),
    ],
)
def test_bad_combinations_are_refused_by_one_sentence(
    overrides: list[str], told: str, tmp_path: Path
) -> None:
    given = ["afd.keep_context=false", *overrides]
    with pytest.raises(ConfigError, match=told) as caught:
        build_method(make_config({**ON, "out": str(tmp_path / "run")}, given))
    assert "\n" not in str(caught.value)


def test_samples_have_a_window_of_their_own() -> None:
    data = {"student": {"kind": "toy", "window": 9}}
    with pytest.raises(ConfigError, match=r"student.window: got 9, for training runs alone"):
        make_config(data, [], "sample", SampleConfig)


def test_the_built_student_has_the_window_of_its_configuration(tmp_path: Path) -> None:
    config = make_config({**ON, "out": str(tmp_path / "run")}, ["afd.keep_context=false"])
    method: Any = build_method(config)
    with method.policies.using("old") as student:
        assert (student.net.config.window, student.net.config.sink) == (9, 3)
    assert config.student.sizes().window == 9
