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
FUNCTIONS = [(op, op + suffix) for op in SHAPES for suffix in ("", "_bwd")]


def chosen(op: str, function: str, shape: tuple[int, ...], device: str) -> str:
    module: str = dispatch.pick(op, torch.ones(shape, device=device), function=function).__name__
    return module.rsplit(".", 1)[1]


@pytest.mark.parametrize(("op", "function"), FUNCTIONS)
def test_a_gpu_takes_triton_forward_and_the_compiled_core_backward(op: str, function: str) -> None:
    with fake_cuda():
        preferred = "triton_impl" if function == op else "native_impl"
        assert chosen(op, function, SHAPES[op], "cuda") == preferred
        with ops.use_backend("native"):
            assert chosen(op, function, SHAPES[op], "cuda") == "native_impl"
    assert chosen(op, function, SHAPES[op], "cpu") == "native_impl"


@pytest.mark.parametrize(("op", "function"), FUNCTIONS)
def test_rows_too_wide_for_a_block_go_to_triton(op: str, function: str) -> None:
    channels = native.core().cuda_most_channels
    fits, wide = (1, 1, channels), (1, 1, channels + 2)
    if op == "qk_norm_rope":
        fits, wide = (1, 1, 2, channels // 2), (1, 1, 2, channels // 2 + 1)
    with fake_cuda():
        assert chosen(op, function, wide, "cuda") == "triton_impl"
        with ops.use_backend("native"):
            assert chosen(op, function, fits, "cuda") == "native_impl"
            with pytest.raises(RuntimeError, match=f"a token has {channels + 2} channels, a CUDA"):
                chosen(op, function, wide, "cuda")
    assert chosen(op, function, wide, "cpu") == "native_impl"


def test_the_report_names_what_runs_forward() -> None:
    with fake_cuda():
        assert dispatch.report("cuda", torch.bfloat16)["adaln"]["chosen"] == "triton"
        assert dispatch.report("cuda", torch.bfloat16)["nft_loss"]["chosen"] == "native"
