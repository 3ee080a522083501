"""The example for downstream authors runs, and its two steps are the same step."""

from __future__ import annotations

import pytest

from examples import diffusionnft_drop_in


def test_one_call_gives_the_loss_and_the_gradient_of_the_thirty_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    difference = diffusionnft_drop_in.main(shape=(2, 16, 3, 8, 10))
    # fp32 against the official float64 promotion, then through the policy's backward in fp32.
    assert difference["loss"] < 1e-5
    assert difference["grad"] < 1e-5
    assert "peak memory" in capsys.readouterr().out
