"""A stream whose context is computed anew before every chunk: against slow references that build it
from clean frames alone, in `afd sample`, in `afd live`, and its pictures encoded again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from afd.errors import ConfigError
from afd.live.take import Compared, Take
from afd.models.codec import Codec, FrameDecoder, Pixels
from afd.models.student import Level
from afd.models.wan.student import WanStudent
from afd.models.wan.tiny_vae import TinyVAE
from afd.models.wan.vae import VideoVAE
from afd.rollout import Switch, counted_noise, seeded_noise, stream, stream_layout
from afd.sampling import sample as sampling
from afd.sampling.config import SampleConfig
from afd.sampling.sample import Pipeline, dry_run, sample
from afd.schedules import renoise
from afd.testing.tiny_vae import drawn_weights
from afd.video import read_comment
from tests.afd.recorded import recorded
from tests.afd.test_rollout import TWO, make_student
from tests.afd.test_sample import make, models, quiet
from tests.afd.test_tiny_vae import keys
from tests.afd.test_vae import model as vae_model
from tests.tolerances import NETWORK_REORDERED as SAME

__all__ = ["models"]
TEXTS = torch.randn(3, 1, 5, 12, generator=torch.Generator().manual_seed(5)).expand(-1, 2, -1, -1)
Texts = Callable[[int], tuple[Tensor, Tensor]]


def noise_of(student: WanStudent) -> Any:
    return seeded_noise([3, 4], (student.chunk, *student.frame_shape))


def streamed(student: WanStudent, frames: int | None, **how: Any) -> Tensor:
    how = {"recache": "chunk", "denoising_steps": TWO, "text_BLE": TEXTS[0]} | how
    layout = stream_layout(student, 99 if frames is None else frames)
    drawn = noise_of(student)
    chunks = stream(
        student,
        how.pop("text_BLE"),
        lambda chunk, step: drawn(chunk, step)[:, : layout[chunk][1]],
        frames=frames,
        **how,
    )
    return torch.cat(list(chunks), 1)


def same_prompt(chunk: int) -> tuple[Tensor, Tensor]:
    return TEXTS[0], TEXTS[0]


@torch.no_grad()
def reference(
    student: WanStudent,
    frames: int,
    *,
    teacher_forced: bool,
    texts: Texts = same_prompt,
    image: Callable[[Tensor, int], Tensor] | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """Every chunk as the last one of a video of its own, without a window.

    Its context is either the clean half of one teacher-forced pass, or a new cache of whole chunks.
    `texts`: the prompts of a chunk's context and of itself. `image`: from all frames and an index.
    """
    window, sink = student.net.config.window, student.net.config.sink
    assert window is not None
    plain = make_student(window=None, sink=0, chunk=student.chunk)
    plain.net.load_state_dict(student.net.state_dict())
    levels, clean = plain.levels(TWO), Level.at(0.0, 0.0, student.device)
    drawn, made = noise_of(student), torch.empty(2, 0, *student.frame_shape)
    given = 0 if prefix is None else prefix.shape[1]
    for chunk, (start, count) in enumerate(stream_layout(student, frames, given)):
        if prefix is not None and start < given:
            made = torch.cat([made, prefix[:, start : start + count]], 1)
            continue
        held = list(range(start))
        if start + count > window:
            held = held[:sink] + held[start - (window - count - sink) :]
        context = made[:, held]
        if image is not None and held and held[0] > 0:
            context = torch.cat([image(made, held[0]), context[:, 1:]], 1)
        context_text, text = texts(chunk)
        x = drawn(chunk, 0)[:, :count]
        for step, level in enumerate(levels):
            if teacher_forced:
                video = torch.cat([context, x], 1)
                keys = plain.net.clean_context(video, context_text, clean.t_11)
                out = plain.net(video, level.t_11, text, keys)[:, len(held) :]
            else:
                size = [1] if given == 1 else []
                size += [student.chunk] * len(held)
                cache, at = plain.new_cache(context_text, len(held) + count), 0
                while at < len(held):
                    part = context[:, at : at + size.pop(0)]
                    plain.remember(part, clean, cache, at)
                    at += part.shape[1]
                plain.switch_text(cache, text)
                found = plain.net.forward_cached(x, level.t_11, cache, at)
                assert found is not None
                out = found
            x0 = plain.x0_from_output(out, x, level.sigma)
            if step + 1 < len(levels):
                x = renoise(x0, drawn(chunk, step + 1)[:, :count], levels[step + 1].sigma)
        made = torch.cat([made, x0], 1)
    return made


@pytest.mark.parametrize(("window", "sink"), [(4, 0), (6, 0), (8, 2), (4, 2), (2, 0)])
def test_a_stream_is_that_of_teacher_forced_passes_over_clean_frames(
    window: int, sink: int
) -> None:
    student = make_student(window=window, sink=sink)
    made = streamed(student, 14)
    torch.testing.assert_close(made, reference(student, 14, teacher_forced=True), **SAME)
    kept = streamed(student, 14, recache="switch")
    torch.testing.assert_close(made[:, :window], kept[:, :window], **SAME)
    if window > 2:
        assert (made[:, window:] - kept[:, window:]).abs().max() > 1e-3


@pytest.mark.parametrize(("window", "sink"), [(5, 0), (5, 1), (3, 1), (6, 1), (7, 3)])
def test_a_context_that_is_no_whole_number_of_chunks_is_cut_from_its_beginning(
    window: int, sink: int
) -> None:
    student = make_student(window=window, sink=sink)
    expected = reference(student, 12, teacher_forced=False)
    torch.testing.assert_close(streamed(student, 12), expected, **SAME)


def test_without_frames_that_leave_the_window_it_is_the_plain_stream() -> None:
    for window in (None, 6, 20):
        student = make_student(window=window)
        expected = streamed(student, 6, recache="switch")
        torch.testing.assert_close(streamed(student, 6), expected, **SAME)


@pytest.mark.parametrize("mode", ["plain", "recache", "recache_causal", "new_sink"])
def test_a_switch_changes_the_contexts_prompt_at_once_or_a_chunk_later(mode: Any) -> None:
    student = make_student(window=4)
    new = [TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[1], TEXTS[2], TEXTS[2]]

    def texts(chunk: int) -> tuple[Tensor, Tensor]:
        before = new[chunk - 1] if mode == "plain" and chunk else new[chunk]
        return before, new[chunk]

    switches = {2: Switch(TEXTS[1], mode), 4: Switch(TEXTS[2], mode)}
    made = streamed(student, 12, switches=switches)
    expected = reference(student, 12, teacher_forced=False, texts=texts)
    torch.testing.assert_close(made, expected, **SAME)
    asked = streamed(student, 12, switches=switches.get)
    assert torch.equal(asked, made)


@pytest.mark.parametrize("given", [1, 2, 4, 6])
def test_a_stream_that_begins_with_a_prefix(given: int) -> None:
    student = make_student(window=6)
    prefix = torch.randn(2, given, 4, 4, 6, generator=torch.Generator().manual_seed(9))
    frames = 13 if given == 1 else 12
    expected = reference(student, frames, teacher_forced=False, prefix=prefix)
    drawn = noise_of(student)
    chunks = stream(
        student,
        TEXTS[0],
        drawn,
        frames=frames,
        denoising_steps=TWO,
        prefix_BFCHW=prefix,
        recache="chunk",
    )
    torch.testing.assert_close(torch.cat(list(chunks), 1), expected, **SAME)


@pytest.mark.parametrize("sink", [0, 2])
def test_what_the_context_begins_with_is_encoded_again(sink: int) -> None:
    """Once it is not the stream's first frame; the caller has all earlier chunks by then."""
    student, taken, asked = make_student(window=6, sink=sink), torch.empty(2, 0, 4, 4, 6), []

    def image(made: Tensor, frame: int) -> Tensor:
        return made[:, frame : frame + 1].flip(-1) + 0.5

    def reencode(frame: int) -> Tensor:
        asked.append((frame, taken.shape[1]))
        return image(taken, frame).double()

    drawn = noise_of(student)
    for chunk in stream(
        student,
        TEXTS[0],
        drawn,
        frames=14,
        denoising_steps=TWO,
        recache="chunk",
        reencode=reencode,
    ):
        taken = torch.cat([taken, chunk], 1)
    assert asked == ([] if sink else [(start - 4, start) for start in (6, 8, 10, 12)])
    expected = reference(student, 14, teacher_forced=True, image=image)
    torch.testing.assert_close(taken, expected, **SAME)
    with pytest.raises(ValueError, match=r"reencode: got .*needed: \[2, 1, 4, 4, 6\]"):
        streamed(make_student(window=4), 8, reencode=lambda frame: taken)


def test_an_endless_stream_keeps_a_window_and_nothing_more() -> None:
    student = make_student(window=4)
    cache = student.new_cache(TEXTS[0], None)
    chunks = stream(
        student,
        TEXTS[0],
        noise_of(student),
        frames=None,
        denoising_steps=TWO,
        cache=cache,
        recache="chunk",
    )
    made = torch.cat([next(chunks) for _ in range(7)], 1)
    torch.testing.assert_close(made, reference(student, 14, teacher_forced=True), **SAME)
    assert (cache.end, cache.frames) == (4, 4)


@pytest.mark.parametrize(
    ("how", "needed"),
    [
        ({"recache": "often"}, "recache: got 'often'; needed: switch or chunk"),
        ({"remember_last": True}, "remember_last: got True; needed: false with recache=chunk"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(how: dict[str, Any], needed: str) -> None:
    with pytest.raises(ValueError, match=needed):
        streamed(make_student(window=4), 8, **how)


def test_a_continued_stream_is_refused() -> None:
    student = make_student(window=4)
    cache = student.new_cache(TEXTS[0], None)
    list(
        stream(
            student,
            TEXTS[0],
            noise_of(student),
            frames=2,
            denoising_steps=TWO,
            cache=cache,
            remember_last=True,
        )
    )
    with pytest.raises(ValueError, match=r"from_chunk: got 1; needed: 0 with recache=chunk"):
        streamed(student, 8, cache=cache.fork(frames=8), from_chunk=1)


# --- pictures ---

CODECS: dict[str, Callable[[], Codec]] = {
    "wan": lambda: VideoVAE(vae_model()),
    "tiny": lambda: TinyVAE.of(drawn_weights(keys())),
    "tiny wan2.2": lambda: TinyVAE.of(drawn_weights(keys(pixels=12, latent=48))),
    "pixels": Pixels,
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("chunks", [[2, 2], [1, 2], [1, 1, 1]])
def test_the_last_picture_of_a_latent_frame_is_encoded_alone(name: str, chunks: list[int]) -> None:
    codec = CODECS[name]()
    time = 1 if name == "pixels" else 4
    video = torch.rand(1, 1 + time * (sum(chunks) - 1), 3, 16, 16) * 2 - 1
    latents = codec.encode(video)
    decoded = codec.decode(latents)
    decoder = FrameDecoder(codec, time, kept=2)
    made = [decoder(part) for part in latents.split(chunks, 1)]
    assert torch.equal(torch.cat(made, 1), decoded)
    last = sum(chunks) - 1
    for frame in range(last - 1, last + 1):
        expected = codec.encode(decoded[:, time * frame : time * frame + 1])
        assert torch.equal(decoder.reencode(frame), expected), frame
    for frame in (last - 2, last + 1):
        with pytest.raises(ValueError, match=r"frame: got .*needed: one of the newest 2 of"):
            decoder.reencode(frame)


# --- afd sample and afd live ---

WINDOW: dict[str, Any] = {"recache": "chunk", "window": 6, "frames": 33}
PROMPT = "a red ball falls"


@torch.no_grad()
def slowly(config: SampleConfig, pipeline: Pipeline) -> Tensor:
    """Latents of three chunks of three over three past frames, the oldest of the last chunk's from
    its picture: each the end of a stream of six frames that begins with those."""
    student, codec, made = pipeline.student, pipeline.codec, torch.empty(0)
    noise = counted_noise(
        [config.seed],
        stream_layout(student, 9),
        len(config.student.denoising_steps),
        student.frame_shape,
        device=student.device,
        dtype=student.dtype,
    )
    plain = replace(student.net.config, window=None)
    windowed, student.net.config = student.net.config, plain
    for chunk in range(3):
        past = made[:, -3:] if chunk else None
        if chunk == 2:
            # The 13th of 21 frames, the last one of latent frame 3 of 0 to 5.
            picture = codec.encode(codec.decode(made)[:, 12:13])
            past = torch.cat([picture, made[:, 4:]], 1)
        *_, x0 = stream(
            student,
            pipeline.text([PROMPT]),
            lambda _, step, chunk=chunk: noise(chunk, step),
            frames=6 if chunk else 3,
            denoising_steps=config.student.denoising_steps,
            prefix_BFCHW=past,
        )
        made = torch.cat([made, x0], 1) if chunk else x0
    student.net.config = windowed
    return made


def test_sampled_videos_begin_a_context_with_a_picture(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = recorded(monkeypatch)
    config = make(models, tmp_path / "out", **WINDOW)
    (path,) = sample(config, quiet()).written
    found = torch.cat(shown, 1)
    pipeline = sampling.load(config, [PROMPT])
    with torch.no_grad():
        expected = pipeline.codec.decode(slowly(config, pipeline))
    torch.testing.assert_close(found, expected, **SAME)
    shown.clear()
    kept = make(models, tmp_path / "kept", **WINDOW | {"recache": "switch"})
    (other,) = sample(kept, quiet()).written
    late = (torch.cat(shown, 1) - expected)[:, 21:]
    assert late.abs().max() > 100 * SAME["atol"]
    settings = [json.loads(read_comment(one) or "")["settings"] for one in (path, other)]
    assert settings[0]["recache"] == "chunk"
    # Videos of earlier versions are found again.
    assert "recache" not in settings[1]
    with pytest.raises(ConfigError, match="recache: got chunk without a window; needed: a window"):
        make(models, tmp_path, **WINDOW | {"window": None})


@pytest.mark.parametrize(
    ("window", "sink", "prefix"), [(6, 0, 0), (12, 0, 3), (8, 1, 0), (3, 0, 1)]
)
def test_the_dry_run_counts_the_passes_over_past_frames(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    window: int,
    sink: int,
    prefix: int,
) -> None:
    config = make(models, tmp_path / "out", **WINDOW | {"window": window, "sink": sink})
    if prefix == 1:
        config = config.model_copy(update={"frames": 37})
    written = io.StringIO()
    jobs = sampling.read_jobs(config)
    start = {0: {}, 1: {"image": Path("x")}, 3: {"video": Path("x")}}[prefix]
    monkeypatch.setattr(sampling, "read_jobs", lambda c: [replace(jobs[0], **start)])
    dry_run(config, Console(file=written, width=200))
    pipeline = sampling.load(config, [PROMPT])
    student, done = pipeline.student, []

    def counted(*args: Any, context: bool) -> Tensor | None:
        done.append(context)
        return None if context else args[0]

    monkeypatch.setattr(student, "_pass", counted)
    given = torch.zeros(1, prefix, *student.frame_shape, dtype=student.dtype) if prefix else None
    layout = stream_layout(student, config.latent_frames, prefix)
    chunks = stream(
        student,
        pipeline.text([PROMPT]),
        lambda chunk, step: torch.zeros(1, layout[chunk][1], *student.frame_shape),
        frames=config.latent_frames,
        denoising_steps=config.student.denoising_steps,
        prefix_BFCHW=given,
        recache="chunk",
    )
    assert len(list(chunks)) == len(layout)
    said = f"{len(done)} passes, {sum(done)} of them over past frames"
    assert said in written.getvalue()


def test_a_live_stream_is_the_sampled_one(models: Path, tmp_path: Path) -> None:
    config = make(models, tmp_path / "out", **WINDOW)
    pipeline = sampling.load(config, [PROMPT])
    take = Take([Compared("one", config, pipeline)], PROMPT, config.seed)
    made = [take.next() for _ in range(3)]
    latents = torch.cat([chunk.latents[0] for chunk in made], 1)
    torch.testing.assert_close(latents, slowly(config, pipeline), **SAME)
    held, formula = made[-1].cache
    assert held == formula == sampling.memory(config).cache
