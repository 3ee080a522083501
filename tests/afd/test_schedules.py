"""The released students' table of noise levels, and conversions between video, velocity, noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from afd.schedules import ShiftedFlow, euler_step, flow_from_x0, renoise, x0_from_flow
from tests.tolerances import assert_elementwise

LIST = (1000, 750, 500, 250)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    path = Path(__file__).parents[2].parent / "shared" / "golden" / "units.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is absent (golden data lives beside the checkout)")
    return load_file(path)


@pytest.mark.parametrize("shift", [5, 8])
def test_the_table_and_the_warped_list_are_the_released_ones_to_the_bit(
    golden: dict[str, Tensor], shift: int
) -> None:
    flow, key = ShiftedFlow(shift), f"sched.shift{shift}"
    assert torch.equal(flow.sigmas, golden[f"{key}.sigmas"])
    assert torch.equal(flow.times, golden[f"{key}.timesteps"])
    assert torch.equal(torch.tensor(flow.warp(LIST)), golden[f"{key}.warp_1000_750_500_250"])
    assert_elementwise(flow.training_weights, golden[f"{key}.training_weight"])


def test_a_table_of_48_steps_is_the_released_one(golden: dict[str, Tensor]) -> None:
    flow = ShiftedFlow(count=48)
    assert torch.equal(flow.sigmas, golden["sched.cd48.sigmas"])
    assert torch.equal(flow.times, golden["sched.cd48.timesteps"])


def test_conversions_are_the_released_ones(golden: dict[str, Tensor]) -> None:
    flow = ShiftedFlow()
    v, x_t, noise, t = (golden[f"conv.{name}"] for name in ("flow", "xt", "noise", "t"))
    sigma = flow.sigma_at(t)
    assert_elementwise(x0_from_flow(v, x_t, sigma), golden["conv.x0"])
    assert_elementwise(renoise(x_t, noise, sigma), golden["conv.add_noise"])
    assert_elementwise(flow_from_x0(v, x_t, sigma), golden["conv.flow_from_x0"])
    assert_elementwise(flow.training_weight(t), golden["conv.training_weight"])
    # With a time at the end of the table among them, the released step takes all of them to 0.
    stepped = euler_step(v[1:], x_t[1:], sigma[1:], 0.0)
    assert_elementwise(stepped, golden["conv.euler_step_first11"])


def test_time_zero_means_the_last_entry_of_the_table() -> None:
    flow = ShiftedFlow()
    assert flow.sigma_of(0.0) == flow.sigmas[-1] > 0
    assert flow.warp([1000, 1, 0])[-1] == 0


def test_the_nearest_entry_is_found_for_any_time() -> None:
    for flow in (ShiftedFlow(), ShiftedFlow(8, 48), ShiftedFlow(count=1)):
        t = torch.cat([torch.rand(5000) * 1010 - 5, flow.times, torch.tensor([0.0, 1000.0])])
        exact = (flow.times.double() - t.double()[:, None]).abs().argmin(1)
        assert torch.equal(flow.nearest(t), exact)
        assert torch.equal(flow.nearest(t[:5000].view(2, -1)), exact[:5000].view(2, -1))


def test_one_number_and_one_per_frame_say_the_same() -> None:
    torch.manual_seed(0)
    v, x_t = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    sigma = ShiftedFlow().sigma_of(625.0)
    per_frame = torch.full((2, 3), sigma)
    for convert in (x0_from_flow, flow_from_x0, renoise):
        torch.testing.assert_close(convert(v, x_t, sigma), convert(v, x_t, per_frame))


def test_conversions_come_back_in_half_precision() -> None:
    v, x_t = torch.randn(2, 3).bfloat16(), torch.randn(2, 3).bfloat16()
    for result in (x0_from_flow(v, x_t, 0.5), flow_from_x0(v, x_t, 0.5), renoise(v, x_t, 0.5)):
        assert result.dtype == torch.bfloat16
    assert torch.equal(x0_from_flow(v, x_t, 0.5), (x_t.double() - 0.5 * v.double()).bfloat16())


@pytest.mark.parametrize("steps", [[1001], [-1], [999.5]])
def test_a_step_outside_the_table_is_refused(steps: list[float]) -> None:
    with pytest.raises(ValueError, match=r"steps: got .*; needed: whole numbers in \[0, 1000\]"):
        ShiftedFlow().warp(steps)


def test_a_table_without_entries_or_shift_is_refused() -> None:
    with pytest.raises(ValueError, match="shift: got 0"):
        ShiftedFlow(0)
    with pytest.raises(ValueError, match="count: got 0"):
        ShiftedFlow(count=0)
    with pytest.raises(ValueError, match="count: got 48; needed: 1000"):
        ShiftedFlow(count=48).warp([1000])
