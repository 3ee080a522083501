"""Noising of latents, x_t = alpha x0 + sigma noise: eager PyTorch against afd.ops.forward_noise.

    python benchmarks/forward_noise.py               # 480x832 latents, fp32 and bf16
    python benchmarks/forward_noise.py --batch 2 --plot

Forward only (the gradient is a scaling). Checked against float64 before timing, with the noise
given, and with the noise drawn (eager, compile) or regenerated from seeds (ours).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd import ops
from benchmarks import official, suite
from benchmarks.suite import OURS, Inputs, Step

# Dtype of the latents and of the noise.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Bound of ||x_t - x_t64|| / ||x_t64||: fp32 arithmetic, or one rounding to bf16.
BOUND = {"fp32": 1e-6, "bf16": 4e-3}
_EAGER_BYTES = 80  # per element: the reference's Philox words, and the inputs


@dataclass(frozen=True)
class Noising:
    """One case of noising; `shape` is that of a sample."""

    dtype: str
    batch: int
    shape: tuple[int, ...]

    def case(self) -> suite.Case:
        """The case in the suite's format."""
        numel = self.batch * torch.Size(self.shape).numel()
        return suite.Case(
            op="forward_noise",
            name="rectified_flow",
            dtype=self.dtype,
            dtypes={DTYPES[self.dtype]},
            batch=self.batch,
            numel=numel,
            eager_bytes=_EAGER_BYTES * numel,
            inputs=self.inputs,
            step=self.step,
            exact=self.exact,
            errors=errors,
            bound=lambda provider: BOUND[self.dtype],
            bytes=lambda source: self.bytes(numel, source),
        )

    def bytes(self, numel: int, source: str) -> tuple[int, int]:
        """Bytes of one pass and of the algorithm, which is a single pass."""
        streams = 3 if source == "given" else 2
        one_pass = streams * numel * DTYPES[self.dtype].itemsize
        return one_pass, one_pass

    def inputs(self, device: str, seed: int) -> Inputs:
        """Random latents."""
        generator = torch.Generator(device).manual_seed(seed)
        shape, dtype = (self.batch, *self.shape), DTYPES[self.dtype]

        def draw() -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        return {
            "x0": draw(),
            "noise": draw(),
            "t": torch.rand(self.batch, generator=generator, device=device),
            "seed": torch.randint(2**62, (self.batch,), generator=generator, device=device),
        }

    def step(self, provider: str, source: str) -> Step:
        """A function from inputs to x_t."""
        if provider in OURS:

            def ours(i: Inputs) -> Tensor:
                name = "noise" if source == "given" else "seed"
                eps: dict[str, Any] = {name: i[name]}
                with ops.use_backend(provider):
                    return ops.forward_noise(i["x0"], i["t"], **eps)

            return ours

        def given(i: Inputs) -> Tensor:
            return official.noised(i["x0"], i["noise"], i["t"]).to(i["x0"].dtype)

        step = given if source == "given" else suite.drawing(given)
        return torch.compile(step, dynamic=False, fullgraph=True) if provider == "compile" else step

    def exact(self, inputs: Inputs) -> dict[str, Tensor]:
        """x_t in float64, with the given noise and with the seeds' noise."""
        x0, t = inputs["x0"].double(), inputs["t"].double()
        return {
            "given": official.noised(x0, inputs["noise"].double(), t),
            "seed": official.noised(x0, suite.seeded_noise(inputs).double(), t),
        }


def errors(x_t: Tensor, exact: Tensor) -> dict[str, float]:
    """Relative error of x_t."""
    return {"x_t": ((x_t.double() - exact).norm() / exact.norm()).item()}


def cases(args: Any) -> Iterator[suite.Case]:
    """Every requested dtype and batch size."""
    for batch in args.batch:
        for dtype in args.dtype:
            yield Noising(dtype, batch, tuple(args.shape)).case()


def main(argv: list[str] | None = None) -> None:
    args = suite.parse(suite.arguments(__doc__.splitlines()[0], DTYPES), argv)
    suite.run("forward_noise", cases(args), args)


if __name__ == "__main__":
    main()
