"""Runs the CUDA kernels once on small awkward shapes, under compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/sanitize.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd import ops
from benchmarks import row_ops
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


# Heads with and without whole packs, several warps, token runs with a tail: (frames, tokens per
# frame, heads, width).
ROWS = ((3, 17, 3, 10), (2, 37, 3, 40), (1, 5, 12, 128), (2, 1, 1, 2))


def drive_rows() -> None:
    """Forward and backward of the token-row ops in the compiled core."""
    for op in row_ops.OPS:
        for dtype in row_ops.DTYPES:
            for shape in ROWS:
                case = row_ops.Case(op, dtype, 2, *shape)
                results = case.step("native")(case.tensors("cuda", 0))
                torch.cuda.synchronize()
                if not all(bool(torch.isfinite(x).all()) for x in results):
                    sys.exit(f"{case} {shape}: a result is not finite")
        print(f"native {op}: ran", flush=True)


def main() -> None:
    cases = [case for case in CASES if case.name in NAMES]
    for backend in ("native", "triton"):
        refusal = ops.explain("nft_loss", "cuda", {torch.float32})[backend]
        if refusal is not None:
            sys.exit(f"{backend}: {refusal}")
        for case in cases:
            drive(case, backend)
            print(f"{backend} {case}: ran", flush=True)
    drive_rows()


if __name__ == "__main__":
    main()
