"""Drives the CUDA kernels of the losses once on small awkward shapes, under compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/sanitize.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# So that it runs from a checkout where nothing is installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd import ops
from tests.cases import CASES, Case

# Tails, several tiles, chunks, masks, both layouts, mixed dtypes.
NAMES = (
    "velocity",
    "bf16_predictions_fp32_latents_and_noise",
    "per_chunk",
    "masked_frames",
    "frames_first",
    "odd_sizes",
    "one_element",
    "many_tiles",
)


def drive(case: Case, backend: str) -> None:
    """Forward and backward of both ops, the gradient scaled out of place and in place."""
    inputs = case.inputs("cuda")
    source = {name: inputs[name] for name in ("seed", "noise", "schedule", "layout")}
    with ops.use_backend(backend):
        x0 = inputs["x0"].clone().requires_grad_()
        ops.forward_noise(x0, inputs["t"], **source).sum().backward()
        loss = ops.nft_loss(**inputs).loss * 2
        loss.backward(retain_graph=True)
        loss.backward()
    torch.cuda.synchronize()
    if not bool(torch.isfinite(inputs["v_theta"].grad).all()):
        sys.exit(f"{case} on {backend}: the gradient is not finite")


def main() -> None:
    cases = [case for case in CASES if case.name in NAMES]
    for backend in ("native", "triton"):
        refusal = ops.explain("nft_loss", "cuda", {torch.float32})[backend]
        if refusal is not None:
            sys.exit(f"{backend}: {refusal}")
        for case in cases:
            drive(case, backend)
            print(f"{backend} {case}: ran", flush=True)


if __name__ == "__main__":
    main()
