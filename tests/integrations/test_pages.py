"""The code of examples/integrations against each trainer's formula, and the adapters it uses."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afd import ops
from afd.integrations import nft
from tests.conftest import DEVICES, ROOT, SHARED
from tests.integrations.formulas import CASES, GOLDENS, PREDICTIONS, Case, Inputs
from tests.tolerances import ELEMENTWISE_RTOL, REDUCTION_RTOL

Place = tuple[str, str]
PAGES = ROOT / "examples" / "integrations"
TRAINERS = sorted(page.stem for page in PAGES.glob("*.md") if page.stem != "README")
# Relative errors of value and gradient in float32 arithmetic.
BOUND = REDUCTION_RTOL[torch.float32]
# Half an ulp of bfloat16 is what one rounding of the gradient costs at most.
ONE_ROUNDING = ELEMENTWISE_RTOL[torch.bfloat16] / 2
PEERS = sorted((SHARED / "golden" / "nft_variants").glob("*.safetensors"))


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118


def code(page: str) -> str:
    """The Python blocks of a page, one after another."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))


def variables(case: Case, x: Inputs) -> dict[str, Any]:
    """The trainer's variables that its page's code reads."""
    c, low_high = case.constants, case.constants.get("clip", 5.0)
    clip = low_high[1] if isinstance(low_high, tuple) else low_high
    named: dict[str, dict[str, Any]] = {
        "diffusionnft": {
            "ref_forward_prediction": x["v_ref"],
            "beta": c.get("beta"),
            "train_beta": c.get("kl"),
        },
        "fastvideo": {"ref_prediction": x["v_ref"], "kl_weight": c.get("kl")},
        "flow_factory": {
            "new_v_pred": x["v_theta"],
            "old_v_pred": x["v_old"],
            "ref_v_pred": x["v_ref"],
            "adv": x["advantage"],
            "adv_clip_range": low_high,
            "kl_beta": c.get("kl"),
        },
        "verl_omni": {
            "latents_clean": x["x0"],
            "ref_forward_prediction": x["v_ref"],
            "reward_prob": x.get("r"),
            "mix_beta": c.get("beta"),
            "ref_kl_coef": c.get("kl"),
            "adaptive_weight_min": c.get("floor"),
        },
        "unirl": {
            "new_pred": x["v_theta"],
            "old_pred": x["v_old"],
            "ref_pred": x["v_ref"],
            "t_batch": x["t"],
            "r": nft.r_from_advantages(x["advantage"], adv_clip=c.get("sat", 5.0)),
            "beta": c.get("beta"),
            "ref_deviation_coef": c.get("kl"),
            "adv_sat_std": c.get("sat"),
            "use_adaptive_weight": c.get("adaptive"),
        },
        "astrolabe": {
            "ref_prediction": x["v_ref"],
            "sigma": x.get("sigma"),
            "selected": x.get("selected"),
            "kl_weight": c.get("kl"),
        },
        "worldcompass": {
            "sigma": x["t"],
            "target_frames": c.get("frames"),
            "gradient_accumulation_steps": c.get("accumulation"),
        },
    }
    shared = {"x0": x["x0"], "t": x["t"], "advantages": x["advantage"], "adv_clip_max": clip}
    shared |= {"forward_prediction": x["v_theta"], "old_prediction": x["v_old"]}
    shared |= {"adv_mode": c.get("mode"), "nft_beta": c.get("beta")}
    return shared | named[case.page]


def placed(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """The case's inputs on a device, latents and predictions in `dtype`."""
    large = (*PREDICTIONS, "x0", "noise")
    return {
        name: value.to(device, dtype if name in large else value.dtype)
        for name, value in case.inputs().items()
    }


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.cpu().double() - wanted).norm() / wanted.norm()).item()


def run_page(case: Case, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient that the page's code computes, and the noise its seeds stand for."""
    torch.manual_seed(0)
    x["v_theta"].requires_grad_()
    names = variables(case, x)
    exec(compile(code(case.page), f"{case.page}.md", "exec"), names)
    loss = names["result"].loss
    assert loss is names["total" if case.page == "unirl" else "loss"]
    (grad,) = torch.autograd.grad(loss, x["v_theta"])
    zeros, ones = torch.zeros_like(x["x0"], dtype=torch.float32), torch.ones_like(x["t"])
    noise = ops.forward_noise(zeros, ones, seed=names["seed"])
    t = x["t"].view(-1, 1, 1, 1, 1)
    noisy = (1 - t) * x["x0"] + t * noise
    torch.testing.assert_close(names["xt"], noisy.to(x["x0"].dtype), rtol=1e-2, atol=1e-2)
    return loss.detach(), grad, noise


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_pages_code_computes_the_trainers_loss(name: str, device: str) -> None:
    case = CASES[name]
    x = placed(case, device, torch.float32)
    loss, grad, noise = run_page(case, x)
    right_loss, right_grad = case.value(case.inputs(), noise.cpu())
    assert relative(loss, right_loss) <= BOUND
    assert relative(grad, right_grad) <= BOUND


@pytest.mark.parametrize("name", CASES)
def test_a_pages_code_rounds_a_bfloat16_gradient_once(name: str) -> None:
    case = CASES[name]
    x = placed(case, "cpu", torch.bfloat16)
    _, grad, noise = run_page(case, {k: v.clone() for k, v in x.items()})
    _, right = case.value(x, noise)
    assert grad.dtype == torch.bfloat16
    assert relative(grad, right) <= ONE_ROUNDING


@pytest.mark.parametrize("name", CASES)
def test_golden_files_are_the_formulas(name: str) -> None:
    held, about = read(GOLDENS / f"{name}.safetensors")
    case = CASES[name]
    inputs = case.inputs()
    loss, grad = case.value(inputs)
    assert about == {key: repr(value) for key, value in case.constants.items()}
    assert held.keys() == {*inputs, "loss", "grad"}
    assert all(torch.equal(held[key], value) for key, value in inputs.items())
    torch.testing.assert_close(held["loss"], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(held["grad"], grad, rtol=1e-12, atol=1e-15)


def adapted(case: Case, x: Inputs, constants: dict[str, Any]) -> ops.NftLoss:
    """The case through its adapter or preset, with the noise given."""
    c = constants
    tensors: dict[str, Any] = {k: x[k] for k in ("v_theta", "v_old", "x0", "t", "noise")}
    if case.page == "worldcompass":
        r = nft.r_from_advantages(x["advantage"], adv_clip=c["clip"])
        frames, accumulation = c["frames"], c["accumulation"]
        return nft.worldcompass(
            **tensors, r=r, target_frames=frames, accumulation=accumulation, layout=c["layout"]
        )
    tensors |= {"v_ref": x["v_ref"], "nft_beta": c["beta"]}
    if case.page == "astrolabe":
        r = nft.r_from_advantages(x["advantage"], adv_clip=c["clip"])
        return nft.astrolabe(
            **tensors, r=r, sigma=x["sigma"], kl_weight=c["kl"], selected=x.get("selected")
        )
    if case.page == "unirl":
        r = nft.r_from_advantages(x["advantage"], adv_clip=c["sat"])
        more = {"adv_sat_std": c["sat"], "adaptive": c["adaptive"], "prior_weight": c["kl"]}
        return nft.unirl(**tensors, r=r, **more)
    r = x.get("r")
    if r is None:
        r = nft.r_from_advantages(x["advantage"], adv_clip=c["clip"], adv_mode=c.get("mode", "all"))
    tensors |= {"r": r, "prior_weight": c["kl"], "adv_clip": c["clip"][1]}
    return ops.nft_loss(**tensors, weight_min=c.get("floor"))


@pytest.mark.parametrize("name", CASES)
def test_adapters_reproduce_the_golden_files(place: Place, name: str) -> None:
    held, _ = read(GOLDENS / f"{name}.safetensors")
    x = {k: v.to(place[1]) for k, v in held.items()}
    x["v_theta"].requires_grad_()
    result = adapted(CASES[name], x, {"layout": "BCFHW", **CASES[name].constants})
    (grad,) = torch.autograd.grad(result.loss, x["v_theta"])
    assert relative(result.loss.detach(), held["loss"]) <= BOUND
    assert relative(grad, held["grad"]) <= BOUND


def peers_case(name: str, x: Inputs, about: dict[str, str]) -> tuple[Case, Inputs] | None:
    """A file of the trainers' own results as a case of ours; None for the rest."""
    batch, kind = len(x["x0"]), name.partition("_")[0]
    if kind == "astrolabe" and not name.endswith("bf16"):
        c = {"beta": float(about["nft_beta"]), "kl": float(about["kl_weight"]), "clip": 5.0}
        x["t"] = torch.full((batch,), float(about["t_noise"]))
        x["sigma"] = torch.full((batch,), float(about["sigma_x0"]))
        return Case("astrolabe", CASES["astrolabe"].formula, c), x
    if kind == "fastvideo":
        c = {"beta": 0.1, "kl": float(about["kl_weight"]), "clip": (-5.0, 5.0)}
        x.pop("r")
        return Case("fastvideo", CASES["fastvideo"].formula, c | {"mode": about["adv_mode"]}), x
    if kind == "worldcompass":
        x["t"] = torch.full((batch,), float(name.split("_")[1].removeprefix("sigma")))
        x.setdefault("v_old", x["v_theta"].clone())
        accumulation = int(about["grad_accumulation"])
        c = {"clip": 2.0, "frames": 3, "accumulation": accumulation}
        return Case("worldcompass", CASES["worldcompass"].formula, c), x
    return None


@pytest.mark.skipif(not PEERS, reason="the files of the trainers' own results are absent")
@pytest.mark.parametrize("file", PEERS, ids=lambda file: file.stem)
def test_formulas_and_adapters_equal_the_trainers_own_results(file: Path) -> None:
    held, about = read(file)
    right = {key: held.pop(key) for key in ("loss", "grad") if key in held}
    found = peers_case(file.stem, held, about) if "x0" in held else None
    if found is None:
        pytest.skip("the trainer's page has no adapter for this file")
    case, x = found
    loss, grad = case.value(x)
    assert relative(loss, right["loss"].squeeze()) <= BOUND
    assert relative(grad, right["grad"]) <= BOUND
    # Only the adapters' own options are at stake here: the op has its own tests.
    x = {k: v.float() if v.is_floating_point() else v for k, v in x.items()}
    if "selected" in x:
        x["selected"] = x["selected"].bool()
    x["v_theta"].requires_grad_()
    result = adapted(case, x, {"layout": "BCFHW", **case.constants})
    (grad,) = torch.autograd.grad(result.loss, x["v_theta"])
    assert relative(result.loss.detach(), right["loss"].squeeze()) <= BOUND
    assert relative(grad, right["grad"]) <= BOUND


def test_every_page_is_listed_and_tested() -> None:
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"\]\((\w+)\.md\)", index))) == TRAINERS
    assert {case.page for case in CASES.values()} == set(TRAINERS)


@pytest.mark.parametrize("name", nft.__all__)
def test_an_adapter_is_at_most_twenty_lines(name: str) -> None:
    (function,) = ast.parse(inspect.getsource(getattr(nft, name))).body
    assert isinstance(function, ast.FunctionDef)
    docstring = function.body[0]
    lines = len(inspect.getsource(getattr(nft, name)).splitlines())
    assert docstring.end_lineno is not None
    assert lines - (docstring.end_lineno - docstring.lineno + 1) <= 20


def test_mistakes_are_named() -> None:
    for bad, got in ((torch.zeros(4, 1), r"float32 \[4, 1\]"), ([1.0], r"\[1.0\]"), (None, "None")):
        with pytest.raises(ValueError, match=f"advantages: got .*{got}"):
            nft.r_from_advantages(bad)  # type: ignore[arg-type]
    x = CASES["worldcompass"].inputs()
    tensors = {k: x[k] for k in ("v_theta", "v_old", "x0", "t", "noise")}
    for frames in (0, 5):
        with pytest.raises(ValueError, match=f"target_frames: got {frames}; needed: from 1 to 4"):
            nft.worldcompass(**tensors, r=torch.ones(4), target_frames=frames)
    with pytest.raises(ValueError, match="layout: got 'FBCHW'; needed: one of 'BCFHW'"):
        nft.worldcompass(**tensors, r=torch.ones(4), target_frames=1, layout="FBCHW")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x0: got .*; needed: 4 dimensions, BFLC"):
        nft.worldcompass(**tensors, r=torch.ones(4), target_frames=1, layout="BFLC")
    with pytest.raises(ValueError, match="accumulation: got 0"):
        nft.worldcompass(**tensors, r=torch.ones(4), target_frames=1, accumulation=0)
    with pytest.raises(ValueError, match=r"nft_beta: got 0.0; needed: a number > 0"):
        nft.unirl(**tensors, r=torch.ones(4), nft_beta=0.0)
    nothing = torch.zeros(4, dtype=torch.bool)
    x = CASES["astrolabe"].inputs()
    tensors = {k: x[k] for k in ("v_theta", "v_old", "v_ref", "x0", "t", "sigma", "noise")}
    tensors |= {"r": torch.ones(4)}
    for wrong in (nothing.float(), nothing[:, None]):
        with pytest.raises(ValueError, match=r"selected: got .*; needed: bool \[B\], or None"):
            nft.astrolabe(**tensors, nft_beta=0.1, kl_weight=1.0, selected=wrong)
    without = nft.astrolabe(**tensors, nft_beta=0.1, kl_weight=1.0, selected=nothing)
    assert torch.equal(without.loss, nft.astrolabe(**tensors, nft_beta=0.1, kl_weight=0.0).loss)
