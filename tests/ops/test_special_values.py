"""NaN, infinities and very large or small numbers: each output element's class is float64's.

The classes are NaN, +inf, -inf and finite (docs/NUMERICS.md, "Special values").
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from afd import ops
from afd_kernels import dispatch
from afd_kernels.adaln import reference as adaln_reference
from afd_kernels.block_attention import reference as attention_reference
from afd_kernels.block_attention.contract import AttentionInputs
from afd_kernels.qk_norm_rope import reference as rope_reference

NAN, INF = float("nan"), float("inf")
SPECIALS = (NAN, INF, -INF, 1e20, -1e20, 1e-30, 0.0)
ROW_BACKENDS = ("native", "triton", "reference")


def require_backend(op: str, backend: str) -> None:
    reason = dispatch.explain(op, "cpu", {torch.float32})[backend]
    if reason:
        pytest.skip(reason)


def classes(x: Tensor) -> Tensor:
    kinds = (x.isnan(), x == INF, x == -INF)
    return sum(i * kind.long() for i, kind in enumerate(kinds, 1))  # type: ignore[return-value]


def assert_same(name: str, got: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    """Equal classes, and equal numbers where they are finite."""
    assert torch.equal(classes(got), classes(expected.float())), name
    finite = expected.float().isfinite()
    torch.testing.assert_close(
        got[finite].double(), expected[finite], rtol=rtol, atol=1e-5, msg=lambda m: f"{name}: {m}"
    )


def doubles(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in tensors]


@pytest.mark.parametrize("width", [32, 24])
@pytest.mark.parametrize("value", SPECIALS)
@pytest.mark.parametrize("backend", ROW_BACKENDS)
def test_one_special_channel_or_a_whole_row_of_them_in_adaln(
    backend: str, value: float, width: int
) -> None:
    require_backend("adaln", backend)
    torch.manual_seed(0)
    x, grad = torch.randn(2, 1, 6, width).unbind()
    scale, shift = torch.randn(2, width).unbind()
    x[0, 1, 3] = value
    x[0, 3] = torch.randn(width) * value
    x[0, 4] = value
    with ops.use_backend(backend, "adaln"):
        _, h = torch.ops.afd.adaln(x, None, None, scale, shift, 1.0, 1e-6)
        dx, *_ = torch.ops.afd.adaln_bwd(None, grad, x, None, None, scale, 1.0, 1e-6)
    wide = scale.double()[None, None], shift.double()[None, None]
    _, expected = adaln_reference.residual_norm(x.double(), None, None, *wide, 1.0, 1e-6)
    expected_dx, *_ = adaln_reference.adaln_bwd(
        None, grad.double(), x.double(), None, None, wide[0], 1.0, 1e-6
    )
    # A constant row: what is left of it in float32 is rounding; eps hides that of small ones.
    keep = [0, 1, 2, 3, 5] if abs(value) in (INF, 1e20) else list(range(6))
    assert_same("h", h[:, keep], expected[:, keep])
    assert_same("dx", dx[:, keep], expected_dx[:, keep])


@pytest.mark.parametrize("width", [32, 24])
@pytest.mark.parametrize("value", SPECIALS)
@pytest.mark.parametrize("backend", ROW_BACKENDS)
def test_one_special_channel_or_a_whole_row_of_them_in_qk_norm_rope(
    backend: str, value: float, width: int
) -> None:
    require_backend("qk_norm_rope", backend)
    torch.manual_seed(0)
    q, k, grad_q, grad_k = torch.randn(4, 1, 6, 2, width // 2).unbind()
    weights = torch.randn(2, width).unbind()
    rope = torch.randn(1, 6, width // 4, 2)
    q[0, 1, 1, 3] = value
    k[0, 3] = torch.randn(2, width // 2) * value
    k[0, 4] = value
    with ops.use_backend(backend, "qk_norm_rope"):
        got = torch.ops.afd.qk_norm_rope(q, k, *weights, rope, 1e-6)
        grads = torch.ops.afd.qk_norm_rope_bwd(grad_q, grad_k, q, k, *weights, rope, 1e-6)
    wide: list[Any] = doubles(q, k, *weights, rope)
    for name, a, b in zip("qk", got, rope_reference.qk_norm_rope(*wide, 1e-6), strict=True):
        assert_same(name, a, b)
    wide = doubles(grad_q, grad_k, q, k, *weights, rope)
    expected = rope_reference.qk_norm_rope_bwd(*wide, 1e-6)
    for name, a, b in zip(("dq", "dk"), grads, expected, strict=False):
        assert_same(name, a, b)


@pytest.mark.parametrize("keys", [1, 2, 7, 20])
@pytest.mark.parametrize("which", range(3), ids="qkv")
@pytest.mark.parametrize("backend", ["library", "triton", "reference"])
def test_a_special_value_in_attention(backend: str, which: int, keys: int) -> None:
    require_backend("block_attention", backend)
    torch.manual_seed(0)
    # The first 4 queries attend `keys` keys, the last 4 three keys more.
    rows = ((0, 4, 0, keys, 0, 0), (4, 8, 0, keys, keys, keys + 3))
    intervals = ops.Intervals((rows,))
    for value in SPECIALS:
        for at in (0, keys + 1):
            tensors = [torch.randn(1, n, 2, 16) for n in (8, keys + 3, keys + 3)]
            place = (0, at if which else 0, 0, 3)
            tensors[which][place] = value
            grad = torch.randn(1, 8, 2, 16)
            inputs = [x.requires_grad_() for x in tensors]
            with ops.use_backend(backend, "block_attention"):
                out, lse = ops.block_attention(*inputs, intervals)
            grads = torch.autograd.grad(out, inputs, grad)
            wide = AttentionInputs(*(x.detach().double() for x in tensors))
            expected, expected_lse = attention_reference.block_attention(wide, intervals, 16**-0.5)
            expected_grads = attention_reference.block_attention_bwd(
                grad.double(), wide, expected, expected_lse, intervals, 16**-0.5,
                (True, True, False),
            )  # fmt: skip
            where = f"{value} at {at}"
            assert_same(f"out, {where}", out.detach(), expected)
            assert_same(f"lse, {where}", lse.detach(), expected_lse)
            if abs(value) < 1e20 or value != value:
                for name, a, b in zip(("dq", "dk", "dv"), grads, expected_grads, strict=False):
                    assert_same(f"{name}, {where}", a, b)


@pytest.mark.parametrize("weighting", ["x0_adaptive", "velocity"])
@pytest.mark.parametrize("backend", ROW_BACKENDS)
def test_what_frame_mask_leaves_out_may_hold_anything(backend: str, weighting: Any) -> None:
    require_backend("nft_loss", backend)
    torch.manual_seed(0)
    mask = torch.tensor([[True, False, True, False]] * 2)
    clean = {name: torch.randn(2, 3, 4, 5, 5) for name in ("v_theta", "v_old", "v_ref", "x0")}
    clean["noise"] = torch.randn(2, 3, 4, 5, 5)

    def run(inputs: dict[str, Tensor]) -> tuple[Any, Tensor]:
        theta = inputs["v_theta"].clone().requires_grad_()
        with ops.use_backend(backend, "nft_loss"):
            result = ops.nft_loss(
                **inputs | {"v_theta": theta},
                t=torch.tensor([0.3, 0.6]),
                r=torch.tensor([0.3, 0.6]),
                nft_beta=0.5,
                prior_weight=0.1,
                weighting=weighting,
                frame_mask=mask,
            )
        return result, torch.autograd.grad(result.loss, theta)[0]

    expected, expected_grad = run(clean)
    assert not expected_grad[:, :, 1].any()
    assert not expected_grad[:, :, 3].any()
    for name in clean:
        for value in (NAN, INF, 1e38):
            spoilt = {key: x.clone() for key, x in clean.items()}
            spoilt[name][:, :, ~mask[0]] = value
            result, grad = run(spoilt)
            assert torch.equal(result.loss, expected.loss), (name, value)
            assert torch.equal(grad, expected_grad), (name, value)
            for metric in ("loss_pos", "loss_neg", "prior", "w_pos", "old_deviation"):
                assert torch.equal(getattr(result, metric), getattr(expected, metric)), metric
            # NaN in an element that counts gives NaN.
            used = {key: x.clone() for key, x in clean.items()}
            used[name][0, 0, 0, 0, 0] = NAN
            assert run(used)[0].loss.isnan(), name


@pytest.mark.parametrize("backend", ROW_BACKENDS)
def test_special_values_in_forward_noise(backend: str) -> None:
    require_backend("forward_noise", backend)
    x0, noise = torch.zeros(2, 1, len(SPECIALS), len(SPECIALS)).unbind()
    x0[0] = torch.tensor(SPECIALS)[:, None]
    noise[0] = torch.tensor(SPECIALS)[None]
    with ops.use_backend(backend, "forward_noise"):
        got = ops.forward_noise(x0, torch.tensor([0.25]), noise=noise)
    expected = 0.75 * x0.double() + 0.25 * noise.double()
    assert torch.equal(classes(got), classes(expected.float()))
