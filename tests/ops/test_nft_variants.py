"""Other trainers' losses, as their own code computed them (../shared/golden/nft_variants).

Each file holds inputs, loss and gradient in float64, and its constants as metadata. Files of the
same kinds that are added there are read, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afd import ops
from tests.conftest import SHARED

Place = tuple[str, str]
FOLDER = SHARED / "golden" / "nft_variants"
# Relative errors of value and gradient, fp32 arithmetic.
BOUND = 1e-6
# The share of a gradient's norm that one rounding to bf16 costs, and what the trainer's own bf16
# arithmetic costs on the same inputs.
ONE_ROUNDING, ITS_ARITHMETIC = 4e-3, 7e-2
NAMES = sorted(x.stem for x in FOLDER.glob("*.safetensors") if "advantages" not in x.stem)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118


def options(name: str, tensors: dict[str, Tensor], about: dict[str, str]) -> dict[str, Any]:
    """The arguments of ops.nft_loss that say what the trainer minimises; no large tensors."""
    batch = tensors["v_theta"].shape[0]
    beta, kind = float(about.get("nft_beta", 0.1)), name.partition("_")[0]
    clip = float(about.get("adv_clip", 5))
    r = (tensors["advantage"] / (2 * clip) + 0.5).clamp(0, 1)
    if kind == "astrolabe":
        prior_weight: Any = float(about["kl_weight"])
        if "selected" in tensors:
            # Its mean is over the selected samples, ours over the batch.
            selected = tensors["selected"]
            prior_weight = prior_weight * selected * batch / selected.sum()
        return {
            "weighting": "x0",
            "prior_space": "x0",
            "t": torch.full((batch,), float(about["t_noise"])),
            "sigma": torch.full((batch,), float(about["sigma_x0"])),
            "r": r,
            "nft_beta": beta,
            "prior_weight": prior_weight,
        }
    if kind == "worldcompass":
        sigma = float(name.split("_")[1].removeprefix("sigma"))
        return {
            "t": torch.full((batch,), sigma),
            "r": r,
            "nft_beta": beta,
            "scale": 1 / float(about["grad_accumulation"]),
            # The update is of the last three frames.
            "layout": "BCFHW",
            "frame_mask": torch.tensor([[False, True, True, True]]),
        }
    if kind == "cosmosrl":
        # Advantages [B, 1] met losses [B] there: r became the mean of all.
        return {
            "t": tensors["t"],
            "r": r.mean().expand(batch),
            "nft_beta": beta,
            "prior_weight": 1e-4,
        }
    # Its advantages are already those of one prompt.
    made = ops.optimality(
        tensors["advantage"],
        samples_per_prompt=batch,
        baseline=0.0,
        normalize="none",
        adv_clip=clip,
        adv_mode=about["adv_mode"],  # type: ignore[arg-type]
    )
    torch.testing.assert_close(made.r, tensors["r"])
    return {
        "t": tensors["t"],
        "r": made.r,
        "nft_beta": beta,
        "prior_weight": float(about["kl_weight"]),
        "adv_clip": clip,
    }


def loss_and_gradient(name: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    tensors, about = read(FOLDER / f"{name}.safetensors")
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def given(key: str) -> Tensor | None:
        return tensors[key].to(device, dtype) if key in tensors else None

    inputs = {key: given(key) for key in ("v_theta", "v_old", "v_ref", "x0", "noise")}
    v_theta = inputs["v_theta"]
    assert v_theta is not None
    if inputs["v_old"] is None:
        inputs["v_old"] = v_theta.clone()
    more = {
        key: value.to(device, wide if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for key, value in options(name, tensors, about).items()
    }
    v_theta.requires_grad_()
    result = ops.nft_loss(**inputs, **{"layout": "BFCHW", **more})  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(result.loss, v_theta)
    return result.loss.detach().cpu().double(), grad.cpu().double()


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.skipif(not NAMES, reason=f"{FOLDER} is absent")
@pytest.mark.parametrize("name", [x for x in NAMES if not x.endswith("bf16")])
def test_equals_the_trainers_own_loss(place: Place, name: str) -> None:
    tensors, _ = read(FOLDER / f"{name}.safetensors")
    for dtype in (torch.float32, *([torch.float64] if place[0] == "reference" else [])):
        loss, grad = loss_and_gradient(name, dtype, place[1])
        assert relative(loss, tensors["loss"].squeeze()) <= BOUND
        assert relative(grad, tensors["grad"]) <= BOUND


@pytest.mark.skipif(not NAMES, reason=f"{FOLDER} is absent")
@pytest.mark.parametrize("name", [x for x in NAMES if x.endswith("bf16")])
def test_bfloat16_is_nearer_the_truth_than_the_trainers_arithmetic(place: Place, name: str) -> None:
    tensors, _ = read(FOLDER / f"{name}.safetensors")
    loss, grad = loss_and_gradient(name, torch.bfloat16, place[1])
    with ops.use_backend("reference"):
        loss_64, grad_64 = loss_and_gradient(name, torch.float64, "cpu")
    assert relative(loss, loss_64) <= BOUND
    theirs, ours = relative(tensors["grad"].double(), grad_64), relative(grad, grad_64)
    assert ours <= ONE_ROUNDING < theirs <= ITS_ARITHMETIC
