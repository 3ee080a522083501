"""Several processes of one run: shares, gathering, sums, agreement, and one that fails."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch

from afd.config.run import make_config
from afd.distributed import ALONE, Ranks, join
from afd.errors import ConfigError
from tests.afd.together import together

CONFIG = make_config({})


def test_shares_are_contiguous_whole_and_differ_by_at_most_one() -> None:
    for count in range(20):
        for world in range(1, 6):
            things = list(range(count))
            parts = [things[Ranks(rank, world).share(count)] for rank in range(world)]
            assert [thing for part in parts for thing in part] == things
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_alone_everything_is_as_it_was() -> None:
    x = torch.randn(3, requires_grad=True)
    assert ALONE.gather(x) is x
    assert ALONE.same((1, "a")) == (1, "a")
    assert ALONE.main
    assert ALONE.each((1, "a")) == [(1, "a")]
    assert not ALONE.any(False)
    y = torch.ones(2)
    ALONE.sum_([y])
    assert y.tolist() == [1, 1]
    with join("cpu") as ranks:
        assert ranks == ALONE


def test_a_device_that_is_not_there_is_refused_and_auto_takes_what_is() -> None:
    with join("auto") as ranks:
        assert ranks.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with (
            pytest.raises(ConfigError, match="device is 'cuda', and torch finds no CUDA"),
            join("cuda"),
        ):
            pass


def parts() -> list[torch.Tensor]:
    """One tensor a dtype; rank r is to hold rows [r] of a ragged split of each."""
    whole = torch.arange(30).view(5, 6)
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)
    return [whole.to(kind) for kind in kinds]


def meet() -> dict[str, Any]:
    with join("cpu") as ranks, join("cpu") as again:
        assert ranks == again
        gathered = [ranks.gather(x[ranks.share(5)]) for x in parts()]
        assert all(map(torch.equal, gathered, parts()))
        assert ranks.gather(torch.zeros(0, 3)).shape == (0, 3)
        only_one = torch.ones(2, 3) if ranks.main else torch.ones(0, 3)
        assert ranks.gather(only_one).shape == (2, 3)
        sums = [torch.full((2, 2), 1.0 + ranks.rank), torch.tensor(0.5, dtype=torch.float64)]
        strided = torch.zeros(2, 3).T
        ranks.sum_([*sums, strided.add_(1)])
        ranks.barrier()
        return {
            "sums": [x.tolist() for x in sums],
            "strided": strided.tolist(),
            "same": ranks.same({"rank": ranks.rank, "x": 0.1, "none": None, "ä": [1, "b"]}),
            "each": ranks.each({"rank": ranks.rank, "text": "a\nb" * ranks.rank}),
            "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
            "main": ranks.main,
        }


def test_two_processes_gather_sum_and_agree() -> None:
    first, second = together(2, meet)
    assert (first.pop("main"), second.pop("main")) == (True, False)
    assert first == second
    assert first["sums"] == [[[3.0, 3.0], [3.0, 3.0]], 1.0]
    assert first["strided"] == [[2.0, 2.0]] * 3
    assert first["same"] == {"rank": 0, "x": 0.1, "none": None, "ä": [1, "b"]}
    assert first["each"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "a\nb"}]
    assert first["any"] == [True, False]


def fail_on(rank: int, how: str) -> None:
    with join("cpu") as ranks:
        ranks.barrier()
        if ranks.rank == rank:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the reason")
        ranks.barrier()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_fails_says_why_and_the_others_leave_silently(rank: int) -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        together(2, fail_on, rank, "raises")
    assert time.monotonic() - began < 30
    assert f"process {rank} raised: ValueError('the reason')" in str(error.value)
    assert f"process {1 - rank} raised: SystemExit(1)" in str(error.value)


def test_one_that_is_killed_ends_the_others_with_a_sentence() -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        together(2, fail_on, 1, "killed")
    assert time.monotonic() - began < 30
    assert "process 1 ended" in str(error.value)
    assert "process 0 lost another process of this run, which was killed" in str(error.value)
