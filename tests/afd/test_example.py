"""The example for downstream authors runs, and its two steps are the same step."""

from __future__ import annotations

from time import sleep

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


def test_both_sides_are_warmed_up_and_timed_in_the_same_rounds() -> None:
    calls = {"before": 0, "after": 0}

    def run(name: str, start_up_s: float) -> None:
        calls[name] += 1
        if calls[name] <= diffusionnft_drop_in.WARM_UP:
            sleep(start_up_s)

    # A start-up of three calls, as compiled code and thread pools have it, counts on neither side.
    timings = diffusionnft_drop_in.timed_alike(
        {"before": lambda _: run("before", 0.1), "after": lambda _: run("after", 0.0)}, "cpu"
    )
    assert calls["before"] == calls["after"]
    assert timings["before"].reps == timings["after"].reps == diffusionnft_drop_in.ROUNDS
    assert timings["before"].p80 < 50
