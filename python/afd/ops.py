"""The fused ops of afd: one torch op per call, differentiable and compilable.

Letters: B batch, C channels, F latent frames, H, W rows and columns, K chunks (K divides F);
L query tokens, N key tokens, h heads, d channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from afd.schedules import Schedule, resolve
from afd_kernels.adaln import op as _adaln
from afd_kernels.block_attention import intervals as intervals
from afd_kernels.block_attention import op as _block_attention
from afd_kernels.block_attention.intervals import Intervals as Intervals
from afd_kernels.dispatch import explain, report, use_backend
from afd_kernels.forward_noise import op as _forward_noise
from afd_kernels.nft_loss import op as _nft_loss
from afd_kernels.qk_norm_rope import op as _qk_norm_rope

__all__ = [
    "Intervals",
    "NftLoss",
    "adaln",
    "block_attention",
    "draw_seeds",
    "explain",
    "forward_noise",
    "intervals",
    "nft_loss",
    "qk_norm_rope",
    "qk_norm_rope_append_",
    "report",
    "use_backend",
]

Layout = Literal["BCFHW", "BFCHW"]


def draw_seeds(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """One 64-bit noise seed per sample, int64 [batch], drawn from `generator` on its device."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator, device=device)


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
        x0: [B, ...], or [B, C, F, H, W] / [B, F, C, H, W] when t is per chunk or frame;
            float32, bfloat16, float16 or float64; any strides.
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
        loss_pos: L+ = mean of the squared error of v+ (in x0 space over w+ when x0_adaptive).
        loss_neg: L-, likewise for v-.
        prior: mean of (v_theta - v_ref)^2, times r when prior_by_r; 0 without v_ref.
        w_pos: the adaptive weight w+ = max(mean |x0+ - x0|, 1e-5); 1 when weighting="velocity".
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
    prior_weight: float = 0.0,
    adv_clip: float = 5.0,
    weighting: Literal["x0_adaptive", "velocity"] = "x0_adaptive",
    group: Literal["video", "chunk"] = "video",
    schedule: str | Schedule = "rectified_flow",
    layout: Layout = "BCFHW",
    frame_mask: Tensor | None = None,
    prior_by_r: bool = False,
) -> NftLoss:
    """The DiffusionNFT loss with a prior to the frozen base, in one op (arXiv 2509.16117).

    With v+ = (1 - nft_beta) v_old + nft_beta v_theta, v- = (1 + nft_beta) v_old - nft_beta v_theta
    and x0+- the clean latents they imply at x_t, "x0_adaptive" is the official code's total
        adv_clip mean_b[(r L+ + (1 - r) L-) / nft_beta] + prior_weight mean|v_theta - v_ref|^2
        L+- = mean (x0+- - x0)^2 / w+-,   w+- = max(mean |x0+- - x0|, 1e-5), a constant;
    "velocity" is mean[r (v+ - v*)^2 + (1 - r) (v- - v*)^2] plus the same prior. Noise, x_t and v*
    are regenerated inside; the gradient with respect to v_theta is computed in the forward, so a
    step allocates that gradient and O(B) scalars.

    Args:
        v_theta: the trained policy's velocity at x_t, [B, ...]; float32, bfloat16 or float16.
        v_old: the old policy's, shape and dtype of v_theta, without gradient.
        v_ref: the frozen base's, likewise, or None (then prior_weight must be 0).
        x0: clean latents, shape of v_theta; may have another dtype than the predictions.
        t: float32 [B], [B, K] or [B, F], as given to forward_noise.
        r: float32 [B] or [B, K] in [0, 1], the optimality weight clamp(A/(2 adv_clip) + .5, 0, 1).
        seed: int64 [B], as given to forward_noise; or
        noise: the noise itself, shape of x0, float32 or x0's dtype.
        nft_beta: mixes the velocities, > 0.
        prior_weight: weighs the prior (elsewhere called KL beta), >= 0.
        adv_clip: the bound to which advantages were clipped, > 0.
        weighting: "x0_adaptive" or "velocity".
        group: w+- per "video" or per "chunk" (K then comes from r, else from t).
        schedule: a name or a Schedule.
        layout: which dimension holds the frames; ignored when everything is per video.
        frame_mask: bool [B, F]; frames where it is False are ignored.
        prior_by_r: weighs each video's (chunk's) prior by its r.

    Returns:
        NftLoss. `loss` is float32 (float64 for float64 inputs), computed in float32 with float64
        sums in a fixed order: the same bits every run, for every thread count.

    Raises:
        ValueError: naming the argument, the value given and what is needed. On an accelerator t
            and r are not range-checked, to avoid a synchronisation; the loss is then NaN.
    """
    how = resolve(schedule)
    needs_grad = torch.is_grad_enabled() and v_theta.requires_grad
    loss, metrics, _ = _nft_loss.nft_loss(
        v_theta,
        v_old,
        v_ref,
        x0,
        t,
        r,
        seed,
        noise,
        frame_mask,
        nft_beta,
        prior_weight,
        adv_clip,
        weighting,
        group,
        prior_by_r,
        how.name,
        list(how.args),
        layout,
        needs_grad,
    )
    per_group = metrics.squeeze(1) if group == "video" else metrics
    return NftLoss(loss, *per_group.unbind(-1))


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
        q, k, weight_q, weight_k, rope, eps: as in qk_norm_rope; L = frames · tokens_per_frame.
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
