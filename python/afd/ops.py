"""The fused ops of afd: one torch op per call, differentiable and compilable.

Letters: B batch, C channels, F latent frames, H, W rows and columns, K chunks (K divides F);
L query tokens, N key tokens, h heads, d channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Literal

import torch
from torch import Tensor

from afd.arguments import typed
from afd.optimality import Optimality as Optimality
from afd.optimality import optimality as optimality
from afd.schedules import Schedule, resolve
from afd_kernels.adaln import op as _adaln
from afd_kernels.block_attention import intervals as intervals
from afd_kernels.block_attention import op as _block_attention
from afd_kernels.block_attention.flops import register_flop_formulas
from afd_kernels.block_attention.intervals import Clip as Clip
from afd_kernels.block_attention.intervals import Intervals as Intervals
from afd_kernels.contracts import require
from afd_kernels.dispatch import explain, report, use_backend
from afd_kernels.forward_noise import op as _forward_noise
from afd_kernels.nft_loss import op as _nft_loss
from afd_kernels.qk_norm_rope import op as _qk_norm_rope

__all__ = [
    "Clip",
    "Intervals",
    "NftLoss",
    "Optimality",
    "adaln",
    "block_attention",
    "draw_seeds",
    "explain",
    "forward_noise",
    "intervals",
    "nft_loss",
    "optimality",
    "qk_norm_rope",
    "qk_norm_rope_append_",
    "register_flop_formulas",
    "report",
    "use_backend",
]

Layout = Literal["BCFHW", "BFCHW", "BFLC"]


@typed
def draw_seeds(
    batch: int,
    generator: torch.Generator | None = None,
    *,
    base: int | None = None,
    step: int | None = None,
    rank: int | None = None,
) -> Tensor:
    """One 64-bit noise seed per sample, int64 [batch].

    Either drawn from `generator` (None: torch's own) on its device; every process needs a generator
    with its own seed. Or made from `base`, the run's seed, with the step and the rank, on the
    CPU: no two (step, rank, sample) of one base have the same seed, and a repeated call has the
    same seeds.

    Args:
        batch: with base at most 65,536.
        generator: None if base is given.
        base: any 64-bit integer, the same on every rank; step and rank are then required.
        step: in [0, 2^32), the update.
        rank: in [0, 65,536).

    Raises:
        ValueError: naming the argument, the value given and what is needed.
    """
    batch = index(batch)  # also of NumPy's integers, which are narrower than the shifts below
    if base is None and step is None and rank is None:
        device = "cpu" if generator is None else generator.device
        return torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator, device=device)
    if base is None or step is None or rank is None:
        given = {"base": base, "step": step, "rank": rank}
        raise ValueError(f"base, step, rank: got {given}; needed: all three, or a generator")
    require(generator is None, "generator", generator, "None when base is given")
    base, step, rank = index(base), index(step), index(rank)
    require(-(2**63) <= base < 2**63, "base", base, "an integer of int64")
    require(0 <= step < 2**32, "step", step, "in [0, 2^32)")
    require(0 <= rank < 2**16, "rank", rank, "in [0, 65536)")
    require(0 <= batch <= 2**16, "batch", batch, "at most 65536 with base")
    # A bijection of 64-bit integers: different samples cannot meet.
    first = step << 32 | rank << 16
    samples = torch.arange(batch) + (first if step < 2**31 else first - 2**64)
    return _mixed(samples ^ _mixed(torch.tensor(base)))


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, a bijection of int64."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        # Shifted without the sign.
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x


@typed
def forward_noise(
    x0: Tensor,
    t: Tensor,
    *,
    schedule: str | Schedule = "rectified_flow",
    seed: Tensor | None = None,
    noise: Tensor | None = None,
    layout: Layout = "BCFHW",
) -> Tensor:
    """Adds noise to clean latents: x_t = alpha_t x0 + sigma_t noise.

    Args:
        x0: [B, ...], or [B, C, F, H, W], [B, F, C, H, W] or [B, F, L, C] (L tokens a frame) when t
            is per chunk or frame; float32, bfloat16, float16 or float64; any strides.
        t: float32 [B] (per video), [B, K] (per chunk) or [B, F] (per frame), inside the schedule's
            domain; 0 is clean.
        schedule: a name ("rectified_flow", "vp_cosine", "vp_linear") or a Schedule.
        seed: int64 [B]. The noise of sample b is Philox4x32-10 keyed by seed[b], counted by the
            element's index in the sample: the same on every device, backend and batch split.
        noise: instead of seed, the noise itself; shape of x0, float32 or x0's dtype.
        layout: which dimension holds the frames; ignored when t is per video.

    Returns:
        x_t, shape and dtype of x0. Differentiable once with respect to x0.

    Raises:
        ValueError: naming the argument, the value given and what is needed. On an accelerator t
            outside the domain is not checked, to avoid a synchronisation, and gives NaN.
    """
    how = resolve(schedule)
    return _forward_noise.forward_noise(x0, t, seed, noise, how.name, list(how.args), layout)


@dataclass(frozen=True)
class NftLoss:
    """The NFT loss and its metrics, which are float64 [B], or [B, K] per chunk.

    Attributes:
        loss: scalar, differentiable with respect to v_theta.
        loss_pos: L+ = mean of the squared error of v+ in its space, over w+ when adaptive.
        loss_neg: L-, likewise for v-.
        prior: mean of (v_theta - v_ref)^2 in prior_space, times r when prior_by_r; 0 without v_ref.
        w_pos: the adaptive weight w+ = max(mean |error of v+|, weight_min); 1 when not adaptive.
        w_neg: w-, likewise.
        old_deviation: mean of (v_theta - v_old)^2.
        ref_deviation: mean of (v_theta - v_ref)^2; 0 without v_ref.
    """

    loss: Tensor
    loss_pos: Tensor
    loss_neg: Tensor
    prior: Tensor
    w_pos: Tensor
    w_neg: Tensor
    old_deviation: Tensor
    ref_deviation: Tensor


@typed
def nft_loss(
    *,
    v_theta: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None = None,
    x0: Tensor,
    t: Tensor,
    r: Tensor,
    seed: Tensor | None = None,
    noise: Tensor | None = None,
    nft_beta: float,
    prior_weight: float | Tensor = 0.0,
    adv_clip: float = 5.0,
    weighting: Literal["x0_adaptive", "x0", "velocity"] = "x0_adaptive",
    space: Literal["x0", "velocity"] | None = None,
    scale: float | None = None,
    weight_min: float | None = None,
    prior_space: Literal["x0", "velocity"] = "velocity",
    sigma: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Literal["video", "chunk"] = "video",
    schedule: str | Schedule = "rectified_flow",
    layout: Layout = "BCFHW",
    frame_mask: Tensor | None = None,
    prior_by_r: bool = False,
) -> NftLoss:
    """The DiffusionNFT loss with a prior to the frozen base, in one op (arXiv 2509.16117).

    With v+ = (1 - nft_beta) v_old + nft_beta v_theta, v- = (1 + nft_beta) v_old - nft_beta v_theta,
    v* the target velocity and x0+-, x0_theta, x0_ref the clean latents that velocities imply,
        mean_b sample_weight_b (scale [r L+ + (1 - r) L-] + prior_weight_b prior).
    `weighting` names the usual forms of it; `space`, `scale`, `weight_min` and `prior_space` change
    one thing about them:
        "x0_adaptive"  L+- = mean (x0+- - x0)^2 / w+-,  w+- = max(mean |x0+- - x0|, weight_min), a
                       constant;  scale = adv_clip / nft_beta: the official code's total
        "x0"           L+- = mean (x0+- - x0)^2;  scale = 1
        "velocity"     L+- = mean (v+- - v*)^2;   scale = 1
    Noise, x_t and v* are regenerated inside; the gradient with respect to v_theta is computed in
    the forward, so a step allocates that gradient and O(B) scalars. Without adaptive weights the
    forward reads every input once, else twice.

    Args:
        v_theta: the trained policy's velocity at x_t, [B, ...]; float32, bfloat16 or float16.
        v_old: the old policy's, shape and dtype of v_theta, without gradient.
        v_ref: the frozen base's, likewise, or None (then prior_weight must be 0).
        x0: clean latents, shape of v_theta; may have another dtype than the predictions.
        t: float32 [B], [B, K] or [B, F], as given to forward_noise.
        r: float32 [B] or [B, K] in [0, 1], the optimality weight clamp(A/(2 adv_clip) + .5, 0, 1);
            afd.ops.optimality makes it from rewards.
        seed: int64 [B], as given to forward_noise; or
        noise: the noise itself, shape of x0, float32 or x0's dtype.
        nft_beta: mixes the velocities, > 0.
        prior_weight: weighs the prior (elsewhere called KL beta), >= 0; a number, or float32 [B]
            for one of each sample. A prior averaged over some samples only has the weight
            w B / (number of those) there and 0 elsewhere, because the mean is over the batch.
        adv_clip: the bound to which advantages were clipped, > 0; only part of the default scale.
        weighting: "x0_adaptive", "x0" or "velocity".
        space: the space of the errors and of w; None: that of `weighting`. Only "x0_adaptive" may
            be given another one ("velocity": adaptive weights on velocity errors).
        scale: > 0, of both branches; None: that of `weighting`.
        weight_min: > 0, the smallest adaptive weight; None: 1e-5. Refused without adaptive weights.
        prior_space: "velocity", the mean of (v_theta - v_ref)^2, or "x0", of (x0_theta - x0_ref)^2.
        sigma: float32, shaped like t ([B], [B, K] or [B, F]), in [0, 1] and at least 1e-6 t: the
            sigma of x0 = x_t - sigma v where it is not the t at which x_t was noised, as in
            trainers that look sigma up in a table. Only for the rectified flow, and with the error
            or the prior in x0 space. None: t's own.
        sample_weight: float32 [B], >= 0, of a sample's whole loss; the mean stays one over B. In
            float16 gradients above 65,504 overflow: keep it at B or below (docs/NUMERICS.md).
        group: w+- per "video" or per "chunk" (K then comes from r, else from t).
        schedule: a name or a Schedule.
        layout: which dimension holds the frames; ignored when everything is per video.
        frame_mask: bool [B, F]; frames where it is False are ignored.
        prior_by_r: weighs each video's (chunk's) prior by its r.

    Returns:
        NftLoss. `loss` is float32 (float64 for float64 inputs), computed in float32 with float64
        sums in a fixed order: the same bits every run, for every thread count.

    Raises:
        ValueError: naming the argument, the value given and what is needed. On an accelerator t,
            r, sigma and weights are not range-checked, to avoid a synchronisation; the loss is then
            NaN.
        RuntimeError: if another argument than v_theta requires a gradient.
    """
    how = resolve(schedule)
    require(isinstance(v_theta, Tensor), "v_theta", v_theta, "a tensor")
    per_sample = isinstance(prior_weight, Tensor)
    needs_grad = torch.is_grad_enabled() and v_theta.requires_grad
    loss, metrics, _ = _nft_loss.nft_loss(
        *(v_theta, v_old, v_ref, x0, t, r, seed, noise, frame_mask, sigma),
        prior_weight if per_sample else None,
        sample_weight,
        nft_beta,
        1.0 if per_sample else prior_weight,
        adv_clip,
        weighting,
        space,
        scale,
        weight_min,
        prior_space,
        group,
        prior_by_r,
        how.name,
        list(how.args),
        layout,
        needs_grad,
    )
    per_group = metrics.squeeze(1) if group == "video" else metrics
    return NftLoss(loss, *per_group.unbind(-1))


@typed
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    *,
    k_context: Tensor | None = None,
    v_context: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which a block of queries attends to at most two contiguous key intervals.

    softmax(scale q k^T) v over each query's keys only: no mask, no padding, no concatenation.
    Block-causal training, windows with a sink, teacher forcing and the cached rollout are all
    Intervals; afd.ops.intervals builds them.

    Args:
        q: [B, L, h, d], float32, bfloat16, float16 or float64. q, k, v and the context may be
            slices of larger tensors (a fused QKV projection, a cache): they are used in place if
            the last dimension is contiguous.
        k: [B, N, h, d], q's dtype.
        v: [B, N, h, d], likewise.
        intervals: the keys each query attends to, in tokens, over the keys [k_context | k].
        k_context: [B, Nc, h, d], keys that precede k, without a concatenation; no interval may
            cross from them into k. None: no context.
        v_context: [B, Nc, h, d], likewise.
        scale: scale of the scores, > 0; None: d^-1/2.

    Returns:
        out [B, L, h, d], contiguous, q's dtype; 0 for a query without keys.
        lse [B, h, L] float32 (float64 for float64): log-sum-exp (natural logarithm) of
        scale q k^T, -inf for a query without keys; not differentiable.
        Differentiable once with respect to q, k, v and the context. Gradients of keys and values
        (k, v, or the context) that do not require them are not computed.

    Raises:
        ValueError: naming the argument, the value given and what is needed.
    """
    require(isinstance(q, Tensor), "q", q, "a tensor")
    return _block_attention.block_attention(
        q,
        k,
        v,
        k_context,
        v_context,
        intervals.flat(),
        intervals.streams,
        q.shape[-1] ** -0.5 if scale is None else scale,
    )


@typed
def qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rope: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """RMS-normalises queries and keys over all heads' channels, then applies RoPE.

    With r = 1 / sqrt(mean over the token's h·d channels of q² + eps), channels (2j, 2j+1) of
    q · r · weight_q are rotated as one complex number by (cos, sin) of pair j. float32 arithmetic,
    rounded once (Wan2.1's released code rounds three times; qk_norm_rope/MATH.md).

    Args:
        q: [B, L, h, d], d even; float32, bfloat16, float16 or float64. Slices of a fused
            projection are read in place: only a token's h·d channels must be contiguous.
        k: like q.
        weight_q: the gain [h·d], q's dtype or float32.
        weight_k: likewise.
        rope: float32 [1 or B, L, d/2, 2], cos and sin of each token's angles.
        eps: added to the mean square.

    Returns:
        q_out, k_out: [B, L, h, d], contiguous, in q's dtype. Differentiable once with respect to
        q, k and the weights; the weights' gradients are float32 sums in a fixed order.

    Raises:
        ValueError: naming the argument, the value given and what is needed.
    """
    return _qk_norm_rope.qk_norm_rope(q, k, weight_q, weight_k, rope, eps)


@typed
def qk_norm_rope_append_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    *,
    tokens_per_frame: int,
    sink_frames: int,
    eps: float = 1e-6,
) -> Tensor:
    """qk_norm_rope that writes k_out and v into a ring cache of frames and returns q_out.

    The cache holds S / tokens_per_frame frames: the first `sink_frames` stay, the rest are a ring.
    Frame f goes to frame slot f if f < sink_frames, else to
    sink_frames + (f - sink_frames) mod (capacity - sink_frames). All other slots are untouched.

    Args:
        q: [B, L, h, d] as in qk_norm_rope, with L = frames · tokens_per_frame.
        k: like q.
        weight_q: as in qk_norm_rope.
        weight_k: likewise.
        rope: likewise.
        eps: likewise.
        v: [B, L, h, d], copied unchanged.
        k_cache: [B, S, h, d], contiguous, q's dtype; written.
        v_cache: likewise.
        position: int64 [1] or [B] on q's device, the absolute frame of each stream's first token:
            read on the device, so that a CUDA graph can replay.
        tokens_per_frame: divides L and S.
        sink_frames: frames that are never overwritten; all L tokens must fit in the ring.

    Returns:
        q_out [B, L, h, d], contiguous. Not differentiable: call it under torch.no_grad.

    Raises:
        ValueError: naming the argument, the value given and what is needed. On an accelerator a
            negative position is not checked, to avoid a synchronisation, and gives NaN.
        RuntimeError: if a derivative or vmap is requested.
    """
    return _qk_norm_rope.qk_norm_rope_append_(
        q,
        k,
        v,
        weight_q,
        weight_k,
        rope,
        k_cache,
        v_cache,
        position,
        tokens_per_frame,
        sink_frames,
        eps,
    )


@typed
def adaln(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    scale_offset: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Gated residual, LayerNorm and per-frame modulation (adaLN) in one pass, as in Wan2.1.

    x_out = x + gate · branch and h = LN(x_out) · (scale_offset + scale) + shift. LN is over D,
    without affine parameters, and reads x_out rounded to x's dtype, as the next residual does.

    Args:
        x: the residual stream [B, L, D]; float32, bfloat16, float16 or float64.
        branch: the residual branch to add, like x, or None.
        gate: [1 or B, F, D] with F dividing L: one row per frame of L/F tokens; None means 1.
        scale: likewise, or [D] for all tokens. gate, scale and shift are in x's dtype or float32;
            slices of a [B, F, 6, D] table are read in place.
        shift: like scale.
        scale_offset: 1 for a modulation, 0 for the weight and bias of an affine LayerNorm.
        eps: added to the variance.

    Returns:
        x_out (x itself when branch is None) and h: [B, L, D], contiguous, in x's dtype.
        Differentiable once with respect to every tensor; sums over tokens are float32, in a fixed
        order.

    Raises:
        ValueError: naming the argument, the value given and what is needed.
    """
    x_out, h = _adaln.adaln(x, branch, gate, scale, shift, scale_offset, eps)
    return (x if branch is None else x_out), h
