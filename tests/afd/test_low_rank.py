"""Low-rank changes of weights: the bits of a folded change."""

from __future__ import annotations

import numpy as np
import torch

from afd.models.low_rank import LowRank


def test_a_change_has_the_same_bits_on_every_machine() -> None:
    """Each product and sum rounded alone, in rank order, as numpy's loops do."""
    generator = torch.Generator().manual_seed(0)
    a_RI, b_OR = (torch.randn(*s, generator=generator) for s in ((5, 33), (130, 5)))
    change = LowRank({"x": a_RI}, {"x": b_OR}, 0.3)
    expected = np.zeros((130, 33), np.float32)
    for r in range(5):
        product = b_OR[:, r, None].numpy() * a_RI[r].numpy()
        expected = expected + product
    delta = change.delta("x")
    assert torch.equal(delta, torch.from_numpy(expected * np.float32(0.3)))
    torch.testing.assert_close(delta, b_OR @ a_RI * 0.3)
