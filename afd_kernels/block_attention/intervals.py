"""Attention patterns in which each block of queries attends at most two key intervals.

Builders count in frames and take the tokens per frame; Intervals counts in tokens. Keys are
numbered over the virtual concatenation [context | k] of afd.ops.block_attention.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from afd_kernels.contracts import require

# (q0, q1, a0, a1, b0, b1): queries [q0, q1) attend keys [a0, a1) and [b0, b1).
Row: TypeAlias = tuple[int, int, int, int, int, int]

_WIDTH = 6


@dataclass(frozen=True)
class Intervals:
    """Rows of queries with the keys they attend; hashable, so usable as a cache key.

    Attributes:
        rows: one tuple of Row per stream, or a single one shared by all streams. The rows of a
            stream cover its queries in order without gaps. An empty interval is (0, 0). [a0, a1)
            is empty only if [b0, b1) is, and ends before [b0, b1) begins.

    Raises:
        ValueError: names the row that violates this.
    """

    rows: tuple[tuple[Row, ...], ...]

    def __post_init__(self) -> None:
        require(bool(self.rows), "rows", self.rows, "the rows of at least one stream")
        for stream in self.rows:
            require(bool(stream), "rows", stream, "at least one row per stream")
            end = 0
            for row in stream:
                _check_row(row, end)
                end = row[1]
        ends = {stream[-1][1] for stream in self.rows}
        require(len(ends) == 1, "rows", sorted(ends), "as many queries in every stream")

    @property
    def streams(self) -> int:
        """Number of streams with separate rows; 1 if all share them."""
        return len(self.rows)

    @property
    def queries(self) -> int:
        """L, the number of queries of a stream."""
        return self.rows[0][-1][1]

    @property
    def keys(self) -> int:
        """One past the last key that any query attends."""
        return max(max(row[3], row[5]) for stream in self.rows for row in stream)

    @property
    def pairs(self) -> int:
        """Number of attended query-key pairs over the streams in `rows` (4 h d FLOP each)."""
        return sum(
            (q1 - q0) * (a1 - a0 + b1 - b0)
            for stream in self.rows
            for q0, q1, a0, a1, b0, b1 in stream
        )

    def flat(self) -> list[int]:
        """All numbers as a flat list, as the op takes them; a row with q0 = 0 starts a stream."""
        return [number for stream in self.rows for row in stream for number in row]

    @staticmethod
    def from_flat(flat: Sequence[int], streams: int) -> Intervals:
        """The inverse of `flat`.

        Raises:
            ValueError: if the numbers are not the rows of `streams` streams.
        """
        return _from_flat(tuple(map(int, flat)), streams)

    def mask(self, keys: int, device: torch.device | str = "cpu") -> Tensor:
        """Dense bool mask [streams, queries, keys], True where attended; for tests, not for ops."""
        mask = torch.zeros(self.streams, self.queries, keys, dtype=torch.bool, device=device)
        for stream, rows in enumerate(self.rows):
            for q0, q1, a0, a1, b0, b1 in rows:
                mask[stream, q0:q1, a0:a1] = True
                mask[stream, q0:q1, b0:b1] = True
        return mask


def _check_row(row: Row, start: int) -> None:
    q0, q1, a0, a1, b0, b1 = row
    require(q0 == start < q1, "rows", row, f"queries [{start}, q1) with q1 > {start}")
    for low, high in ((a0, a1), (b0, b1)):
        require(
            0 <= low < high or low == high == 0,
            "rows",
            row,
            "keys [low, high) with 0 <= low < high, or (0, 0) for none",
        )
    require(
        b1 == 0 or 0 < a1 <= b0, "rows", row, "a second interval only after the end of the first"
    )


@functools.lru_cache(maxsize=4096)
def _from_flat(flat: tuple[int, ...], streams: int) -> Intervals:
    require(len(flat) % _WIDTH == 0, "intervals", flat, f"{_WIDTH} numbers per row")
    found: list[list[Row]] = []
    for i in range(0, len(flat), _WIDTH):
        q0, q1, a0, a1, b0, b1 = flat[i : i + _WIDTH]
        if q0 == 0:
            found.append([])
        require(bool(found), "intervals", flat, "rows that begin with query 0")
        found[-1].append((q0, q1, a0, a1, b0, b1))
    require(len(found) == streams, "intervals", f"{len(found)} streams", f"{streams} streams")
    return Intervals(tuple(tuple(rows) for rows in found))


def _row(queries: tuple[int, int], *keys: tuple[int, int], tokens: int) -> Row:
    """A row from frame intervals, with empty ones dropped and adjacent ones merged."""
    kept = [(low, high) for low, high in keys if high > low]
    if len(kept) == 2 and kept[0][1] == kept[1][0]:
        kept = [(kept[0][0], kept[1][1])]
    kept += [(0, 0)] * (2 - len(kept))
    (q0, q1), (a0, a1), (b0, b1) = ((tokens * low, tokens * high) for low, high in (queries, *kept))
    return q0, q1, a0, a1, b0, b1


def _check(**counts: int) -> None:
    for name, value in counts.items():
        require(value >= 1, name, value, "an integer >= 1")


def _chunks(frames: int, chunk: int, independent_first_frame: bool) -> list[tuple[int, int]]:
    """[start, end) of every chunk; the last end is not clipped to `frames`."""
    first = 1 if independent_first_frame else chunk
    starts = [0, *range(first, frames, chunk)]
    return [(start, start + (first if start == 0 else chunk)) for start in starts]


def causal(
    frames: int,
    chunk: int,
    tokens: int,
    *,
    independent_first_frame: bool = False,
    window: int | None = None,
) -> Intervals:
    """Block-causal attention for training: a chunk attends itself and all earlier chunks.

    Args:
        frames: F, query and key frames.
        chunk: frames per chunk.
        tokens: tokens per frame.
        independent_first_frame: the first chunk is a single frame.
        window: attend only the last `window` frames up to the end of the chunk, as in the released
            training mask (no sink); >= chunk. None: all.
    """
    _check(frames=frames, chunk=chunk, tokens=tokens)
    require(window is None or window >= chunk, "window", window, f"None or >= chunk, {chunk}")
    return Intervals(
        (
            tuple(
                _row(
                    (start, min(end, frames)),
                    (0 if window is None else max(0, end - window), min(end, frames)),
                    tokens=tokens,
                )
                for start, end in _chunks(frames, chunk, independent_first_frame)
            ),
        )
    )


def windowed(
    frames: int,
    chunk: int,
    tokens: int,
    *,
    window: int,
    sink: int = 0,
    independent_first_frame: bool = False,
) -> Intervals:
    """Attention of a stream with a rolling cache, for all chunks in one pass.

    A chunk attends the first `sink` frames and the last `window - sink` frames up to its own end,
    including its own. Neither needs to be a multiple of the chunk.

    Args:
        frames: F, query and key frames.
        chunk: frames per chunk.
        tokens: tokens per frame.
        window: maximum number of frames a query attends, including the sink; >= sink + chunk.
        sink: initial frames that are always kept; >= 0.
        independent_first_frame: the first chunk is a single frame.
    """
    _check(frames=frames, chunk=chunk, tokens=tokens)
    require(sink >= 0, "sink", sink, "an integer >= 0")
    require(window >= sink + chunk, "window", window, f">= sink + chunk, {sink + chunk}")
    rows = []
    for start, end in _chunks(frames, chunk, independent_first_frame):
        end = min(end, frames)
        recent = max(0, end - (window - sink))
        if recent <= sink:
            rows.append(_row((start, end), (0, end), tokens=tokens))
        else:
            rows.append(_row((start, end), (0, sink), (recent, end), tokens=tokens))
    return Intervals((tuple(rows),))


@dataclass(frozen=True)
class Clip:
    """Frames of a stream that are trained on in one pass, and what of the stream they attend.

    Keys are numbered over [past | clean | noisy]: the frames held when the clip begins, in the
    order of the stream, the clip's clean frames, and noisy chunks of it. As a block of queries
    attends at most two intervals, a copy of the sink precedes every noisy chunk.

    Attributes:
        frames: F, frames of the clip.
        chunk: frames per chunk.
        start: the clip's first frame in the stream.
        window: most frames a chunk attends, the sink and itself included; None: all.
        sink: initial frames of the stream that are always attended.
    """

    frames: int
    chunk: int
    start: int = 0
    window: int | None = None
    sink: int = 0

    def __post_init__(self) -> None:
        _check(frames=self.frames, chunk=self.chunk)
        require(self.start >= 0, "start", self.start, "a frame >= 0")
        require(self.sink >= 0, "sink", self.sink, "an integer >= 0")
        least = self.sink + self.chunk
        fits = self.window is None or self.window >= least
        require(fits, "window", self.window, f"None or >= sink + chunk, {least}")

    @property
    def past(self) -> int:
        """Frames held when the clip begins."""
        return self.start if self.window is None else min(self.start, self.window)

    @property
    def copied(self) -> int:
        """Frames of the sink that precede every noisy chunk."""
        return 0 if self.window is None else min(self.sink, self.past + self.frames)

    def chunks(self) -> list[tuple[int, int]]:
        """[start, end) of every chunk within the clip."""
        return [(a, min(b, self.frames)) for a, b in _chunks(self.frames, self.chunk, False)]

    def seen(self, before: int, end: int) -> tuple[bool, tuple[int, int]]:
        """What a chunk that ends at frame `end` of the clip attends of the frames before `before`:
        whether the sink apart from the rest, and the interval of the rest (or of all)."""
        gap = self.start - self.past
        until = self.start + before - gap
        if self.window is not None:
            recent = self.start + end - (self.window - self.sink)
            if recent > self.sink:
                return self.sink > 0, (recent - gap, until)
        return False, (0, until)


def clean_half(clip: Clip, tokens: int) -> Intervals:
    """Clean chunks of a clip, each attending clean frames up to its end: keys [past | clean]."""
    rows = []
    for start, end in clip.chunks():
        apart, rest = clip.seen(end, end)
        rows.append(_row((start, end), (0, clip.sink if apart else 0), rest, tokens=tokens))
    return Intervals((tuple(rows),))


def teacher_forcing(
    frames: int,
    chunk: int,
    tokens: int,
    chunks: Sequence[Sequence[int]] | None = None,
    **within: Any,
) -> Intervals:
    """Teacher forcing with queries [clean | noisy] and keys [past | clean | noisy].

    Clean chunk i attends clean chunks <= i; noisy chunk i attends clean chunks < i and itself; both
    within the window. There are F clean frames, and F noisy ones or fewer with `chunks`.

    Args:
        frames: F, clean frames.
        chunk: frames per chunk.
        tokens: tokens per frame.
        chunks: the noisy chunks of each stream, as in `noisy_half`.
        within: start, window and sink of the `Clip`.
    """
    (clean,) = clean_half(Clip(frames, chunk, **within), tokens).rows
    shift = frames * tokens
    return Intervals(
        tuple(
            clean + tuple((row[0] + shift, row[1] + shift, *row[2:]) for row in noisy)
            for noisy in noisy_half(frames, chunk, tokens, chunks, **within).rows
        )
    )


def noisy_half(
    frames: int,
    chunk: int,
    tokens: int,
    chunks: Sequence[Sequence[int]] | None = None,
    **within: Any,
) -> Intervals:
    """Only the noisy queries of `teacher_forcing`, over the keys [past | clean | noisy].

    Args:
        frames: F, clean frames, and noisy frames unless `chunks` is given.
        chunk: frames per chunk.
        tokens: tokens per frame.
        chunks: the noisy chunks of each stream, ascending, equally many per stream; the queries and
            noisy keys are theirs only. None: all.
        within: start, window and sink of the `Clip`.
    """
    _check(tokens=tokens)
    clip = Clip(frames, chunk, **within)
    whole, copied = clip.chunks(), clip.copied
    streams = []
    for drawn in [range(len(whole))] if chunks is None else chunks:
        numbers, rows, at = list(drawn), [], 0
        rising = numbers == sorted(set(numbers)) and set(numbers) <= set(range(len(whole)))
        require(rising, "chunks", numbers, f"rising numbers in [0, {len(whole)})")
        key = clip.past + clip.frames
        for number in numbers:
            start, end = whole[number]
            apart, rest = clip.seen(start, end)
            first = key if apart else key + copied
            key += copied + end - start
            rows.append(_row((at, at + end - start), rest, (first, key), tokens=tokens))
            at += end - start
        streams.append(tuple(rows))
    return Intervals(tuple(streams))


def cache(valid: int | Sequence[int], queries: int, tokens: int = 1) -> Intervals:
    """Every query attends the valid slots of a cache: keys [0, valid).

    Attention does not depend on the order of keys, so a ring buffer needs no roll; only slots never
    written are excluded.

    Args:
        valid: number of written slots, shared by all streams or one per stream.
        queries: query slots.
        tokens: tokens per slot.
    """
    _check(queries=queries, tokens=tokens)
    counts = (valid,) if isinstance(valid, int) else tuple(valid)
    for count in counts:
        require(count >= 0, "valid", valid, "slots >= 0")
    return Intervals(tuple((_row((0, queries), (0, count), tokens=tokens),) for count in counts))


def forked(past: int, own: int, slots: int, queries: int, copies: int) -> Intervals:
    """Continuations of one past as one stream: keys [past | slots of every continuation].

    Continuation i attends the past and the first `own` of its own slots.

    Args:
        past: tokens of the past.
        own: tokens that a continuation has written, the queries' own included.
        slots: token slots of a continuation.
        queries: queries of a continuation.
        copies: continuations.
    """
    _check(past=past, queries=queries, copies=copies)
    require(queries <= own <= slots, "own", own, f"{queries} to {slots} tokens")
    starts = [(i * queries, past + i * slots) for i in range(copies)]
    # Not merged where they are adjacent: the past is in other memory.
    return Intervals((tuple((q, q + queries, 0, past, k, k + own) for q, k in starts),))


def after_context(context: int, queries: int, tokens: int = 1) -> Intervals:
    """One chunk after a context in a separate tensor: keys [context | chunk], all attended.

    Like `cache(context + queries, queries)`, but split into two intervals at the border, because
    k_context and k are in different memory.

    Args:
        context: slots of the context; may be 0.
        queries: slots of the chunk, queries and keys.
        tokens: tokens per slot.
    """
    _check(queries=queries, tokens=tokens)
    require(context >= 0, "context", context, "slots >= 0")
    border, end, last = context * tokens, (context + queries) * tokens, queries * tokens
    keys = (0, border, border, end) if context else (0, end, 0, 0)
    return Intervals((((0, last, *keys),),))
