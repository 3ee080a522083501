"""float16 backwards under a loss scale: the scaled gradient in, float64's, rounded once, out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from afd import ops
from afd_kernels.dispatch import OPS, explain, use_backend

SCALE = 65536.0
# What arrives unscaled: of a mean over a video's latents, near float16's smallest number.
INCOMING = 1e-6
Inputs = dict[str, Tensor]


def adaln() -> tuple[Inputs, Callable[[Inputs], Tensor]]:
    inputs = {name: torch.randn(2, 48, 256) for name in ("x", "branch")}
    inputs |= {name: torch.randn(2, 3, 256) for name in ("gate", "scale", "shift")}
    return inputs, lambda i: torch.stack(ops.adaln(**i))


def qk_norm_rope() -> tuple[Inputs, Callable[[Inputs], Tensor]]:
    inputs = {name: torch.randn(2, 48, 4, 32) for name in ("q", "k")}
    inputs |= {name: torch.randn(128) for name in ("weight_q", "weight_k")}
    angles = torch.randn(1, 48, 16)
    rope = torch.stack((angles.cos(), angles.sin()), dim=-1)
    return inputs, lambda i: torch.stack(ops.qk_norm_rope(**i, rope=rope))


def block_attention() -> tuple[Inputs, Callable[[Inputs], Tensor]]:
    inputs = {name: torch.randn(1, 96, 2, 32) for name in "qkv"}
    intervals = ops.Intervals((((0, 48, 0, 48, 0, 0), (48, 96, 0, 24, 48, 96)),))
    return inputs, lambda i: ops.block_attention(**i, intervals=intervals)[0]


def forward_noise() -> tuple[Inputs, Callable[[Inputs], Tensor]]:
    noise = torch.randn(2, 3, 4, 24, 24).half()
    run = lambda i: ops.forward_noise(  # noqa: E731
        i["x0"], torch.tensor([0.3, 0.6]), noise=noise.to(i["x0"].dtype)
    )
    return {"x0": torch.randn(2, 3, 4, 24, 24)}, run


MAKERS = {make.__name__: make for make in (adaln, qk_norm_rope, block_attention, forward_noise)}


@pytest.mark.parametrize(("op", "backend"), [(op, backend) for op in MAKERS for backend in OPS[op]])
def test_a_scaled_float16_backward_is_float64s(op: str, backend: str) -> None:
    reason = explain(op, "cpu", {torch.float16})[backend]
    if reason:
        pytest.skip(reason)
    torch.manual_seed(0)
    made, run = MAKERS[op]()
    inputs = {name: x.half().requires_grad_() for name, x in made.items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    with use_backend(backend, op):
        result = run(inputs)
        grad = (torch.randn(result.shape) * INCOMING * SCALE).half()
        got = torch.autograd.grad(result, list(inputs.values()), grad)
    with use_backend("reference", op):
        expected = torch.autograd.grad(run(wide), list(wide.values()), grad.double())
    for name, mine, exact in zip(inputs, got, expected, strict=True):
        once = exact.half().double()
        error, floor = (mine.double() - exact).norm(), (once - exact).norm()
        assert error <= 3 * floor, (name, float(error / floor))
        assert abs(int((mine == 0).sum()) - int((once == 0).sum())) <= mine.numel() / 1000, name
