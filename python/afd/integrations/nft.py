"""Other trainers' NFT losses on `afd.ops.nft_loss`, called with what those trainers hold.

DiffusionNFT, FastVideo, MeanFlowNFT, Flow-Factory and verl-omni need `r_from_advantages` and an
option of the op at most. Astrolabe, WorldCompass and UniRL have an adapter each, which translates
their quantities to the op's options and returns its result. examples/integrations has a page per
trainer.

Letters: B samples, C channels, F latent frames, H, W rows and columns. Every loss takes tensors as
`afd.ops.nft_loss` does: predictions and latents [B, ...] of one shape, t, sigma and r float32 [B],
and either `seed` (int64 [B], as given to `afd.ops.forward_noise`) or `noise`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from afd import ops
from afd.arguments import typed
from afd_kernels.contracts import require

__all__ = ["astrolabe", "r_from_advantages", "unirl", "worldcompass"]


@typed
def r_from_advantages(
    advantages: Tensor,
    *,
    adv_clip: float | tuple[float, float] = 5.0,
    adv_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all",
) -> Tensor:
    """The weight r [B] of the positive branch, for trainers that have advantages [B] already.

    Args:
        advantages: float32 or float64 [B], one per sample. [B, 1] is refused, because it would
            broadcast against losses [B].
        adv_clip: the advantage at which r reaches 0 and 1; or (low, high), which clips
            asymmetrically: r = clamp(A / (2 high) + 1/2, 0, 1).
        adv_mode: as in `afd.ops.optimality`.

    Raises:
        ValueError: naming the argument, the value given and what is needed.
    """
    given = isinstance(advantages, Tensor) and advantages.ndim == 1 and len(advantages) > 0
    require(given, "advantages", advantages, "float32 or float64 [B]")
    alone = {"samples_per_prompt": 1, "baseline": 0.0, "normalize": "none"}
    made: Any = ops.optimality(advantages, adv_clip=adv_clip, adv_mode=adv_mode, **alone)  # type: ignore[arg-type]
    return made.r


def astrolabe(
    *, kl_weight: float, sigma: Tensor, selected: Tensor | None = None, **tensors: Any
) -> ops.NftLoss:
    """Astrolabe's loss: unweighted errors of x0, and a prior in x0 space over selected samples.

    Args:
        kl_weight: weight of the prior's mean over the selected samples.
        sigma: float32 [B], the noise level its scheduler's table gives for the timestep, with
            which x0 = x_t - sigma v is computed; t remains the level at which x_t was noised.
        selected: bool [B], the samples that the prior applies to; None: all. Without any the prior
            is 0.
        tensors: v_theta, v_old, v_ref, x0, t, r, nft_beta, and seed or noise.
    """
    weight: float | Tensor = kl_weight
    if selected is not None:
        ok = isinstance(selected, Tensor) and selected.dtype == torch.bool and selected.ndim == 1
        require(ok, "selected", selected, "bool [B], or None")
        share = selected.float()
        # The op averages over the batch, the trainer over the selected samples.
        weight = kl_weight * len(share) / share.sum().clamp(min=1) * share
    options: Any = {"weighting": "x0", "prior_space": "x0", "layout": "BFCHW"}
    return ops.nft_loss(prior_weight=weight, sigma=sigma, **options, **tensors)


def worldcompass(
    *,
    x0: Tensor,
    target_frames: int,
    accumulation: int = 1,
    layout: ops.Layout = "BCFHW",
    **tensors: Any,
) -> ops.NftLoss:
    """WorldCompass's loss: adaptive errors of the last chunk's x0, neither clip factor nor prior.

    Args:
        x0: clean latents, five-dimensional, or [B, F, L, C].
        target_frames: number of last frames that the update is about; those before are context.
        accumulation: number of micro-batches whose gradients are added, >= 1.
        layout: which dimension of the tensors holds the frames.
        tensors: v_theta, v_old, t, r, and seed or noise. As released, the trainer overwrites
            the old prediction with the trained one: v_old = v_theta.detach() reproduces that.
    """
    known = layout in ("BCFHW", "BFCHW", "BFLC")
    require(known, "layout", layout, "one of 'BCFHW', 'BFCHW', 'BFLC'")
    require(x0.ndim == len(layout), "x0", x0, f"{len(layout)} dimensions, {layout}")
    frames = x0.shape[layout.index("F")]
    ok = 0 < target_frames <= frames
    require(ok, "target_frames", target_frames, f"from 1 to {frames}, the frames of x0")
    require(accumulation >= 1, "accumulation", accumulation, "an integer >= 1")
    kept = torch.arange(frames, device=x0.device) >= frames - target_frames
    mask = kept.expand(len(x0), -1).contiguous()
    options: Any = {"nft_beta": 1.0, "scale": 1 / accumulation, "layout": layout}
    return ops.nft_loss(x0=x0, frame_mask=mask, **options, **tensors)


def unirl(
    *, nft_beta: float, adv_sat_std: float = 5.0, adaptive: bool = True, **tensors: Any
) -> ops.NftLoss:
    """UniRL's loss: adaptive or plain errors of x0, both times adv_sat_std / nft_beta.

    Args:
        nft_beta: its `beta`.
        adv_sat_std: the advantage at which r reaches 0 and 1, and the factor of the loss.
        adaptive: its `use_adaptive_weight`.
        tensors: v_theta, v_old, v_ref and prior_weight (its `ref_deviation_coef`) if there is a
            reference, x0, t, r, and seed or noise.
    """
    for name, value in (("nft_beta", nft_beta), ("adv_sat_std", adv_sat_std)):
        require(value > 0, name, value, "a number > 0")
    weighting: Any = "x0_adaptive" if adaptive else "x0"
    scale = adv_sat_std / nft_beta
    return ops.nft_loss(weighting=weighting, scale=scale, nft_beta=nft_beta, **tensors)
