"""Groups that share a beginning: the same videos as without sharing, for fewer passes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Generator, Tensor

from afd.methods.afd import Afd
from afd.methods.config import AfdConfig
from afd.methods.copies import Place, draw_copies, draw_fork
from afd.methods.generation import Streaming
from afd.methods.rollouts import roll_out
from afd.models.student import Student
from afd.models.wan.graphs import FixedPasses
from afd.models.wan.kv_cache import KVCache
from afd.models.wan.network import CausalWan
from afd.rollout import STEPS, stream, stream_layout
from tests.afd.tiny_methods import (
    WAN_STEPS,
    make_afd,
    step,
    toy_batch,
    toy_student,
    wan_batch,
    wan_student,
    weights,
)
from tests.afd.tiny_wan import HEIGHT, TOKENS, WIDTH, text, tiny, video
from tests.tolerances import NETWORK_REORDERED as SAME

CHUNK, CHUNKS, GROUP = 3, 4, 3
T_STEP, T_CLEAN = torch.full((1, 1), 700.0), torch.zeros(1, 1)


# --- the cache ---


def play(net: CausalWan, cache: KVCache, start: int, x: Tensor, call: Any = None) -> Tensor:
    """A denoising pass and the context pass of a chunk; returns the former's output."""
    call = call or (lambda *a: net.forward_cached(*a[:4], context_only=a[4]))
    out = call(x, T_STEP, cache, start, False)
    call(x, T_CLEAN, cache, start, True)
    assert out is not None
    return out


def repeated(x: Tensor, copies: int) -> Tensor:
    return x.repeat_interleave(copies, 0)


WINDOWS = [(None, 0), (7, 0), (7, 2), (6, 3), (9, 4)]


@pytest.mark.parametrize(("window", "sink"), WINDOWS, ids=str)
@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_fork_continues_as_the_unshared_stream_does(
    window: int | None, sink: int, before: int, copies: int
) -> None:
    """Past the window, too, where the ring turns and the fork takes memory of its own."""
    net = tiny(window=window, sink=sink).requires_grad_(False)
    words, frames = text(net), None if window else 24
    shared = net.new_cache(words, 3 * before if window is None else frames, HEIGHT, WIDTH)
    apart = net.new_cache(repeated(words, copies), frames, HEIGHT, WIDTH)
    for start in range(0, 3 * before, 3):
        x = video(net, 3, seed=start)
        play(net, shared, start, x)
        play(net, apart, start, repeated(x, copies))
    fork = shared.fork(copies, frames)
    bits = copies == 1 and fork.shared_frames == fork.frames
    for start in range(3 * before, 24, 3):
        x = video(net, 3, batch=2 * copies, seed=100 + start)
        found, expected = play(net, fork, start, x), play(net, apart, start, x)
        assert fork.held() == apart.held()
        if bits:  # the ring was full: the fork copied it, and the pass is the same one
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, **SAME)


def test_a_fork_takes_memory_for_its_own_frames_alone_until_the_ring_turns() -> None:
    net = tiny(window=9, sink=2).requires_grad_(False)
    cache = net.new_cache(text(net), None, HEIGHT, WIDTH)
    for start in (0, 3):
        play(net, cache, start, video(net, 3))
    before, one = cache.bytes, 2 * 2 * 2 * 32 * 4  # layers, k and v, streams, channels, fp32
    fork = cache.fork(3, None)
    assert fork.bytes == 3 * one * 3 * TOKENS
    assert fork.shared_kv[0][0].data_ptr() == cache.self_kv[0][0].data_ptr()
    assert fork.cross_kv is cache.cross_kv
    play(net, fork, 6, video(net, 3, batch=6))
    assert fork.shared_frames == 6
    play(net, fork, 9, video(net, 3, batch=6))
    assert fork.shared_frames == 0
    assert fork.bytes == 3 * before
    assert cache.bytes == before


def test_writes_to_one_never_reach_the_other() -> None:
    """The parent's ring turns, begins anew, and changes its prompt; so does a fork."""
    net = tiny(window=6, sink=1).requires_grad_(False)
    other = net.text_kv(text(net, seed=9))

    def turn(cache: KVCache) -> None:
        for start in (6, 9):
            play(net, cache, start, video(net, 3, batch=len(cache.self_kv[0][0])))

    def recache(cache: KVCache) -> None:
        rows = len(cache.self_kv[0][0])
        net.recache(video(net, 6, batch=rows), T_CLEAN, cache)

    changes: dict[str, Any] = {
        "turn": turn,
        "recache": recache,
        "begin": lambda cache: play(net, cache, 0, video(net, 3, len(cache.self_kv[0][0]), 7)),
        "text": lambda cache: cache.switch_text(
            other
            if len(cache.self_kv[0][0]) == 2
            else [(repeated(k, 2), repeated(v, 2)) for k, v in other]
        ),
        "reset": lambda cache: cache.reset(),
    }
    for name, change in changes.items():
        for changed in ("parent", "fork"):
            cache = net.new_cache(text(net), None, HEIGHT, WIDTH)
            for start in (0, 3):
                play(net, cache, start, video(net, 3, seed=start))
            forks = [cache.fork(2, None) for _ in range(2)]
            kept = cache if changed == "fork" else forks[1]
            expected = [x.clone() for x in contents(kept)]
            change(cache if changed == "parent" else forks[0])
            found = contents(kept)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name


def contents(cache: KVCache) -> list[Tensor]:
    """All keys and values, shared ones once for each continuation, and the prompt's."""
    rows = range(len(cache.self_kv[0][0]))
    held = [
        [torch.cat(x, 1) for x in zip(*part, strict=True)]
        for row in rows
        for part in joined(cache, row)
    ]
    text_kv = [repeated(x, len(rows) // len(x)) for kv in cache.cross_kv for x in kv]
    return [x for part in held for x in part] + text_kv


def joined(cache: KVCache, row: int) -> list[list[tuple[Tensor, Tensor]]]:
    parts = cache.parts(row)
    return [[(k, v) for part in parts for k, v in [part[layer]]] for layer in range(len(parts[0]))]


@pytest.mark.parametrize("new_sink", [False, True])
@pytest.mark.parametrize("chunks", [2, 4])
def test_a_recache_of_a_fork_is_that_of_the_unshared_stream(chunks: int, new_sink: bool) -> None:
    net = tiny(window=7, sink=1).requires_grad_(False)
    words = text(net)
    shared = net.new_cache(words, None, HEIGHT, WIDTH)
    apart = net.new_cache(repeated(words, 2), None, HEIGHT, WIDTH)
    finished = []
    for start in range(0, 3 * chunks, 3):
        x = video(net, 3, seed=start)
        finished.append(x)
        play(net, shared, start, x)
        play(net, apart, start, repeated(x, 2))
    fork, clean = shared.fork(2, None), repeated(torch.cat(finished, 1), 2)
    other = net.text_kv(text(net, batch=4, seed=9))
    for cache in (fork, apart):
        cache.switch_text(other)
        net.recache(clean, T_CLEAN, cache, new_sink=new_sink)
    for start in range(3 * chunks, 3 * chunks + 9, 3):
        x = video(net, 3, batch=4, seed=start)
        torch.testing.assert_close(play(net, fork, start, x), play(net, apart, start, x), **SAME)


def test_recorded_passes_of_a_fork_equal_the_plain_ones_before_and_after_it_copies() -> None:
    net = tiny(window=7, sink=1).requires_grad_(False)
    cache = net.new_cache(text(net), None, HEIGHT, WIDTH)
    for start in (0, 3):
        play(net, cache, start, video(net, 3, seed=start))
    plain, fixed, passes = cache.fork(2, None), cache.fork(2, None), FixedPasses(net)
    for start in range(6, 18, 3):
        x = video(net, 3, batch=4, seed=start)
        expected = play(net, plain, start, x)
        torch.testing.assert_close(play(net, fixed, start, x, passes), expected, **SAME)


def test_a_fork_of_a_fork_and_what_is_refused() -> None:
    net = tiny().requires_grad_(False)
    empty = net.new_cache(text(net), 6, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"fork: got .*; needed: at least one finished chunk"):
        empty.fork(2, 6)
    play(net, empty, 0, video(net, 3))
    with pytest.raises(ValueError, match="frames: got 2; needed: at least 3"):
        empty.fork(2, 2)
    with pytest.raises(ValueError, match="frames: got None; needed: at least 3"):
        empty.fork(2, None)
    with pytest.raises(ValueError, match="copies: got 0"):
        empty.fork(0, 6)
    child = empty.fork(2, 9)
    x = video(net, 3, batch=4, seed=3)
    play(net, child, 3, x)
    grandchild = child.fork(2, 9)
    y = video(net, 3, batch=8, seed=6)
    apart = net.new_cache(repeated(text(net), 4), 9, HEIGHT, WIDTH)
    play(net, apart, 0, repeated(video(net, 3), 4))
    play(net, apart, 3, repeated(x, 2))
    torch.testing.assert_close(play(net, grandchild, 6, y), play(net, apart, 6, y), **SAME)


def test_a_stream_is_continued_only_where_its_cache_ends() -> None:
    student = wan_student()
    words = student.encode(["a"])
    noise = student.noise_source([1], stream_layout(student, 12), 4)
    cache = student.new_cache(words, 12)
    how: dict[str, Any] = {"denoising_steps": WAN_STEPS}
    with pytest.raises(
        ValueError, match="cache: got 'one of 0 frames'; needed: one that holds the 3"
    ):
        stream(student, words, noise, cache=cache, from_chunk=1, **how)
    with pytest.raises(ValueError, match="from_chunk: got 4; needed: a chunk of the stream"):
        stream(student, words, noise, cache=cache, from_chunk=4, **how)
    first = list(stream(student, words, noise, frames=6, cache=cache, remember_last=True, **how))
    with pytest.raises(ValueError, match=r"switches: got 1; needed: a chunk in \[2, 4\)"):
        stream(student, words, noise, cache=cache, from_chunk=2, switches={1: words}, **how)
    rest = list(stream(student, words, noise, cache=cache, from_chunk=2, **how))
    whole = list(stream(student, words, noise, **how))
    assert all(torch.equal(a, b) for a, b in zip([*first, *rest], whole, strict=True))


# --- the rollouts of an update ---


def unshared(student: Student, batch: Any, seeds: Tensor, steps: Any, fork: int) -> list[Tensor]:
    """Each video on its own, from the noise that it has in its group; and its caches."""
    layout, videos = stream_layout(student, student.frames), []
    for i, seed in enumerate(seeds.tolist()):
        words = student.encode([batch.prompts[i // GROUP]])
        past = student.noise_source([int(seeds[i - i % GROUP])], layout, len(steps))
        own = student.noise_source([seed], layout, len(steps))

        def noise(chunk: int, at: int, past: Any = past, own: Any = own) -> Tensor:
            return past(chunk, at) if chunk < fork else own(chunk, at)

        chunks = stream(student, words, noise, denoising_steps=steps)
        videos.append(torch.cat(list(chunks), 1).float())
    return videos


@pytest.mark.parametrize("kind", ["toy", "wan"])
@pytest.mark.parametrize("width", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("fork", [1, 3])
def test_a_group_has_the_videos_that_it_has_without_sharing(
    kind: str, width: int | None, fork: int
) -> None:
    student: Student = toy_student() if kind == "toy" else wan_student()
    batch, steps = (toy_batch(), STEPS) if kind == "toy" else (wan_batch(), WAN_STEPS)
    found = roll_out(
        student,
        batch,
        GROUP,
        Generator().manual_seed(5),
        Streaming(steps, batch=width),
        keep_context=True,
        place=Place(fork=fork, first=fork),
    )
    seeds = torch.randint(2**62, (2 * GROUP,), generator=Generator().manual_seed(5))
    expected = unshared(student, batch, seeds, steps, fork)
    for i, (video_FCHW, one_1FCHW) in enumerate(zip(found.x0_BFCHW, expected, strict=True)):
        begins = one_1FCHW[0, : fork * CHUNK]
        if width == 1:  # the same passes over one video
            assert torch.equal(video_FCHW[: fork * CHUNK], begins)
        assert torch.equal(
            video_FCHW[: fork * CHUNK], found.x0_BFCHW[i - i % GROUP][: fork * CHUNK]
        )
        torch.testing.assert_close(video_FCHW, one_1FCHW[0], rtol=1e-3, atol=1e-4)
    # The kept context is that of the finished videos.
    text_BLE = found.text_BLE
    again = student.clean_context(found.x0_BFCHW, text_BLE)
    kept = found.context(torch.arange(2 * GROUP))
    per_frame = again[0][0].shape[1] // student.frames
    until = (student.frames - CHUNK) * per_frame
    for a, b in zip(kept, again, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.shape == y.shape
            torch.testing.assert_close(x[:, :until], y[:, :until], rtol=1e-3, atol=1e-4)


def counted(student: Student, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every denoising and context pass from now on."""
    rows: list[int] = []
    passed = Student._pass

    def note(self: Student, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        rows.append(len(x))
        return passed(self, x, *args, **kwargs)

    monkeypatch.setattr(Student, "_pass", note)
    return rows


@pytest.mark.parametrize(("fork", "width"), [(0, None), (1, None), (3, None), (3, 1), (2, 4)])
def test_a_group_takes_the_passes_of_the_prefix_once(
    fork: int, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, batch, group = wan_student(), wan_batch(), 4
    rows = counted(student, monkeypatch)
    how = Streaming(WAN_STEPS, batch=width)
    roll_out(student, batch, group, Generator().manual_seed(0), how, place=Place(fork=fork or None))
    denoising = len(WAN_STEPS) * 2 * (fork + group * (CHUNKS - fork))
    contexts = 2 * (fork + group * (CHUNKS - fork - 1))
    assert sum(rows) == denoising + contexts
    if fork == CHUNKS - 1:
        share = (CHUNKS - 1 + group) / (CHUNKS * group)
        assert denoising == share * len(WAN_STEPS) * 2 * group * CHUNKS


# --- the update ---


def test_the_chunk_from_which_videos_differ_is_drawn_or_fixed() -> None:
    generator = Generator().manual_seed(0)
    before = generator.get_state()
    assert draw_fork(None, 4, generator) == 0
    assert draw_fork(2, 4, generator) == 2
    assert draw_fork("last", 4, generator) == 3
    assert torch.equal(generator.get_state(), before)
    assert {draw_fork("random", 4, generator) for _ in range(100)} == {0, 1, 2, 3}


def test_the_update_is_about_the_continuation_alone() -> None:
    config = AfdConfig(draws=2, chunks_per_update=2)
    for fork, count in ((1, 2), (3, 1)):
        copies = draw_copies(config, 6, 4, STEPS, Generator().manual_seed(0), from_chunk=fork)
        assert copies.chunks_NM is not None
        assert copies.chunks_NM.shape == (12, count)
        assert int(copies.chunks_NM.min()) >= fork
    every = draw_copies(AfdConfig(), 6, 4, STEPS, Generator().manual_seed(0), from_chunk=2)
    mask_NF = every.mask(12, 3)
    assert mask_NF is not None
    assert mask_NF.tolist() == [[False] * 6 + [True] * 6] * 12


@pytest.mark.parametrize("context", ["shared_context", "own_context", "recompute"])
@pytest.mark.parametrize("shared", [1, "last", "random"])
def test_every_context_trains_on_shared_prefixes(context: str, shared: Any) -> None:
    found = {}
    for keep in (True, False):
        method = make_afd(
            toy_student(),
            context=context,
            group_from_chunk=shared,
            keep_context=keep,
            micro_batch=3,
        )
        before = weights(method, "theta")
        metrics = step(method, toy_batch())
        assert metrics["student/from_chunk"] in (
            [1] if shared == 1 else [3] if shared == "last" else range(4)
        )
        assert any(not torch.equal(v, before[k]) for k, v in weights(method, "theta").items())
        found[keep] = metrics["student/grad_norm"]
    assert found[True] == pytest.approx(found[False], rel=1e-3)


def test_a_wan_student_trains_on_shared_prefixes_with_adapters() -> None:
    from afd.models.config import LoraConfig

    method = make_afd(wan_student(), lora=LoraConfig(rank=2, alpha=2), group_from_chunk="last")
    for number in range(2):
        metrics = step(method, wan_batch(number))
    assert metrics["student/from_chunk"] == 3
    assert metrics["student/grad_norm"] > 0


def test_the_same_prefix_gives_no_diversity() -> None:
    method = make_afd(toy_student(), group_from_chunk="last")
    method.rollout(toy_batch())
    rollouts = method._current()
    same = rollouts.x0_BFCHW.unflatten(0, (-1, 2))[:, :, :9]
    assert torch.equal(same[:, 0], same[:, 1])
    x = rollouts.x0_BFCHW.unflatten(0, (-1, 2))[:, :, 9:]
    expected = (x[:, 0] - x[:, 1]).square().mean().sqrt()
    method.discriminator_step(toy_batch())
    metrics = method.student_step(toy_batch())
    assert metrics["student/diversity"] == pytest.approx(float(expected), rel=1e-4)


def saved(method: Afd) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def test_a_resumed_run_of_random_prefixes_continues_with_the_same_bits() -> None:
    whole = make_afd(toy_student(), group_from_chunk="random")
    for number in range(3):
        step(whole, toy_batch(number))
    resumed = make_afd(toy_student(), seed=99, group_from_chunk="random")
    resumed.load_state_dict(saved(whole))
    for number in range(3, 6):
        assert step(whole, toy_batch(number)) == step(resumed, toy_batch(number))
    for name, value in weights(whole, "old").items():
        assert torch.equal(value, weights(resumed, "old")[name])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"group_from_chunk": 0}, "needed: a number of chunks from 1, random, last, or null"),
        ({"group_from_chunk": True}, "needed: a number, neither true nor false"),
        ({"group_from_chunk": "first"}, "needed: a number of chunks from 1"),
        ({"group_from_chunk": 1.5}, "needed: a number of chunks from 1"),
        ({"baseline": "teacher"}, "afd.baseline: got teacher; needed: group with afd.group_from"),
        ({"context": "noisy"}, "afd.context: got noisy; needed: another with afd.group_from_chunk"),
        ({"samples_per_prompt": 1}, "afd.samples_per_prompt: got 1; needed: 2 or more"),
    ],
)
def test_bad_combinations_are_refused_by_one_sentence(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told) as caught:
        AfdConfig(**{"group_from_chunk": "last", **settings})
    assert len(caught.value.errors()) == 1


def test_a_prefix_as_long_as_the_video_is_refused() -> None:
    with pytest.raises(
        ValueError, match="group_from_chunk: got 4; needed: null, or less than the 4"
    ):
        make_afd(toy_student(), group_from_chunk=4)
