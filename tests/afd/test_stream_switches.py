"""Streams without end, and prompts that are switched while a stream runs."""

from __future__ import annotations

import weakref
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from afd.models.noise import KEYS_AHEAD
from afd.models.wan.graphs import FixedPasses
from afd.models.wan.student import WanStudent
from afd.rollout import (
    EndlessLayout,
    Switch,
    SwitchMode,
    chunk_layout,
    counted_noise,
    denoise_chunk,
    stream,
    stream_layout,
)
from tests.afd.test_rollout import TWO, Watch, make_student, noise_of, student, text, video
from tests.tolerances import NETWORK_REORDERED as SAME

__all__ = ["student", "text"]


@pytest.mark.parametrize("mode", get_args(SwitchMode))
def test_a_callable_gives_the_stream_that_switches_give(text: Tensor, mode: Any) -> None:
    """Also where the prompt is decided between two chunks, before the last one is remembered."""
    student = make_student(window=5, sink=1)
    switches = {1: Switch(text.flip(0), mode), 4: Switch(text.roll(1, 1), mode)}
    known = video(student, text, [1, 2], frames=14, switches=switches)
    wanted: dict[int, Switch] = {}
    asked = []

    def next_text(chunk: int) -> Switch | None:
        asked.append(chunk)
        return wanted.pop(chunk, None)

    noise = noise_of(student, [1, 2], 14)
    chunks = []
    for chunk in stream(student, text, noise, frames=14, denoising_steps=TWO, switches=next_text):
        chunks.append(chunk)
        if len(chunks) in switches:
            wanted[len(chunks)] = switches[len(chunks)]
    assert asked == list(range(7))
    assert torch.equal(torch.cat(chunks, 1), known)
    plain = video(student, text, [1, 2], frames=14)
    assert not torch.equal(known, plain)


def test_embeddings_alone_are_a_plain_switch(student: WanStudent, text: Tensor) -> None:
    other = text.flip(0)
    alone = video(student, text, [1, 2], switches={1: other})
    assert torch.equal(alone, video(student, text, [1, 2], switches={1: Switch(other)}))
    given = video(student, text, [1, 2], switches=lambda chunk: other if chunk == 1 else None)
    assert torch.equal(given, alone)


def test_a_recache_without_a_window_encodes_everything_again(
    student: WanStudent, text: Tensor
) -> None:
    """As if the cache had been filled in one pass under the new prompt."""
    other = text.flip(0)
    cache = student.new_cache(text, 6)
    switches = {2: Switch(other, "recache")}
    made = video(student, text, [1, 2], switches=switches, cache=cache)
    fresh = student.new_cache(other, 6)
    t_11 = torch.zeros(1, 1)
    student.net.forward_cached(made[:, :4], t_11, fresh, 0, context_only=True)
    noise, levels = noise_of(student, [1, 2]), student.levels(TWO)
    last = denoise_chunk(student, fresh, noise, levels, 2, 4)
    assert torch.equal(made[:, 4:], last)


def test_a_block_causal_recache_without_a_window_is_the_stream_under_the_new_prompt(
    student: WanStudent, text: Tensor
) -> None:
    other, cache = text.flip(0), student.new_cache(text, 6)
    switches = {2: Switch(other, "recache_causal")}
    made = video(student, text, [1, 2], switches=switches, cache=cache)
    fresh = student.new_cache(other, 6)
    for start in (0, 2):
        frames = made[:, start : start + 2]
        student.net.forward_cached(frames, torch.zeros(1, 1), fresh, start, context_only=True)
    noise, levels = noise_of(student, [1, 2]), student.levels(TWO)
    last = denoise_chunk(student, fresh, noise, levels, 2, 4)
    torch.testing.assert_close(made[:, 4:], last, **SAME)


@pytest.mark.parametrize(("window", "sink", "chunk"), [(5, 1, 2), (6, 0, 2), (7, 3, 2), (8, 2, 3)])
@pytest.mark.parametrize("new_sink", [False, True])
def test_a_block_causal_recache_attends_to_the_sink_and_what_came_before(
    window: int, sink: int, chunk: int, new_sink: bool
) -> None:
    student = make_student(window=window, sink=sink)
    for chunks in range(1, 9):
        cache = student.new_cache(torch.zeros(1, 5, 12), None)
        for start in range(0, chunk * chunks, chunk):
            cache.seek(start, chunk)
        frames = cache.recache(new_sink=new_sink, chunks=[chunk] * chunks)
        mask = cache.intervals(len(frames) * cache.tokens_per_frame).mask(cache.valid)[0]
        slots = {cache.slot(f): f for f in cache.held()}
        step = cache.tokens_per_frame
        for i, frame in enumerate(frames):
            attended = {slots[s // step] for s in mask[i * step].nonzero().flatten().tolist()}
            end = frame // chunk * chunk + chunk
            kept = {f for f in cache.held() if f < frames[0]}
            assert attended == kept | set(range(frames[0], end))
            assert (mask[i * step : (i + 1) * step] == mask[i * step]).all()
    with pytest.raises(ValueError, match=r"chunks: got \[1\]; needed: chunks of the newest"):
        cache.recache(chunks=[1])


def test_an_endless_stream_begins_like_a_video_and_keeps_its_memory(text: Tensor) -> None:
    student = make_student(window=5, sink=1)
    expected = video(student, text, [1, 2], frames=12)
    layout = stream_layout(student, None)
    assert [layout[i] for i in range(3)] == [(0, 2), (2, 2), (4, 2)]
    noise = counted_noise([1, 2], layout, 2, student.frame_shape)
    cache = student.new_cache(text, None)
    held = cache.bytes
    alive: list[weakref.ref[Tensor]] = []
    chunks = stream(
        student,
        text,
        noise,
        frames=None,
        denoising_steps=TWO,
        switches=lambda chunk: Switch(text.roll(chunk, 1), "new_sink") if chunk > 6 else None,
        cache=cache,
    )
    first = torch.cat([next(chunks) for _ in range(6)], 1)
    assert torch.equal(first, expected)
    for _ in range(100):
        alive.append(weakref.ref(next(chunks)))
    assert cache.bytes == held
    # Of the latents only those that a recache would take, and the chunk just given.
    assert sum(ref() is not None for ref in alive) <= 4
    assert cache.end == 2 * 106


def test_noise_of_an_endless_layout_is_that_of_a_finite_one() -> None:
    endless = counted_noise([3, 4], EndlessLayout(2, first_alone=True), 2, (4, 2, 3))
    count = KEYS_AHEAD + 2
    finite = counted_noise([3, 4], chunk_layout(1 + 2 * count, 2, first_alone=True), 2, (4, 2, 3))
    for chunk in (0, 1, KEYS_AHEAD - 1, KEYS_AHEAD, KEYS_AHEAD + 1, 0):
        assert torch.equal(endless(chunk, 1), finite(chunk, 1))


def test_an_endless_stream_takes_a_prefix(text: Tensor) -> None:
    student = make_student(window=5, sink=1)
    image = torch.randn(2, 1, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    expected = video(student, text, [1, 2], frames=9, prefix_BFCHW=image)
    noise = counted_noise([1, 2], stream_layout(student, None, 1), 2, student.frame_shape)
    options: dict[str, Any] = {"frames": None, "denoising_steps": TWO}
    chunks = stream(student, text, noise, prefix_BFCHW=image, **options)
    assert torch.equal(torch.cat([next(chunks) for _ in range(5)], 1), expected)
    with pytest.raises(ValueError, match=r"prefix: .* P one of \[2, 4\], whole chunks"):
        stream(student, text, noise, prefix_BFCHW=torch.zeros(2, 3, 4, 4, 6), **options)


def test_mistakes_of_endless_streams_and_switches_are_named(
    student: WanStudent, text: Tensor
) -> None:
    options: dict[str, Any] = {"denoising_steps": TWO}
    noise = noise_of(student, [1, 2])
    with pytest.raises(ValueError, match="frames: got None; needed: a number, as there is no win"):
        stream(student, text, noise, frames=None, **options)
    wrong: Any = Switch(text, "again")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode: got 'again'; needed: one of plain, recache, rec"):
        stream(student, text, noise, switches={1: wrong}, **options)
    chunks = stream(student, text, noise, switches=lambda chunk: text[:1], **options)
    with pytest.raises(ValueError, match=r"switches: got float32 \[1, 5, 12\]"):
        next(chunks)
    cache = student.new_cache(text, 6)
    cache.seek(0, 4)
    with pytest.raises(ValueError, match=r"x: got .*; needed: the newest 4 frames"):
        student.net.recache(torch.zeros(2, 3, 4, 4, 6), torch.zeros(1, 1), cache)
    with pytest.raises(ValueError, match="recache: got 'an empty cache'"):
        student.new_cache(text, 6).recache()


@pytest.mark.parametrize("mode", ["recache", "new_sink"])
def test_recorded_passes_stream_on_after_a_recache(text: Tensor, mode: Any) -> None:
    """Slots are counted anew after the sink is replaced; a replay reads where from the device."""
    student = make_student(window=5, sink=1)
    switches = {c: Switch(text.roll(c, 1), mode) for c in (1, 4, 6)}
    expected = video(student, text, [1, 2], frames=18, switches=switches)
    student._graphs = passes = FixedPasses(student.net)  # type: ignore[assignment]
    cache = student.new_cache(text, 18)
    for _ in range(2):
        cache.reset(student.net.text_kv(text))
        made = video(student, text, [1, 2], frames=18, switches=switches, cache=cache)
        torch.testing.assert_close(made, expected, **SAME)
    assert passes.count == 6  # two kinds of pass, at three lengths of the cache


def test_no_value_is_read_back_at_a_recache(text: Tensor) -> None:
    student = make_student(window=5, sink=1)
    switches = {c: Switch(text.flip(0), "new_sink") for c in (2, 4)}
    noise = noise_of(student, [1, 2], 12)
    chunks = stream(student, text, noise, frames=12, denoising_steps=TWO, switches=switches)
    next(chunks)
    with Watch() as watch:
        assert len(list(chunks)) == 5
    assert watch.waits == []


def test_a_new_video_in_the_same_cache_forgets_the_replaced_sink(text: Tensor) -> None:
    student = make_student(window=5, sink=1)
    cache = student.new_cache(text, 12)
    video(student, text, [1, 2], frames=12, switches={4: Switch(text, "new_sink")}, cache=cache)
    assert cache.held()[0] == 3
    cache.reset(student.net.text_kv(text))
    again = video(student, text, [1, 2], frames=12, cache=cache)
    assert torch.equal(again, video(student, text, [1, 2], frames=12))
    assert cache.held()[0] == 0
