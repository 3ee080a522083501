"""Shape, dtype and device checks shared by all backends and fakes.

`plan_forward_noise` and `plan_nft_loss` read only metadata, so fakes share them;
`check_values` reads values and runs only where that needs no synchronisation (CPU).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

LAYOUTS = ("BCFHW", "BFCHW")
WEIGHTINGS = ("x0_adaptive", "velocity")
GROUPS = ("video", "chunk")
# Domain of t per schedule; vp_linear's sigma' is unbounded at 0.
SCHEDULES = {"rectified_flow": (0.0, 1.0), "vp_cosine": (0.0, 1.0), "vp_linear": (1e-5, 1.0)}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The columns of nft_loss's metrics tensor.
METRICS = ("loss_pos", "loss_neg", "prior", "w_pos", "w_neg", "old_deviation", "ref_deviation")


@dataclass(frozen=True)
class Plan:
    """How a backend traverses a sample: `outer * frames` rows of `inner` contiguous elements.

    Frame f uses t[:, f // (frames // t_chunks)]. If everything is per video, frames = outer = 1.
    """

    batch: int
    outer: int
    frames: int
    inner: int
    t_chunks: int
    schedule: str
    schedule_args: tuple[float, ...]


@dataclass(frozen=True)
class NftPlan(Plan):
    """A Plan with the options of the loss; frame f is in group f // (frames // groups)."""

    r_chunks: int
    groups: int
    nft_beta: float
    prior_weight: float
    adv_clip: float
    weighting: str
    prior_by_r: bool
    needs_grad: bool


def contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors in row-major layout, which all backends' kernels assume."""
    return [None if x is None else x.contiguous() for x in tensors]


def describe(value: Tensor) -> str:
    """Format a tensor's dtype, shape and device for messages."""
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"


def require(ok: bool, argument: str, got: object, needed: str) -> None:
    """Raises ValueError with the argument, its value and the requirement, unless `ok`."""
    if not ok:
        shown = describe(got) if isinstance(got, Tensor) else repr(got)
        raise ValueError(f"{argument}: got {shown}; needed: {needed}")


def expect(
    argument: str,
    value: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    beside: Tensor,
) -> None:
    """Requires a shape, one of `dtypes` and the device of `beside`; formats only on failure."""
    if value.shape == shape and value.dtype in dtypes and value.device == beside.device:
        return
    kinds = " or ".join(dict.fromkeys(str(x).removeprefix("torch.") for x in dtypes))
    require(False, argument, value, f"{kinds} {list(shape)} on {beside.device}")


def _check_one_of(argument: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, argument, value, "one of " + ", ".join(map(repr, allowed)))


def _check_sample(x0: Tensor) -> None:
    require(x0.dtype in FLOATS, "x0", x0, "float32, bfloat16, float16 or float64")
    require(x0.ndim >= 2, "x0", x0, "at least 2 dimensions, the first is the batch")
    require(x0.numel() > 0, "x0", x0, "at least one sample with at least one element")


def _check_source(x0: Tensor, seed: Tensor | None, noise: Tensor | None) -> None:
    if (seed is None) == (noise is None):
        got = "neither" if seed is None else "both"
        raise ValueError(f"seed, noise: got {got}; needed: exactly one of them")
    if seed is not None:
        require(seed.dtype == torch.int64, "seed", seed, f"int64 [{x0.shape[0]}]")
        require(seed.shape == x0.shape[:1], "seed", seed, f"int64 [{x0.shape[0]}], one per sample")
        require(seed.device == x0.device, "seed", seed, f"the device of x0, {x0.device}")
    if noise is not None:
        require(noise.shape == x0.shape, "noise", noise, f"the shape of x0, {list(x0.shape)}")
        require(
            noise.dtype in (torch.float32, x0.dtype),
            "noise",
            noise,
            f"float32 or the dtype of x0, {x0.dtype}",
        )
        require(noise.device == x0.device, "noise", noise, f"the device of x0, {x0.device}")


def _frame_count(x0: Tensor, layout: str, why: str) -> int:
    if x0.ndim != 5:
        raise ValueError(
            f"x0: got {describe(x0)}; needed: 5 dimensions {layout}, because {why} is per frame "
            f"or per chunk"
        )
    return x0.shape[layout.index("F")]


def _check_per_frame(x0: Tensor, name: str, value: Tensor, layout: str) -> int:
    """Checks t or r ([B] or [B, K]) and returns K."""
    wide = torch.float64 if x0.dtype == torch.float64 else torch.float32
    require(
        value.dtype in (torch.float32, wide),
        name,
        value,
        "float32 (half precision merges timesteps)",
    )
    require(value.device == x0.device, name, value, f"the device of x0, {x0.device}")
    batch = x0.shape[0]
    require(
        value.ndim in (1, 2) and value.shape[0] == batch,
        name,
        value,
        f"[{batch}], or [{batch}, K] with K dividing the number of frames",
    )
    if value.ndim == 1 or value.shape[1] == 1:
        return 1
    frames = _frame_count(x0, layout, name)
    chunks = value.shape[1]
    require(
        chunks > 0 and frames % chunks == 0,
        name,
        value,
        f"[{batch}, K] with K dividing the {frames} frames of x0 (layout {layout})",
    )
    return chunks


def _rows(x0: Tensor, layout: str, per_video: bool) -> tuple[int, int, int]:
    """outer, frames, inner of one sample."""
    if per_video:
        return 1, 1, prod(x0.shape[1:])
    if layout == "BCFHW":
        return x0.shape[1], x0.shape[2], prod(x0.shape[3:])
    return 1, x0.shape[1], prod(x0.shape[2:])


def _check_schedule(schedule: str, args: Sequence[float]) -> None:
    _check_one_of("schedule", schedule, tuple(SCHEDULES))
    if schedule != "vp_linear":
        require(not args, "schedule_args", list(args), f"none for {schedule}")
        return
    ok = len(args) == 2 and 0 < args[0] <= args[1]
    require(ok, "schedule_args", list(args), "(beta_min, beta_max) with 0 < beta_min <= beta_max")


def plan_forward_noise(
    x0: Tensor,
    t: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    schedule: str,
    schedule_args: Sequence[float],
    layout: str,
) -> Plan:
    """Checks the metadata of forward_noise and returns its plan.

    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    _check_sample(x0)
    _check_one_of("layout", layout, LAYOUTS)
    _check_schedule(schedule, schedule_args)
    _check_source(x0, seed, noise)
    t_chunks = _check_per_frame(x0, "t", t, layout)
    outer, frames, inner = _rows(x0, layout, per_video=t_chunks == 1)
    return Plan(
        batch=x0.shape[0],
        outer=outer,
        frames=frames,
        inner=inner,
        t_chunks=t_chunks,
        schedule=schedule,
        schedule_args=tuple(map(float, schedule_args)),
    )


def plan_nft_loss(
    v_theta: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    x0: Tensor,
    t: Tensor,
    r: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    frame_mask: Tensor | None,
    nft_beta: float,
    prior_weight: float,
    adv_clip: float,
    weighting: str,
    group: str,
    prior_by_r: bool,
    schedule: str,
    schedule_args: Sequence[float],
    layout: str,
    needs_grad: bool,
) -> NftPlan:
    """Checks the metadata of nft_loss and returns its plan.

    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    _check_sample(x0)
    _check_one_of("layout", layout, LAYOUTS)
    _check_one_of("weighting", weighting, WEIGHTINGS)
    _check_one_of("group", group, GROUPS)
    _check_schedule(schedule, schedule_args)
    require(v_theta.dtype in FLOATS, "v_theta", v_theta, "float32, bfloat16, float16 or float64")
    for name, value in (("v_theta", v_theta), ("v_old", v_old), ("v_ref", v_ref)):
        if value is None:
            continue
        require(value.shape == x0.shape, name, value, f"the shape of x0, {list(x0.shape)}")
        require(value.device == x0.device, name, value, f"the device of x0, {x0.device}")
        require(value.dtype == v_theta.dtype, name, value, f"v_theta's dtype, {v_theta.dtype}")
    _check_source(x0, seed, noise)
    require(0 < nft_beta < float("inf"), "nft_beta", nft_beta, "a finite number > 0")
    require(0 < adv_clip < float("inf"), "adv_clip", adv_clip, "a finite number > 0")
    require(0 <= prior_weight < float("inf"), "prior_weight", prior_weight, "a finite number >= 0")
    require(
        v_ref is not None or prior_weight == 0,
        "prior_weight",
        prior_weight,
        "0 when v_ref is not given (the prior compares v_theta with v_ref)",
    )
    t_chunks = _check_per_frame(x0, "t", t, layout)
    r_chunks = _check_per_frame(x0, "r", r, layout)
    groups = 1
    if group == "chunk":
        groups = r_chunks if r_chunks > 1 else t_chunks
        if groups == 1 and max(t.ndim, r.ndim) == 1:
            raise ValueError(
                f"group: got 'chunk' with t {describe(t)} and r {describe(r)}; needed: t or r of "
                f"shape [{x0.shape[0]}, chunks], which gives the number of chunks"
            )
    if frame_mask is not None:
        frames = _frame_count(x0, layout, "frame_mask")
        require(
            frame_mask.dtype == torch.bool and frame_mask.shape == (x0.shape[0], frames),
            "frame_mask",
            frame_mask,
            f"bool [{x0.shape[0]}, {frames}]",
        )
        require(frame_mask.device == x0.device, "frame_mask", frame_mask, f"on {x0.device}")
    per_video = frame_mask is None and t_chunks == r_chunks == 1
    outer, frames, inner = _rows(x0, layout, per_video)
    return NftPlan(
        batch=x0.shape[0],
        outer=outer,
        frames=frames,
        inner=inner,
        t_chunks=t_chunks,
        schedule=schedule,
        schedule_args=tuple(map(float, schedule_args)),
        r_chunks=r_chunks,
        groups=groups,
        nft_beta=nft_beta,
        prior_weight=prior_weight,
        adv_clip=adv_clip,
        weighting=weighting,
        prior_by_r=prior_by_r,
        needs_grad=needs_grad,
    )


# Up to this many elements are faster to check one by one.
_FEW = 32


def _within(x: Tensor, low: float, high: float) -> bool:
    """Whether all elements of x are in [low, high], rounded to x's dtype; False for NaN."""
    if x.numel() > _FEW:
        return bool(((x >= low) & (x <= high)).all())
    low, high = _rounded(low, x.dtype), _rounded(high, x.dtype)
    rows = x.tolist() if x.ndim > 1 else [x.tolist()]
    return all(low <= value <= high for row in rows for value in row)


@functools.cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype).item())


def check_values(plan: Plan, t: Tensor, r: Tensor | None = None) -> None:
    """Rejects timesteps outside the schedule and r outside [0, 1] or NaN; CPU tensors only.

    On an accelerator this would synchronise; there the kernels set the result to NaN instead.
    """
    if t.device.type != "cpu":
        return
    low, high = SCHEDULES[plan.schedule]
    if not _within(t, low, high):
        raise ValueError(
            f"t: got values in [{t.min().item():.6g}, {t.max().item():.6g}]; needed: "
            f"[{low:g}, {high:g}], the domain of {plan.schedule}"
        )
    if r is not None and not _within(r, 0.0, 1.0):
        raise ValueError(
            f"r: got values in [{r.min().item():.6g}, {r.max().item():.6g}]; needed: [0, 1] "
            f"(r = clamp(advantage / (2 adv_clip) + 1/2, 0, 1))"
        )
