"""A DiffusionNFT step before and after: thirty lines of loss, or one call of afd.ops.

    python examples/diffusionnft_drop_in.py

`before` is a trainer's step as DiffusionNFT trainers write it (its loss is the thirty lines of
benchmarks/official.py). `after` is the same step on afd.ops. Both train the same tiny diffusion
transformer; loss and gradient agree, and the table shows what the loss costs in each.

Letters: B batch, C channels, F frames, H, W rows and columns, L tokens, D width.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

# So that it runs from a checkout where nothing is installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd import ops
from benchmarks import harness, official

NFT_BETA, PRIOR_WEIGHT = 0.1, 1e-4
# Calls of each side before the first timed one, and timed calls of each side.
WARM_UP, ROUNDS = 3, 20
CHANNELS, PATCH, WIDTH, HEADS = 16, 2, 64, 4


class Block(nn.Module):
    """Attention and MLP, each modulated by the time (adaLN)."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x_BLD: Tensor, time_B1D: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(time_B1D).chunk(6, dim=-1)
        h_BLD = nn.functional.layer_norm(x_BLD, (WIDTH,)) * (1 + scale) + shift
        q, k, v = self.qkv(h_BLD).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x_BLD = x_BLD + gate * self.out(attended.transpose(1, 2).flatten(2))
        h_BLD = nn.functional.layer_norm(x_BLD, (WIDTH,)) * (1 + scale2) + shift2
        return x_BLD + gate2 * self.mlp(h_BLD)


class TinyDiT(nn.Module):
    """Predicts the velocity of latents [B, C, F, H, W] at time t [B]."""

    def __init__(self) -> None:
        super().__init__()
        patch = (1, PATCH, PATCH)
        self.embed = nn.Conv3d(CHANNELS, WIDTH, patch, patch)
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.unembed = nn.ConvTranspose3d(WIDTH, CHANNELS, patch, patch)

    def forward(self, x_BCFHW: Tensor, t_B: Tensor) -> Tensor:
        h = self.embed(x_BCFHW)
        x_BLD, time_B1D = h.flatten(2).transpose(1, 2), self.time(t_B[:, None])[:, None]
        for block in self.blocks:
            x_BLD = block(x_BLD, time_B1D)
        return self.unembed(x_BLD.transpose(1, 2).reshape(h.shape))


@dataclass
class Policies:
    """The trained policy, the one that made the samples, and the frozen base."""

    theta: nn.Module
    old: nn.Module
    ref: nn.Module


def before(p: Policies, x0: Tensor, t: Tensor, r: Tensor, noise: Tensor) -> Tensor:
    """The step of a DiffusionNFT trainer: it holds the noise, x_t, and every term of the loss."""
    x_t = official.noised(x0, noise, t)
    v_theta = p.theta(x_t, t)
    with torch.no_grad():
        v_old, v_ref = p.old(x_t, t), p.ref(x_t, t)
    loss, _metrics = official.diffusionnft_loss(
        v_theta=v_theta,
        v_old=v_old,
        v_ref=v_ref,
        x0=x0,
        x_t=x_t,
        t=t,
        r=r,
        nft_beta=NFT_BETA,
        prior_weight=PRIOR_WEIGHT,
    )
    return loss


def after(p: Policies, x0: Tensor, t: Tensor, r: Tensor, seed: Tensor) -> Tensor:
    """The same step: the noise is a function of 64 bits per sample, regenerated where needed."""
    x_t = ops.forward_noise(x0, t, seed=seed)
    v_theta = p.theta(x_t, t)
    with torch.no_grad():
        v_old, v_ref = p.old(x_t, t), p.ref(x_t, t)
    result = ops.nft_loss(
        v_theta=v_theta,
        v_old=v_old,
        v_ref=v_ref,
        x0=x0,
        t=t,
        r=r,
        seed=seed,
        nft_beta=NFT_BETA,
        prior_weight=PRIOR_WEIGHT,
    )
    return result.loss  # result.w_pos, result.old_deviation, ... are the metrics


def main(shape: tuple[int, ...] = (2, CHANNELS, 5, 30, 52)) -> dict[str, float]:
    """Runs both steps, prints them side by side and returns the differences."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    base = TinyDiT()
    policies = Policies(copy.deepcopy(base), copy.deepcopy(base), base)
    with torch.no_grad():  # some training later, the three differ
        for policy in (policies.theta, policies.old):
            for weight in policy.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
    for policy in (policies.theta, policies.old, policies.ref):
        policy.to(device)
    x0 = torch.randn(shape).to(device)
    t, r = torch.rand(2, shape[0]).to(device)
    seed = ops.draw_seeds(shape[0]).to(device)
    # The noise the seeds stand for: noising zeros at t = 1 gives it.
    noise = ops.forward_noise(torch.zeros_like(x0), torch.ones_like(t), seed=seed)

    weights = list(policies.theta.parameters())
    steps: dict[str, Callable[[], Tensor]] = {
        "before": lambda: before(policies, x0, t, r, noise),
        "after": lambda: after(policies, x0, t, r, seed),
    }
    losses = {name: step() for name, step in steps.items()}
    grads = {
        name: torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
        for name, loss in losses.items()
    }
    print_table(device, losses, grads, loss_costs(device, shape, x0, t, r, noise, seed))
    change = (grads["after"] - grads["before"]).norm() / grads["before"].norm()
    return {
        "loss": (losses["after"] / losses["before"] - 1).abs().item(),
        "grad": change.item(),
    }


def loss_costs(
    device: str,
    shape: tuple[int, ...],
    x0: Tensor,
    t: Tensor,
    r: Tensor,
    noise: Tensor,
    seed: Tensor,
) -> dict[str, tuple[float, float]]:
    """Median milliseconds and peak MiB of each loss, forward and backward, without the model."""
    v_theta, v_old, v_ref = (torch.randn(shape).to(device) for _ in range(3))
    v_theta.requires_grad_()
    shared: dict[str, Any] = {"v_theta": v_theta, "v_old": v_old, "v_ref": v_ref}
    shared |= {"x0": x0, "t": t, "r": r, "nft_beta": NFT_BETA, "prior_weight": PRIOR_WEIGHT}

    def old_loss(_: int) -> object:
        x_t = official.noised(x0, noise, t)
        loss, _metrics = official.diffusionnft_loss(**shared, x_t=x_t)
        return torch.autograd.grad(loss, v_theta)

    def new_loss(_: int) -> object:
        return torch.autograd.grad(ops.nft_loss(**shared, seed=seed).loss, v_theta)

    runs: dict[str, harness.Run] = {"before": old_loss, "after": new_loss}
    timings = timed_alike(runs, device)
    return {
        name: (timings[name].median_ms, harness.peak_mib(run, device)) for name, run in runs.items()
    }


def timed_alike(runs: dict[str, harness.Run], device: str) -> dict[str, harness.Timing]:
    """Every run warmed up, then timed in the same rounds, which take turns in who is first."""
    for _ in range(WARM_UP):
        for run in runs.values():
            run(0)
    return harness.timed(runs, device, sets=1, reps=ROUNDS, budget_s=float("inf"))


def print_table(
    device: str,
    losses: dict[str, Tensor],
    grads: dict[str, Tensor],
    costs: dict[str, tuple[float, float]],
) -> None:
    """Old code and one call, side by side."""
    backend = ops.report(device)["nft_loss"]["chosen"]
    table = Table(title=f"one DiffusionNFT step on {device}, backend {backend}")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    lines: list[tuple[str, str, Callable[[str], float]]] = [
        ("loss", ".7f", lambda name: losses[name].item()),
        ("norm of the policy's gradient", ".7f", lambda name: grads[name].norm().item()),
        ("loss and its backward, ms", ".2f", lambda name: costs[name][0]),
        ("its peak memory, MiB", ".2f", lambda name: costs[name][1]),
    ]
    for label, digits, value in lines:
        table.add_row(label, format(value("before"), digits), format(value("after"), digits))
    Console().print(table)


if __name__ == "__main__":
    main()
