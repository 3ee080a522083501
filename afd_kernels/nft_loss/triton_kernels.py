"""Kernels of nft_loss: partial sums, an fp64 finalisation per group, the gradient; no atomics.

Letters: B batch, O outer, F frames, I inner, G groups (see contracts.NftPlan); a row is I
contiguous elements. MATH.md has the algebra and the launches; triton_impl.py launches them.
"""
# mypy: ignore-errors
# (@triton.jit bodies are not ordinary Python)

from __future__ import annotations

import triton
import triton.language as tl

from afd_kernels.forward_noise.triton_impl import lanes_left, schedule_coefficients, tile_of_row
from afd_kernels.philox_triton import normal_tile

# Columns of the partial sums [B, O * F * tiles, SUMS] fp32: |pos|, pos^2, |neg|, neg^2,
# (v_theta - v_ref)^2, (v_theta - v_old)^2 and two that pad a row to 32 bytes.
SUMS = tl.constexpr(8)
# Columns of the gradient coefficients [B, F, COEFFICIENTS] fp32: of e, of v_theta - v_old, of
# v_theta - v_ref, then alpha' and sigma'.
COEFFICIENTS = tl.constexpr(5)
METRICS = tl.constexpr(7)


@triton.jit
def _errors(
    v_theta_ptr,
    v_old_ptr,
    v_ref_ptr,
    x0_ptr,
    noise_ptr,
    seed,
    first,
    in_sample,
    lanes,
    d_alpha,
    d_sigma,
    MASKED: tl.constexpr,
    ZEROS: tl.constexpr,
    QUADS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """e = v_old - u, v_theta - v_old and v_theta - v_ref of one tile, fp32 [BLOCK].

    first: the tile's first element in the batch, in_sample: in its sample, both int64.
    MASKED reads `lanes` lanes, all without it. The others are 0 where ZEROS, which costs
    instructions, else undefined.
    """
    lane = tl.arange(0, BLOCK)
    inside = None
    other = None
    if MASKED:
        inside = lane < lanes
    if ZEROS:
        other = 0.0
    theta = tl.load(v_theta_ptr + first + lane, mask=inside, other=other).to(tl.float32)
    old = tl.load(v_old_ptr + first + lane, mask=inside, other=other).to(tl.float32)
    x0 = tl.load(x0_ptr + first + lane, mask=inside, other=other).to(tl.float32)
    from_old = theta - old
    from_ref = from_old
    if v_ref_ptr is not None:
        ref = tl.load(v_ref_ptr + first + lane, mask=inside, other=other)
        from_ref = theta - ref.to(tl.float32)
    if noise_ptr is None:
        noise = normal_tile(seed, in_sample, BLOCK, QUADS, VECTOR)
    else:
        noise = tl.load(noise_ptr + first + lane, mask=inside, other=other).to(tl.float32)
    e = tl.fma(noise, -d_sigma, tl.fma(x0, -d_alpha, old))
    if ZEROS:
        e = tl.where(inside, e, 0.0)
    return e, from_old, from_ref


@triton.jit
def _add(
    pos_abs, pos_sq, neg_abs, neg_sq, ref_sq, old_sq, e, from_old, from_ref, nft_beta,
    REF: tl.constexpr,
):  # fmt: skip
    """Adds one tile to the six running sums, lane by lane."""
    pos = tl.fma(from_old, nft_beta, e)
    neg = tl.fma(from_old, -nft_beta, e)
    pos_abs += tl.abs(pos)
    pos_sq = tl.fma(pos, pos, pos_sq)
    neg_abs += tl.abs(neg)
    neg_sq = tl.fma(neg, neg, neg_sq)
    if REF:
        ref_sq = tl.fma(from_ref, from_ref, ref_sq)
    old_sq = tl.fma(from_old, from_old, old_sq)
    return pos_abs, pos_sq, neg_abs, neg_sq, ref_sq, old_sq


@triton.jit
def _gradient(e, from_old, from_ref, c_e, c_old, c_ref, REF: tl.constexpr):
    """pos (e + d) - neg (e - d) + prior (v_theta - v_ref) with d = nft_beta (v_theta - v_old)."""
    grad = tl.fma(from_old, c_old, e * c_e)
    if REF:
        grad = tl.fma(from_ref, c_ref, grad)
    return grad


@triton.jit
def _valid_frames(mask_ptr, sample, frames, BLOCK: tl.constexpr):
    """How many frames of the sample count."""
    if mask_ptr is None:
        return tl.full((), 0, tl.int64) + frames
    else:
        count = tl.full((BLOCK,), 0, tl.int64)
        for start in range(0, frames, BLOCK):
            f = start + tl.arange(0, BLOCK)
            count += tl.load(mask_ptr + sample * frames + f, mask=f < frames, other=0).to(tl.int64)
        return tl.sum(count)


@triton.jit
def _coefficients(
    t, r, valid, w_pos, w_neg, count, batch, nft_beta, prior_weight, adv_clip, grad_power,
    ADAPTIVE: tl.constexpr, PRIOR_BY_R: tl.constexpr, SCHEDULE: tl.constexpr,
    BETA_MIN: tl.constexpr, BETA_MAX: tl.constexpr,
):  # fmt: skip
    """Coefficients of e, v_theta - v_old and v_theta - v_ref in grad_power times the gradient, in
    fp64, and alpha', sigma'.

    NaN where t or r is out of range: a device value cannot be refused without a synchronisation.
    """
    alpha, sigma, d_alpha, d_sigma = schedule_coefficients(t, SCHEDULE, BETA_MIN, BETA_MAX)
    r = tl.where((r >= 0.0) & (r <= 1.0), r, float("nan")).to(tl.float64)
    elements = tl.maximum(count, 1).to(tl.float64) * batch
    common = valid.to(tl.float64) * 2.0 / elements * grad_power
    if ADAPTIVE:
        kappa = sigma / (alpha * d_sigma - sigma * d_alpha)
        scale = common * kappa * kappa * adv_clip
    else:
        # The loss does not depend on alpha and sigma, but an invalid t must still give NaN.
        scale = common * (nft_beta + 0.0 * d_sigma)
    pos = scale * r / w_pos
    neg = scale * (1.0 - r) / w_neg
    prior = common * prior_weight
    if PRIOR_BY_R:
        prior = prior * r
    return pos - neg, (pos + neg) * nft_beta, prior, d_alpha, d_sigma


@triton.jit
def _nft_loss_partials_kernel(
    v_theta_ptr,
    v_old_ptr,
    v_ref_ptr,
    x0_ptr,
    t_ptr,
    r_ptr,
    seed_ptr,
    noise_ptr,
    mask_ptr,
    partials_ptr,
    grad_ptr,
    row_units,
    rows,
    frames,
    tiles,
    t_chunks,
    r_chunks,
    nft_beta,
    prior_weight,
    adv_clip,
    grad_power,
    SCHEDULE: tl.constexpr,
    BETA_MIN: tl.constexpr,
    BETA_MAX: tl.constexpr,
    PRIOR_BY_R: tl.constexpr,
    ONE_ROW: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The six sums of STEPS * BLOCK elements of one row.

    With grad_ptr also their gradient: velocity weighting knows its coefficients beforehand.
    """
    sample = tl.program_id(1)
    block = tl.program_id(0)
    inner = tl.full((), ROW_ALIGN, tl.int64) * row_units
    row, start, left = tile_of_row(block, inner, tiles, STEPS * BLOCK, ONE_ROW)
    frame = row % frames
    t = tl.load(t_ptr + sample * t_chunks + frame // (frames // t_chunks))
    if mask_ptr is not None:
        left = tl.where(tl.load(mask_ptr + sample * frames + frame) != 0, left, 0)
    c_e = 0.0
    c_old = 0.0
    c_ref = 0.0
    if grad_ptr is None:
        _, _, d_alpha, d_sigma = schedule_coefficients(t, SCHEDULE, BETA_MIN, BETA_MAX)
    else:
        r = tl.load(r_ptr + sample * r_chunks + frame // (frames // r_chunks))
        per_frame = inner * (rows // frames)
        count = _valid_frames(mask_ptr, sample, frames, 64) * per_frame
        e_64, old_64, ref_64, d_alpha, d_sigma = _coefficients(
            t, r, tl.full((), 1.0, tl.float64), 1.0, 1.0, count, tl.num_programs(1), nft_beta,
            prior_weight, adv_clip, grad_power, False, PRIOR_BY_R, SCHEDULE, BETA_MIN, BETA_MAX,
        )  # fmt: skip
        c_e = e_64.to(tl.float32)
        c_old = old_64.to(tl.float32)
        c_ref = ref_64.to(tl.float32)
    d_alpha = d_alpha.to(tl.float32)
    d_sigma = d_sigma.to(tl.float32)
    seed = 0
    if noise_ptr is None:
        seed = tl.load(seed_ptr + sample)
    in_sample = row.to(tl.int64) * inner + start
    first = sample.to(tl.int64) * inner * rows + in_sample
    REF: tl.constexpr = v_ref_ptr is not None
    QUADS: tl.constexpr = ROW_ALIGN > 1

    pos_abs = tl.full((BLOCK,), 0.0, tl.float32)
    pos_sq = tl.full((BLOCK,), 0.0, tl.float32)
    neg_abs = tl.full((BLOCK,), 0.0, tl.float32)
    neg_sq = tl.full((BLOCK,), 0.0, tl.float32)
    ref_sq = tl.full((BLOCK,), 0.0, tl.float32)
    old_sq = tl.full((BLOCK,), 0.0, tl.float32)
    lane = tl.arange(0, BLOCK)
    full_steps = tl.where(left < STEPS * BLOCK, left // BLOCK, STEPS).to(tl.int32)
    for _ in range(full_steps):
        e, from_old, from_ref = _errors(
            v_theta_ptr, v_old_ptr, v_ref_ptr, x0_ptr, noise_ptr, seed, first, in_sample, BLOCK,
            d_alpha, d_sigma, False, False, QUADS, VECTOR, BLOCK,
        )  # fmt: skip
        pos_abs, pos_sq, neg_abs, neg_sq, ref_sq, old_sq = _add(
            pos_abs, pos_sq, neg_abs, neg_sq, ref_sq, old_sq, e, from_old, from_ref, nft_beta, REF
        )
        if grad_ptr is not None:
            grad = _gradient(e, from_old, from_ref, c_e, c_old, c_ref, REF)
            tl.store(grad_ptr + first + lane, grad.to(grad_ptr.dtype.element_ty))
        first += BLOCK
        in_sample += BLOCK
    left -= full_steps.to(tl.int64) * BLOCK
    if (full_steps < STEPS) & (left > 0):
        lanes = lanes_left(left, BLOCK)
        e, from_old, from_ref = _errors(
            v_theta_ptr, v_old_ptr, v_ref_ptr, x0_ptr, noise_ptr, seed, first, in_sample, lanes,
            d_alpha, d_sigma, True, True, QUADS, VECTOR, BLOCK,
        )  # fmt: skip
        pos_abs, pos_sq, neg_abs, neg_sq, ref_sq, old_sq = _add(
            pos_abs, pos_sq, neg_abs, neg_sq, ref_sq, old_sq, e, from_old, from_ref, nft_beta, REF
        )
        if grad_ptr is not None:
            grad = _gradient(e, from_old, from_ref, c_e, c_old, c_ref, REF)
            tl.store(grad_ptr + first + lane, grad.to(grad_ptr.dtype.element_ty), mask=lane < lanes)
    out = partials_ptr + (sample.to(tl.int64) * tl.num_programs(0) + block) * SUMS
    tl.store(out, tl.sum(pos_abs))
    tl.store(out + 1, tl.sum(pos_sq))
    tl.store(out + 2, tl.sum(neg_abs))
    tl.store(out + 3, tl.sum(neg_sq))
    tl.store(out + 4, tl.sum(ref_sq))
    tl.store(out + 5, tl.sum(old_sq))


@triton.jit
def _column(values, column, index: tl.constexpr):
    return tl.sum(tl.where(column == index, values, 0.0))


@triton.jit
def _nft_loss_finalize_kernel(
    partials_ptr,
    t_ptr,
    r_ptr,
    mask_ptr,
    metrics_ptr,
    losses_ptr,
    coefficients_ptr,
    row_units,
    outer,
    frames,
    tiles,
    t_chunks,
    r_chunks,
    nft_beta,
    prior_weight,
    adv_clip,
    grad_power,
    ADAPTIVE: tl.constexpr,
    PRIOR_BY_R: tl.constexpr,
    SCHEDULE: tl.constexpr,
    BETA_MIN: tl.constexpr,
    BETA_MAX: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    FRAMES: tl.constexpr,
    PARALLEL: tl.constexpr,
):
    """Metrics, share of the loss and gradient coefficients of one group of frames, in fp64.

    Grid (groups, batch). FRAMES frames and PARALLEL partial sums of each are added side by side,
    in an order that depends on the launch configuration alone.
    """
    sample = tl.program_id(1)
    group = tl.program_id(0)
    members = frames // tl.num_programs(0)
    per_frame = (tl.full((), ROW_ALIGN, tl.int64) * row_units) * outer
    count = _valid_frames(mask_ptr, sample, frames, 64) * per_frame

    column = tl.arange(0, SUMS)
    plain = tl.full((SUMS,), 0.0, tl.float64)
    by_r = tl.full((SUMS,), 0.0, tl.float64)
    in_group = tl.full((), 0, tl.int64)
    for first in range(0, members, FRAMES):
        member = first + tl.arange(0, FRAMES)
        exists = member < members
        f = group * members + tl.where(exists, member, 0)
        valid = exists
        if mask_ptr is not None:
            valid = exists & (tl.load(mask_ptr + sample * frames + f) != 0)
        sums = tl.full((FRAMES, PARALLEL, SUMS), 0.0, tl.float64)
        for start in range(0, outer * tiles, PARALLEL):
            k = start + tl.arange(0, PARALLEL)
            row = (k // tiles)[None, :] * frames + f[:, None]
            block = (sample.to(tl.int64) * outer * frames + row) * tiles + (k % tiles)[None, :]
            wanted = valid[:, None] & (k < outer * tiles)[None, :]
            sums += tl.load(
                partials_ptr + block[:, :, None] * SUMS + column[None, None, :],
                mask=wanted[:, :, None] & (column < 6)[None, None, :],
                other=0.0,
            ).to(tl.float64)
        total = tl.sum(sums, axis=1)
        t = tl.load(t_ptr + sample * t_chunks + f // (frames // t_chunks))
        r = tl.load(r_ptr + sample * r_chunks + f // (frames // r_chunks))
        r = tl.where((r >= 0.0) & (r <= 1.0), r, float("nan")).to(tl.float64)
        alpha, sigma, d_alpha, d_sigma = schedule_coefficients(t, SCHEDULE, BETA_MIN, BETA_MAX)
        # Propagate the NaN of a t outside the schedule even if the formula does not use t.
        kappa = 1.0 + 0.0 * d_sigma
        if ADAPTIVE:
            kappa = sigma / (alpha * d_sigma - sigma * d_alpha)
        power = tl.where((column & 1)[None, :] == 1, (kappa * kappa)[:, None], kappa[:, None])
        weighted = total * tl.where((column < 4)[None, :], power, 1.0)
        plain += tl.sum(weighted, axis=0)
        by_r += tl.sum(weighted * r[:, None], axis=0)
        in_group += tl.sum(valid.to(tl.int64)) * per_frame

    elements = tl.maximum(in_group, 1).to(tl.float64)
    sq_pos = _column(plain, column, 1)
    sq_neg = _column(plain, column, 3)
    pull_pos = _column(by_r, column, 1)
    pull_neg = sq_neg - _column(by_r, column, 3)
    ref_sq = _column(plain, column, 4)
    prior = ref_sq
    if PRIOR_BY_R:
        prior = _column(by_r, column, 4)
    w_pos = tl.full((), 1.0, tl.float64)
    w_neg = w_pos
    scale = w_pos
    if ADAPTIVE:
        # Not maximum(): it drops a NaN.
        w_pos = _column(plain, column, 0) / elements
        w_neg = _column(plain, column, 2) / elements
        w_pos = tl.where(w_pos < 1e-5, 1e-5, w_pos)
        w_neg = tl.where(w_neg < 1e-5, 1e-5, w_neg)
        scale = scale * adv_clip / nft_beta
    of_batch = tl.maximum(count, 1).to(tl.float64) * tl.num_programs(1)
    loss = scale * (pull_pos / w_pos + pull_neg / w_neg) + prior_weight * prior
    place = sample * tl.num_programs(0) + group
    tl.store(losses_ptr + place, loss / of_batch)
    columns = metrics_ptr + place * METRICS
    tl.store(columns, sq_pos / w_pos / elements)
    tl.store(columns + 1, sq_neg / w_neg / elements)
    tl.store(columns + 2, prior / elements)
    tl.store(columns + 3, w_pos)
    tl.store(columns + 4, w_neg)
    tl.store(columns + 5, _column(plain, column, 5) / elements)
    tl.store(columns + 6, ref_sq / elements)

    if coefficients_ptr is not None:
        for first in range(0, members, FRAMES):
            member = first + tl.arange(0, FRAMES)
            exists = member < members
            f = group * members + tl.where(exists, member, 0)
            valid = exists
            if mask_ptr is not None:
                valid = exists & (tl.load(mask_ptr + sample * frames + f) != 0)
            t = tl.load(t_ptr + sample * t_chunks + f // (frames // t_chunks))
            r = tl.load(r_ptr + sample * r_chunks + f // (frames // r_chunks))
            c_e, c_old, c_ref, d_alpha, d_sigma = _coefficients(
                t, r, valid.to(tl.float64), w_pos, w_neg, count, tl.num_programs(1), nft_beta,
                prior_weight, adv_clip, grad_power, ADAPTIVE, PRIOR_BY_R, SCHEDULE, BETA_MIN,
                BETA_MAX,
            )  # fmt: skip
            out = coefficients_ptr + (sample * frames + f) * COEFFICIENTS
            tl.store(out, c_e.to(tl.float32), mask=exists)
            tl.store(out + 1, c_old.to(tl.float32), mask=exists)
            tl.store(out + 2, c_ref.to(tl.float32), mask=exists)
            tl.store(out + 3, d_alpha.to(tl.float32), mask=exists)
            tl.store(out + 4, d_sigma.to(tl.float32), mask=exists)


@triton.jit
def _store_loss(losses_ptr, loss_ptr, groups, batch):
    """Adds up the groups' shares of the loss; one scalar after the other keeps this short."""
    total = tl.full((), 0.0, tl.float64)
    for k in range(groups * batch):
        total += tl.load(losses_ptr + k)
    tl.store(loss_ptr, total.to(tl.float32))


@triton.jit
def _nft_loss_total_kernel(losses_ptr, loss_ptr, groups, batch):
    """The loss, where no gradient kernel runs after the finalisation."""
    _store_loss(losses_ptr, loss_ptr, groups, batch)


@triton.jit
def _nft_loss_grad_kernel(
    v_theta_ptr,
    v_old_ptr,
    v_ref_ptr,
    x0_ptr,
    seed_ptr,
    noise_ptr,
    mask_ptr,
    coefficients_ptr,
    grad_ptr,
    losses_ptr,
    loss_ptr,
    row_units,
    rows,
    frames,
    tiles,
    groups,
    ONE_ROW: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient, last tile first: the partial sums left the last tiles in the L2 cache."""
    batch = tl.num_programs(1)
    sample = batch - 1 - tl.program_id(1)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    inner = tl.full((), ROW_ALIGN, tl.int64) * row_units
    row, start, left = tile_of_row(block, inner, tiles, BLOCK, ONE_ROW)
    frame = row % frames
    coefficients = coefficients_ptr + (sample * frames + frame) * COEFFICIENTS
    c_e = tl.load(coefficients)
    c_old = tl.load(coefficients + 1)
    c_ref = tl.load(coefficients + 2)
    d_alpha = tl.load(coefficients + 3)
    d_sigma = tl.load(coefficients + 4)
    seed = 0
    if noise_ptr is None:
        seed = tl.load(seed_ptr + sample)
    in_sample = row.to(tl.int64) * inner + start
    first = sample.to(tl.int64) * inner * rows + in_sample
    lanes = lanes_left(left, BLOCK)
    seen = lanes
    if mask_ptr is not None:
        # A masked frame is not read, since it may contain NaN. Its coefficients are 0.
        seen = tl.where(tl.load(mask_ptr + sample * frames + frame) != 0, lanes, 0)
    REF: tl.constexpr = v_ref_ptr is not None
    e, from_old, from_ref = _errors(
        v_theta_ptr, v_old_ptr, v_ref_ptr, x0_ptr, noise_ptr, seed, first, in_sample, seen,
        d_alpha, d_sigma, True, mask_ptr is not None, ROW_ALIGN > 1, VECTOR, BLOCK,
    )  # fmt: skip
    grad = _gradient(e, from_old, from_ref, c_e, c_old, c_ref, REF)
    lane = tl.arange(0, BLOCK)
    tl.store(grad_ptr + first + lane, grad.to(grad_ptr.dtype.element_ty), mask=lane < lanes)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        _store_loss(losses_ptr, loss_ptr, groups, batch)


@triton.jit
def _nft_loss_scale_kernel(
    grad_ptr, scale_ptr, out_ptr, elements, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr
):
    """out = grad * scale; in place a scale of exactly 1 touches nothing."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if (not IN_PLACE) | (scale != 1.0):
        first = tl.program_id(0).to(tl.int64) * BLOCK
        lane = tl.arange(0, BLOCK)
        inside = lane < lanes_left(elements - first, BLOCK)
        grad = tl.load(grad_ptr + first + lane, mask=inside).to(tl.float32)
        tl.store(out_ptr + first + lane, (grad * scale).to(out_ptr.dtype.element_ty), mask=inside)
