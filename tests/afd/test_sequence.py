"""A video computed by several processes is the one of a single process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from afd.distributed import Ranks
from afd.errors import ConfigError
from tests.afd.distributed import Leg, Walked, assert_alike, walk
from tests.afd.sequenced import alone, passes
from tests.afd.together import together
from tests.tolerances import NETWORK_GRADIENT, NETWORK_REORDERED


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return alone()


@pytest.mark.parametrize("world", [2, 4])
def test_every_pass_of_a_group_is_that_of_one_process(one: dict[str, Any], world: int) -> None:
    # The 6 tokens of a frame divide by 2, and are padded for 4.
    for found in together(world, passes, world):
        assert found.keys() == one.keys()
        for key, value in found.items():
            if "bytes" in key:
                assert value * world == one[key], "each holds the keys of its own heads"
            elif key.startswith("gradient"):
                error = np.linalg.norm(value - one[key])
                # The gradient of a key's bias is 0 but for rounding: softmax ignores it.
                assert error <= NETWORK_GRADIENT * max(np.linalg.norm(one[key]), 1e-2), key
            else:
                np.testing.assert_allclose(value, one[key], **NETWORK_REORDERED, err_msg=key)


# Method, weights, processes for each video and videos of an update, in four processes.
SHARED = (
    ("afd", "fsdp", 2, 2),
    ("afd full", "ddp", 2, 2),
    ("sft", "fsdp", 2, 2),
    ("gan", "ddp", 2, 2),
    ("dmd", "fsdp", 2, 2),
    ("afd", "fsdp", 4, 1),
    ("afd full", "fsdp", 1, 4),
)
LAYERS: dict[str, Any] = {"num_heads": 4, "num_layers": 3, "checkpoint_blocks": True}


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Walked]]:
    """Two updates of each method, and a third from their state, in one process and in four."""
    folder = tmp_path_factory.mktemp("states")

    def legs(updates: int, parted: bool, given: str = "", left: str = "") -> list[Leg]:
        return [
            Leg(
                method,
                parallel,
                updates,
                given=folder / f"{given} {i}" if given else None,
                left=folder / f"{left} {i}" if left else None,
                parts=parts if parted else 1,
                videos=videos,
                sizes=LAYERS,
            )
            for i, (method, parallel, parts, videos) in enumerate(SHARED)
        ]

    one = walk([*legs(2, False, left="one"), *legs(1, False, given="one")])
    found = {"1": one[: len(SHARED)], "1 then 1": one[len(SHARED) :]}
    every = together(4, walk, [*legs(2, True, left="four"), *legs(1, True, given="one")])
    for other in every[1:]:
        assert [walked.said for walked in other] == [walked.said for walked in every[0]]
    found |= {"4": every[0][: len(SHARED)], "1 then 4": every[0][len(SHARED) :]}
    return found | {"4 then 1": walk(legs(1, False, given="four"))}


@pytest.mark.parametrize(
    "number", range(len(SHARED)), ids=[f"{m} {p} {n}" for m, p, n, _ in SHARED]
)
@pytest.mark.parametrize("way", ["4", "1 then 4", "4 then 1"])
def test_four_processes_make_the_updates_of_one(
    walks: dict[str, list[Walked]], way: str, number: int
) -> None:
    other = "1" if way == "4" else "1 then 1"
    assert walks[way][number].drawn == walks[other][number].drawn
    assert_alike(walks[way][number], walks[other][number])


def test_processes_divide_into_groups_of_a_video() -> None:
    places = [Ranks(rank, 6).in_parts(2) for rank in range(6)]
    assert [(r.rank, r.part) for r in places] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert {(r.world, r.processes) for r in places} == {(3, 6)}
    assert [r.process for r in places] == list(range(6))
    assert [r.main for r in places] == [True] + [False] * 5
    with pytest.raises(ConfigError, match=r"parallel\.sequence is 4, and there are 6 process"):
        Ranks(0, 6).in_parts(4)
