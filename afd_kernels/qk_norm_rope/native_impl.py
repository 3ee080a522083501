"""qk_norm_rope through the compiled core (csrc/cpu and csrc/cuda). Letters as in contract.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afd_kernels import native
from afd_kernels.kept import Kept

KEEPS = True


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    """The reason why the compiled core cannot run this, or None."""
    return native.refuse(device, dtypes)


def unfit(tensors: Sequence[Tensor]) -> str | None:
    """The reason why the CUDA kernels cannot take these tensors (rows first), or None."""
    return native.refuse_rows(tensors[0], tensors[0].shape[2] * tensors[0].shape[3])


def _problem(q: Tensor, k: Tensor, weight_q: Tensor, rope: Tensor, eps: float) -> Any:
    """The fields common to all passes, without the addresses."""
    problem = native.core().QkNormRopeProblem()
    problem.batch, problem.tokens, problem.heads, problem.head_dim = q.shape
    problem.type = native.type_code(q.dtype)
    problem.weight_type = native.type_code(weight_q.dtype)
    problem.rope_batch = rope.stride(0) if rope.shape[0] > 1 else 0
    problem.eps = eps
    problem.q, problem.k = native.rows(q), native.rows(k)
    return problem


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor,
    eps: float,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """q_out and k_out [B, L, h, d], contiguous; q and k may be strided over B and L."""
    problem = native.take(kept, lambda: _problem(q, k, weight_q, rope, eps))
    q_out, k_out = native.empty_like(q), native.empty_like(k)
    problem.place(q, k, None, weight_q, weight_k, rope, None, None, None, q_out, k_out)
    native.run_rows("qk_norm_rope", problem, q)
    native.put_back(kept, problem)
    return q_out, k_out


def qk_norm_rope_bwd(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor,
    eps: float,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k [B, L, h, d] and of the weights [D], summed over tokens in fp32."""

    def make() -> Any:
        problem = _problem(q, k, weight_q, rope, eps)
        problem.grad_q, problem.grad_k = native.rows(grad_q), native.rows(grad_k)
        return problem

    problem = native.take(kept, make)
    dq, dk = native.empty_like(q), native.empty_like(k)
    dweight_q, dweight_k = (
        torch.empty(weight_q.shape, dtype=torch.float32, device=q.device) for _ in range(2)
    )
    problem.place_bwd(
        *(grad_q, grad_k, q, k, weight_q, weight_k, rope, dq, dk, dweight_q, dweight_k)
    )
    native.run_rows("qk_norm_rope_bwd", problem, q, scratch=True)
    native.put_back(kept, problem)
    return dq, dk, dweight_q.to(weight_q.dtype), dweight_k.to(weight_k.dtype)


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
    tokens_per_frame: int,
    sink_frames: int,
    eps: float,
    kept: Kept | None = None,
) -> Tensor:
    """q_out; k_out and v are written to the cache slots of their frames."""

    def make() -> Any:
        problem = _problem(q, k, weight_q, rope, eps)
        problem.v = native.rows(v)
        problem.positions, problem.slots = position.numel(), k_cache.shape[1]
        problem.tokens_per_frame, problem.sink_frames = tokens_per_frame, sink_frames
        return problem

    problem = native.take(kept, make)
    q_out = native.empty_like(q)
    problem.place(*(q, k, v, weight_q, weight_k, rope, k_cache, v_cache, position, q_out, None))
    native.run_rows("qk_norm_rope", problem, q)
    native.put_back(kept, problem)
    return q_out
