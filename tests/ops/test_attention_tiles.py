"""The tables from which block_attention's Triton kernels read their work."""

from __future__ import annotations

import pytest
import torch

from afd_kernels.block_attention import intervals
from afd_kernels.block_attention import tiles as tables
from afd_kernels.block_attention.intervals import Intervals
from afd_kernels.block_attention.tiles import (
    Table,
    key_table,
    key_tiles,
    query_table,
    query_tiles,
)

CASES = {
    "causal": intervals.causal(5, 2, 13),
    "window": intervals.causal(6, 1, 20, window=3),
    "sink": intervals.windowed(9, 2, 9, window=5, sink=2),
    "teacher_forcing": intervals.teacher_forcing(4, 2, 17),
    "noisy_half": intervals.noisy_half(4, 2, 33),
    "unequal": intervals.cache([0, 33, 70], 20),
    "keyless": intervals.cache(0, 20),
}
BLOCK_M, BLOCK_N = 16, 32


@pytest.fixture(params=sorted(CASES))
def rows(request: pytest.FixtureRequest) -> Intervals:
    return CASES[request.param]


def test_every_query_is_in_one_tile_with_its_own_keys(rows: Intervals) -> None:
    found = torch.zeros(rows.streams, rows.queries, rows.keys, dtype=torch.int)
    seen = torch.zeros(rows.streams, rows.queries, dtype=torch.int)
    for stream, q0, q1, a0, a1, b0, b1, _ in query_tiles(rows, BLOCK_M):
        assert 0 < q1 - q0 <= BLOCK_M
        seen[stream, q0:q1] += 1
        found[stream, q0:q1, a0:a1] += 1
        found[stream, q0:q1, b0:b1] += 1
    assert bool((seen == 1).all())
    assert torch.equal(found, rows.mask(rows.keys).int())


@pytest.mark.parametrize(("low", "extra"), [(0, 0), (0, 7), (17, 3)])
def test_a_tile_of_keys_is_attended_by_all_queries_of_its_walk_and_no_others(
    rows: Intervals, low: int, extra: int
) -> None:
    high = max(rows.keys + extra, low)
    tiles, walk = key_tiles(rows, low, high, BLOCK_N, BLOCK_M)
    found = torch.zeros(rows.streams, rows.queries, high, dtype=torch.int)
    seen = torch.zeros(rows.streams, high, dtype=torch.int)
    for stream, n0, n1, first, count, *_ in tiles:
        assert 0 < n1 - n0 <= BLOCK_N
        seen[stream, low + n0 : low + n1] += 1
        for q, left in walk[first : first + count]:
            assert 0 < left <= BLOCK_M
            found[stream, q : q + left, low + n0 : low + n1] += 1
    assert bool((seen[:, low:] == 1).all())
    assert torch.equal(found[:, :, low:], rows.mask(high).int()[:, :, low:])


def test_tiles_with_most_work_come_first(rows: Intervals) -> None:
    keys = [a1 - a0 + b1 - b0 for _, _, _, a0, a1, b0, b1, _ in query_tiles(rows, BLOCK_M)]
    assert keys == sorted(keys, reverse=True)
    counts = [tile[4] for tile in key_tiles(rows, 0, rows.keys, BLOCK_N, BLOCK_M)[0]]
    assert counts == sorted(counts, reverse=True)


def test_a_table_is_made_once(rows: Intervals) -> None:
    device = torch.device("cpu")
    again = Intervals(rows.rows)
    assert query_table(rows, 16, device).rows is query_table(again, 16, device).rows
    first = key_table(rows, 0, 80, 32, 16, device)
    assert first.walk is key_table(again, 0, 80, 32, 16, device).walk


def test_a_table_read_by_a_captured_graph_outlives_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = Table(torch.zeros(1, 8, dtype=torch.int32), None, 1, object(), 0)
    monkeypatch.setattr(tables, "_captured", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert table.ready() is table.ready() is table
    assert [*tables._captured.values()] == [table]


@pytest.mark.gpu
def test_a_table_is_uploaded_without_waiting() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_sync_debug_mode("error")
    try:
        table = query_table(intervals.cache(12345, 20), 16, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert table.rows.tolist() == query_tiles(intervals.cache(12345, 20), 16)


@pytest.mark.gpu
def test_new_intervals_inside_a_capture_are_refused() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="before the capture"):
        query_table(intervals.cache(54321, 20), 16, device)
