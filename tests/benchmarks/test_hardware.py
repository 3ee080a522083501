"""Floors: their parts, what they grow with, and what they say of the full-size rollout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from afd.models.wan.network import CausalWan
from afd.models.wan.types import WanConfig
from benchmarks import hardware, report
from benchmarks.hardware import Machine, chunk_seconds, pass_work, rollout_seconds
from tests.offline import budget

H200 = Machine(4.3e12, 788e12)  # copy and bf16 product, as measured on one


def test_the_arithmetic_of_a_pass_is_that_of_its_products() -> None:
    config = WanConfig(dim=32, num_heads=2, ffn_dim=48, num_layers=2, text_len=5, text_dim=8)
    with torch.device("meta"):
        block = CausalWan(config).blocks[0]
    products = [m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(linear.weight.numel() for linear in products)
    # The prompt's keys and values are made once per prompt, not in every pass.
    weights -= 2 * config.dim**2
    work = pass_work(config, tokens=7, keys=21, batch=3, itemsize=4)
    assert work.linear_flop == 2 * config.num_layers * weights * 3 * 7
    assert work.attention_flop == config.num_layers * 3 * 4 * 7 * (21 + 5) * config.dim


def test_the_full_size_video_is_990_tflop_and_bound_by_arithmetic() -> None:
    config, flop = WanConfig(), 0.0
    for chunk in range(1, 8):
        work = pass_work(config, 4680, 4680 * chunk, 1, 2)
        flop += 5 * work.flop
        assert work.flop / H200.matmul > work.bytes / H200.bandwidth
    assert flop == pytest.approx(990e12, rel=0.01)
    # Without the last context pass.
    assert rollout_seconds(H200, config, 1560, 21, 4) == pytest.approx(
        1.327 * (1 - 0.041), rel=0.01
    )


def test_a_window_bounds_the_floor_of_later_chunks() -> None:
    whole, windowed = WanConfig(), replace(WanConfig(), window=9)
    assert rollout_seconds(H200, windowed, 1560, 21, 4) < rollout_seconds(H200, whole, 1560, 21, 4)
    longer = [rollout_seconds(H200, windowed, 1560, frames, 4) for frames in (21, 24, 27)]
    assert longer[2] - longer[1] == pytest.approx(longer[1] - longer[0])


def test_a_slower_machine_has_a_higher_floor() -> None:
    floor = chunk_seconds(H200, WanConfig(), 4680, 9360, 5)
    assert chunk_seconds(Machine(1e12, 788e12), WanConfig(), 4680, 9360, 5) > floor
    assert chunk_seconds(Machine(4.3e12, 400e12), WanConfig(), 4680, 9360, 5) > floor


def test_the_machine_at_hand_can_be_measured() -> None:
    machine = Machine.measured("cpu", torch.float32, seconds=0.01)
    assert 1e8 < machine.bandwidth < 1e13
    assert 1e8 < machine.matmul < 1e15


def test_rates_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    hardware.main(["--bandwidth", "4.3e12", "--matmul", "788e12", "--batch", "1"])
    said = capsys.readouterr().out
    assert "4300.0 GB/s, 788 TFLOP/s" in said
    assert "frames per second" in said


def test_the_floor_of_an_op_is_its_bytes_or_its_arithmetic() -> None:
    floors = {op: (flop, moved, ms) for op, flop, moved, ms in hardware.op_floors(H200)}
    # Two passes of 8 bytes and a gradient of 2 for every one of 32 x 2,096,640 elements.
    _, moved, ms = floors["nft_loss bf16 B=32, noise seed"]
    assert moved == 18 * 32 * 16 * 21 * 60 * 104
    assert ms == pytest.approx(1e3 * moved / 4.3e12)
    flop, _, ms = floors["attention, rollout, chunk 7 B=1"]
    assert flop == 4 * 4680 * 7 * 4680 * 1536
    assert ms == pytest.approx(1e3 * flop / 788e12)
    whole, alone = (floors[f"attention, {name}"][0] for name in (
        "noisy half B=1, forward and backward", "context, backward B=1"
    ))  # fmt: skip
    assert alone < whole


def test_the_page_shows_what_the_commands_print() -> None:
    page = (report.ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    rows = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines)}
    floors = {op: f"{ms:.3g}" for op, _, _, ms in hardware.op_floors(H200)}
    shown = rows.keys() & floors.keys()
    assert len(shown) == 13
    assert {op: rows[op][0] for op in shown} == {op: floors[op] for op in shown}
    old, new = (budget.budgets()[f"triton {version}"]["sm_90"] for version in ("3.6", "3.9"))
    kernels = rows.keys() & old.keys()
    assert len(kernels) == 6
    for name in kernels:
        registers = f"{old[name]['registers']} / {new[name]['registers']}"
        shared, programs = round(old[name]["shared"] / 1024), old[name]["programs"]
        assert rows[name][1:] == [registers, str(shared), str(programs)], name
