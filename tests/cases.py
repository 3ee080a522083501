"""Shapes and inputs shared by tests and benchmarks, and the float64 oracle of the formula."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# The latent of 81 frames at 480x832: [B, C, F, H, W].
WAN_480 = (16, 21, 60, 104)


@dataclass(frozen=True)
class Case:
    """One input of nft_loss. `name` reads as the test's parameter."""

    name: str
    shape: tuple[int, ...] = (2, 4, 6, 5, 8)
    layout: str = "BCFHW"
    pred: torch.dtype = torch.float32
    latent: torch.dtype = torch.float32
    noise: torch.dtype | None = None  # None: from the seed
    t_chunks: int = 0  # 0: per video
    r_chunks: int = 0
    group: str = "video"
    weighting: str = "x0_adaptive"
    schedule: str = "rectified_flow"
    masked: bool = False
    ref: bool = True
    prior_by_r: bool = False
    nft_beta: float = 0.1
    prior_weight: float = 1e-2
    t: float | None = None  # a constant t instead of random ones

    def frames(self) -> int:
        return self.shape[self.layout.index("F")] if len(self.shape) == 5 else 1

    def inputs(self, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of afd.ops.nft_loss; v_theta requires grad."""
        g = torch.Generator().manual_seed(seed)
        batch = self.shape[0]

        def normal(dtype: torch.dtype) -> Tensor:
            return torch.randn(self.shape, generator=g).to(device, dtype)

        def uniform(chunks: int) -> Tensor:
            return torch.rand((batch, chunks) if chunks else (batch,), generator=g)

        wide = torch.float64 if torch.float64 in (self.pred, self.latent) else torch.float32
        times = uniform(self.t_chunks) * 0.98 + 0.01
        if self.t is not None:
            times = torch.full_like(times, self.t)
        mask = None
        if self.masked:
            mask = torch.rand(batch, self.frames(), generator=g) < 0.6
            mask[:, 0] = True
        v_old = normal(self.pred)
        return {
            "v_theta": (v_old + 0.1 * normal(self.pred)).requires_grad_(),
            "v_old": v_old,
            "v_ref": v_old + 0.1 * normal(self.pred) if self.ref else None,
            "x0": normal(self.latent),
            "t": times.to(device, wide),
            "r": uniform(self.r_chunks).to(device, wide),
            "seed": None
            if self.noise
            else torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g).to(device),
            "noise": normal(self.noise) if self.noise else None,
            "nft_beta": self.nft_beta,
            "prior_weight": self.prior_weight if self.ref else 0.0,
            "weighting": self.weighting,
            "group": self.group,
            "schedule": self.schedule,
            "layout": self.layout,
            "frame_mask": None if mask is None else mask.to(device),
            "prior_by_r": self.prior_by_r,
        }

    def __str__(self) -> str:
        return self.name


BASE = Case("per_video")
CASES = [
    BASE,
    replace(BASE, name="noise_given", noise=torch.float32),
    replace(BASE, name="velocity", weighting="velocity", nft_beta=1.0),
    replace(BASE, name="no_ref", ref=False),
    replace(BASE, name="bf16", pred=torch.bfloat16, latent=torch.bfloat16),
    replace(BASE, name="fp16", pred=torch.float16, latent=torch.float16),
    replace(
        BASE,
        name="bf16_predictions_fp32_latents_and_noise",
        pred=torch.bfloat16,
        noise=torch.float32,
    ),
    replace(
        BASE,
        name="bf16_latents_fp32_noise",
        pred=torch.bfloat16,
        latent=torch.bfloat16,
        noise=torch.float32,
    ),
    replace(BASE, name="per_chunk", t_chunks=2, r_chunks=2, group="chunk"),
    replace(BASE, name="t_per_chunk_r_per_video", t_chunks=2),
    replace(BASE, name="t_per_frame_group_chunk", t_chunks=6, r_chunks=3, group="chunk"),
    replace(BASE, name="velocity_per_chunk", t_chunks=3, r_chunks=3, weighting="velocity"),
    replace(BASE, name="masked_frames", masked=True, t_chunks=2, prior_by_r=True),
    replace(BASE, name="frames_first", layout="BFCHW", shape=(2, 6, 4, 5, 8), t_chunks=2),
    replace(BASE, name="odd_sizes", shape=(3, 3, 5, 7, 3), t_chunks=5),
    replace(BASE, name="one_element", shape=(1, 1)),
    replace(BASE, name="image_batch_of_five", shape=(5, 3, 9, 11)),
    replace(BASE, name="vp_cosine", schedule="vp_cosine", t_chunks=2),
    replace(BASE, name="vp_linear", schedule="vp_linear"),
    replace(BASE, name="vp_linear_velocity", schedule="vp_linear", weighting="velocity"),
    replace(BASE, name="t_near_0", t=1e-4),
    replace(BASE, name="t_is_1", t=1.0),
    replace(BASE, name="prior_by_r", prior_by_r=True, r_chunks=3, t_chunks=3, prior_weight=1.0),
    replace(BASE, name="many_tiles", shape=(2, 3, 4, 60, 104), t_chunks=2),
]


def oracle(case: Case, inputs: dict[str, Any], eps: Tensor) -> dict[str, Tensor]:
    """The formula of the DiffusionNFT code in float64 autograd, written with x0 predictions.

    Shares nothing with the package: x_t, v+-, x0+- are built explicitly; the frame loop is a loop.
    """
    five = inputs["x0"].ndim == 5
    frame_axis = case.layout.index("F") if five else 1
    frames = inputs["x0"].shape[frame_axis] if five else 1

    def frame(x: Tensor, b: int, f: int) -> Tensor:
        return x[b].select(frame_axis - 1, f) if five else x[b]

    def at(x: Tensor, b: int, f: int) -> Tensor:
        row = x[b].reshape(-1)
        return row[f * row.numel() // frames]

    theta = inputs["v_theta"].detach().double().requires_grad_()
    old, x0, eps = inputs["v_old"].double(), inputs["x0"].double(), eps.double()
    ref = None if inputs["v_ref"] is None else inputs["v_ref"].double()
    beta, batch = case.nft_beta, x0.shape[0]
    adaptive = case.weighting == "x0_adaptive"
    chunks = 1
    if case.group == "chunk":
        chunks = case.r_chunks if case.r_chunks > 1 else case.t_chunks
    loss = theta.new_zeros(())
    rows: list[list[Tensor]] = []
    for b in range(batch):
        errors: dict[str, list[list[Tensor]]] = {"pos": [], "neg": []}
        weights, priors, deviations = [], [], []
        for f in range(frames):
            if inputs["frame_mask"] is not None and not inputs["frame_mask"][b, f]:
                for key in errors:
                    errors[key].append([])
                weights.append(None)
                priors.append(None)
                deviations.append(None)
                continue
            t, r = at(inputs["t"].double(), b, f), at(inputs["r"].double(), b, f)
            alpha, sigma, d_alpha, d_sigma = _schedule(case.schedule, t)
            clean, noise = frame(x0, b, f), frame(eps, b, f)
            x_t, target = alpha * clean + sigma * noise, d_alpha * clean + d_sigma * noise
            v, v_old = frame(theta, b, f), frame(old, b, f)
            v_pos, v_neg = (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v
            for key, velocity in (("pos", v_pos), ("neg", v_neg)):
                if adaptive:
                    x0_hat = (d_sigma * x_t - sigma * velocity) / (
                        alpha * d_sigma - sigma * d_alpha
                    )
                    errors[key].append([(x0_hat - clean).flatten()])
                else:
                    errors[key].append([(velocity - target).flatten()])
            weights.append(r)
            if ref is not None:
                squared = (v - frame(ref, b, f)).square().flatten()
                priors.append(squared * (r if case.prior_by_r else 1))
            else:
                priors.append(torch.zeros_like(v).flatten())
            deviations.append((v - v_old).square().flatten())
        count = sum(p.numel() for p in priors if p is not None)
        per_sample = theta.new_zeros(())
        for g in range(chunks):
            members = [f for f in range(frames) if f // (frames // chunks) == g]
            members = [f for f in members if weights[f] is not None]
            zero = theta.new_zeros(())
            values = {}
            for key in ("pos", "neg"):
                flat = [errors[key][f][0] for f in members]
                if not flat:
                    values[key], values["w_" + key] = zero, zero + (1e-5 if adaptive else 1)
                    continue
                w = torch.cat(flat).abs().mean().clamp(min=1e-5).detach() if adaptive else zero + 1
                values["w_" + key] = w
                values[key] = torch.cat(flat).square().mean() / w
                for f, e in zip(members, flat, strict=True):
                    share = weights[f] if key == "pos" else 1 - weights[f]
                    scale = 5.0 / beta if adaptive else 1.0
                    per_sample = per_sample + scale * share * e.square().sum() / w / count
            prior = torch.cat([priors[f] for f in members]).mean() if members else zero
            moved = torch.cat([deviations[f] for f in members]).mean() if members else zero
            rows.append(
                [values["pos"], values["neg"], prior, values["w_pos"], values["w_neg"], moved]
            )
        prior_sum = sum(p.sum() for p in priors if p is not None)
        loss = loss + (per_sample + inputs["prior_weight"] * prior_sum / count) / batch
    loss.backward()
    metrics = torch.stack([torch.stack([v.detach() for v in row]) for row in rows])
    return {
        "loss": loss.detach(),
        "grad": theta.grad,
        "metrics": metrics.reshape(batch, chunks, -1),
    }


def _schedule(name: str, t: Tensor) -> tuple[Tensor, ...]:
    """alpha, sigma by their definition; their derivatives by autograd."""
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        if name == "rectified_flow":
            alpha, sigma = 1 - t, t * 1
        elif name == "vp_cosine":
            alpha, sigma = torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)
        else:
            alpha = torch.exp(-0.5 * (0.1 * t + 0.5 * (20.0 - 0.1) * t**2))
            sigma = torch.sqrt(1 - alpha**2)
        (d_alpha,) = torch.autograd.grad(alpha, t, retain_graph=True)
        (d_sigma,) = torch.autograd.grad(sigma, t)
    return alpha.detach(), sigma.detach(), d_alpha, d_sigma
