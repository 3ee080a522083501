"""Tile tables that assign work to the programs of the Triton kernels, built once from Intervals.

A kernel that reads its work from a table needs no mask and never visits an unattended tile.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_kernels.block_attention.intervals import Intervals

# Numbers per row of both tables; duplicated in the kernels.
COLUMNS = 8
# Tables read by captured CUDA graphs, by id, kept alive here: replays bypass the caches below.
_captured: dict[int, Table] = {}


@dataclass(frozen=True)
class Table:
    """Rows of int32 on a device, with the completion event of their upload."""

    rows: Tensor
    walk: Tensor | None
    count: int
    copied: torch.cuda.Event | None
    stream: int

    def ready(self) -> Table:
        """The table, safe to read on the current stream; the host does not wait."""
        if self.copied is None:
            return self
        if torch.cuda.is_current_stream_capturing():
            # A capture starts only after all earlier work on the device has finished.
            _captured[id(self)] = self
            return self
        current = torch.cuda.current_stream(self.rows.device)
        if current.cuda_stream != self.stream:
            current.wait_event(self.copied)
            for numbers in (self.rows, self.walk):
                if numbers is not None:
                    # Once evicted from the cache, its memory is not reused before this stream
                    # has read it.
                    numbers.record_stream(current)
        return self


def query_table(intervals: Intervals, block: int, device: torch.device) -> Table:
    """[tiles, 8] of (stream, q0, q1, a0, a1, b0, b1, 0): at most `block` queries of one row each.

    Tiles with the most keys come first, so that the last ones to finish are short.
    """
    return _query_table(intervals, block, device).ready()


def key_table(
    intervals: Intervals, low: int, high: int, block_n: int, block_m: int, device: torch.device
) -> Table:
    """[tiles, 8] of (stream, n0, n1, first, count, 0, 0, 0) over the keys [low, high), from low.

    All keys of a tile are attended by the same queries: `count` entries of the walk starting at
    `first`, each (q, queries left) of at most `block_m`. Unattended keys have count 0.
    """
    return _key_table(intervals, low, high, block_n, block_m, device).ready()


@functools.lru_cache(maxsize=1024)
def _query_table(intervals: Intervals, block: int, device: torch.device) -> Table:
    return _upload(query_tiles(intervals, block), None, device)


@functools.lru_cache(maxsize=1024)
def _key_table(
    intervals: Intervals, low: int, high: int, block_n: int, block_m: int, device: torch.device
) -> Table:
    return _upload(*key_tiles(intervals, low, high, block_n, block_m), device)


def query_tiles(intervals: Intervals, block: int) -> list[list[int]]:
    """The rows of `query_table`."""
    tiles = [
        [stream, q, min(q + block, row[1]), *row[2:], 0]
        for stream, rows in enumerate(intervals.rows)
        for row in rows
        for q in range(row[0], row[1], block)
    ]
    return sorted(tiles, key=lambda tile: tile[3] - tile[4] + tile[5] - tile[6])


def key_tiles(
    intervals: Intervals, low: int, high: int, block_n: int, block_m: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The rows of `key_table` and its walk."""
    tiles: list[list[int]] = []
    walk: list[list[int]] = []
    for stream, rows in enumerate(intervals.rows):
        ends = {end for row in rows for end in row[2:] if low < end < high}
        cuts = sorted(ends | {low, high})
        for start, end in itertools.pairwise(cuts):
            first = len(walk)
            for q0, q1 in _readers(rows, start):
                walk += [[q, min(block_m, q1 - q)] for q in range(q0, q1, block_m)]
            count = len(walk) - first
            tiles += [
                [stream, n - low, min(n + block_n, end) - low, first, count, 0, 0, 0]
                for n in range(start, end, block_n)
            ]
    return sorted(tiles, key=lambda tile: -tile[4]), walk or [[0, 0]]


def _readers(rows: tuple[tuple[int, ...], ...], key: int) -> list[tuple[int, int]]:
    """Runs [q0, q1) of queries that attend `key`, with adjacent rows merged."""
    runs: list[tuple[int, int]] = []
    for q0, q1, a0, a1, b0, b1 in rows:
        if a0 <= key < a1 or b0 <= key < b1:
            if runs and runs[-1][1] == q0:
                q0 = runs.pop()[0]
            runs.append((q0, q1))
    return runs


def _upload(rows: list[list[int]], walk: list[list[int]] | None, device: torch.device) -> Table:
    """Copies a table to the device asynchronously.

    Raises:
        RuntimeError: inside a CUDA graph capture, where a replay would copy from freed memory.
    """
    numbers = torch.tensor(rows, dtype=torch.int32)
    path = None if walk is None else torch.tensor(walk, dtype=torch.int32)
    if device.type != "cuda":
        kept = None if path is None else path.to(device)
        return Table(numbers.to(device), kept, len(rows), None, 0)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "block_attention: got new intervals while a CUDA graph is captured; "
            "needed: one call with these intervals before the capture"
        )
    numbers = numbers.pin_memory().to(device, non_blocking=True)
    if path is not None:
        path = path.pin_memory().to(device, non_blocking=True)
    stream = torch.cuda.current_stream(device)
    return Table(numbers, path, len(rows), stream.record_event(), stream.cuda_stream)
