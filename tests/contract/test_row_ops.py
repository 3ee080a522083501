"""What rule 7 of the architecture asks of the ops on token rows, qk_norm_rope and adaln."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from afd import ops

Place = tuple[str, str]

# adaln's backends and their limits are the same.
OP = "qk_norm_rope"
# B streams, L tokens of T a frame, h heads of d channels, S cache slots.
B, L, T, H, D, S = 2, 6, 2, 3, 8, 12


def tensors(strided: bool, device: str = "cpu") -> dict[str, Tensor]:
    """Small inputs of both ops by name; strided ones are slices of fused projections."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device)

    angle = normal(B, L, D // 2)
    inputs = {
        **{name: normal(B, L, H, D) for name in ("q", "k", "v", "grad_q", "grad_k")},
        **{name: normal(H * D) for name in ("weight_q", "weight_k")},
        "rope": torch.stack((angle.cos(), angle.sin()), dim=-1),
        **{name: torch.zeros(B, S, H, D, device=device) for name in ("k_cache", "v_cache")},
        "position": torch.tensor([0, 7], device=device),
        **{name: normal(B, L, H * D) for name in ("x", "branch", "grad_x", "grad_h")},
        **{name: normal(B, L // T, H * D) for name in ("gate", "scale", "shift")},
    }
    if strided:
        inputs |= dict(zip("qkv", normal(B, L, 3, H, D).unbind(2), strict=True))
        inputs |= zip(("x", "branch"), normal(B, L, 2, H * D).unbind(2), strict=True)
        table = normal(B, L // T, 6, H * D).unbind(2)
        inputs |= zip(("gate", "scale", "shift"), table, strict=False)
        inputs["grad_q"] = normal(B, H, L, D).transpose(1, 2)
        inputs["grad_h"] = normal(B, H * D, L).transpose(1, 2)
    return inputs


def arguments(case: str, strided: bool, device: str = "cpu") -> tuple[str, tuple[Any, ...]]:
    """The op and positional arguments of a case; what is differentiable asks for its gradient."""
    name, _, variant = case.partition("-")
    i = tensors(strided, device)
    if name in ("qk_norm_rope", "adaln"):
        i = {k: v.requires_grad_(k not in ("rope", "position")) for k, v in i.items()}
    qk = tuple(i[n] for n in ("q", "k", "weight_q", "weight_k", "rope"))
    gate = i["gate"] if variant == "gated" else None
    branch = None if variant == "norm" else i["branch"]
    scale, shift = (i["scale"], i["shift"]) if gate is not None else (i["scale"][0, 0],) * 2
    cached = ("k_cache", "v_cache", "position")
    return name, {
        "qk_norm_rope": (*qk, 1e-6),
        "qk_norm_rope_bwd": (i["grad_q"], i["grad_k"], *qk, 1e-6),
        "qk_norm_rope_append_": (*qk[:2], i["v"], *qk[2:], *(i[n] for n in cached), T, 1, 1e-6),
        "adaln": (i["x"], branch, gate, scale, shift, 1.0, 1e-6),
        "adaln_bwd": (i["grad_x"], i["grad_h"], i["x"], branch, gate, scale, 0.0, 1e-6),
    }[name]


CASES = (
    *("qk_norm_rope", "qk_norm_rope_bwd", "qk_norm_rope_append_"),
    *(f"{name}-{kind}" for name in ("adaln", "adaln_bwd") for kind in ("gated", "plain", "norm")),
)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "sliced"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(place: Place, case: str, strided: bool) -> None:
    name, args = arguments(case, strided, place[1])
    torch.library.opcheck(getattr(torch.ops.afd, name).default, args)


@pytest.mark.parametrize("case", CASES)
def test_a_trace_holds_the_op_alone(case: str) -> None:
    """What a call asks of its tensors, such as whether they have tangents, must not be traced."""
    name, args = arguments(case, strided=True)
    op = getattr(torch.ops.afd, name).default
    tensors = [x for x in args if isinstance(x, Tensor)]

    def call(*given: Tensor) -> Any:
        left = iter(given)
        return op(*(next(left) if isinstance(x, Tensor) else x for x in args))

    with torch.no_grad():
        graph = make_fx(call)(*tensors).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert [x for x in called if x is not operator.getitem] == [op]


def step(i: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """A block's use of both ops: modulated residual, then queries and keys into the cache."""
    x, h = ops.adaln(i["x"], i["branch"], i["gate"], i["scale"], i["shift"])
    _, h = ops.adaln(x, None, None, i["scale"] * 2, i["shift"])
    q = h.unflatten(-1, (H, D))
    q, k = ops.qk_norm_rope(q, i["k"] * 2, i["weight_q"], i["weight_k"], i["rope"])
    return x, q, k


def append(i: dict[str, Tensor]) -> Tensor:
    names = ("q", "k", "v", "weight_q", "weight_k", "rope", "k_cache", "v_cache", "position")
    return ops.qk_norm_rope_append_(*(i[n] for n in names), tokens_per_frame=T, sink_frames=1)


def append_and_read(i: dict[str, Tensor]) -> Tensor:
    """The mutating op before operations on what it wrote."""
    return append(i) + i["k_cache"][:, :L] + i["v_cache"][:, L:]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph_with_the_same_bits(backend: str) -> None:
    inputs = tensors(strided=True)
    names = ("x", "branch", "gate", "scale", "shift", "k", "weight_q", "weight_k")
    for name in names:
        inputs[name] = inputs[name].detach().requires_grad_()

    def gradients(run: Any) -> tuple[Tensor, ...]:
        x, q, k = run(inputs)
        return x, q, k, *torch.autograd.grad((x, q, k), [inputs[n] for n in names], (x, q, k))

    eager = gradients(step)
    compiled = gradients(torch.compile(step, fullgraph=True, backend=backend))
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_append_compiles_in_place(backend: str) -> None:
    eager, traced = tensors(strided=True), tensors(strided=True)
    compiled = torch.compile(append_and_read, fullgraph=True, backend=backend)
    # A cached graph would hide a failure to compile.
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        for frame in (0, 3):
            eager["position"].fill_(frame)
            traced["position"].fill_(frame)
            assert torch.equal(append_and_read(eager), compiled(traced))
            for name in ("k_cache", "v_cache"):
                assert torch.equal(eager[name], traced[name])


def test_fake_cuda_tensors_pass_without_a_synchronisation() -> None:
    """A hidden .item() would raise DataDependentOutputException here."""
    shapes = {k: (v.shape, v.dtype) for k, v in tensors(strided=False).items()}
    with FakeTensorMode():
        i = {k: torch.empty(s, dtype=t, device="cuda") for k, (s, t) in shapes.items()}
        assert [x.shape for x in step(i)] == [i["x"].shape, i["q"].shape, i["q"].shape]
        assert append(i).device.type == "cuda"
        weights = (i["weight_q"], i["weight_k"])
        grads = torch.ops.afd.qk_norm_rope_bwd(
            i["q"], i["k"], i["q"], i["k"], *weights, i["rope"], 1e-6
        )
        assert [g.shape for g in grads] == [x.shape for x in (i["q"], i["k"], *weights)]
        grads = torch.ops.afd.adaln_bwd(
            None, i["x"], i["x"], i["branch"], i["gate"], i["scale"], 1.0, 1e-6
        )
        expected = [i[n].shape for n in ("x", "branch", "gate", "scale", "shift")]
        assert [g.shape for g in grads] == expected
        assert all(g.device.type == "cuda" for g in grads)
