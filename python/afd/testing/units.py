"""Values of single functions: schedule tables, conversions, RoPE, RMS norm, time embedding."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from afd import ops
from afd.models.wan.block import EPS, rms_norm
from afd.models.wan.rope import axis_table, pairs_per_axis, rope_table, sinusoid
from afd.schedules import ShiftedFlow, euler_step, flow_from_x0, renoise, x0_from_flow
from afd.testing.measure import BF16_ROUNDINGS, Report, relative_error

Golden = dict[str, Tensor]


def compare_units(report: Report, golden: Golden, device: torch.device) -> None:
    """Compares every result tensor of a units file with the functions the student uses."""
    golden = {key: value.to(device) for key, value in golden.items()}
    used: set[str] = set()
    _schedules(report, golden, used)
    _conversions(report, golden, used)
    _rope(report, golden, used)
    _rms(report, golden, used)
    for key in golden:
        if match := re.fullmatch(r"sinus(\d+)\.out", key):
            used |= {key, f"sinus{match[1]}.t"}
            t = golden[f"sinus{match[1]}.t"]
            report.value(key, sinusoid(t, int(match[1])), golden[key])
    for key in sorted(golden.keys() - used):
        report.wrong.append(f"unknown: {key}")


def _schedules(report: Report, golden: Golden, used: set[str]) -> None:
    columns = {
        "sigmas": lambda flow: flow.sigmas,
        "timesteps": lambda flow: flow.times,
        "training_weight": lambda flow: flow.training_weights,
    }
    for key in golden:
        match = re.fullmatch(r"sched\.(?:shift(\d+)|cd(\d+))\.(\w+)", key)
        if match is None:
            continue
        shift, count, what = match.groups()
        # The consistency table's name gives its number of entries; its shift is the students'.
        flow = ShiftedFlow(float(shift)) if shift else ShiftedFlow(5.0, int(count))
        if what in columns:
            report.value(key, columns[what](flow), golden[key])
        elif what.startswith("warp_"):
            steps = [float(step) for step in what.split("_")[1:]]
            report.value(key, torch.tensor(flow.warp(steps)), golden[key])
        else:
            continue
        used.add(key)


def _conversions(report: Report, golden: Golden, used: set[str]) -> None:
    names = [key for key in golden if key.startswith("conv.")]
    if not names:
        return
    flow_BC, xt, noise, t = (golden[f"conv.{name}"] for name in ("flow", "xt", "noise", "t"))
    schedule = ShiftedFlow()
    sigma = schedule.sigma_at(t)
    # The released step sets the whole batch to noise level 0 once any element is at the last.
    following = schedule.nearest(t[1:]) + 1
    at_end = bool((following == schedule.count).any())
    after = 0.0 if at_end else schedule.sigmas.to(t.device)[following]
    results = {
        "x0": x0_from_flow(flow_BC, xt, sigma),
        "add_noise": renoise(xt, noise, sigma),
        "flow_from_x0": flow_from_x0(flow_BC, xt, sigma),
        "training_weight": schedule.training_weight(t),
        "euler_step_first11": euler_step(flow_BC[1:], xt[1:], sigma[1:], after),
    }
    used |= {f"conv.{name}" for name in ("flow", "xt", "noise", "t")}
    for name, result in results.items():
        if f"conv.{name}" in golden:
            used.add(f"conv.{name}")
            report.value(f"conv.{name}", result, golden[f"conv.{name}"])


def _rope(report: Report, golden: Golden, used: set[str]) -> None:
    for key in golden:
        match = re.fullmatch(r"rope(\d+)\.(?:out\.start(\d+)|freqs\.(cos|sin)(\d+))", key)
        if match is None:
            continue
        width, start, part, count = match.groups()
        used |= {key, f"rope{width}.x", f"rope{width}.grid"}
        if start is None:
            place = torch.arange(int(count), device=golden[key].device)
            table = torch.cat([axis_table(place, n) for n in pairs_per_axis(int(width))], 1)
            report.value(key, table[..., 0 if part == "cos" else 1], golden[key])
            continue
        x_BLhd = golden[f"rope{width}.x"]
        frames, rows, cols = golden[f"rope{width}.grid"].tolist()
        frame_F = torch.arange(int(start), int(start) + frames, device=x_BLhd.device)
        table = rope_table(int(width), frame_F, rows, cols)
        gain = torch.ones(x_BLhd.shape[2:].numel(), device=x_BLhd.device)
        turned, _ = ops.qk_norm_rope(x_BLhd, x_BLhd, gain, gain, table, eps=EPS)
        # The op also normalises; rotation is linear, so the norm can be undone afterwards.
        size = (x_BLhd.double().flatten(2).square().mean(-1) + EPS).sqrt()[..., None, None]
        report.value(key, turned * size, golden[key])


def _rms(report: Report, golden: Golden, used: set[str]) -> None:
    if "rms.x" not in golden:
        return
    x_BLD, weight_D = golden["rms.x"], golden["rms.w"]
    used |= {"rms.x", "rms.w"}
    if "rms.out" in golden:
        used.add("rms.out")
        report.value("rms.out", rms_norm(x_BLD, weight_D), golden["rms.out"])
        still = torch.ones(1, x_BLD.shape[1], x_BLD.shape[2] // 2, 2, device=x_BLD.device)
        still[..., 1] = 0
        row = x_BLD.unsqueeze(2)
        out, _ = ops.qk_norm_rope(row, row, weight_D, weight_D, still, eps=EPS)
        report.value("rms.out by the fused op", out.squeeze(2), golden["rms.out"])
    if "rms.out_bf16" in golden:
        used.add("rms.out_bf16")
        expected = golden["rms.out_bf16"]
        out = rms_norm(x_BLD.bfloat16(), weight_D.bfloat16())
        # The released code also rounds intermediates: require agreement within those roundings.
        within = relative_error(out, expected) <= BF16_ROUNDINGS
        report.exact("rms.out_bf16 within two roundings", within, True)
