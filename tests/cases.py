"""Shapes and inputs shared by tests and benchmarks, and the float64 oracle of the formula."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from afd_kernels.nft_loss.contract import NftInputs, NftOptions

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
    space: str | None = None
    scale: float | None = None
    weight_min: float | None = None
    prior_space: str = "velocity"
    sigma_chunks: int | None = None  # None: no sigma; 0: per video
    weighted: bool = False  # prior_weight and sample_weight per sample

    def frames(self) -> int:
        split = len(self.shape) == len(self.layout)
        return self.shape[self.layout.index("F")] if split else 1

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
        prior_weight: float | Tensor = self.prior_weight if self.ref else 0.0
        sigma = sample_weight = None
        if self.sigma_chunks is not None:
            sigma = (uniform(self.sigma_chunks) * 0.9 + 0.1).to(device, wide)
        if self.weighted:
            sample_weight = (uniform(0) * 2).to(device, wide)
            prior_weight = (uniform(0) * self.prior_weight).to(device, wide)
            prior_weight[0] = 0
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
            "prior_weight": prior_weight,
            "weighting": self.weighting,
            "group": self.group,
            "schedule": self.schedule,
            "layout": self.layout,
            "frame_mask": None if mask is None else mask.to(device),
            "prior_by_r": self.prior_by_r,
            "space": self.space,
            "scale": self.scale,
            "weight_min": self.weight_min,
            "prior_space": self.prior_space,
            "sigma": sigma,
            "sample_weight": sample_weight,
        }

    def __str__(self) -> str:
        return self.name


BASE = Case("per_video")
_X0 = replace(BASE, weighting="x0", prior_space="x0", prior_weight=0.1)
# What other trainers minimise: docs/OPS.md has the table.
DIALECTS = [
    replace(_X0, name="x0"),
    replace(_X0, name="x0_sigma", sigma_chunks=0, weighted=True),
    replace(_X0, name="x0_bf16", pred=torch.bfloat16, latent=torch.bfloat16, sigma_chunks=0),
    # A scale without which the gradient would be below float16's normal numbers.
    replace(_X0, name="x0_fp16", pred=torch.float16, latent=torch.float16, scale=5e3),
    replace(
        _X0,
        name="x0_masked_chunks",
        masked=True,
        t_chunks=6,
        r_chunks=2,
        sigma_chunks=3,
        weighted=True,
        prior_by_r=True,
    ),
    replace(_X0, name="x0_vp", schedule="vp_cosine", scale=50.0, prior_space="velocity"),
    replace(_X0, name="x0_t_is_0", t=0.0),
    replace(BASE, name="adaptive_sigma", t_chunks=2, sigma_chunks=2, prior_space="x0"),
    replace(BASE, name="adaptive_scale", nft_beta=1.0, scale=0.5, weight_min=0.4, ref=False),
    replace(BASE, name="adaptive_velocity", space="velocity", weighted=True, t_chunks=2),
    replace(BASE, name="velocity_prior_x0", weighting="velocity", prior_space="x0", sigma_chunks=0),
    replace(BASE, name="tokens", layout="BFLC", shape=(2, 6, 10, 8), t_chunks=6, weighted=True),
    replace(_X0, name="one_video", shape=(1, 4, 6, 5, 8), sigma_chunks=6),
]
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
    *DIALECTS,
    replace(BASE, name="many_tiles", shape=(2, 3, 4, 60, 104), t_chunks=2),
]


def raw(inputs: dict[str, Any]) -> tuple[NftInputs, NftOptions]:
    """The arguments of torch.ops.afd.nft_loss for those of afd.ops.nft_loss."""
    prior_weight = inputs["prior_weight"]
    given = dict(inputs)
    if isinstance(prior_weight, Tensor):
        given |= {"prior_weight": 1.0, "prior_weights": prior_weight}
    tensors = {name: given[name] for name in NftInputs._fields if name in given}
    options = {name: given[name] for name in NftOptions._fields if name in given}
    return NftInputs(**tensors), NftOptions(**options)


def oracle(case: Case, inputs: dict[str, Any], eps: Tensor) -> dict[str, Tensor]:
    """The formula of the DiffusionNFT code in float64 autograd, written with x0 predictions.

    Shares nothing with the package: x_t, v+-, x0+- are built explicitly; the frame loop is a loop.
    """
    split = inputs["x0"].ndim == len(case.layout)
    frame_axis = case.layout.index("F") if split else 1
    frames = case.frames()

    def frame(x: Tensor, b: int, f: int) -> Tensor:
        return x[b].select(frame_axis - 1, f) if split else x[b]

    def at(x: Tensor, b: int, f: int) -> Tensor:
        row = x[b].reshape(-1)
        return row[f * row.numel() // frames]

    theta = inputs["v_theta"].detach().double().requires_grad_()
    old, x0, eps = inputs["v_old"].double(), inputs["x0"].double(), eps.double()
    ref = None if inputs["v_ref"] is None else inputs["v_ref"].double()
    beta, batch = case.nft_beta, x0.shape[0]
    adaptive = case.weighting == "x0_adaptive"
    in_x0 = (case.space or case.weighting) != "velocity"
    scale = case.scale or (5.0 / beta if adaptive else 1.0)
    floor = case.weight_min or 1e-5
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
            given = None if inputs["sigma"] is None else at(inputs["sigma"].double(), b, f)

            def x0_of(
                velocity: Tensor,
                x_t: Tensor = x_t,
                given: Tensor | None = given,
                of_t: tuple[Tensor, ...] = (alpha, sigma, d_alpha, d_sigma),
            ) -> Tensor:
                if given is not None:
                    return x_t - given * velocity
                alpha, sigma, d_alpha, d_sigma = of_t
                return (d_sigma * x_t - sigma * velocity) / (alpha * d_sigma - sigma * d_alpha)

            for key, velocity in (("pos", v_pos), ("neg", v_neg)):
                if in_x0:
                    errors[key].append([(x0_of(velocity) - clean).flatten()])
                else:
                    errors[key].append([(velocity - target).flatten()])
            weights.append(r)
            if ref is not None:
                apart = v - frame(ref, b, f)
                if case.prior_space == "x0":
                    apart = x0_of(v) - x0_of(frame(ref, b, f))
                squared = apart.square().flatten()
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
                    values[key], values["w_" + key] = zero, zero + (floor if adaptive else 1)
                    continue
                w = torch.cat(flat).abs().mean().clamp(min=floor).detach() if adaptive else zero + 1
                values["w_" + key] = w
                values[key] = torch.cat(flat).square().mean() / w
                for f, e in zip(members, flat, strict=True):
                    share = weights[f] if key == "pos" else 1 - weights[f]
                    per_sample = per_sample + scale * share * e.square().sum() / w / count
            prior = torch.cat([priors[f] for f in members]).mean() if members else zero
            moved = torch.cat([deviations[f] for f in members]).mean() if members else zero
            rows.append(
                [values["pos"], values["neg"], prior, values["w_pos"], values["w_neg"], moved]
            )
        prior_sum = sum(p.sum() for p in priors if p is not None)
        prior_weight, sample_weight = inputs["prior_weight"], inputs["sample_weight"]
        if isinstance(prior_weight, Tensor):
            prior_weight = prior_weight[b].double()
        whole = per_sample + prior_weight * prior_sum / count
        if sample_weight is not None:
            whole = whole * sample_weight[b].double()
        loss = loss + whole / batch
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
