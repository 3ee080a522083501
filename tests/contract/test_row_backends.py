"""Which backend of the ops on token rows a GPU gets, on a simulated one."""

from __future__ import annotations

import pytest
import torch

from afd import ops
from afd_kernels import dispatch, native
from tests.fake_cuda import fake_cuda

if native.why_missing() is not None:
    pytest.skip("needs the compiled core", allow_module_level=True)

SHAPES = {"adaln": (2, 4, 16), "qk_norm_rope": (2, 4, 2, 8)}


def chosen(op: str, shape: tuple[int, ...], device: str) -> str:
    module: str = dispatch.pick(op, torch.ones(shape, device=device)).__name__
    return module.rsplit(".", 1)[1]


@pytest.mark.parametrize("op", SHAPES)
def test_a_gpu_tries_the_compiled_core_first(op: str) -> None:
    with fake_cuda():
        assert chosen(op, SHAPES[op], "cuda") == "native_impl"
        with ops.use_backend("triton"):
            assert chosen(op, SHAPES[op], "cuda") == "triton_impl"
        assert dispatch.report("cuda", torch.bfloat16)[op]["chosen"] == "native"


@pytest.mark.parametrize("op", SHAPES)
def test_rows_too_wide_for_a_block_go_to_triton(op: str) -> None:
    channels = native.core().cuda_most_channels
    fits, wide = (1, 1, channels), (1, 1, channels + 2)
    if op == "qk_norm_rope":
        fits, wide = (1, 1, 2, channels // 2), (1, 1, 2, channels // 2 + 1)
    with fake_cuda():
        assert chosen(op, wide, "cuda") == "triton_impl"
        with ops.use_backend("native"):
            assert chosen(op, fits, "cuda") == "native_impl"
            with pytest.raises(RuntimeError, match=f"{channels + 2} channels per token"):
                chosen(op, wide, "cuda")
    assert chosen(op, wide, "cpu") == "native_impl"


def test_every_function_is_launched() -> None:
    """The simulated GPU runs an op on every backend that can: the gradient, too."""
    x = torch.ones(2, 4, 16)
    q = torch.ones(2, 4, 2, 8)
    weight, rope = torch.ones(16), torch.ones(1, 4, 4, 2)
    cache, position = torch.zeros(2, 8, 2, 8), torch.zeros(1, dtype=torch.int64)
    with fake_cuda() as gpu:
        x, q, weight, rope, cache, other, position = (
            value.cuda() for value in (x, q, weight, rope, cache, cache, position)
        )
        ops.qk_norm_rope_append_(
            q, q, q, weight, weight, rope, cache, other, position, tokens_per_frame=2, sink_frames=1
        )
        x, q = x.requires_grad_(), q.requires_grad_()
        results = [
            *ops.adaln(x, x, x[:, :2], weight, weight),
            *ops.qk_norm_rope(q, q, weight, weight, rope),
        ]
        torch.stack([result.sum() for result in results]).sum().backward()
    functions = ("adaln", "adaln_bwd", "qk_norm_rope", "qk_norm_rope_bwd")
    assert {f"{function}_cuda" for function in functions} <= gpu.launches.keys()
    assert gpu.launches["qk_norm_rope_cuda"] >= 2
