"""Losses in a CUDA graph: a replay reads seeds, times and inputs anew and gives the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from afd import ops
from tests.cases import CASES, Case

# Both weightings, chunks, masks, halves and layouts; all regenerate their noise from seeds.
NAMES = ("velocity", "bf16", "per_chunk", "masked_frames", "frames_first", "many_tiles")
SEEDED = [case for case in CASES if case.name in NAMES]


def step(i: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """x_t, the loss and the gradient of v_theta."""
    source = {name: i[name] for name in ("seed", "noise", "schedule", "layout")}
    x_t = ops.forward_noise(i["x0"], i["t"], **source)
    out = ops.nft_loss(**i)
    (grad,) = torch.autograd.grad(out.loss, i["v_theta"])
    return x_t, out.loss.detach(), out.w_pos.detach(), grad


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("case", SEEDED, ids=lambda case: case.name)
def test_a_captured_loss_replays_with_other_seeds_times_and_inputs(
    case: Case, backend: str
) -> None:
    held = case.inputs("cuda")
    refusal = ops.explain("nft_loss", "cuda", {torch.float32})[backend]
    assert refusal is None, refusal
    with ops.use_backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(held)
        before = None
        for again in (1, 2):
            with torch.no_grad():
                for name in ("v_theta", "v_old", "x0"):
                    held[name].add_(0.1 * again)
                held["t"].mul_(0.9)
                if held["seed"] is not None:
                    held["seed"].add_(again)
            graph.replay()
            replayed = [x.clone() for x in captured]
            for x, y in zip(replayed, step(held), strict=True):
                assert torch.equal(x, y)
            assert before is None or not torch.equal(before, replayed[0])
            before = replayed[0]
