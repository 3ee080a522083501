"""Arguments of nft_loss and their checks, shared by all backends and the fakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from afd_kernels import contracts
from afd_kernels.contracts import Plan, require

# Space of the squared error, and whether an adaptive weight divides it.
WEIGHTINGS = {
    "x0_adaptive": ("x0", True),
    "x0": ("x0", False),
    "velocity": ("velocity", False),
}
SPACES = ("x0", "velocity")
GROUPS = ("video", "chunk")
# The columns of the metrics tensor.
METRICS = ("loss_pos", "loss_neg", "prior", "w_pos", "w_neg", "old_deviation", "ref_deviation")
WEIGHT_MIN = 1e-5
# The smallest sigma / t: the target t / sigma (noise - x0) stays far from float32's limits.
LEAST_SIGMA = 1e-6
_LARGEST = torch.finfo(torch.float32).max


class NftInputs(NamedTuple):
    """The tensors of a call; afd.ops.nft_loss has their shapes.

    Attributes:
        prior_weights: [B], multiplied by the option prior_weight; None: 1.
    """

    v_theta: Tensor
    v_old: Tensor
    v_ref: Tensor | None
    x0: Tensor
    t: Tensor
    r: Tensor
    seed: Tensor | None = None
    noise: Tensor | None = None
    frame_mask: Tensor | None = None
    sigma: Tensor | None = None
    prior_weights: Tensor | None = None
    sample_weight: Tensor | None = None


class NftOptions(NamedTuple):
    """The other arguments of a call; afd.ops.nft_loss describes them."""

    nft_beta: float
    prior_weight: float
    adv_clip: float = 5.0
    weighting: str = "x0_adaptive"
    space: str | None = None
    scale: float | None = None
    weight_min: float | None = None
    prior_space: str = "velocity"
    group: str = "video"
    prior_by_r: bool = False
    schedule: str = "rectified_flow"
    schedule_args: Sequence[float] = ()
    layout: str = "BCFHW"
    needs_grad: bool = True


@dataclass(frozen=True)
class NftPlan(Plan):
    """A Plan with the options of the loss; frame f is in group f // (frames // groups).

    Attributes:
        scale: of both branches' losses; `slope` is scale times nft_beta.
        x0_space: the error is that of x0, else of the velocity; prior_in_x0 likewise.
    """

    r_chunks: int
    sigma_chunks: int
    groups: int
    nft_beta: float
    prior_weight: float
    scale: float
    slope: float
    weight_min: float
    adaptive: bool
    x0_space: bool
    prior_in_x0: bool
    prior_by_r: bool
    needs_grad: bool


def plan_nft_loss(inputs: NftInputs, options: NftOptions) -> NftPlan:
    """Checks the metadata of nft_loss and returns its plan.

    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    x0, layout = inputs.x0, options.layout
    contracts.check_sample(x0)
    contracts.check_one_of("layout", layout, contracts.LAYOUTS)
    contracts.check_schedule(options.schedule, options.schedule_args)
    _check_predictions(inputs)
    contracts.check_source(x0, inputs.seed, inputs.noise)
    scale, slope, weight_min = _check_numbers(options)
    space, adaptive = _check_weighting(options)
    _check_prior(inputs, options)
    _check_sigma(inputs, options, space)
    _check_per_sample("sample_weight", inputs.sample_weight, x0)
    t_chunks = contracts.check_per_frame(x0, "t", inputs.t, layout)
    r_chunks = contracts.check_per_frame(x0, "r", inputs.r, layout)
    sigma_chunks = 1
    if inputs.sigma is not None:
        sigma_chunks = contracts.check_per_frame(x0, "sigma", inputs.sigma, layout)
    groups = _groups(inputs, options, t_chunks, r_chunks)
    _check_mask(inputs, layout)
    per_video = inputs.frame_mask is None and t_chunks == r_chunks == sigma_chunks == 1
    outer, frames, inner = contracts.rows(x0, layout, per_video)
    return NftPlan(
        batch=x0.shape[0],
        outer=outer,
        frames=frames,
        inner=inner,
        t_chunks=t_chunks,
        schedule=options.schedule,
        schedule_args=tuple(map(float, options.schedule_args)),
        r_chunks=r_chunks,
        sigma_chunks=sigma_chunks,
        groups=groups,
        nft_beta=options.nft_beta,
        prior_weight=options.prior_weight,
        scale=scale,
        slope=slope,
        weight_min=weight_min,
        adaptive=adaptive,
        x0_space=space == "x0",
        prior_in_x0=options.prior_space == "x0",
        prior_by_r=options.prior_by_r,
        needs_grad=options.needs_grad,
    )


def check_values(inputs: NftInputs, plan: NftPlan) -> None:
    """Rejects tensors on the CPU whose values are out of range or NaN."""
    contracts.check_times(inputs.t, plan.schedule)
    contracts.check_between(
        "r", inputs.r, 0.0, 1.0, "[0, 1] (r = clamp(advantage / (2 adv_clip) + 1/2, 0, 1))"
    )
    weights = (("prior_weight", inputs.prior_weights), ("sample_weight", inputs.sample_weight))
    for name, value in weights:
        if value is not None:
            contracts.check_between(name, value, 0.0, _LARGEST, "finite numbers >= 0")
    if inputs.sigma is None:
        return
    contracts.check_between("sigma", inputs.sigma, 0.0, 1.0, "[0, 1]")
    if inputs.sigma.device.type == "cpu":
        batch = plan.batch
        t, sigma = inputs.t.reshape(batch, -1), inputs.sigma.reshape(batch, -1)
        t = t.repeat_interleave(plan.frames // plan.t_chunks, 1).double()
        sigma = sigma.repeat_interleave(plan.frames // plan.sigma_chunks, 1).double()
        if bool((sigma < LEAST_SIGMA * t).any()):
            raise ValueError(
                f"sigma: got values down to {sigma.min().item():.6g}; needed: at least "
                f"{LEAST_SIGMA:g} t (0 where t is 0), since the target is t / sigma (noise - x0)"
            )


def _check_predictions(inputs: NftInputs) -> None:
    x0, v_theta = inputs.x0, inputs.v_theta
    floats = "float32, bfloat16, float16 or float64"
    require(v_theta.dtype in contracts.FLOATS, "v_theta", v_theta, floats)
    for name in ("v_theta", "v_old", "v_ref"):
        value = getattr(inputs, name)
        if value is None:
            continue
        require(value.shape == x0.shape, name, value, f"the shape of x0, {list(x0.shape)}")
        require(value.device == x0.device, name, value, f"the device of x0, {x0.device}")
        require(value.dtype == v_theta.dtype, name, value, f"v_theta's dtype, {v_theta.dtype}")


def _check_numbers(options: NftOptions) -> tuple[float, float, float]:
    """scale, slope and weight_min."""
    adaptive = WEIGHTINGS.get(options.weighting, ("", False))[1]
    for name in ("nft_beta", "adv_clip", "scale", "weight_min"):
        value = getattr(options, name)
        require(value is None or 0 < value < float("inf"), name, value, "a finite number > 0")
    prior = options.prior_weight
    require(0 <= prior < float("inf"), "prior_weight", prior, "a finite number >= 0")
    weight_min = WEIGHT_MIN if options.weight_min is None else options.weight_min
    if options.scale is not None:
        return options.scale, options.scale * options.nft_beta, weight_min
    if adaptive:
        # Not scale times nft_beta, which need not be adv_clip to the last bit.
        return options.adv_clip / options.nft_beta, options.adv_clip, weight_min
    return 1.0, options.nft_beta, weight_min


def _check_weighting(options: NftOptions) -> tuple[str, bool]:
    """The space of the error, and whether its weight is adaptive."""
    weighting, space = options.weighting, options.space
    contracts.check_one_of("weighting", weighting, tuple(WEIGHTINGS))
    contracts.check_one_of("prior_space", options.prior_space, SPACES)
    own_space, adaptive = WEIGHTINGS[weighting]
    if space is not None:
        contracts.check_one_of("space", space, SPACES)
        needed = f"{own_space!r}, or weighting={space!r}"
        require(
            adaptive or space == own_space, f"space with weighting={weighting!r}", space, needed
        )
    if options.weight_min is not None:
        needed = f"None, since weighting={weighting!r} has no adaptive weight"
        require(adaptive, "weight_min", options.weight_min, needed)
    return space or own_space, adaptive


def _check_prior(inputs: NftInputs, options: NftOptions) -> None:
    _check_per_sample("prior_weight", inputs.prior_weights, inputs.x0)
    given = inputs.prior_weights
    require(
        inputs.v_ref is not None or (given is None and options.prior_weight == 0),
        "prior_weight",
        options.prior_weight if given is None else given,
        "0 when v_ref is not given (the prior compares v_theta with v_ref)",
    )


def _check_sigma(inputs: NftInputs, options: NftOptions, space: str) -> None:
    if inputs.sigma is None:
        return
    require(
        options.schedule == "rectified_flow",
        "sigma",
        inputs.sigma,
        f"None with schedule={options.schedule!r}: x_t - sigma v is the x0 of rectified_flow",
    )
    require(
        "x0" in (space, options.prior_space),
        "sigma",
        inputs.sigma,
        "None when the error and the prior are in velocity space",
    )


def _check_per_sample(name: str, value: Tensor | None, x0: Tensor) -> None:
    if value is not None:
        dtypes = (torch.float32, *([torch.float64] if x0.dtype == torch.float64 else []))
        contracts.expect(name, value, x0.shape[:1], dtypes, x0)


def _groups(inputs: NftInputs, options: NftOptions, t_chunks: int, r_chunks: int) -> int:
    contracts.check_one_of("group", options.group, GROUPS)
    if options.group == "video":
        return 1
    groups = r_chunks if r_chunks > 1 else t_chunks
    if groups == 1 and max(inputs.t.ndim, inputs.r.ndim) == 1:
        raise ValueError(
            f"group: got 'chunk' with t {contracts.describe(inputs.t)} and r "
            f"{contracts.describe(inputs.r)}; needed: t or r of shape "
            f"[{inputs.x0.shape[0]}, chunks], which gives the number of chunks"
        )
    return groups


def _check_mask(inputs: NftInputs, layout: str) -> None:
    if inputs.frame_mask is not None:
        frames = contracts.frame_count(inputs.x0, layout, "frame_mask")
        shape = (inputs.x0.shape[0], frames)
        contracts.expect("frame_mask", inputs.frame_mask, shape, (torch.bool,), inputs.x0)
