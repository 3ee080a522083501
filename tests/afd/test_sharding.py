"""Sharded weights are gathered block by block, one block ahead of the pass."""

from __future__ import annotations

import pytest

from tests.afd.sharded import held_by_an_update
from tests.afd.together import together


@pytest.mark.parametrize("name", ["afd full", "sft"])
def test_an_update_holds_the_root_and_two_blocks(name: str) -> None:
    for found in together(2, held_by_an_update, name, 5):
        one = max(found["blocks"])
        assert len(found["blocks"]) == 5
        # The running block and the one that is gathered meanwhile.
        assert found["peak"] == found["root"] + 2 * one
        assert found["left"] == 0
