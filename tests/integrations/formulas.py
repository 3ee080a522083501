"""Other trainers' NFT losses in float64 PyTorch, sample by sample, and golden files made from them.

    python -m tests.integrations.formulas    # writes tests/integrations/goldens

Written from the trainers' formulas, independently of afd and of its benchmarks. A golden file holds
a case's inputs (float32 values), its constants as metadata, and the float64 loss and gradient.

Letters: B samples, C channels, F frames, H, W rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
Inputs = dict[str, Tensor]
PREDICTIONS = ("v_theta", "v_old", "v_ref")


def advantage_to_r(advantage: Tensor, low: float, high: float, mode: str = "all") -> Tensor:
    """r of one advantage: clipped, changed by `mode`, mapped to [0, 1]."""
    a = min(max(float(advantage), low), high)
    if mode == "positive_only":
        a = max(a, 0.0)
    elif mode == "negative_only":
        a = min(a, 0.0)
    elif mode == "one_only":
        a = 1.0 if a > 0 else 0.0
    elif mode == "binary":
        a = float((a > 0) - (a < 0))
    return torch.tensor(min(max(a / high / 2 + 0.5, 0.0), 1.0), dtype=torch.float64)


def branch(x_t: Tensor, sigma: Tensor, v: Tensor, x0: Tensor, floor: float | None) -> Tensor:
    """Squared error of the x0 that a velocity implies; with `floor` over its own mean size."""
    error = x_t - sigma * v - x0
    if floor is None:
        return (error**2).mean()
    size = torch.clamp(error.detach().abs().mean(), min=floor)
    return (error**2 / size).mean()


def policy(x: Inputs, b: int, sigma: Tensor, r: Tensor, beta: float, floor: float | None) -> Tensor:
    """r L+ + (1 - r) L- of sample b."""
    new, old, x0 = x["v_theta"][b], x["v_old"][b], x["x0"][b]
    x_t = x["x_t"][b]
    positive = branch(x_t, sigma, beta * new + (1 - beta) * old, x0, floor)
    negative = branch(x_t, sigma, (1 + beta) * old - beta * new, x0, floor)
    return r * positive + (1 - r) * negative


def official(x: Inputs, c: Mapping[str, Any]) -> Tensor:
    """DiffusionNFT, FastVideo, Flow-Factory, verl-omni: adaptive, clip / beta, prior on v."""
    low, high = c["clip"]
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(x["x0"])):
        if "r" in x:
            r = x["r"][b]
        else:
            r = advantage_to_r(x["advantage"][b], low, high, c.get("mode", "all"))
        loss = policy(x, b, x["t"][b], r, c["beta"], c.get("floor", 1e-5))
        prior = ((x["v_theta"][b] - x["v_ref"][b]) ** 2).mean()
        total = total + loss / c["beta"] * high + c["kl"] * prior
    return total / len(x["x0"])


def unirl(x: Inputs, c: Mapping[str, Any]) -> Tensor:
    """UniRL: the same, adaptive or not."""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(x["x0"])):
        r = advantage_to_r(x["advantage"][b], -c["sat"], c["sat"])
        loss = policy(x, b, x["t"][b], r, c["beta"], 1e-5 if c["adaptive"] else None)
        prior = ((x["v_theta"][b] - x["v_ref"][b]) ** 2).mean()
        total = total + c["sat"] * loss / c["beta"] + c["kl"] * prior
    return total / len(x["x0"])


def astrolabe(x: Inputs, c: Mapping[str, Any]) -> Tensor:
    """Astrolabe: plain errors at the table's sigma; the prior's mean is over selected samples."""
    batch = len(x["x0"])
    chosen = [b for b in range(batch) if "selected" not in x or bool(x["selected"][b])]
    total = torch.zeros((), dtype=torch.float64)
    for b in range(batch):
        r = advantage_to_r(x["advantage"][b], -c["clip"], c["clip"])
        total = total + policy(x, b, x["sigma"][b], r, c["beta"], None) / batch
    for b in chosen:
        new = x["x_t"][b] - x["sigma"][b] * x["v_theta"][b]
        ref = x["x_t"][b] - x["sigma"][b] * x["v_ref"][b]
        total = total + c["kl"] * ((new - ref) ** 2).mean() / len(chosen)
    return total


def worldcompass(x: Inputs, c: Mapping[str, Any]) -> Tensor:
    """WorldCompass: adaptive, beta = 1, last frames of [C, F, H, W], over the accumulation."""
    target = {k: v[:, :, -c["frames"] :] if v.ndim == 5 else v for k, v in x.items()}
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(x["x0"])):
        r = advantage_to_r(x["advantage"][b], -c["clip"], c["clip"])
        total = total + policy(target, b, x["t"][b], r, 1.0, 1e-5)
    return total / len(x["x0"]) / c["accumulation"]


@dataclass(frozen=True)
class Case:
    """A trainer's loss at one setting.

    Attributes:
        page: the page of examples/integrations.
        formula: the loss of float64 inputs, which hold x_t.
        constants: what the formula takes beside tensors.
        extra: tensors beside predictions, x0, t and advantages.
    """

    page: str
    formula: Callable[[Inputs, Mapping[str, Any]], Tensor]
    constants: dict[str, Any]
    extra: dict[str, Tensor] = field(default_factory=dict)

    def inputs(self, seed: int = 0) -> Inputs:
        """Float32 values: predictions near each other, advantages on both sides of the clip."""
        g = torch.Generator().manual_seed(seed)
        shape = (4, 2, 4, 3, 4)
        x = {"x0": torch.randn(shape, generator=g), "noise": torch.randn(shape, generator=g)}
        x["v_theta"] = x["noise"] - x["x0"] + 0.3 * torch.randn(shape, generator=g)
        x["v_old"] = x["v_theta"] + 0.1 * torch.randn(shape, generator=g)
        x["v_ref"] = x["v_theta"] + 0.1 * torch.randn(shape, generator=g)
        x["t"] = torch.tensor([0.25, 0.5, 0.75, 0.9375])
        x["advantage"] = torch.tensor([-7.0, -0.4, 0.9, 6.0])
        return x | self.extra

    def value(self, x: Inputs, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss and gradient of v_theta in float64 for inputs of any dtype."""
        wide = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
        eps = wide["noise"] if noise is None else noise.double()
        t = wide["t"].view(-1, 1, 1, 1, 1)
        wide["x_t"] = (1 - t) * wide["x0"] + t * eps
        wide["v_theta"].requires_grad_()
        loss = self.formula(wide, self.constants)
        (grad,) = torch.autograd.grad(loss, wide["v_theta"])
        return loss.detach(), grad


def _official(page: str, **more: Any) -> Case:
    extra = more.pop("extra", {})
    return Case(page, official, {"beta": 0.1, "kl": 1e-2, "clip": (-5.0, 5.0)} | more, extra)


_SIGMA = torch.tensor([0.25159743, 0.50059956, 0.75000006, 0.9375])
_SELECTED = torch.tensor([True, False, True, True])
CASES = {
    **{
        f"diffusionnft_{mode}": _official("diffusionnft", mode=mode)
        for mode in ("all", "positive_only", "negative_only", "one_only", "binary")
    },
    "fastvideo": _official("fastvideo", kl=1e-4, mode="all"),
    "flow_factory": _official("flow_factory", clip=(-2.0, 5.0)),
    "verl_omni": _official(
        "verl_omni", floor=0.4, extra={"r": torch.tensor([0.0, 0.46, 0.59, 1.0])}
    ),
    "unirl_adaptive": Case("unirl", unirl, {"beta": 1.0, "kl": 1e-2, "sat": 5.0, "adaptive": True}),
    "unirl_plain": Case("unirl", unirl, {"beta": 0.5, "kl": 1e-2, "sat": 3.0, "adaptive": False}),
    "astrolabe": Case(
        "astrolabe", astrolabe, {"beta": 0.1, "kl": 0.04, "clip": 5.0}, {"sigma": _SIGMA}
    ),
    "astrolabe_selective": Case(
        "astrolabe",
        astrolabe,
        {"beta": 0.1, "kl": 0.04, "clip": 5.0},
        {"sigma": _SIGMA, "selected": _SELECTED},
    ),
    "worldcompass": Case(
        "worldcompass", worldcompass, {"clip": 2.0, "frames": 3, "accumulation": 2}
    ),
}


def write() -> None:
    """Write the golden file of every case."""
    from safetensors.torch import save_file

    GOLDENS.mkdir(exist_ok=True)
    for name, case in CASES.items():
        x = case.inputs()
        loss, grad = case.value(x)
        about = {key: repr(value) for key, value in case.constants.items()}
        tensors = x | {"loss": loss, "grad": grad}
        save_file(tensors, GOLDENS / f"{name}.safetensors", metadata=about)


if __name__ == "__main__":
    write()
