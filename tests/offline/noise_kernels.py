"""The smallest kernels around the noise helpers, and how to launch them."""
# mypy: ignore-errors
# (@triton.jit bodies are a language of their own)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from afd_kernels.forward_noise.triton_impl import (
    INTERPRETED,
    schedule_coefficients,
    tile_of_row,
)
from afd_kernels.philox_triton import normal_tile, philox_quads

__all__ = ["INTERPRETED", "coefficients", "fma_rounds_once", "noise", "place", "words"]


@triton.jit
def _noise_kernel(
    seed_ptr, start_ptr, out_ptr, BLOCK: tl.constexpr, QUADS: tl.constexpr, VECTOR: tl.constexpr
):
    values = normal_tile(tl.load(seed_ptr), tl.load(start_ptr), BLOCK, QUADS, VECTOR)
    tl.store(out_ptr + tl.arange(0, BLOCK), values)


@triton.jit
def _words_kernel(seed_ptr, quad_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox_quads(tl.load(seed_ptr), tl.load(quad_ptr) + lane)
    tl.store(out_ptr + lane, w0.to(tl.int64))
    tl.store(out_ptr + BLOCK + lane, w1.to(tl.int64))
    tl.store(out_ptr + 2 * BLOCK + lane, w2.to(tl.int64))
    tl.store(out_ptr + 3 * BLOCK + lane, w3.to(tl.int64))


@triton.jit
def _place_kernel(block_ptr, inner_ptr, tiles, out_ptr, TILE: tl.constexpr, ONE_ROW: tl.constexpr):
    row, start, left = tile_of_row(tl.load(block_ptr), tl.load(inner_ptr), tiles, TILE, ONE_ROW)
    tl.store(out_ptr, row.to(tl.int64))
    tl.store(out_ptr + 1, start)
    tl.store(out_ptr + 2, left)


@triton.jit
def _coefficients_kernel(
    t_ptr, out_ptr, SCHEDULE: tl.constexpr, BETA_MIN: tl.constexpr, BETA_MAX: tl.constexpr
):
    at = tl.program_id(0)
    found = schedule_coefficients(tl.load(t_ptr + at), SCHEDULE, BETA_MIN, BETA_MAX)
    for i in tl.static_range(4):
        tl.store(out_ptr + 4 * at + i, found[i])


@triton.jit
def _fma_kernel(ab_ptr, c_ptr, out_ptr):
    tl.store(out_ptr, tl.fma(tl.load(ab_ptr), tl.load(ab_ptr), tl.load(c_ptr)))


def fma_rounds_once(device: str) -> bool:
    """Whether fma is one here: every GPU's is, that of Triton 3.7's interpreter is not."""
    a, c, out = torch.tensor([[1 + 2.0**-12], [-1 - 2.0**-11], [0.0]], device=device)
    _fma_kernel[(1,)](a, c, out, enable_fp_fusion=False)
    return out.item() == 2.0**-24


def coefficients(t: torch.Tensor, schedule: str, beta: tuple[float, float]) -> torch.Tensor:
    """alpha, sigma, alpha', sigma' fp64 [n, 4] of a schedule at t fp32 [n]."""
    out = torch.empty(t.numel(), 4, dtype=torch.float64, device=t.device)
    _coefficients_kernel[(t.numel(),)](t, out, schedule, *beta, enable_fp_fusion=False)
    return out


def noise(seed: int, start: int, out: torch.Tensor, quads: bool, vector: int) -> None:
    """Fills out [n], n a power of 2, with the noise of elements start, start + 1, ..."""
    scalars = torch.tensor([[seed], [start]], device=out.device)
    _noise_kernel[(1,)](
        scalars[0],
        scalars[1],
        out,
        BLOCK=out.numel(),
        QUADS=quads,
        VECTOR=vector,
        enable_fp_fusion=False,
    )


def words(seed: int, quad: int, out: torch.Tensor) -> None:
    """Fills out int64 [4, n] with the Philox words of counters quad, quad + 1, ..."""
    scalars = torch.tensor([[seed], [quad]], device=out.device)
    _words_kernel[(1,)](scalars[0], scalars[1], out, BLOCK=out.shape[1])


def place(block: int, inner: int, tiles: int, tile: int, one_row: bool, device: str) -> list[int]:
    """Row, first element and elements left of the block-th tile."""
    block_i32 = torch.tensor([block], dtype=torch.int32, device=device)
    out = torch.empty(3, dtype=torch.int64, device=device)
    inner_i64 = torch.tensor([inner], device=device)
    _place_kernel[(1,)](block_i32, inner_i64, tiles, out, TILE=tile, ONE_ROW=one_row)
    return out.tolist()
