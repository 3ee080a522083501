"""Streams that begin under another prompt and switch to their own before the clip, in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Generator, Tensor

from afd.config.run import make_config
from afd.errors import ConfigError
from afd.methods.base import Batch, earlier_prompts
from afd.methods.config import AfdConfig
from afd.methods.copies import Place, draw_place
from afd.methods.generation import Streaming
from afd.methods.rollouts import Rollouts, roll_out
from afd.models.student import Student
from afd.rollout import STEPS, Switch, SwitchMode, stream, stream_layout
from afd.trainer.loop import Outcome, train
from tests.afd.commands import assert_same_run
from tests.afd.test_kill import PATIENCE_S, begin, kill, small_run
from tests.afd.test_resume import numbers
from tests.afd.test_stream_training import CHUNK, CHUNKS, student_of
from tests.afd.tiny import TinyMethod, make_clips, tiny_config
from tests.afd.tiny_methods import WAN_STEPS, toy_batch, toy_student, wan_batch
from tests.tolerances import NETWORK_REORDERED as SAME

MODES = get_args(SwitchMode)


def batch_of(kind: str) -> Batch:
    batch = toy_batch() if kind == "toy" else wan_batch()
    return replace(batch, earlier=earlier_prompts(batch.prompts))


def rolled(student: Student, kind: str, place: Place, mode: SwitchMode, **how: Any) -> Rollouts:
    streaming = Streaming(STEPS if kind == "toy" else WAN_STEPS, batch=how.pop("batch", None))
    draws = Generator().manual_seed(5)
    given = student, batch_of(kind), 2, draws, streaming
    return roll_out(*given, place=place, switch_mode=mode, **how)


def reference(student: Student, kind: str, place: Place, mode: SwitchMode) -> Tensor:
    """The clips of whole streams, each rolled out alone with its switch."""
    batch, steps = batch_of(kind), STEPS if kind == "toy" else WAN_STEPS
    seeds = torch.randint(2**62, (4,), generator=Generator().manual_seed(5)).tolist()
    frames, clips = (place.clip + CHUNKS) * CHUNK, []
    layout = stream_layout(student, frames)
    for i, seed in enumerate(seeds):
        first, own = (
            student.encode([batch.earlier[i // 2]]),
            student.encode([batch.prompts[i // 2]]),
        )
        shared = student.noise_source([seeds[i - i % 2]], layout, len(steps))
        alone = student.noise_source([seed], layout, len(steps))

        def noise(chunk: int, at: int, shared: Any = shared, alone: Any = alone) -> Tensor:
            return (shared if chunk < (place.fork or 0) else alone)(chunk, at)

        switches = {} if place.switch is None else {place.switch: Switch(own, mode)}
        how: dict[str, Any] = {"frames": frames, "denoising_steps": steps, "switches": switches}
        chunks = list(stream(student, first, noise, **how))
        clips.append(torch.cat(chunks, 1)[:, place.clip * CHUNK :].float())
    return torch.cat(clips)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("clip", "switch"), [(1, 1), (5, 2), (5, 5), (8, 6)])
def test_a_clip_is_cut_from_the_stream_that_switches(
    mode: SwitchMode, clip: int, switch: int
) -> None:
    """To the bit where each stream is alone in its batch."""
    student, place = student_of("wan"), Place(clip, switch=switch)
    expected = reference(student, "wan", place, mode)
    assert torch.equal(rolled(student, "wan", place, mode, batch=1).x0_BFCHW, expected)
    made = rolled(student, "wan", place, mode)
    torch.testing.assert_close(made.x0_BFCHW, expected, rtol=1e-3, atol=1e-4)
    one_prompt = rolled(student, "wan", Place(clip), mode)
    assert not torch.allclose(made.x0_BFCHW, one_prompt.x0_BFCHW, rtol=1e-2, atol=1e-3)
    assert made.prompts == one_prompt.prompts
    assert torch.equal(made.text_BLE, one_prompt.text_BLE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("fork", "switch", "batch"), [(5, 5, None), (5, 2, 1), (8, 5, 1)])
def test_a_group_of_clips_shares_the_switch(
    mode: SwitchMode, fork: int, switch: int, batch: int | None
) -> None:
    student, place = student_of("wan"), Place(5, fork, fork - 5, switch)
    made = rolled(student, "wan", place, mode, batch=batch)
    expected = reference(student, "wan", place, mode)
    torch.testing.assert_close(made.x0_BFCHW, expected, rtol=1e-3, atol=1e-4)


def test_the_toy_switches_as_well() -> None:
    student, place = student_of("toy"), Place(5, switch=4)
    made = rolled(student, "toy", place, "recache", batch=1)
    expected = reference(student, "toy", place, "recache")
    torch.testing.assert_close(made.x0_BFCHW, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("clip", "switch"), [(2, 2), (6, 6), (6, 5), (6, 1)])
def test_the_update_attends_to_what_the_rollout_attended_to(
    mode: SwitchMode, clip: int, switch: int
) -> None:
    student = student_of("wan")
    found = rolled(student, "wan", Place(clip, switch=switch), mode, keep_last_inputs=True)
    assert found.last_inputs_BFCHW is not None
    (level,) = student.levels(WAN_STEPS)[-1:]
    past, start = found.past(torch.arange(4)), clip * CHUNK
    context = student.clean_context(found.x0_BFCHW, found.text_BLE, past=past, start_frame=start)
    t_BK = torch.full((4, 1), level.t / 1000)
    noisy_BFCHW = found.last_inputs_BFCHW
    out = student.predict(noisy_BFCHW, t_BK, found.text_BLE, context, start_frame=start)
    x0 = student.x0_from_output(out, noisy_BFCHW, level.sigma)
    torch.testing.assert_close(x0[:, :CHUNK], found.x0_BFCHW[:, :CHUNK], **SAME)
    torch.testing.assert_close(x0, found.x0_BFCHW, rtol=1e-3, atol=1e-4)


def test_a_switch_after_the_last_chunk_needs_the_cache_that_it_leaves() -> None:
    student = student_of("wan")
    first, own = student.encode(["up"]), student.encode(["up!"])
    noise = student.noise_source([1], stream_layout(student, 6), 4)
    how: dict[str, Any] = {"frames": 6, "denoising_steps": WAN_STEPS, "switches": {2: own}}
    with pytest.raises(ValueError, match=r"switches: got 2; needed: a chunk in \[0, 2\)"):
        stream(student, first, noise, **how)
    how["switches"] = {3: own}
    with pytest.raises(ValueError, match=r"switches: got 3; needed: a chunk in \[0, 3\)"):
        stream(student, first, noise, remember_last=True, **how)


# --- draws ---


def test_a_switch_is_drawn_up_to_the_clip() -> None:
    config, generator = AfdConfig(stream_frames=24, stream_switch="recache"), Generator()
    places = [draw_place(config, CHUNKS, CHUNK, generator.manual_seed(n)) for n in range(300)]
    drawn = {(place.clip, place.switch) for place in places}
    assert drawn == {(0, None)} | {(c, s) for c in range(1, 5) for s in range(1, c + 1)}


@pytest.mark.parametrize("shared", [None, "random"])
def test_runs_without_the_key_keep_their_draws(shared: Any) -> None:
    off = AfdConfig(stream_frames=24, group_from_chunk=shared)
    on = AfdConfig(stream_frames=24, group_from_chunk=shared, stream_switch="plain")
    ours, by_hand = (Generator().manual_seed(3) for _ in range(2))
    for _ in range(8):
        place = draw_place(off, CHUNKS, CHUNK, ours)
        if shared is not None:
            torch.randint(CHUNKS, (), generator=by_hand)
        assert place.clip == int(torch.randint(5, (), generator=by_hand))
        assert torch.equal(ours.get_state(), by_hand.get_state())
    first = [draw_place(one, CHUNKS, CHUNK, Generator().manual_seed(8)) for one in (off, on)]
    assert replace(first[1], switch=None) == first[0]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (["a", "b", "c"], ["c", "a", "b"]),
        (["a", "a", "b"], ["b", "b", "a"]),
        (["a", "b", "b", "a"], ["b", "a", "a", "b"]),
        (["a", "a"], ["a", "a"]),
        (["a"], ["a"]),
        ([], []),
    ],
)
def test_a_prompt_follows_the_nearest_other_one(prompts: list[str], expected: list[str]) -> None:
    assert earlier_prompts(prompts) == expected


def test_a_batch_without_earlier_prompts_is_refused() -> None:
    given = student_of("wan"), wan_batch(), 2, Generator().manual_seed(5), Streaming(WAN_STEPS)
    with pytest.raises(ValueError, match=r"batch.earlier: got .*; needed: one for each"):
        roll_out(*given, place=Place(2, switch=1))


# --- runs ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("switched")
    make_clips(folder / "clips", frames=12)
    toy_student().save(folder / "student.safetensors")
    return folder


def run(folder: Path, out: str, updates: int = 4, **afd: Any) -> dict[str, Any]:
    data = small_run(folder / out, folder)
    data["student"] |= {"window": 9, "sink": 3}
    data["afd"] |= {"keep_context": False, "stream_frames": 24, "stream_switch": "recache", **afd}
    return data | {"updates": updates, "evaluation": {"kind": "none"}}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("delay", [0, 1])
def test_a_run_that_is_killed_and_one_that_is_lengthened_are_the_straight_one(
    folder: Path, delay: int
) -> None:
    straight = run(folder, f"straight {delay}", **{"async": delay})
    assert train(make_config(straight)) is Outcome.FINISHED
    lines = numbers(folder / f"straight {delay}")
    assert {line["student/from_chunk"] for line in lines} - {0.0}, "streams that switch"
    killed = run(folder, f"killed {delay}", **{"async": delay})
    kill(killed, 0.1, while_writing=True)
    process = begin(killed)
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    assert_same_run(folder / f"killed {delay}", folder / f"straight {delay}")
    for updates in (2, 4):
        longer = run(folder, f"longer {delay}", updates, **{"async": delay})
        assert train(make_config(longer)) is Outcome.FINISHED
    assert_same_run(folder / f"longer {delay}", folder / f"straight {delay}")


class Noted(TinyMethod):
    """Keeps the prompts of every update."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[list[str], list[str]]] = []

    def rollout(self, batch: Batch) -> None:
        super().rollout(batch)
        self.given.append((batch.prompts, list(batch.earlier)))


def test_the_trainer_gives_every_prompt_another_one_of_its_update(tmp_path: Path) -> None:
    clips, method = make_clips(tmp_path / "clips"), Noted()
    train(tiny_config(tmp_path / "run", clips, "prompts_per_update=4"), method=method)
    assert len(method.given) == 6
    for prompts, earlier in method.given:
        assert earlier == earlier_prompts(prompts)
        assert len(prompts) == 4
        assert all(a != b for a, b in zip(prompts, earlier, strict=True))


# --- configuration ---


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["afd.stream_frames=null"], "afd.stream_switch: got recache without afd.stream_frames"),
        (["prompts_per_update=1"], "afd.stream_switch: got recache with updates of one prompt"),
        (["afd.stream_switch=smooth"], "afd.stream_switch.*smooth"),
        (
            ["replay.fraction=0.5", "replay.prompts=x.txt"],
            "afd.stream_switch: got recache with updates of one prompt of the teacher; needed: "
            "prompts_per_update of 2 or more",
        ),
    ],
)
def test_bad_combinations_are_refused_by_one_sentence(
    folder: Path, overrides: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        make_config(run(folder, "refused"), overrides)
    assert "\n" not in str(caught.value)


def test_a_teacher_of_one_prompt_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "clips", count=2, frames=12)
    (clips / "prompts.txt").write_text("0.mp4\tup\n1.mp4\tup\n", encoding="utf-8")
    toy_student().save(tmp_path / "student.safetensors")
    with pytest.raises(ConfigError, match=r"afd.stream_switch: got recache with a teacher of one"):
        train(make_config(run(tmp_path, "run")))
