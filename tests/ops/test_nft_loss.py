"""nft_loss equals the float64 formula on every backend, and refuses what it cannot mean."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from afd import ops
from afd_kernels.dispatch import use_backend
from afd_kernels.forward_noise.reference import normal
from afd_kernels.nft_loss import reference
from afd_kernels.nft_loss.contract import METRICS, plan_nft_loss
from tests.cases import BASE, CASES, Case, oracle, raw
from tests.tolerances import assert_elementwise, assert_reduced

Place = tuple[str, str]


def noise_of(inputs: dict[str, Any]) -> Tensor:
    """The noise as the op sees it, on the CPU."""
    if inputs["noise"] is not None:
        return inputs["noise"].cpu()
    x0 = inputs["x0"]
    return normal(inputs["seed"].cpu(), x0[0].numel()).reshape(x0.shape)


def on_cpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def assert_matches_oracle(case: Case, inputs: dict[str, Any]) -> None:
    expected = oracle(case, on_cpu(inputs), noise_of(inputs))
    result = ops.nft_loss(**inputs)
    result.loss.backward()
    grad = inputs["v_theta"].grad
    scale = expected["grad"].abs().max().item()
    assert_elementwise(grad.cpu(), expected["grad"], scale=4 * scale)
    assert_reduced(result.loss.detach().cpu(), expected["loss"])
    got = torch.stack([getattr(result, name) for name in METRICS], dim=-1).cpu()
    want = expected["metrics"][:, 0] if case.group == "video" else expected["metrics"]
    assert_reduced(got[..., :-1], want)
    assert got.dtype == torch.float64


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_float64_formula(place: Place, case: Case) -> None:
    assert_matches_oracle(case, case.inputs(place[1]))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_equals_the_formula_for_every_small_batch(place: Place, batch: int) -> None:
    case = replace(BASE, shape=(batch, 5, 4, 3, 7), t_chunks=4)
    assert_matches_oracle(case, case.inputs(place[1], seed=batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula_on_real_latents(place: Place, shared, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    latents = load_file(shared / "data" / "wan21_latents.safetensors")["latents"]
    x0 = latents[:, :, :4].to(place[1], dtype)
    case = replace(BASE, shape=tuple(x0.shape), pred=dtype, latent=dtype, t_chunks=2, r_chunks=2)
    inputs = case.inputs(place[1]) | {"x0": x0}
    assert_matches_oracle(case, inputs)


def test_the_gradient_is_the_derivative_in_double() -> None:
    for weighting, group in (("x0_adaptive", "chunk"), ("velocity", "video")):
        case = replace(
            BASE,
            shape=(2, 2, 4, 2, 2),
            pred=torch.float64,
            latent=torch.float64,
            t_chunks=2,
            r_chunks=2,
            weighting=weighting,
            group=group,
            nft_beta=0.7,
        )
        inputs = case.inputs()
        v_theta = inputs.pop("v_theta")

        def loss(v: Tensor, inputs: dict[str, Any] = inputs) -> Tensor:
            return ops.nft_loss(v_theta=v, **inputs).loss

        if weighting == "velocity":
            assert torch.autograd.gradcheck(loss, v_theta)
        else:
            # w is a constant of the graph but a function of v_theta, so finite differences cannot
            # see this gradient; the differentiable reference can.
            (got,) = torch.autograd.grad(loss(v_theta), v_theta)
            (want,) = torch.autograd.grad(differentiable(v_theta, inputs), v_theta)
            assert_elementwise(got, want, scale=want.abs().max().item())


def differentiable(v_theta: Tensor, inputs: dict[str, Any]) -> Tensor:
    tensors, options = raw({**inputs, "v_theta": v_theta})
    return reference.loss(tensors, plan_nft_loss(tensors, options))


def test_the_reference_is_twice_differentiable() -> None:
    case = replace(
        BASE, shape=(2, 2, 2, 2, 2), pred=torch.float64, latent=torch.float64, weighting="velocity"
    )
    inputs = case.inputs()
    v_theta = inputs.pop("v_theta")
    assert torch.autograd.gradgradcheck(lambda v: differentiable(v, inputs), v_theta)


def test_two_runs_give_the_same_bits(place: Place) -> None:
    case = replace(BASE, shape=(2, 3, 4, 33, 21), t_chunks=2)
    results = []
    for _ in range(2):
        inputs = case.inputs(place[1])
        result = ops.nft_loss(**inputs)
        result.loss.backward()
        results.append((result.loss, result.w_pos, inputs["v_theta"].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_thread_counts_give_the_same_bits() -> None:
    case = replace(BASE, shape=(2, 4, 6, 61, 35), t_chunks=2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            inputs = case.inputs()
            result = ops.nft_loss(**inputs)
            result.loss.backward()
            results.append((result.loss, result.w_neg, inputs["v_theta"].grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_batch_split_changes_nothing_but_the_batch_mean(place: Place) -> None:
    inputs = replace(BASE, shape=(4, 3, 4, 5, 7)).inputs(place[1])
    whole = ops.nft_loss(**inputs)
    whole.loss.backward()
    for b in range(4):
        part = {k: v[b : b + 1].detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        part["v_theta"].requires_grad_()
        single = ops.nft_loss(**part)
        (single.loss / 4).backward()
        assert torch.equal(single.w_pos, whole.w_pos[b : b + 1])
        grad = inputs["v_theta"].grad[b : b + 1]
        assert_elementwise(part["v_theta"].grad, grad, scale=grad.abs().max().item())


@pytest.mark.parametrize("layout", ["BCFHW", "BFCHW"])
def test_strides_do_not_matter(place: Place, layout: str) -> None:
    case = replace(BASE, layout=layout, shape=(2, 6, 6, 5, 8), t_chunks=2)
    inputs = case.inputs(place[1])
    strided = {
        k: v.detach().transpose(1, 3).contiguous().transpose(1, 3)
        if isinstance(v, Tensor) and v.ndim == 5
        else v
        for k, v in inputs.items()
    }
    strided["v_theta"].requires_grad_()
    losses = [ops.nft_loss(**i).loss for i in (inputs, strided)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert torch.equal(inputs["v_theta"].grad, strided["v_theta"].grad)


def test_the_incoming_gradient_scales_and_a_kept_graph_can_be_asked_twice(place: Place) -> None:
    inputs = BASE.inputs(place[1])
    v_theta = inputs["v_theta"]
    loss = ops.nft_loss(**inputs).loss
    (once,) = torch.autograd.grad(loss, v_theta, retain_graph=True)
    kept = once.clone()
    (thrice,) = torch.autograd.grad(3 * loss, v_theta, retain_graph=True)
    (again,) = torch.autograd.grad(loss, v_theta)
    assert torch.equal(once, kept)
    assert torch.equal(again, kept)
    assert_elementwise(thrice, 3 * kept, scale=kept.abs().max().item())


def test_an_expanded_or_sliced_incoming_gradient_is_read_right(place: Place) -> None:
    inputs = BASE.inputs(place[1])
    loss = ops.nft_loss(**inputs).loss
    (want,) = torch.autograd.grad(loss, inputs["v_theta"], retain_graph=True)
    expanded = torch.tensor(2.0, device=place[1]).expand(4)[1]
    sliced = torch.arange(6.0, device=place[1])[2::2][0]
    for incoming in (expanded, sliced):
        (got,) = torch.autograd.grad(loss, inputs["v_theta"], incoming, retain_graph=True)
        assert torch.equal(got, 2 * want)


def test_metrics_carry_no_gradient_and_no_grad_makes_no_gradient(place: Place) -> None:
    inputs = BASE.inputs(place[1])
    assert not ops.nft_loss(**inputs).loss_pos.requires_grad
    with torch.no_grad():
        result = ops.nft_loss(**inputs)
    assert not result.loss.requires_grad
    assert torch.equal(result.loss, ops.nft_loss(**inputs).loss.detach())


def test_double_backward_is_refused(place: Place) -> None:
    inputs = BASE.inputs(place[1])
    loss = ops.nft_loss(**inputs).loss
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, inputs["v_theta"], create_graph=True)


def test_autocast_leaves_the_arithmetic_alone(place: Place) -> None:
    inputs = BASE.inputs(place[1])
    plain = ops.nft_loss(**inputs).loss
    with torch.autocast(place[1], dtype=torch.bfloat16):
        cast = ops.nft_loss(**inputs).loss
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


def test_per_sample_metrics_have_one_value_per_sample_or_chunk(place: Place) -> None:
    video = ops.nft_loss(**replace(BASE, t_chunks=3, r_chunks=3).inputs(place[1]))
    chunk = ops.nft_loss(**replace(BASE, t_chunks=3, r_chunks=3, group="chunk").inputs(place[1]))
    for name in METRICS:
        assert getattr(video, name).shape == (2,)
        assert getattr(chunk, name).shape == (2, 3)


def test_masked_frames_count_for_nothing(place: Place) -> None:
    case = replace(BASE, masked=True)
    inputs = case.inputs(place[1])
    changed = dict(inputs)
    mask = inputs["frame_mask"][:, None, :, None, None]
    changed["v_old"] = torch.where(mask, inputs["v_old"], 7.0)
    first, second = ops.nft_loss(**inputs), ops.nft_loss(**changed)
    assert torch.equal(first.loss, second.loss)
    first.loss.backward()
    assert inputs["v_theta"].grad.masked_select(~mask).abs().max() == 0


def bad(change: dict[str, Any], needle: str) -> Any:
    return pytest.param(change, needle, id=f"{next(iter(change))}-{needle[:24]}")


X = (2, 4, 6, 5, 8)
BAD = [
    bad({"v_old": torch.zeros(2, 4, 6, 5, 9)}, "v_old: got float32 [2, 4, 6, 5, 9]"),
    bad({"v_ref": torch.zeros(X, dtype=torch.bfloat16)}, "v_ref: got bfloat16"),
    bad({"x0": torch.zeros(X, dtype=torch.int32)}, "x0: got int32"),
    bad({"t": torch.zeros(2, dtype=torch.bfloat16)}, "t: got bfloat16 [2] on cpu"),
    bad({"t": torch.zeros(3)}, "t: got float32 [3]"),
    bad({"t": torch.zeros(2, 4)}, "dividing the 6 frames"),
    bad({"t": torch.tensor([0.5, 1.5])}, "t: got values in [0.5, 1.5]; needed: [0, 1]"),
    bad({"t": torch.tensor([0.5, float("nan")])}, "t: got values in [nan, nan]"),
    bad({"t": torch.zeros(2), "schedule": "vp_linear"}, "needed: [1e-05, 1]"),
    bad({"r": torch.tensor([0.5, -0.1])}, "r: got values in [-0.1, 0.5]; needed: [0, 1]"),
    bad({"r": torch.tensor([0.5, float("nan")])}, "r: got values"),
    bad({"seed": None}, "got neither; needed: exactly one"),
    bad({"noise": torch.zeros(X)}, "got both; needed: exactly one"),
    bad({"seed": torch.zeros(2)}, "seed: got float32 [2]"),
    bad({"seed": torch.zeros(3, dtype=torch.int64)}, "seed: got int64 [3]"),
    bad({"seed": None, "noise": torch.zeros(2, 4)}, "noise: got float32 [2, 4]"),
    bad({"seed": None, "noise": torch.zeros(X).half()}, "noise: got float16"),
    bad({"nft_beta": 0.0}, "nft_beta: got 0.0"),
    bad({"nft_beta": float("nan")}, "nft_beta: got nan"),
    bad({"prior_weight": -1.0}, "prior_weight: got -1.0"),
    bad({"v_ref": None}, "prior_weight: got 0.01; needed: 0 when v_ref is not given"),
    bad({"adv_clip": 0.0}, "adv_clip: got 0.0"),
    bad({"weighting": "plain"}, "weighting: got 'plain'; needed: one of 'x0_adaptive'"),
    bad({"group": "frame"}, "group: got 'frame'"),
    bad({"group": "chunk"}, "t or r of shape [2, chunks]"),
    bad({"schedule": "flow"}, "schedule: got 'flow'"),
    bad({"layout": "BHWC"}, "layout: got 'BHWC'"),
    bad({"frame_mask": torch.ones(2, 5, dtype=torch.bool)}, "frame_mask: got bool [2, 5]"),
    bad({"frame_mask": torch.ones(2, 6)}, "frame_mask: got float32"),
    bad({"v_old": torch.zeros(X, device="meta")}, "v_old: got float32 [2, 4, 6, 5, 8] on meta"),
]


@pytest.mark.parametrize(("change", "needle"), BAD)
def test_bad_input_names_the_argument(change: dict[str, Any], needle: str) -> None:
    with pytest.raises(ValueError, match=re.escape(needle)):
        ops.nft_loss(**(BASE.inputs() | change))


def test_an_empty_batch_is_refused() -> None:
    inputs = BASE.inputs()
    empty = {k: v[:0].detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with pytest.raises(
        ValueError, match=r"x0: got float32 .0, 4, 6, 5, 8. on cpu; needed: at least"
    ):
        ops.nft_loss(**empty)


def test_data_that_requires_grad_is_refused() -> None:
    inputs = BASE.inputs()
    inputs["v_old"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"v_old: got a tensor that requires grad"):
        ops.nft_loss(**inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_values_out_of_range_on_a_gpu_poison_the_loss(backend: str) -> None:
    for change in ({"t": torch.tensor([0.5, 1.5])}, {"r": torch.tensor([float("nan"), 0.5])}):
        inputs = BASE.inputs("cuda") | {k: v.cuda() for k, v in change.items()}
        with use_backend(backend):
            result = ops.nft_loss(**inputs)
        assert result.loss.isnan()
