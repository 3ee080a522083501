"""What the kernels are compared on: sizes with tails, addresses between 16 bytes, every option."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from afd import ops
from tests.cases import CASES, Case
from tests.cuda_on_cpu.device import Memory

BLOCK = 4096  # elements of a row that one block takes
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class NoiseCase:
    """One call of forward_noise, and of its gradient."""

    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    noise: torch.dtype | None = None
    chunks: int = 0
    schedule: str = "rectified_flow"
    layout: str = "BCFHW"
    shift: int = 0  # bytes by which every address misses 16

    def __str__(self) -> str:
        parts = ("x".join(map(str, self.shape)), str(self.dtype)[6:], str(self.noise or "seed"))
        return "-".join((*parts, self.schedule, self.layout, str(self.chunks), str(self.shift)))

    def run(self, memory: Memory | None = None) -> list[Tensor]:
        """x_t and the gradient of x0."""
        g = torch.Generator().manual_seed(3)
        batch = self.shape[0]
        x0 = torch.randn(self.shape, generator=g).to(self.dtype).requires_grad_()
        t = torch.rand((batch, self.chunks) if self.chunks else (batch,), generator=g) * 0.98 + 0.01
        noise = None if self.noise is None else torch.randn(self.shape, generator=g).to(self.noise)
        seed = torch.arange(batch) * 2**40 - 1 if noise is None else None
        grad = torch.randn(self.shape, generator=g).to(self.dtype)
        inputs = placed(memory, {"x0": x0, "t": t, "seed": seed, "noise": noise}, self.shift)
        x_t = ops.forward_noise(**inputs, schedule=self.schedule, layout=self.layout)
        x_t.backward(placed(memory, {"grad": grad}, self.shift)["grad"])
        found = inputs["x0"].grad
        assert found is not None
        return [x_t.detach(), found]


def placed(memory: Memory | None, inputs: dict[str, Any], shift: int) -> dict[str, Any]:
    """The tensors in the device's memory; shifted ones begin between two 16-byte borders."""
    if memory is None:
        return inputs
    return {
        name: memory.place(x, shift // x.element_size() * x.element_size())
        if isinstance(x, Tensor)
        else x
        for name, x in inputs.items()
    }


def run_loss(case: Case, memory: Memory | None = None, shift: int = 0) -> list[Tensor]:
    """The gradient, then the loss and every metric."""
    inputs = placed(memory, case.inputs(), shift)
    result = ops.nft_loss(**inputs)
    # Not 1: the backward would have nothing to scale.
    (result.loss * 0.5).backward()
    metrics = (result.loss_pos, result.loss_neg, result.prior, result.w_pos, result.w_neg)
    return [
        inputs["v_theta"].grad,
        *(x.detach() for x in (result.loss, *metrics, result.old_deviation, result.ref_deviation)),
    ]


VIDEO = (2, 3, 4, 3, 5)
NOISES = (
    NoiseCase((2, 3 * BLOCK + 4)),
    NoiseCase((1, BLOCK + 9), BF16),
    NoiseCase((2, BLOCK - 1), F16, noise=F16),
    NoiseCase((3, 1)),
    NoiseCase((2, 2051), BF16, noise=F32, schedule="vp_linear"),
    NoiseCase(VIDEO, F16, chunks=2, schedule="vp_cosine"),
    NoiseCase((2, 4, 3, 7, 11), BF16, chunks=4, layout="BFCHW"),
    NoiseCase((2, 777), F32, shift=4),
    NoiseCase((1, 2048), BF16, noise=BF16, shift=2),
    NoiseCase((2, 1000), F16, shift=8),
    NoiseCase((5, 40)),
)
# A row of one block and a bit, of every type.
_ROW = Case("row", shape=(2, BLOCK + 13))
LOSSES = (
    *CASES,
    _ROW,
    replace(_ROW, name="row_bf16", pred=BF16, latent=BF16, noise=BF16),
    replace(_ROW, name="row_fp16_velocity", pred=F16, latent=F16, weighting="velocity"),
    replace(_ROW, name="five_samples", shape=(5, 50)),
)
