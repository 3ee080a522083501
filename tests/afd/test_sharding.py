"""Sharded weights are gathered block by block, one block ahead of the pass, and planned so."""

from __future__ import annotations

import pytest

from afd.planning.cost_model import Net
from afd.planning.weights import VersionWeights
from tests.afd.sharded import held_by_an_update, held_weights
from tests.afd.tiny_methods import wan_student
from tests.afd.together import together


@pytest.mark.parametrize("name", ["afd full", "sft"])
def test_an_update_holds_the_root_and_two_blocks(name: str) -> None:
    for found in together(2, held_by_an_update, name, 5):
        one = max(found["blocks"])
        assert len(found["blocks"]) == 5
        # The running block and the one that is gathered meanwhile.
        assert found["peak"] == found["root"] + 2 * one
        assert found["left"] == 0


def planned(name: str, shards: int) -> int:
    """The plan's bytes of what `held_weights` counts."""
    net, lora = wan_student().net, None if name == "every weight" else 4
    wan, numbers = net.config, sum(p.numel() for p in net.parameters())
    sizes = (wan.dim, wan.ffn_dim, wan.num_layers, wan.text_len)
    stacked, ahead = name.startswith("stacked"), ("behind",) if "ahead" in name else ()
    frozen = (3, 2) if stacked else {"taken back": (5,)}.get(name, ())
    copies = {"replaced": ("pretrained",), "every weight": ("ref",)}.get(name, ())
    weights = VersionWeights(
        Net(*sizes, numbers, 6, wan.chunk, 6, lora),
        2,
        shards,
        ("theta", "ema", *ahead),
        ("theta",),
        copies,
        frozen,
        stacked=stacked,
    )
    wanted = ("network", "adapters", "reference", "parents' adapters")
    return sum(part.bytes for part in weights.memory() if part.name in wanted)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_plan_counts_the_weights_that_processes_hold(processes: int) -> None:
    found = together(processes, held_weights, processes > 1)
    for name in found[0]:
        assert sum(one[name] for one in found) == processes * planned(name, processes), name
