"""qk_norm_rope and adaln allocate their results and nothing the size of a token row each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from afd import ops
from afd_kernels.dispatch import use_backend

MIB = 2**20
# Thread stacks, allocator slack and the page cache of the interpreter; a result is larger.
SLACK = 6 * MIB

# Measures the kernel's own high-water mark of resident memory, as test_memory.py does.
SCRIPT = """
import sys, torch
from tests.ops.test_row_memory import calls
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
torch.set_num_threads(2)
def measure(frames):
    call, size = calls(frames, "cpu")[sys.argv[1]]
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    kept = call()
    return status("VmHWM") - before, size
measure(1)
print(*measure(60))
"""

Call = tuple[Callable[[], object], int]


def calls(frames: int, device: str) -> dict[str, Call]:
    """A call on fused, sliced inputs and the bytes of what it returns, by name."""
    tokens, heads, width = 256, 4, 64
    length, channels = frames * tokens, heads * width

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)

    q, k, v = ones(1, length, 3, heads, width).unbind(2)
    weight, rope = ones(channels), torch.ones(1, length, width // 2, 2, device=device)
    caches = [ones(1, 2 * length, heads, width) for _ in "kv"]
    position = torch.tensor([1], device=device)
    x, branch = ones(1, length, 2, channels).unbind(2)
    gate, scale, shift = ones(1, frames, 6, channels).unbind(2)[:3]
    row = 2 * length * channels
    bwd = torch.ops.afd
    return {
        "qk_norm_rope": (lambda: ops.qk_norm_rope(q, k, weight, weight, rope), 2 * row),
        "append": (
            lambda: ops.qk_norm_rope_append_(
                *(q, k, v, weight, weight, rope, *caches, position),
                tokens_per_frame=tokens,
                sink_frames=1,
            ),
            row,
        ),
        "qk_norm_rope_bwd": (
            lambda: bwd.qk_norm_rope_bwd(q, k, q, k, weight, weight, rope, 1e-6),
            2 * row,
        ),
        "adaln": (lambda: ops.adaln(x, branch, gate, scale, shift), 2 * row),
        "norm": (lambda: ops.adaln(x, None, None, scale, shift), row),
        "adaln_bwd": (
            lambda: bwd.adaln_bwd(x, x, x, branch, gate, scale, 1.0, 1e-6),
            2 * row,
        ),
    }


NAMES = ("qk_norm_rope", "append", "qk_norm_rope_bwd", "adaln", "norm", "adaln_bwd")


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs"
)
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_core_allocates_its_results(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, name],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    peak, size = map(int, run.stdout.split())
    assert size <= peak + SLACK, "the measurement must see the results themselves"
    assert peak <= size + SLACK


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_triton_allocates_its_results(name: str) -> None:
    """And, backwards, a fp32 partial row or three per block of tokens."""
    call, size = calls(60, "cuda")[name]
    with use_backend("triton"):
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        peak = torch.cuda.max_memory_allocated() - before
    assert kept is not None
    partial = size // 4 if name.endswith("_bwd") else 0
    assert peak <= size + partial + MIB
