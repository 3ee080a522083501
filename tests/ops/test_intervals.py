"""Intervals: what the builders mean in frames, against the released masks and plain sentences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from afd.ops import Intervals, intervals

FOLDERS = ("A_small", "B_hd128")


def golden(shared: Path, folder: str, name: str) -> tuple[dict[str, int], Tensor]:
    """The folder's configuration and the file's mask of frames."""
    config = json.loads((shared / "golden" / folder / "config.json").read_text())
    return config, load_file(shared / "golden" / folder / f"{name}.safetensors")["frame_mask"]


def of_frames(case: Intervals, frames: int) -> Tensor:
    """The mask of a case built with one token per frame."""
    return case.mask(frames)[0]


@pytest.mark.parametrize("folder", FOLDERS)
class TestTheReleasedMasks:
    def test_causal(self, shared: Path, folder: str) -> None:
        config, mask = golden(shared, folder, "train_causal")
        case = intervals.causal(config["frames"], config["chunk"], 1)
        assert torch.equal(of_frames(case, config["frames"]), mask)

    def test_causal_window(self, shared: Path, folder: str) -> None:
        config, mask = golden(shared, folder, "train_causal_window")
        frames = config["frames"]
        case = intervals.causal(frames, config["chunk"], 1, window=config["win_train"])
        assert torch.equal(of_frames(case, frames), mask)

    def test_first_frame_independent(self, shared: Path, folder: str) -> None:
        config, mask = golden(shared, folder, "train_causal_first_frame_independent")
        case = intervals.causal(len(mask), config["chunk"], 1, independent_first_frame=True)
        assert torch.equal(of_frames(case, len(mask)), mask)

    def test_teacher_forcing(self, shared: Path, folder: str) -> None:
        config, mask = golden(shared, folder, "teacher_forcing")
        frames = config["frames"]
        case = intervals.teacher_forcing(frames, config["chunk"], 1)
        assert torch.equal(of_frames(case, 2 * frames), mask)
        noisy = intervals.noisy_half(frames, config["chunk"], 1)
        assert torch.equal(of_frames(noisy, 2 * frames), mask[frames:])


def rolling(frames: int, chunk: int, window: int, sink: int) -> Tensor:
    """What a rolling cache holds, chunk by chunk; the oldest after the sink goes."""
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    held: list[int] = []
    for start in range(0, frames, chunk):
        own = list(range(start, min(start + chunk, frames)))
        held += own
        while len(held) > window:
            held.pop(sink)
        for query in own:
            mask[query, held] = True
    return mask


@settings(max_examples=100, deadline=None)
@given(
    frames=st.integers(1, 20),
    chunk=st.integers(1, 4),
    spare=st.integers(0, 6),
    sink=st.integers(0, 4),
)
def test_a_windowed_pass_attends_what_the_rolling_cache_would_hold(
    frames: int, chunk: int, spare: int, sink: int
) -> None:
    window = sink + chunk + spare
    case = intervals.windowed(frames, chunk, 1, window=window, sink=sink)
    assert torch.equal(of_frames(case, frames), rolling(frames, chunk, window, sink))


@settings(max_examples=50, deadline=None)
@given(
    frames=st.integers(1, 12),
    chunk=st.integers(1, 4),
    tokens=st.integers(1, 5),
    first=st.booleans(),
)
def test_tokens_repeat_the_mask_of_frames(
    frames: int, chunk: int, tokens: int, first: bool
) -> None:
    small = intervals.causal(frames, chunk, 1, independent_first_frame=first)
    large = intervals.causal(frames, chunk, tokens, independent_first_frame=first)
    grown = of_frames(small, frames).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    assert torch.equal(of_frames(large, frames * tokens), grown)
    assert large.pairs == grown.sum() == small.pairs * tokens**2
    assert (large.queries, large.keys) == (frames * tokens, frames * tokens)


def test_one_chunk_over_all_frames_is_bidirectional() -> None:
    assert of_frames(intervals.causal(5, 5, 1), 5).all()


def test_a_window_wide_enough_changes_nothing() -> None:
    plain = intervals.causal(6, 2, 3)
    assert intervals.causal(6, 2, 3, window=6) == plain
    assert intervals.windowed(6, 2, 3, window=6, sink=2) == plain


def test_a_sink_beside_the_window_is_one_interval() -> None:
    case = intervals.windowed(6, 2, 1, window=4, sink=2)
    assert case.rows[0][1] == (2, 4, 0, 4, 0, 0)
    assert case.rows[0][2] == (4, 6, 0, 2, 4, 6)


def test_a_cache_attends_what_was_written() -> None:
    assert intervals.cache(3, 2, tokens=5).rows == (((0, 10, 0, 15, 0, 0),),)
    assert intervals.cache(0, 2).pairs == 0
    unequal = intervals.cache([1, 0, 4], 2)
    assert unequal.streams == 3
    assert unequal.mask(4).sum((1, 2)).tolist() == [2, 0, 8]


def test_a_chunk_after_a_context_meets_it_at_the_border() -> None:
    case = intervals.after_context(2, 1, tokens=5)
    assert case.rows == (((0, 5, 0, 10, 10, 15),),)
    assert torch.equal(case.mask(15), intervals.cache(3, 1, tokens=5).mask(15))
    assert intervals.after_context(0, 1, tokens=5) == intervals.cache(1, 1, tokens=5)


@pytest.mark.parametrize(
    "case",
    [
        intervals.causal(7, 3, 4, independent_first_frame=True),
        intervals.windowed(9, 2, 5, window=5, sink=2),
        intervals.teacher_forcing(6, 3, 5),
        intervals.cache([3, 0, 9], 4),
    ],
)
def test_flat_numbers_give_the_intervals_back(case: Intervals) -> None:
    assert Intervals.from_flat(case.flat(), case.streams) == case
    assert hash(Intervals.from_flat(case.flat(), case.streams)) == hash(case)


@pytest.mark.parametrize(
    ("rows", "needle"),
    [
        ((), "rows: got \\(\\); needed: the rows of at least one stream"),
        (((),), "at least one row"),
        ((((1, 2, 0, 1, 0, 0),),), r"queries \[0, q1\)"),
        ((((0, 2, 0, 1, 0, 0), (3, 4, 0, 1, 0, 0)),), r"queries \[2, q1\)"),
        ((((0, 2, 3, 3, 0, 0),),), r"\(0, 0\) for none"),
        ((((0, 2, 4, 2, 0, 0),),), "low < high"),
        ((((0, 2, 0, 0, 3, 4),),), "only after the end of the first"),
        ((((0, 2, 0, 4, 3, 5),),), "only after the end of the first"),
        ((((0, 2, 0, 1, 0, 0),), ((0, 3, 0, 1, 0, 0),)), "as many queries in every stream"),
    ],
)
def test_rows_that_mean_nothing_are_refused(rows: tuple, needle: str) -> None:
    with pytest.raises(ValueError, match=needle):
        Intervals(rows)


def test_builders_name_what_is_wrong() -> None:
    for build, needle in (
        (lambda: intervals.causal(0, 1, 1), "frames: got 0"),
        (lambda: intervals.causal(4, 0, 1), "chunk: got 0"),
        (lambda: intervals.causal(4, 1, 0), "tokens: got 0"),
        (lambda: intervals.causal(4, 2, 1, window=1), "window: got 1; needed: None or >= chunk"),
        (lambda: intervals.windowed(4, 2, 1, window=3, sink=2), "window: got 3; needed: >= sink"),
        (lambda: intervals.windowed(4, 2, 1, window=3, sink=-1), "sink: got -1"),
        (lambda: intervals.cache([2, -1], 1), "valid: got"),
        (lambda: intervals.after_context(-1, 1), "context: got -1"),
        (lambda: Intervals.from_flat([0, 1, 0], 1), "intervals: got .*6 numbers per row"),
        (lambda: Intervals.from_flat([0, 1, 0, 1, 0, 0], 2), "got '1 streams'; needed: 2"),
    ):
        with pytest.raises(ValueError, match=needle):
            build()
