"""qk_norm_rope through the compiled core (csrc/cpu). Letters as in contract.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd_kernels import native


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    """Why the compiled core cannot run this, or None."""
    if device == "cuda":
        return "the compiled core has no CUDA kernel for qk_norm_rope"
    return native.refuse(device, dtypes)


def _problem(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rope: Tensor, eps: float
) -> Any:
    problem = native.core().QkNormRopeProblem()
    problem.batch, problem.tokens, problem.heads, problem.head_dim = q.shape
    problem.type = native.type_code(q.dtype)
    problem.weight_type = native.type_code(weight_q.dtype)
    problem.eps = eps
    problem.q, problem.k = native.rows(q), native.rows(k)
    problem.weight_q, problem.weight_k = weight_q.data_ptr(), weight_k.data_ptr()
    problem.rope = rope.data_ptr()
    problem.rope_batch = rope.stride(0) if rope.shape[0] > 1 else 0
    return problem


def qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """q_out and k_out [B, L, h, d], contiguous; q and k may be strided over B and L."""
    problem = _problem(q, k, weight_q, weight_k, rope, eps)
    q_out, k_out = native.empty_like(q), native.empty_like(k)
    problem.q_out, problem.k_out = q_out.data_ptr(), k_out.data_ptr()
    native.core().qk_norm_rope_cpu(problem, native.threads(q))
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k [B, L, h, d] and of the weights [D], summed over tokens in fp32."""
    problem = _problem(q, k, weight_q, weight_k, rope, eps)
    problem.grad_q, problem.grad_k = native.rows(grad_q), native.rows(grad_k)
    dq, dk = native.empty_like(q), native.empty_like(k)
    dweight_q, dweight_k = (torch.empty(weight_q.shape, dtype=torch.float32) for _ in range(2))
    problem.dq, problem.dk = dq.data_ptr(), dk.data_ptr()
    problem.dweight_q, problem.dweight_k = dweight_q.data_ptr(), dweight_k.data_ptr()
    native.core().qk_norm_rope_bwd_cpu(problem, native.threads(q))
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
) -> Tensor:
    """q_out; k_out and v go to the slots of their frames."""
    problem = _problem(q, k, weight_q, weight_k, rope, eps)
    q_out = native.empty_like(q)
    problem.q_out = q_out.data_ptr()
    problem.v = native.rows(v)
    problem.k_cache, problem.v_cache = k_cache.data_ptr(), v_cache.data_ptr()
    problem.position, problem.positions = position.data_ptr(), position.numel()
    problem.slots = k_cache.shape[1]
    problem.tokens_per_frame = tokens_per_frame
    problem.sink_frames = sink_frames
    native.core().qk_norm_rope_cpu(problem, native.threads(q))
    return q_out
