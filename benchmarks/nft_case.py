"""The DiffusionNFT loss as a benchmark case: inputs, all providers, and the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afd import ops
from benchmarks import official, suite
from benchmarks.suite import OURS, Inputs, Step

NFT_BETA, PRIOR_WEIGHT = 0.1, 1e-4
# Dtypes of the predictions, of the latents and of the noise.
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32, torch.float32),
}
# Bounds of ||g - g64|| / ||g64|| and |loss - loss64| / |loss64|: fp32 arithmetic, or one rounding
# of the gradient to bf16. Eager mixes the velocities in bf16 before it subtracts them.
BOUND = {"fp32": 1e-5, "bf16": 4e-3, "mixed": 4e-3}
EAGER_BOUND = {"fp32": 1e-5, "bf16": 5e-2, "mixed": 5e-2}
_EAGER_BYTES = 250  # per element: eager's peak memory, including the inputs


@dataclass(frozen=True)
class Nft:
    """One case of the loss; `shape` is that of a sample."""

    weighting: str
    dtype: str
    batch: int
    shape: tuple[int, ...]

    def case(self) -> suite.Case:
        """The case in the suite's format."""
        numel = self.batch * torch.Size(self.shape).numel()
        return suite.Case(
            op="nft_loss",
            name=self.weighting,
            dtype=self.dtype,
            dtypes=set(DTYPES[self.dtype]),
            batch=self.batch,
            numel=numel,
            eager_bytes=_EAGER_BYTES * numel,
            inputs=self.inputs,
            step=self.step,
            exact=self.exact,
            errors=errors,
            bound=lambda provider: (BOUND if provider in OURS else EAGER_BOUND)[self.dtype],
            bytes=lambda source: self.bytes(numel, source),
        )

    def bytes(self, numel: int, source: str) -> tuple[int, int]:
        """Bytes of one pass and of the algorithm: the adaptive weights need a separate pass."""
        prediction, latent, noise = (dtype.itemsize for dtype in DTYPES[self.dtype])
        reads = 3 * prediction + latent + (noise if source == "given" else 0)
        passes = 2 if self.weighting == "x0_adaptive" else 1
        return numel * (reads + prediction), numel * (passes * reads + prediction)

    def inputs(self, device: str, seed: int) -> Inputs:
        """Random tensors, with the trained policy near the old one."""
        generator = torch.Generator(device).manual_seed(seed)
        prediction, latent, noise = DTYPES[self.dtype]

        def draw() -> Tensor:
            return torch.randn(self.batch, *self.shape, generator=generator, device=device)

        v_old = draw()
        t, r = torch.rand(2, self.batch, generator=generator, device=device)
        return {
            "v_theta": (v_old + 0.1 * draw()).to(prediction).requires_grad_(),
            "v_old": v_old.to(prediction),
            "v_ref": (v_old + 0.1 * draw()).to(prediction),
            "x0": draw().to(latent),
            "t": 0.05 + 0.9 * t,
            "r": r,
            "seed": torch.randint(2**62, (self.batch,), generator=generator, device=device),
            "noise": draw().to(noise),
        }

    def step(self, provider: str, source: str) -> Step:
        """Forward and backward: a function from inputs to (loss, gradient of v_theta)."""
        if provider in OURS:
            return self._our_step(provider, source)
        loss: Step = official_loss(self.weighting)
        if source == "seed":
            loss = suite.drawing(loss)
        if provider == "compile":
            loss = torch.compile(loss, dynamic=False, fullgraph=True)
        return lambda i: differentiate(loss(i), i)

    def _our_step(self, backend: str, source: str) -> Step:
        options: dict[str, Any] = {
            "nft_beta": NFT_BETA,
            "prior_weight": PRIOR_WEIGHT,
            "weighting": self.weighting,
        }
        eps = "noise" if source == "given" else "seed"

        def step(i: Inputs) -> tuple[Tensor, Tensor]:
            names = ("v_theta", "v_old", "v_ref", "x0", "t", "r", eps)
            tensors: dict[str, Any] = {name: i[name] for name in names}
            with ops.use_backend(backend):
                return differentiate(ops.nft_loss(**options, **tensors).loss, i)

        return step

    def exact(self, inputs: Inputs) -> dict[str, tuple[Tensor, Tensor]]:
        """Loss and gradient in float64, with the given noise and with the seeds' noise."""
        return {
            "given": self.oracle(inputs),
            "seed": self.oracle(inputs | {"noise": suite.seeded_noise(inputs)}),
        }

    def oracle(self, i: Inputs) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the formula in float64, sample by sample to bound memory."""
        losses, grads = [], []
        for b in range(self.batch):
            one = {name: x[b : b + 1].detach().double() for name, x in i.items() if name != "seed"}
            one["v_theta"].requires_grad_()
            loss, grad = differentiate(official_loss(self.weighting)(one), one)
            losses.append(loss.detach())
            grads.append(grad / self.batch)
        return torch.stack(losses).mean(), torch.cat(grads)


def official_loss(weighting: str) -> Callable[[Inputs], Tensor]:
    """The official formula as a function of inputs that include the noise."""

    def loss(i: Inputs) -> Tensor:
        shared: dict[str, Any] = {k: i[k] for k in ("v_theta", "v_old", "v_ref", "x0", "r")}
        shared |= {"nft_beta": NFT_BETA, "prior_weight": PRIOR_WEIGHT}
        if weighting == "velocity":
            return official.velocity_loss(noise=i["noise"], **shared)[0]
        x_t = official.noised(i["x0"], i["noise"], i["t"])
        return official.diffusionnft_loss(x_t=x_t, t=i["t"], **shared)[0]

    return loss


def errors(output: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Relative errors of loss and gradient."""
    return {
        name: ((x.detach().double() - x64).norm() / x64.norm()).item()
        for name, x, x64 in zip(("loss", "grad"), output, exact, strict=True)
    }


def differentiate(loss: Tensor, i: Inputs) -> tuple[Tensor, Tensor]:
    (grad,) = torch.autograd.grad(loss, i["v_theta"])
    return loss, grad
