"""A training step of nft_loss allocates only the gradient and O(B) scalars."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afd import ops
from afd_kernels.dispatch import use_backend
from tests.cases import BASE

MIB = 2**20
# Thread stacks, allocator slack and the page cache of the interpreter; far below one gradient.
SLACK = 6 * MIB

# Measures the kernel's own high-water mark of resident memory, so that allocations of the compiled
# core count too. /proc/self/clear_refs resets the mark (Linux).
SCRIPT = """
import sys, torch
from afd import ops
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
dtype, leaf = getattr(torch, sys.argv[1]), sys.argv[2] == "leaf"
noise_given = sys.argv[3] == "noise"
torch.set_num_threads(2)
def step(count):
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(2, count, generator=g).to(dtype) for _ in range(4)]
    noise = torch.randn(2, count, generator=g) if noise_given else None
    v = x[0].requires_grad_()
    v_theta = v if leaf else v.view_as(v)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    out = ops.nft_loss(v_theta=v_theta, v_old=x[1], v_ref=x[2], x0=x[3], t=torch.full((2,), 0.3),
        r=torch.full((2,), 0.7), seed=None if noise_given else torch.tensor([1, 2]), noise=noise,
        nft_beta=0.1, prior_weight=1e-4)
    (out.loss * 0.25).backward()
    return status("VmHWM") - before, v.grad.numel() * v.grad.element_size()
step(1 << 16)
print(*step(8 << 20))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs"
)
@pytest.mark.parametrize("noise", ["seed", "noise"])
@pytest.mark.parametrize("use", ["leaf", "inner"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_step_allocates_one_gradient(dtype: str, use: str, noise: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, dtype, use, noise],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, grad = map(int, run.stdout.split())
    assert grad <= peak + SLACK, "the measurement must see the gradient itself"
    assert peak <= grad + SLACK


def test_a_kept_graph_may_allocate_another_gradient() -> None:
    """The opposite case, which shows that the donation depends on retain_graph."""
    inputs = BASE.inputs()
    loss = ops.nft_loss(**inputs).loss
    (first,) = torch.autograd.grad(loss, inputs["v_theta"], retain_graph=True)
    (second,) = torch.autograd.grad(loss, inputs["v_theta"])
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_step_allocates_one_gradient(backend: str, dtype: torch.dtype) -> None:
    shape = (2, 16, 21, 60, 104)
    x = [torch.randn(shape, device="cuda").to(dtype) for _ in range(4)]
    scalars = {k: torch.full((2,), 0.5, device="cuda") for k in ("t", "r")}
    seed = ops.draw_seeds(2).cuda()
    v_theta = x[0].requires_grad_().view_as(x[0])
    with use_backend(backend):
        for _ in range(2):  # the first run compiles
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = ops.nft_loss(
                v_theta=v_theta, v_old=x[1], v_ref=x[2], x0=x[3], **scalars, seed=seed, nft_beta=0.1
            )
            torch.autograd.grad(out.loss * 0.5, v_theta)
            peak = torch.cuda.max_memory_allocated() - before
            del out
    assert peak <= x[0].numel() * x[0].element_size() + MIB
