"""The cache: which frames it holds, what memory it takes, what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch

from afd.models.wan.kv_cache import TIMES_KEPT, KVCache, cache_bytes
from afd.models.wan.rope import pairs_per_axis, rope_table
from afd.models.wan.types import LayerKV
from tests.afd.tiny_wan import HEIGHT, TOKENS, WIDTH, text, tiny, video


def text_kv(layers: int = 2, batch: int = 2) -> list[LayerKV]:
    return [(torch.randn(batch, 5, 2, 8), torch.randn(batch, 5, 2, 8)) for _ in range(layers)]


def make(frames: int | None, window: int | None = None, sink: int = 0) -> KVCache:
    return KVCache(text_kv(), frames, 3, 2, window=window, sink=sink)


RINGS = [
    (window, sink, chunk)
    for window, sink, chunk in itertools.product(range(1, 10), range(5), range(1, 5))
    if window - sink >= chunk
]


@pytest.mark.parametrize(("window", "sink", "chunk"), RINGS, ids=str)
def test_a_ring_holds_the_sink_and_the_most_recent_frames(
    window: int, sink: int, chunk: int
) -> None:
    cache = make(None, window, sink)
    slots: dict[int, int] = {}
    for start in range(0, 8 * chunk, chunk):
        cache.seek(start, chunk)
        for frame in range(start, start + chunk):
            slots[cache.slot(frame)] = frame
        end = start + chunk
        recent = [f for f in range(end) if f < sink or f >= end - (window - sink)]
        assert sorted(slots.values()) == cache.held() == recent
        assert sorted(slots) == list(range(cache.valid_frames))
        assert cache.valid == cache.valid_frames * 6 == cache.view(0)[0].shape[1]


@pytest.mark.parametrize(("frames", "window"), [(30, None), (30, 7), (None, 7), (5, 7)], ids=str)
def test_memory_is_the_formula_s_and_does_not_grow(frames: int | None, window: int | None) -> None:
    net = tiny(window=window)
    cache = net.new_cache(text(net), frames, HEIGHT, WIDTH)
    kept = min(x for x in (frames, window) if x is not None)
    expected = cache_bytes(2, 2, kept * TOKENS, net.config.text_len, 32, torch.float32)
    assert cache.bytes == expected
    places = [x.data_ptr() for kv in cache.self_kv for x in kv]
    for start in range(0, frames or 60, 5 if frames == 5 else 3):
        count = 5 if frames == 5 else 3
        net.forward_cached(video(net, count), torch.zeros(1, 1), cache, start)
    assert cache.bytes == expected
    assert [x.data_ptr() for kv in cache.self_kv for x in kv] == places


def test_the_released_cache_of_a_clip_takes_six_gigabytes() -> None:
    """30 layers, 21 frames of 1560 tokens, 1536 channels, in bfloat16."""
    assert cache_bytes(30, 1, 21 * 1560, 0, 1536, torch.bfloat16) == pytest.approx(6.04e9, rel=1e-3)


def test_a_chunk_s_calls_write_the_same_slots_and_no_others() -> None:
    net = tiny(window=7, sink=2)
    cache = net.new_cache(text(net), None, HEIGHT, WIDTH)
    for start in range(0, 12, 3):
        net.forward_cached(video(net, 3, seed=start), torch.zeros(1, 1), cache, start)
        before = cache.self_kv[1][0].clone()
        net.forward_cached(video(net, 3, seed=99), torch.full((1, 1), 500.0), cache, start)
        changed = (cache.self_kv[1][0] != before).unflatten(1, (-1, TOKENS)).any(-1).any(-1)
        own = {cache.slot(frame) for frame in range(start, start + 3)}
        assert set(changed.any(0).any(1).nonzero().flatten().tolist()) == own


def test_the_next_videos_use_the_same_memory() -> None:
    net = tiny(window=7, sink=1)
    t = torch.full((1, 1), 300.0)

    def run(cache: KVCache) -> torch.Tensor:
        chunks = [net.forward_cached(video(net, 3, seed=s), t, cache, s) for s in range(0, 15, 3)]
        assert all(chunk is not None for chunk in chunks)
        return torch.cat([chunk for chunk in chunks if chunk is not None], 1)

    used = net.new_cache(text(net, seed=7), None, HEIGHT, WIDTH)
    run(used)
    places = [x.data_ptr() for kv in (*used.self_kv, *used.cross_kv) for x in kv]
    with torch.no_grad():
        used.reset(net.text_kv(text(net)))
    fresh = net.new_cache(text(net), None, HEIGHT, WIDTH)
    assert torch.equal(run(used), run(fresh))
    assert [x.data_ptr() for kv in (*used.self_kv, *used.cross_kv) for x in kv] == places
    # Starting again at frame 0 is a new video too.
    assert torch.equal(run(used), run(fresh))


def test_a_step_value_s_modulation_is_made_once_and_anew_after_a_reset() -> None:
    net = tiny()
    cache = net.new_cache(text(net), 6, HEIGHT, WIDTH)
    t = torch.full((1, 1), 300.0)
    first = net.streaming_times(t, cache)
    assert net.streaming_times(t, cache) is first
    t.fill_(200.0)
    assert net.streaming_times(t, cache) is not first
    cache.reset()
    second = net.streaming_times(t, cache)
    torch.testing.assert_close(second.embed_BFD, net.time_table(t).embed_BFD)
    for value in range(2 * TIMES_KEPT):
        net.streaming_times(torch.full((1, 1), float(value)), cache)
    assert len(cache._times) == TIMES_KEPT


def test_places_are_checked() -> None:
    cache = make(9)
    cache.seek(0, 3)
    cache.seek(3, 3)
    cache.seek(0, 3)
    with pytest.raises(ValueError, match="start_frame: got 6; needed: 0 to 3"):
        cache.seek(6, 3)
    cache.seek(3, 3)
    cache.seek(6, 3)
    with pytest.raises(ValueError, match="frames that fit a cache of 9"):
        cache.seek(9, 3)
    ring = make(None, 5, 1)
    for start in range(0, 9, 3):
        ring.seek(start, 3)
    with pytest.raises(ValueError, match=r"start_frame: got 3; .*has turned"):
        ring.seek(3, 3)
    with pytest.raises(ValueError, match="has turned"):
        ring.before(3)
    with pytest.raises(ValueError, match="frames: got 5; needed: at most 4"):
        ring.seek(9, 5)
    ring.seek(0, 3)
    assert ring.held() == [0, 1, 2]
    with pytest.raises(ValueError, match="sink: got 5; needed: 0 <= sink < window, 5"):
        make(None, 5, 5)
    with pytest.raises(ValueError, match="frames: got None; needed: a number"):
        make(None)
    with pytest.raises(ValueError, match="sink: got 1; needed: 0 where there is no window"):
        make(4, None, 1)
    with pytest.raises(ValueError, match="cross_kv: "):
        cache.reset([(k[:, :2], v[:, :2]) for k, v in cache.cross_kv])


def test_a_prompt_switch_leaves_other_streams_of_the_same_prompt_alone() -> None:
    net = tiny()
    with torch.no_grad():
        words, others = net.text_kv(text(net)), net.text_kv(text(net, seed=9))
    switched, kept = (net.new_cache(words, 6, HEIGHT, WIDTH) for _ in range(2))
    before = [k.clone() for k, _ in words]
    switched.reset(others)
    for k, (mine, _), (given, _) in zip(before, kept.cross_kv, words, strict=True):
        assert torch.equal(mine, k)
        assert torch.equal(given, k)


def test_a_past_lent_for_gradients_does_not_mind_later_writes() -> None:
    net = tiny()
    cache = net.new_cache(text(net), 9, HEIGHT, WIDTH)
    t = torch.zeros(1, 1)
    net.forward_cached(video(net, 3), t, cache, 0)
    flow, _ = net.forward_over(video(net, 3), t, text(net), cache.before(3), 3)
    for start in (3, 6):
        net.forward_cached(video(net, 3), t, cache, start)
    flow.sum().backward()
    assert net.blocks[0].self_attn.q.weight.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("head_dim", [8, 32, 40, 128])
@pytest.mark.parametrize("start", [0, 1023, 1024, 10**6])
def test_the_rotary_table_has_no_last_frame(head_dim: int, start: int) -> None:
    """Token (f, r, c) turns pair j of its axis by position · 10000^(-j / pairs of the axis)."""
    table = rope_table(head_dim, torch.arange(start, start + 2), 3, 4)
    assert table.shape == (1, 24, head_dim // 2, 2)
    expected = []
    for f, r, c in itertools.product(range(start, start + 2), range(3), range(4)):
        for place, pairs in zip((f, r, c), pairs_per_axis(head_dim), strict=True):
            ladder = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
            expected.append(torch.stack([(place * ladder).cos(), (place * ladder).sin()], -1))
    assert torch.equal(table[0], torch.cat(expected).view(24, -1, 2).float())


def test_the_production_head_splits_22_21_21() -> None:
    assert pairs_per_axis(128) == (22, 21, 21)
