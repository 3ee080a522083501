"""A student with a window and a sink trains as it streams, also in the middle of a stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from afd.models.wan.network import CausalWan
from afd.models.wan.types import LayerKV
from afd.ops import intervals
from tests.afd.tiny_wan import HEIGHT, WIDTH, text, tiny, video
from tests.tolerances import NETWORK_REORDERED as SAME

FRAMES, CHUNK = 9, 3
WINDOWS = [(None, 0), (6, 0), (7, 2), (6, 3), (8, 4), (5, 1), (12, 5)]
STARTS = [0, 3, 6, 12, 21]


def streamed(net: CausalWan, clean: Tensor, noisy: Tensor, t: Tensor, start: int) -> Tensor:
    """Every noisy chunk of the clip as the stream's last denoising step sees it; and the keys held
    when the clip begins."""
    frames = None if net.config.window else clean.shape[1]
    cache = net.new_cache(text(net), frames, HEIGHT, WIDTH)
    out = []
    for at in range(0, clean.shape[1], CHUNK):
        if at == start:
            net.held = cache.snapshot() if start else None  # type: ignore[assignment]
        part = slice(at, at + CHUNK)
        if at >= start:
            x, time = noisy[:, at - start : at - start + CHUNK], t[:, at - start : at - start + 1]
            made = net.forward_cached(x, time, cache, at)
            assert made is not None
            out.append(made)
        net.forward_cached(clean[:, part], torch.zeros(1, 1), cache, at, context_only=True)
    return torch.cat(out, 1)


@pytest.mark.parametrize(("window", "sink"), WINDOWS, ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_training_passes_of_a_clip_see_what_the_stream_saw(
    window: int | None, sink: int, start: int
) -> None:
    net = tiny(window=window, sink=sink)
    clean, noisy = video(net, start + FRAMES), video(net, FRAMES, seed=5)
    chunk_t = 1000 * torch.rand(2, FRAMES // CHUNK, generator=Generator().manual_seed(3))
    t_BF = chunk_t.repeat_interleave(CHUNK, 1)
    with torch.no_grad():
        expected = streamed(net, clean, noisy, t_BF, start)
    past: list[LayerKV] | None = net.held  # type: ignore[assignment]
    clip = clean[:, start:]
    context = net.clean_context(clip, text(net), past=past, start_frame=start)
    how: dict[str, Any] = {"start_frame": start}
    found = {
        "context": net(noisy, t_BF, text(net), context, **how),
        "one pass": net(noisy, t_BF, text(net), past, x0_BFCHW=clip, **how),
    }
    for out in found.values():
        torch.testing.assert_close(out, expected, **SAME)
    drawn = torch.tensor([[0, 2], [1, 2]])
    row, frame = torch.arange(2)[:, None], (drawn[..., None] * 3 + torch.arange(3)).flatten(1)
    given: dict[str, Any] = {**how, "chunks_BN": drawn}
    some = noisy[row, frame], t_BF[row, frame], text(net)
    for out in (net(*some, context, **given), net(*some, past, x0_BFCHW=clip, **given)):
        torch.testing.assert_close(out, expected[row, frame], **SAME)


@pytest.mark.parametrize("start", [0, 12])
def test_both_ways_of_teacher_forcing_have_the_same_gradients(start: int) -> None:
    found = []
    for way in ("context", "one pass"):
        net = tiny(window=7, sink=2)
        clean, noisy = video(net, start + FRAMES), video(net, FRAMES, seed=5)
        with torch.no_grad():
            streamed(net, clean, noisy, torch.zeros(2, FRAMES), start)
        past: Any = net.held
        clip, t = clean[:, start:], torch.full((1, 1), 500.0)
        if way == "context":
            context = net.clean_context(clip, text(net), past=past, start_frame=start)
            out = net(noisy, t, text(net), context, start_frame=start)
        else:
            out = net(noisy, t, text(net), past, x0_BFCHW=clip, start_frame=start)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in net.parameters())])
    for ours, expected in zip(*found, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours / scale, expected / scale, **SAME)


def test_a_noisy_chunk_attends_to_two_intervals_whatever_the_window() -> None:
    """The dense mask, frame by frame, against the definition of a stream's window."""
    for window, sink, start in ((7, 2, 0), (7, 2, 12), (6, 3, 3), (8, 4, 6), (12, 5, 21)):
        noisy = intervals.noisy_half(FRAMES, CHUNK, 1, start=start, window=window, sink=sink)
        past = min(start, window)
        held = [f for f in range(start) if f < sink or f >= start - (window - sink)]
        assert len(held) == past
        frames: list[Any] = [*held, *range(start, start + FRAMES)]
        for chunk in range(FRAMES // CHUNK):
            own = [("own", chunk * CHUNK + i) for i in range(CHUNK)]
            frames += [*range(min(sink, past + FRAMES)), *own]
        mask = noisy.mask(len(frames))[0]
        for query in range(FRAMES):
            begin = start + query - query % CHUNK
            end = begin + CHUNK
            wanted = {f for f in range(begin) if f < sink or f >= end - (window - sink)}
            wanted |= {("own", begin - start + i) for i in range(CHUNK)}  # type: ignore[arg-type]
            seen = [frames[key] for key in mask[query].nonzero().flatten().tolist()]
            assert len(seen) == len(set(seen))
            assert set(seen) == wanted


def test_keys_of_another_length_are_refused_by_name() -> None:
    net = tiny(window=7, sink=2)
    x, t = video(net, FRAMES), torch.zeros(1, 1)
    with pytest.raises(ValueError, match="past: got None; needed: keys of the 7 frames held at fr"):
        net.clean_context(x, text(net), start_frame=12)
    past = net.clean_context(video(net, 3), text(net))
    with pytest.raises(ValueError, match=r"past: .* needed: keys of the 7 frames held at frame 12"):
        net(x, t, text(net), past, x0_BFCHW=x, start_frame=12)
    with pytest.raises(ValueError, match="start_frame: got 3; needed: 0 where nothing clean"):
        net(x, t, text(net), start_frame=3)
    with pytest.raises(ValueError, match=r"window: got 4; needed: None or >= sink \+ chunk, 5"):
        intervals.noisy_half(9, 3, 1, window=4, sink=2)
