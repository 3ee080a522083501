"""A video computed by several processes is the one of a single process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rich.console import Console

from afd.config.parallel import ParallelConfig
from afd.config.run import load_config, make_config
from afd.distributed import Ranks
from afd.errors import ConfigError
from afd.planning.plan import make_plan, show
from afd.trainer.run_folder import refuse_idle_processes
from tests.afd.distributed import Leg, Walked, assert_alike, walk
from tests.afd.sequenced import alone, passes
from tests.afd.together import together
from tests.tolerances import NETWORK_BFLOAT16, NETWORK_GRADIENT, NETWORK_REORDERED


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
            elif "bf16" in key:
                error = np.linalg.norm(value - one[key])
                assert error <= NETWORK_BFLOAT16 * np.linalg.norm(one[key])
            elif key.startswith("gradient"):
                error = np.linalg.norm(value - one[key])
                # The gradient of a key's bias is 0 but for rounding: softmax ignores it.
                assert error <= NETWORK_GRADIENT * max(np.linalg.norm(one[key]), 1e-2), key
            else:
                np.testing.assert_allclose(value, one[key], **NETWORK_REORDERED, err_msg=key)


# Method, weights, processes for each video and videos of an update, in four processes.
SHARED = (
    ("afd", "fsdp", 2, 2),
    ("gan", "ddp", 4, 1),
    ("sft", "ddp", 2, 2),
    ("sft", "fsdp", 1, 4),
)
LAYERS: dict[str, Any] = {"num_heads": 4, "num_layers": 2, "checkpoint_blocks": True}


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


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel=fsdp", "parallel.sequence=2"],
        ["parallel.sequence=2", "parallel=fsdp"],
        ["parallel.sequence=2", "parallel.weights=fsdp"],
        ["parallel={weights: fsdp, sequence: 2}"],
    ],
)
def test_a_word_stands_for_what_is_done_with_the_weights(overrides: list[str]) -> None:
    for given in ({}, {"parallel": "ddp"}, {"parallel": {"weights": "ddp"}}):
        config = make_config(given, overrides)
        assert (config.parallel.weights, config.parallel.sequence) == ("fsdp", 2)
    assert make_config({"parallel": "fsdp"}).parallel.weights == "fsdp"
    with pytest.raises(ConfigError, match=r"parallel\.weights is 'both'"):
        make_config({}, ["parallel=both"])


def test_processes_that_do_not_fit_are_refused() -> None:
    three = make_config({}, ["parallel.sequence=3"])
    with pytest.raises(ConfigError, match=r"sequence: got 3; needed: a divisor of .* 4 heads"):
        make_plan(three, 3)
    two = make_config({}, ["parallel.sequence=2"])
    with pytest.raises(ConfigError, match=r"sequence is 2, and there are 1 process.*a multiple"):
        make_plan(two)
    with pytest.raises(ConfigError, match="prompts_per_update is 1; 2 groups of processes need"):
        refuse_idle_processes(two.model_copy(update={"prompts_per_update": 1}), 2)


def test_a_group_holds_a_part_of_each_video() -> None:
    config = load_config("afd_self_forcing_480x832")
    shared = ParallelConfig(sequence=2)
    one, two = make_plan(config, 4), make_plan(config.model_copy(update={"parallel": shared}), 8)
    sizes = [{part.name: part.bytes for part in plan.memory} for plan in (one, two)]
    assert sizes[1]["activations"] < 0.52 * sizes[0]["activations"]
    assert sizes[1]["cache"] < 0.52 * sizes[0]["cache"]  # the prompt's keys are whole
    assert sizes[1]["network"] == sizes[0]["network"]
    console = Console(width=200, record=True)
    show(two, console)
    told = console.export_text()
    assert "all-to-all" in told
    assert "by each of 8 processes" in told
