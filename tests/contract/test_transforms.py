"""Forward mode, torch.func and hooks: every op gives the right value or refuses in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

from afd import ops
from afd_kernels.adaln import reference as adaln_reference
from afd_kernels.block_attention import reference as attention_reference
from afd_kernels.block_attention.contract import AttentionInputs
from afd_kernels.qk_norm_rope import reference as rope_reference
from tests.cases import BASE
from tests.contract import test_attention, test_every_op, test_row_ops

Place = tuple[str, str]
Call = tuple[Callable[[Tensor], Tensor], Tensor]

SMALL = replace(BASE, shape=(2, 3, 4, 2, 3), t_chunks=2)
# The refusal of forward mode, and the op's differentiable counterpart that it names.
REFUSED = {
    "block_attention": "afd_kernels.block_attention.reference.block_attention",
    "qk_norm_rope": "afd_kernels.qk_norm_rope.reference.norm_rope",
    "adaln": "afd_kernels.adaln.reference.residual_norm",
}


def call(op: str, device: str = "cpu") -> Call:
    """A scalar function of the op's first input, and that input."""
    if op in ("nft_loss", "forward_noise"):
        inputs = SMALL.inputs(device)
        v = inputs.pop("v_theta").detach()
        if op == "nft_loss":
            return lambda x: ops.nft_loss(v_theta=x, **inputs).loss, v
        t, seed = inputs["t"], inputs["seed"]
        return lambda x: ops.forward_noise(x, t, seed=seed).square().sum(), v
    if op == "block_attention":
        q, k, w, *_ = (x.detach() for x in test_attention.tensors(device, strided=False))
        return lambda x: ops.block_attention(x, k, w, test_attention.ALIKE)[0].square().sum(), q
    i = test_row_ops.tensors(strided=False, device=device)
    if op == "qk_norm_rope":
        rest = (i["k"], i["weight_q"], i["weight_k"], i["rope"])
        return lambda x: sum(y.sin().sum() for y in ops.qk_norm_rope(x, *rest)), i["q"]
    rest = (i["branch"], i["gate"], i["scale"], i["shift"])
    return lambda x: sum(y.sin().sum() for y in ops.adaln(x, *rest)), i["x"]


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """By an ordinary backward."""
    x = x.detach().requires_grad_()
    f(x).backward()
    assert x.grad is not None
    return x.grad


OPS = ("nft_loss", "forward_noise", "block_attention", "qk_norm_rope", "adaln")
LINEAR = ("nft_loss", "forward_noise")


@pytest.mark.parametrize("op", OPS)
def test_reverse_mode_transforms_give_the_backward(op: str) -> None:
    f, x = call(op)
    want = gradient(f, x)
    torch.testing.assert_close(grad(f)(x), want)
    torch.testing.assert_close(jacrev(f)(x), want)
    _, pull = vjp(f, x)
    torch.testing.assert_close(pull(torch.tensor(2.0))[0], 2 * want)
    several = torch.stack([x, x * 0.5, x + 0.1])
    each = torch.stack([gradient(f, one) for one in several])
    torch.testing.assert_close(vmap(f)(several), torch.stack([f(one) for one in several]))
    torch.testing.assert_close(vmap(grad(f))(several), each)
    torch.testing.assert_close(vmap(grad(f), in_dims=1)(several.movedim(0, 1)), each)
    torch.testing.assert_close(grad(lambda s: vmap(f)(s).sum())(several), each)
    torch.testing.assert_close(gradient(lambda s: vmap(f)(s).sum(), several), each)
    leaf = x.clone().requires_grad_()
    scales = torch.tensor([1.0, 3.0])
    (batched,) = torch.autograd.grad(f(leaf), leaf, scales, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([want, 3 * want]))


def test_transforms_on_every_backend_of_the_fused_ops(place: Place) -> None:
    for op in ("nft_loss", "forward_noise"):
        f, x = call(op, place[1])
        want = gradient(f, x)
        torch.testing.assert_close(grad(f)(x), want)
        tangent = torch.linspace(-1, 1, x.numel(), device=place[1]).reshape(x.shape)
        torch.testing.assert_close(jvp(f, (x,), (tangent,))[1], (want * tangent).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tangents_of_every_dtype(dtype: torch.dtype) -> None:
    inputs = replace(SMALL, pred=dtype, latent=dtype).inputs()
    v = inputs.pop("v_theta").detach()
    tangent = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    value, got = jvp(lambda x: ops.nft_loss(v_theta=x, **inputs).loss, (v,), (tangent,))
    wide = {k: w.double() if isinstance(w, Tensor) and w.ndim > 2 else w for k, w in inputs.items()}
    exact = gradient(lambda x: ops.nft_loss(v_theta=x, **wide).loss, v.double())
    want = (exact * tangent.double()).sum()
    size = exact.norm() * tangent.double().norm()
    assert got.dtype == value.dtype
    assert abs(got.double() - want) <= torch.finfo(dtype).eps * size


@pytest.mark.parametrize("op", LINEAR)
def test_forward_mode_is_exact(op: str) -> None:
    f, x = call(op)
    want = gradient(f, x)
    tangent = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    slope = (want * tangent).sum()
    torch.testing.assert_close(jvp(f, (x,), (tangent,))[1], slope)
    torch.testing.assert_close(jacfwd(f)(x), want)
    torch.testing.assert_close(linearize(f, x)[1](tangent), slope)
    compiled = torch.compile(
        lambda x: jvp(f, (x,), (tangent,))[1], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), slope)
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
            out = f(forward_ad.make_dual(x, tangent))
            torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, slope)


def test_a_compiled_dual_level_is_seen() -> None:
    f, x = call("nft_loss")
    tangent = torch.ones_like(x)

    def slope(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent

    compiled = torch.compile(slope, backend="aot_eager")
    torch.testing.assert_close(compiled(x), (gradient(f, x) * tangent).sum())


def test_forward_noise_is_linear_to_any_order() -> None:
    f, x = call("forward_noise")
    direction = torch.ones_like(x)
    inputs = SMALL.inputs()
    alpha = 1 - inputs["t"].repeat_interleave(2, dim=1)[:, None, :, None, None]
    want = 2 * alpha.square().expand_as(x)
    torch.testing.assert_close(jvp(grad(f), (x,), (direction,))[1], want)
    twice = jvp(lambda y: jvp(f, (y,), (direction,))[1], (x,), (direction,))[1]
    torch.testing.assert_close(twice, want.sum())


@pytest.mark.parametrize("op", REFUSED)
def test_forward_mode_is_refused_by_name(op: str) -> None:
    f, x = call(op)
    needle = rf"afd::{op} has no forward-mode derivative.*; {REFUSED[op]} has one"
    for transform in (
        lambda: jvp(f, (x,), (x,)),
        lambda: jacfwd(f)(x),
        lambda: linearize(f, x),
        lambda: torch.compile(lambda x: jvp(f, (x,), (x,))[1], backend="aot_eager")(x),
    ):
        with pytest.raises(Exception, match=needle):
            transform()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=needle):
        f(forward_ad.make_dual(x, x))


def test_what_the_refusals_name_has_a_tangent() -> None:
    i = test_row_ops.tensors(strided=False)
    q, k, v, *_ = (x.detach() for x in test_attention.tensors("cpu", strided=False))
    for f, x in (
        (lambda x: rope_reference.norm_rope(x, i["weight_q"], i["rope"], 1e-6), i["q"]),
        (
            lambda x: adaln_reference.residual_norm(
                x, i["branch"], i["gate"], i["scale"], i["shift"], 1.0, 1e-6
            )[1],
            i["x"],
        ),
        (
            lambda x: attention_reference.block_attention(
                AttentionInputs(x, k, v), test_attention.ALIKE, 0.2
            )[0],
            q,
        ),
    ):
        tangent = torch.linspace(-1, 1, x.numel()).reshape(x.shape).square()
        want = (gradient(lambda y, f=f: f(y).sin().sum(), x) * tangent).sum()
        got = jvp(lambda y, f=f: f(y).sin().sum(), (x,), (tangent,))[1]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", [op for op in OPS if op != "forward_noise"])
def test_second_derivatives_are_refused(op: str) -> None:
    f, x = call(op)
    one = torch.ones_like(x)
    for transform in (
        lambda: hessian(f)(x),
        lambda: jacrev(jacrev(f))(x),
        lambda: grad(lambda y: grad(f)(y).sum())(x),
        lambda: jvp(grad(f), (x,), (one,)),
        lambda: grad(lambda y: jvp(f, (y,), (one,))[1])(x),
        lambda: jvp(lambda y: jvp(f, (y,), (one,))[1], (x,), (one,)),
        lambda: gradient(lambda y: grad(f)(y).sum() + y.sum(), x),
    ):
        with pytest.raises(RuntimeError, match=rf"afd::{op}\w* has no .*derivative"):
            transform()


BACKWARDS = ("nft_loss_bwd", "block_attention_bwd", "qk_norm_rope_bwd", "adaln_bwd-gated")
IN_PLACE = ("nft_loss_bwd_", "qk_norm_rope_append_")


def direct(case: str) -> tuple[str, tuple[Any, ...]]:
    """An op of torch.ops.afd with its positional arguments, none of which requires grad."""
    name = case.partition("-")[0]
    if name in test_every_op.NAMES:
        args = test_every_op.arguments(name, "cpu", False)
    elif name.startswith("block"):
        args = test_attention.arguments(name, "cpu", False, True)
    else:
        _, args = test_row_ops.arguments(case, False)
    return name, tuple(x.detach() if isinstance(x, Tensor) else x for x in args)


@pytest.mark.parametrize("case", [*BACKWARDS, *IN_PLACE])
def test_the_ops_behind_the_public_ones_refuse_tangents(case: str) -> None:
    name, args = direct(case)
    op = getattr(torch.ops.afd, name)
    needle = rf"afd::{name} (has no forward-mode derivative|writes in place and has no derivative)"
    with pytest.raises(RuntimeError, match=needle):
        jvp(lambda x: op(x, *args[1:]), (args[0],), (torch.ones_like(args[0]),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=needle):
        op(forward_ad.make_dual(args[0], torch.ones_like(args[0])), *args[1:])


@pytest.mark.parametrize("case", IN_PLACE)
def test_writing_in_place_is_refused_under_autograd_and_vmap(case: str) -> None:
    name, args = direct(case)
    op = getattr(torch.ops.afd, name)
    with pytest.raises(RuntimeError, match=rf"afd::{name} writes in place.*torch.no_grad"):
        op(args[0].clone().requires_grad_(), *args[1:])
    with pytest.raises(RuntimeError, match=rf"afd::{name} writes in place and has no vmap"):
        vmap(lambda x: op(x, *args[1:]))(torch.stack([args[0]] * 2))


@pytest.mark.parametrize("name", ["t", "r", "x0", "v_old"])
def test_data_with_a_tangent_is_refused(name: str) -> None:
    inputs = SMALL.inputs() | {"r": torch.rand(2)}
    inputs["v_theta"] = inputs["v_theta"].detach()

    def f(x: Tensor) -> Tensor:
        return ops.nft_loss(**(inputs | {name: x})).loss

    x = inputs[name]
    with pytest.raises(RuntimeError, match=rf"{name}: got a tensor with a tangent; needed: {name}"):
        jvp(f, (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match=rf"{name}: got a tensor that requires grad"):
        grad(f)(x)
    if name in ("t", "x0"):
        noised = inputs | {name: x}
        if name == "t":
            with pytest.raises(RuntimeError, match="t: got a tensor with a tangent"):
                jvp(
                    lambda t: ops.forward_noise(noised["x0"], t, seed=noised["seed"]),
                    (x,),
                    (torch.ones_like(x),),
                )


def test_per_sample_gradients_of_a_module() -> None:
    inputs = replace(SMALL, shape=(1, 3, 4, 2, 3)).inputs()
    net = torch.nn.Conv3d(3, 3, 1)
    params = {k: p.detach() for k, p in net.named_parameters()}
    names = ("v_old", "v_ref", "x0", "t", "r", "seed")
    data = {k: torch.stack([inputs[k], inputs[k].roll(1, -1)]) for k in names}
    rest = {k: v for k, v in inputs.items() if k not in (*names, "v_theta")}

    def loss(params: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
        v_theta = functional_call(net, params, (data["x0"],))
        return ops.nft_loss(v_theta=v_theta, **data, **rest).loss

    got = vmap(grad(loss), in_dims=(None, 0))(params, data)
    for i in range(2):
        net.zero_grad()
        loss(dict(net.named_parameters()), {k: v[i] for k, v in data.items()}).backward()
        for key, parameter in net.named_parameters():
            torch.testing.assert_close(got[key][i], parameter.grad)


@pytest.mark.parametrize("op", OPS)
def test_hooks_checkpoints_and_odd_strides_change_nothing(op: str) -> None:
    f, x = call(op)
    want = gradient(f, x)
    for reentrant in (False, True):
        got = gradient(lambda y, r=reentrant: checkpoint(f, y, use_reentrant=r), x)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(gradient(f, x), want, rtol=0, atol=0)
    kept: list[Tensor] = []

    def pack(saved: Tensor) -> int:
        kept.append(saved.detach().clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: kept[i]):
        torch.testing.assert_close(gradient(f, x), want, rtol=0, atol=0)
    expanded = x[:1].expand_as(x)
    torch.testing.assert_close(gradient(f, expanded), gradient(f, expanded.contiguous()))
    with torch.inference_mode():
        value = f(x)
    assert not value.requires_grad
    torch.testing.assert_close(value, f(x), rtol=0, atol=0)
