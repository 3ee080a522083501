"""What each option of nft_loss means, on its own: identities, edges, refusals, seeds of ranks."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from afd import ops
from afd_kernels.contracts import FLOATS
from tests.cases import BASE, DIALECTS, raw
from tests.tolerances import assert_elementwise, assert_reduced

Place = tuple[str, str]
X0 = replace(BASE, weighting="x0", prior_space="x0", prior_weight=0.1)


def value_and_gradient(inputs: dict[str, Any]) -> tuple[ops.NftLoss, Tensor]:
    inputs = inputs | {"v_theta": inputs["v_theta"].detach().requires_grad_()}
    result = ops.nft_loss(**inputs)
    (grad,) = torch.autograd.grad(result.loss, inputs["v_theta"])
    return result, grad


def assert_same(a: tuple[ops.NftLoss, Tensor], b: tuple[ops.NftLoss, Tensor]) -> None:
    assert_reduced(a[0].loss.detach().cpu(), b[0].loss.detach().cpu())
    assert_elementwise(a[1], b[1], scale=b[1].abs().max().item())


@pytest.mark.parametrize("weighting", ["x0", "x0_adaptive"])
def test_sigma_equal_to_t_changes_no_bit(place: Place, weighting: str) -> None:
    inputs = replace(X0, weighting=weighting, t_chunks=3).inputs(place[1])
    (without, grad), (given, other) = (
        value_and_gradient(inputs | {"sigma": sigma}) for sigma in (None, inputs["t"])
    )
    assert torch.equal(without.loss, given.loss)
    assert torch.equal(grad, other)


def test_the_x0_error_is_t_times_the_velocity_error(place: Place) -> None:
    inputs = replace(X0, t=0.5).inputs(place[1])
    velocity = inputs | {"weighting": "velocity", "prior_space": "velocity", "scale": 0.25}
    velocity["prior_weight"] = inputs["prior_weight"] / 4
    assert_same(value_and_gradient(inputs), value_and_gradient(velocity))


def test_adaptive_weights_in_velocity_space_do_not_see_a_common_t(place: Place) -> None:
    """x0 errors over their mean are t times velocity errors over theirs."""
    inputs = replace(BASE, t=0.5, prior_weight=0.0).inputs(place[1])
    in_x0, in_velocity = (
        value_and_gradient(inputs | {"space": space}) for space in ("x0", "velocity")
    )
    assert_same(in_x0, (replace(in_velocity[0], loss=in_velocity[0].loss / 2), in_velocity[1] / 2))


def test_a_prior_of_selected_samples_is_one_of_their_mean(place: Place) -> None:
    inputs = replace(X0, shape=(4, 3, 4, 5, 6), scale=1e-12).inputs(place[1])
    selected = torch.tensor([1.0, 0, 1, 0], device=place[1])
    some = value_and_gradient(inputs | {"prior_weight": 0.3 * selected * 4 / 2})
    few = {k: v[::2] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    alone = value_and_gradient(few | {"prior_weight": 0.3})
    scale = alone[1].abs().max().item()
    # The branches are in it, too: less than a millionth.
    assert some[0].loss.item() == pytest.approx(alone[0].loss.item(), rel=1e-6)
    assert (some[1][::2] - alone[1]).abs().max().item() < 1e-6 * scale
    assert some[1][1::2].abs().max().item() < 1e-6 * scale


def test_sample_weights_weigh_whole_losses(place: Place) -> None:
    inputs = replace(BASE, shape=(3, 3, 4, 5, 6)).inputs(place[1])
    weight = torch.tensor([0.0, 0.5, 3.0], device=place[1])
    whole, grad = value_and_gradient(inputs | {"sample_weight": weight})
    total = 0.0
    for b in range(3):
        one = {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        single, single_grad = value_and_gradient(one)
        total += weight[b].item() * single.loss.item() / 3
        want = single_grad * weight[b] / 3
        assert_elementwise(grad[b : b + 1], want, scale=grad.abs().max().item())
        assert torch.equal(single.w_pos, whole.w_pos[b : b + 1])
    assert whole.loss.item() == pytest.approx(total, rel=1e-6)


def test_the_floor_of_the_adaptive_weight(place: Place) -> None:
    inputs = BASE.inputs(place[1])
    free, _ = value_and_gradient(inputs)
    held, _ = value_and_gradient(inputs | {"weight_min": 10.0})
    assert (held.w_pos == 10).all()
    assert (held.w_neg == 10).all()
    torch.testing.assert_close(held.loss_pos, free.loss_pos * free.w_pos / 10, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sigma", [None, 0.0], ids=["no_sigma", "sigma_is_0"])
def test_clean_latents_have_no_x0_error(place: Place, sigma: float | None) -> None:
    inputs = replace(X0, t=0.0, prior_weight=0.5).inputs(place[1])
    given = None if sigma is None else torch.full_like(inputs["t"], sigma)
    result, grad = value_and_gradient(inputs | {"sigma": given})
    assert result.loss.item() == 0
    assert grad.abs().max().item() == 0


def test_frames_without_noise_beside_noisy_ones(place: Place) -> None:
    inputs = replace(X0, t_chunks=6).inputs(place[1])
    inputs["t"][:, ::2] = 0
    result, grad = value_and_gradient(inputs | {"sigma": inputs["t"] * 0.9})
    assert result.loss.isfinite()
    assert grad[:, :, ::2].abs().max().item() == 0
    assert grad[:, :, 1::2].abs().min(0).values.max().item() > 0


def test_tokens_are_frames_of_another_shape(place: Place) -> None:
    g = torch.Generator().manual_seed(3)
    tokens = torch.randn(2, 6, 10, 8, generator=g).to(place[1])
    t, seed = torch.rand(2, 3, generator=g).to(place[1]), torch.tensor([4, 5], device=place[1])
    with ops.use_backend(place[0]):
        noisy = ops.forward_noise(tokens, t, seed=seed, layout="BFLC")
        frames = ops.forward_noise(tokens.view(2, 6, 8, 2, 5), t, seed=seed, layout="BFCHW")
    assert torch.equal(noisy.flatten(), frames.flatten())
    with pytest.raises(ValueError, match="needed: 5 dimensions BCFHW, because t is per frame"):
        ops.forward_noise(tokens, t, seed=seed)


@pytest.mark.parametrize("case", [DIALECTS[1], DIALECTS[4]], ids=str)
def test_other_trainers_losses_pass_opcheck_and_compile(place: Place, case: Any) -> None:
    inputs = case.inputs(place[1])
    tensors, options = raw(inputs)
    if place[0] == "native":
        torch.library.opcheck(torch.ops.afd.nft_loss.default, (*tensors, *options))
    compiled = torch.compile(lambda: ops.nft_loss(**inputs).loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(), ops.nft_loss(**inputs).loss)


def bad(needle: str, **change: Any) -> Any:
    return pytest.param(change, needle, id=needle[:40])


HALF, ONES = torch.full((2,), 0.5), torch.ones(2)
REFUSED = [
    bad("space: got 'rgb'; needed: one of 'x0', 'velocity'", space="rgb"),
    bad("needed: 'x0', or weighting='velocity'", weighting="x0", space="velocity"),
    bad("needed: 'velocity', or weighting='x0'", weighting="velocity", space="x0"),
    bad("prior_space: got 'w'", prior_space="w"),
    bad("scale: got 0.0; needed: a finite number > 0", scale=0.0),
    bad("scale: got inf", scale=float("inf")),
    bad("weight_min: got 0.0", weight_min=0.0),
    bad("weight_min: got 0.1; needed: None, since weighting='x0'", weighting="x0", weight_min=0.1),
    bad("sigma: got float32 [2] on cpu; needed: None when", weighting="velocity", sigma=HALF),
    bad("needed: None with schedule='vp_cosine'", schedule="vp_cosine", sigma=HALF),
    bad("sigma: got values in [0.5, 1.5]", sigma=torch.tensor([0.5, 1.5])),
    bad("sigma: got values in [nan", sigma=torch.tensor([0.5, float("nan")])),
    bad("sigma: got values down to 0; needed: at least 1e-06 t", sigma=torch.tensor([0.5, 0.0])),
    bad("sigma: got float64 [2]", sigma=HALF.double()),
    bad("sigma: got float32 [2, 4]", sigma=torch.ones(2, 4)),
    bad("prior_weight: got float32 [2, 1]", prior_weight=ONES[:, None]),
    bad("prior_weight: got float32 [2] on cpu; needed: 0 when", prior_weight=ONES, v_ref=None),
    bad("prior_weight: got values in [-1, 1]", prior_weight=torch.tensor([-1.0, 1.0])),
    bad("sample_weight: got float32 [2, 1]", sample_weight=ONES[:, None]),
    bad("sample_weight: got float16 [2]", sample_weight=ONES.half()),
    bad("needed: finite numbers >= 0", sample_weight=torch.tensor([1.0, float("inf")])),
    bad("sample_weight: got 0.5; needed: a tensor or None", sample_weight=0.5),
    bad("sigma: got 0.5; needed: a tensor or None", sigma=0.5),
    bad("t: got 0.5; needed: a tensor", t=0.5),
    bad("r: got 1; needed: a tensor", r=1),
    bad("v_theta: got 0.0; needed: a tensor", v_theta=0.0),
    bad("v_old: got None; needed: a tensor", v_old=None),
    bad("x0: got [0.0]; needed: a tensor", x0=[0.0]),
    bad("seed: got 3; needed: a tensor or None", seed=3),
]


@pytest.mark.parametrize(("change", "needle"), REFUSED)
def test_bad_input_names_the_argument(change: dict[str, Any], needle: str) -> None:
    with pytest.raises(ValueError, match=re.escape(needle)):
        ops.nft_loss(**(BASE.inputs() | change))


def test_numbers_are_refused_for_the_tensors_of_every_op() -> None:
    x = torch.zeros(1, 4, 1, 8)
    gain, rope, row = torch.ones(8), torch.zeros(1, 4, 4, 2), torch.zeros(8)
    seen = ops.intervals.causal(frames=2, chunk=1, tokens=2)
    where = torch.zeros(1, dtype=torch.int64)
    calls: dict[str, Any] = {
        "forward_noise": lambda *a: ops.forward_noise(a[0], a[1], seed=a[2]),
        "block_attention": lambda *a: ops.block_attention(*a, seen),
        "qk_norm_rope": ops.qk_norm_rope,
        "adaln": ops.adaln,
        "qk_norm_rope_append_": lambda *a: ops.qk_norm_rope_append_(
            *a, tokens_per_frame=2, sink_frames=0
        ),
    }
    given: dict[str, tuple[Tensor, ...]] = {
        "forward_noise": (x, torch.ones(1), where),
        "block_attention": (x, x, x),
        "qk_norm_rope": (x, x, gain, gain, rope),
        "adaln": (x[:, :, 0], x[:, :, 0], row.view(1, 1, 8), row, row),
        "qk_norm_rope_append_": (x, x, x, gain, gain, rope, x.clone(), x.clone(), where),
    }
    for name, call in calls.items():
        call(*given[name])
        for at in range(len(given[name])):
            changed = list(given[name])
            changed[at] = 0.5  # type: ignore[call-overload]
            with pytest.raises(ValueError, match=r"^\w+: got 0.5; needed: a tensor"):
                call(*changed)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_values_out_of_range_on_a_gpu_poison_the_loss(backend: str) -> None:
    for name, value in (("sigma", 0.0), ("sigma", 1.5), ("sample_weight", -1.0)):
        inputs = X0.inputs("cuda") | {name: torch.tensor([0.5, value]).cuda()}
        with ops.use_backend(backend):
            assert ops.nft_loss(**inputs).loss.isnan()


def test_a_kernel_poisons_the_loss_where_the_host_cannot_look(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from afd_kernels.nft_loss import contract

    monkeypatch.setattr(contract, "check_values", lambda *_: None)
    nan, small = float("nan"), replace(X0, shape=(2, 3))
    for name, values in {
        "sigma": (0.0, -0.1, 1.5, nan),
        "sample_weight": (-1.0, nan, float("inf")),
        "prior_weight": (-1.0, nan, float("inf")),
        "t": (1.5, nan),
        "r": (-0.1, nan),
    }.items():
        for weighting in ("x0", "x0_adaptive"):
            for value in values:
                change = {name: torch.tensor([0.5, value], device=place[1])}
                inputs = small.inputs(place[1]) | {"weighting": weighting} | change
                result, grad = value_and_gradient(inputs)
                assert result.loss.isnan(), (name, value, weighting)
                assert grad[1].isnan().any(), (name, value, weighting)


def test_half_precision_is_stored_without_overflow_of_weighted_gradients(place: Place) -> None:
    """Weights up to the batch size, which is what a mean over selected samples needs."""
    case = replace(X0, shape=(4, 3, 4, 5, 6), pred=torch.float16, latent=torch.float16)
    for weighting in ("x0", "x0_adaptive"):
        inputs = replace(case, weighting=weighting).inputs(place[1])
        weight = torch.tensor([4.0, 0, 1, 0.5], device=place[1])
        change = {"sample_weight": weight, "prior_weight": weight}
        wide = {
            k: v.double() if isinstance(v, Tensor) and v.dtype in FLOATS else v
            for k, v in (inputs | change).items()
        }
        with ops.use_backend("reference"):
            _, exact = value_and_gradient({**wide, "scale": 1e3})
        _, grad = value_and_gradient({**inputs, **change, "scale": 1e3})
        assert_elementwise(grad, exact.half().double(), scale=4 * exact.abs().max().item())


# --- seeds ---


def test_seeds_of_ranks_steps_and_samples_never_meet() -> None:
    for base in (0, 1, -1, 2**63 - 1, -(2**63)):
        seeds = torch.cat(
            [
                ops.draw_seeds(33, base=base, step=step, rank=rank)
                for step in (0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1)
                for rank in (0, 1, 7, 2**16 - 1)
            ]
        )
        assert seeds.dtype == torch.int64
        assert len(seeds.unique()) == len(seeds)
    again = ops.draw_seeds(5, base=3, step=2, rank=1)
    assert torch.equal(again, ops.draw_seeds(9, base=3, step=2, rank=1)[:5])
    assert not torch.equal(again, ops.draw_seeds(5, base=4, step=2, rank=1))
    bits = (ops.draw_seeds(2**16, base=3, step=2, rank=1)[:, None] >> torch.arange(64)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 0.01


def test_seeds_of_a_generator_are_as_before() -> None:
    a, b = (ops.draw_seeds(4, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("how", "needle"),
    [
        ({"base": 1}, "base, step, rank: got {'base': 1, 'step': None, 'rank': None}"),
        ({"step": 1, "rank": 0}, "needed: all three, or a generator"),
        ({"base": 1, "step": -1, "rank": 0}, "step: got -1"),
        ({"base": 1, "step": 0, "rank": 2**16}, "rank: got 65536"),
        ({"base": 2**63, "step": 0, "rank": 0}, "base: got 9223372036854775808"),
        ({"base": 1, "step": 0, "rank": 0, "batch": 2**17}, "batch: got 131072"),
        (
            {"base": 1, "step": 0, "rank": 0, "generator": torch.Generator()},
            "generator: got <torch",
        ),
    ],
)
def test_bad_seeds_are_refused(how: dict[str, Any], needle: str) -> None:
    with pytest.raises(ValueError, match=re.escape(needle)):
        ops.draw_seeds(**{"batch": 4, **how})
