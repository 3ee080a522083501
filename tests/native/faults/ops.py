"""Every native op with injected failures; run by test_faults.py with the shim preloaded.

For each op the n-th allocation of the compiled core fails, n = 0, 1, ..., until the op gets by:
once alone and once with all after it. Each failure is a MemoryError, and the op runs right after.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import afd_kernels  # noqa: F401 (registers torch.ops.afd.*)
from afd_kernels.dispatch import use_backend
from afd_kernels.nft_loss.contract import NftInputs, NftOptions

AFD = torch.ops.afd
OPTIONS = NftOptions(nft_beta=0.1, prior_weight=0.0)


def calls() -> dict[str, Callable[[], Any]]:
    """Calls of the ops themselves, large enough for several threads."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 40, 64)
    t, seed = torch.tensor([0.3, 0.6]), torch.tensor([1, 2])
    mask = torch.tensor([[True, False, True, True]] * 2)
    q, k, v = torch.randn(3, 2, 1200, 4, 32).unbind()
    w, rope = torch.randn(128), torch.randn(1, 1200, 16, 2)
    tokens = torch.randn(2, 1200, 128)
    row = torch.randn(1, 3, 128)

    def append() -> tuple[Tensor, ...]:
        caches = torch.zeros(2, 2, 2400, 4, 32).unbind()
        out = AFD.qk_norm_rope_append_(
            q, k, v, w, w, rope, *caches, torch.tensor([0]), 300, 1, 1e-6
        )
        return out, *caches

    return {
        "forward_noise": lambda: AFD.forward_noise(x, t, seed, None, "rectified_flow", [], "BCFHW"),
        "forward_noise_bwd": lambda: AFD.forward_noise_bwd(x, t, "rectified_flow", [], "BCFHW"),
        "nft_loss": lambda: AFD.nft_loss(*nft_inputs(x, x, t, seed, mask), *OPTIONS),
        "nft_loss and its backward": lambda: gradient(x, t, seed, mask),
        "qk_norm_rope": lambda: AFD.qk_norm_rope(q, k, w, w, rope, 1e-6),
        "qk_norm_rope_append_": append,
        "qk_norm_rope_bwd": lambda: AFD.qk_norm_rope_bwd(q, k, q, k, w, w, rope, 1e-6),
        "adaln": lambda: AFD.adaln(tokens, tokens, row, row, row, 1.0, 1e-6),
        "adaln_bwd": lambda: AFD.adaln_bwd(tokens, tokens, tokens, tokens, row, row, 1.0, 1e-6),
    }


def nft_inputs(v_theta: Tensor, x: Tensor, t: Tensor, seed: Tensor, mask: Tensor) -> NftInputs:
    return NftInputs(v_theta, x * 0.9, None, x, t, t, seed, None, mask, sample_weight=t)


def gradient(x: Tensor, t: Tensor, seed: Tensor, mask: Tensor) -> Tensor:
    theta = x.clone().requires_grad_()
    loss, *_ = AFD.nft_loss(*nft_inputs(theta, x, t, seed, mask), *OPTIONS)
    return torch.autograd.grad(loss * 3, theta)[0]


def flat(result: Any) -> list[Tensor]:
    return [x.detach() for x in ([result] if isinstance(result, Tensor) else result)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def main(shim: Any) -> None:
    torch.set_num_threads(4)
    shim.shim_met.restype = ctypes.c_long
    shim.shim_refuse_threads(1)
    alone = {name: flat(call()) for name, call in calls().items()}
    for all_after in (0, 1):
        for name, call in calls().items():
            failures = 0
            while True:
                shim.shim_fail(ctypes.c_long(failures), all_after)
                try:
                    got = flat(call())
                except MemoryError:
                    got = None
                met = shim.shim_met()
                shim.shim_fail(ctypes.c_long(-1), 0)
                assert (got is None) == bool(met) or same(got or [], alone[name]), (name, failures)
                for _ in range(3):
                    assert same(flat(call()), alone[name]), (name, failures)
                if not met:
                    break
                failures += 1
            print(f"{name}: {failures} failing allocations", flush=True)
        shim.shim_refuse_threads(0)


if __name__ == "__main__":
    with use_backend("native"):
        main(ctypes.CDLL(sys.argv[1]))
    print("survived")
