"""The causal Wan network against values and gradients of the released code (../shared/golden)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from afd.models.causal_wan import CausalWan, WanConfig
from afd.ops import intervals
from tests.tolerances import NETWORK_FORWARD as FORWARD
from tests.tolerances import NETWORK_GRADIENT as GRADIENT

GOLDEN = Path(__file__).parents[2] / "../shared/golden"
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared/golden")
FOLDERS = ["A_small", "B_hd128"]


def load(folder: str, name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / folder / f"{name}.safetensors")


def network(folder: str) -> CausalWan:
    golden = json.loads((GOLDEN / folder / "config.json").read_text())
    keys = (
        "dim",
        "num_heads",
        "ffn_dim",
        "num_layers",
        "freq_dim",
        "text_dim",
        "text_len",
        "chunk",
    )
    net = CausalWan(WanConfig(**{key: golden[key] for key in keys}))
    net.load_state_dict(load(folder, "weights"))
    return net


def error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    return float((actual - expected).norm() / max(float(expected.norm()), floor))


def check_gradients(net: CausalWan, golden: dict[str, Tensor]) -> None:
    norms = {k[9:]: float(v) for k, v in golden.items() if k.startswith("gradnorm.")}
    floor = 1e-4 * max(norms.values())
    parameters = dict(net.named_parameters())
    assert norms.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert abs(float(parameter.grad.norm()) - norms[name]) <= GRADIENT * max(norms[name], floor)
        if f"grad.{name}" in golden:
            assert error(parameter.grad, golden[f"grad.{name}"], floor) <= GRADIENT, name


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("name", ["train_causal", "train_causal_per_frame_t"])
def test_block_causal_forward_equals_the_released_code(folder: str, name: str) -> None:
    golden, net = load(folder, name), network(folder)
    with torch.no_grad():
        flow = net(golden["x"], golden["t"], golden["context"])
    assert error(flow, golden["flow"]) <= FORWARD


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("name", ["teacher_forcing", "teacher_forcing_aug"])
def test_teacher_forcing_equals_the_released_code(folder: str, name: str) -> None:
    golden, net = load(folder, name), network(folder)
    with torch.no_grad():
        clean = net.clean_context(golden["clean_x"], golden["context"], golden.get("aug_t"))
        flow = net(golden["x"], golden["t"], golden["context"], clean)
    assert error(flow, golden["flow"]) <= FORWARD


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("name", ["train_causal", "teacher_forcing"])
def test_gradients_equal_the_released_code(folder: str, name: str) -> None:
    golden, net = load(folder, name), network(folder)
    inputs = {k: golden[k].requires_grad_() for k in ("x", "clean_x") if k in golden}
    clean = net.clean_context(inputs["clean_x"], golden["context"]) if "clean_x" in inputs else None
    flow = net(inputs["x"], golden["t"], golden["context"], clean)
    loss = (flow * golden["R"]).mean()
    assert float(loss.detach()) == pytest.approx(float(golden["loss"]), rel=1e-4)
    loss.backward()
    check_gradients(net, golden)
    for key, value in inputs.items():
        if f"grad.{key}" in golden:
            assert value.grad is not None
            assert error(value.grad, golden[f"grad.{key}"]) <= GRADIENT


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_cached_call_equals_the_released_code(folder: str) -> None:
    golden, net = load(folder, "rollout"), network(folder)
    noise, context = golden["noise"], golden["context"]
    steps = golden["denoising_step_list"]
    tokens = (noise.shape[3] // 2) * (noise.shape[4] // 2)
    renoise = (golden[k] for k in sorted(golden) if k.startswith("renoise."))
    latents, call = [], 0
    with torch.no_grad():
        cache = net.new_cache(context, noise.shape[1], *noise.shape[3:])
        for start in range(0, noise.shape[1], 3):
            x = noise[:, start : start + 3]
            for step in [*steps.tolist(), 0.0]:
                t = torch.full(x.shape[:2], step)
                assert golden[f"call.{call:03d}.meta"][0] == start * tokens
                flow = net.forward_cached(x, t, cache, start)
                assert flow is not None
                assert error(flow, golden[f"call.{call:03d}.flow"]) <= FORWARD
                call += 1
                if step:
                    x = x - step / 1000 * flow
                if step > steps[-1]:
                    sigma = steps[steps < step][0] / 1000
                    x = (1 - sigma) * x + sigma * next(renoise).view_as(x)
            latents.append(x)
    assert error(torch.cat(latents, 1), golden["latents"]) <= FORWARD
    for layer, (k, v) in enumerate(cache.self_kv):
        assert error(k, golden[f"final.kv.{layer}.k"]) <= FORWARD
        assert error(v, golden[f"final.kv.{layer}.v"]) <= FORWARD


def test_the_mask_is_the_released_one() -> None:
    golden = load("A_small", "train_causal")["frame_mask"]
    assert torch.equal(intervals.causal(12, 3, 1).mask(12)[0], golden)
    both = load("A_small", "teacher_forcing")["frame_mask"]
    assert torch.equal(intervals.teacher_forcing(12, 3, 1).mask(24)[0], both)
