"""adaln: the residual, its norm and the modulation of each frame, in one pass.

Letters: B streams, L tokens, D width, F frames of a modulation.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from afd import ops
from afd_kernels.adaln import reference
from tests.tolerances import assert_elementwise

Place = tuple[str, str]

OP = "adaln"
EPS = 1e-6
HALVES = [torch.float32, torch.bfloat16, torch.float16]
# B, L, D: odd sizes, widths that are no power of two.
SHAPES = [(2, 6, 96), (1, 12, 120), (3, 6, 1), (1, 6, 7), (1, 6, 1536)]
KINDS = ("gated", "plain", "affine", "norm", "shared", "unequal")

Inputs = dict[str, Tensor | None]
NAMES = ("x", "branch", "gate", "scale", "shift")


def inputs(
    shape: tuple[int, int, int],
    kind: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    modulation: torch.dtype | None = None,
) -> Inputs:
    """Tensor arguments of ops.adaln; modulations are slices of a [B, F, 6, D] table.

    gated: a block's self-attention; plain: after cross-attention; affine: gated residual, then
    norm3's weight and bias; norm: no residual; shared: one row for all streams and tokens;
    unequal: gates of 2 frames, shifts and scales of 3.
    """
    g = torch.Generator().manual_seed(sum(shape))
    batch, _, width = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g).to(device, modulation or dtype)

    streams = 1 if kind == "shared" else batch
    frames = 1 if kind == "shared" else 3
    shift, scale, gate = normal(streams, frames, 6, width).unbind(2)[:3]
    if kind == "affine":
        scale, shift = normal(width), normal(width)
    if kind == "unequal":
        gate = normal(1, 2, 6, width)[:, :, 2]
    x, branch = torch.randn(2, *shape, generator=g).to(device, dtype).unbind(0)
    return {
        "x": 2 * x + 1,
        "branch": None if kind == "norm" else branch,
        "gate": None if kind in ("plain", "norm") else gate,
        "scale": scale,
        "shift": shift,
    }


def offset(kind: str) -> float:
    return 0.0 if kind == "affine" else 1.0


def run(i: Inputs, kind: str) -> tuple[Tensor, Tensor]:
    return ops.adaln(*(i[n] for n in NAMES), scale_offset=offset(kind))


def per_token(value: Tensor, x: Tensor) -> Tensor:
    """A loop over tokens: token l belongs to frame l // (L/F)."""
    if value.ndim == 1:
        return value.double()
    tokens = x.shape[1] // value.shape[1]
    rows = [value[:, t // tokens] for t in range(x.shape[1])]
    return torch.stack(rows, dim=1).double()


def residual(i: Inputs) -> Tensor:
    x, branch, gate = i["x"], i["branch"], i["gate"]
    if branch is None:
        return x.double()
    return x.double() + (branch.double() if gate is None else branch * per_token(gate, x))


def modulated(x_out: Tensor, i: Inputs, kind: str) -> Tensor:
    normed = layer_norm(x_out.double(), x_out.shape[-1:], eps=EPS)
    return normed * (offset(kind) + per_token(i["scale"], x_out)) + per_token(i["shift"], x_out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_rows_equal_float64(place: Place, dtype: torch.dtype, shape, kind: str) -> None:
    i = inputs(shape, kind, place[1], dtype)
    x_out, h = run(i, kind)
    assert x_out.dtype == h.dtype == dtype
    assert h.is_contiguous()
    assert x_out.is_contiguous()
    assert_elementwise(x_out, residual(i), scale=4.0)
    # The norm reads the residual stream as it was rounded.
    assert_elementwise(h, modulated(x_out, i, kind), scale=16.0)


def test_without_a_branch_x_comes_back_itself(place: Place) -> None:
    i = inputs((1, 6, 8), "norm", place[1])
    assert run(i, "norm")[0] is i["x"]


def test_a_modulation_may_stay_in_float32(place: Place) -> None:
    i = inputs((2, 6, 40), "gated", place[1], torch.bfloat16, modulation=torch.float32)
    x_out, h = run(i, "gated")
    assert_elementwise(x_out, residual(i), scale=4.0)
    assert_elementwise(h, modulated(x_out, i, "gated"), scale=16.0)


def test_a_large_mean_does_not_cost_the_variance(place: Place) -> None:
    """E[x²] - E[x]² would leave nothing of it."""
    i = inputs((1, 6, 64), "norm", place[1])
    i["x"] = i["x"] + 2.0**12
    centred = i["x"].double() - i["x"].double().mean(-1, keepdim=True)
    expected = modulated(centred, i, "norm")
    assert_elementwise(run(i, "norm")[1], expected, scale=2.0**9)


def layouts(shape: tuple[int, int, int], device: str) -> dict[str, Tensor]:
    """Views of other memory with the given shape."""
    batch, tokens, width = shape
    g = torch.Generator().manual_seed(1)
    return {
        "sliced": torch.randn(batch, tokens + 3, 2, width, generator=g).to(device)[:, 2:-1, 1],
        "expanded": torch.randn(1, 1, width, generator=g).to(device).expand(shape),
        "sparse": torch.randn(batch, tokens, 2 * width, generator=g).to(device)[..., ::2],
        "channels_first": torch.randn(batch, width, tokens, generator=g).to(device).mT,
    }


@pytest.mark.parametrize("layout", ["sliced", "expanded", "sparse", "channels_first"])
def test_any_strides_are_read(place: Place, layout: str) -> None:
    i = inputs((2, 6, 24), "gated", place[1])
    i["x"] = layouts((2, 6, 24), place[1])[layout]
    i["branch"] = layouts((2, 6, 24), place[1])["sliced"]
    i["gate"] = layouts((2, 3, 24), place[1])[layout]
    x_out, h = run(i, "gated")
    assert_elementwise(x_out, residual(i), scale=4.0)
    assert_elementwise(h, modulated(x_out, i, "gated"), scale=16.0)


def asking(i: Inputs) -> tuple[list[str], list[Tensor]]:
    """The given tensors, each now a leaf that requires grad, and their names."""
    for name, value in i.items():
        i[name] = None if value is None else value.detach().requires_grad_()
    names = [n for n in NAMES if i[n] is not None]
    return names, [i[n] for n in names]


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        *((torch.float32, layout) for layout in ("expanded", "sparse", "channels_first")),
        *((dtype, "sliced") for dtype in HALVES),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_float64(place: Place, kind: str, dtype: torch.dtype, layout: str) -> None:
    check_gradients(place, (2, 6, 40), kind, dtype, layout)


@pytest.mark.parametrize("kind", ["shared", "unequal"])
def test_sums_over_many_tokens_equal_float64(place: Place, kind: str) -> None:
    """More tokens to a modulation than any kernel takes at once."""
    check_gradients(place, (2, 210 if kind == "unequal" else 67, 7), kind, torch.float32, "sliced")


def check_gradients(
    place: Place, shape: tuple[int, int, int], kind: str, dtype: torch.dtype, layout: str
) -> None:
    i = inputs(shape, kind, place[1], dtype)
    names, leaves = asking(i)
    incoming = [layouts(shape, place[1])[n].to(dtype) for n in (layout, "sliced")]
    x_out, h = run(i, kind)
    # Without a branch x_out is x: autograd adds that gradient itself, with its own rounding.
    first = 1 if kind == "norm" else 0
    got = torch.autograd.grad((x_out, h)[first:], leaves, incoming[first:])

    wide = {n: None if v is None else v.detach().double().requires_grad_() for n, v in i.items()}
    exact = residual(wide)
    # Where the norm reads a rounded value, its gradient is taken there.
    rounded = exact + (x_out.detach().double() - exact.detach())
    expected = torch.autograd.grad(
        (exact, modulated(rounded, wide, kind))[first:],
        [wide[n] for n in names],
        [x.double() for x in incoming[first:]],
    )
    for name, ours, theirs in zip(names, got, expected, strict=True):
        assert ours.dtype == dtype
        rows = shape[0] * shape[1] if name in ("gate", "scale", "shift") else 1
        assert_elementwise(ours, theirs, scale=16.0 * rows)


@pytest.mark.parametrize("kind", ["gated", "plain", "norm"])
def test_an_unused_output_counts_as_zero(place: Place, kind: str) -> None:
    i = inputs((2, 6, 24), kind, place[1])
    names, leaves = asking(i)
    x_out, h = run(i, kind)
    zero = torch.zeros_like(h)
    only_h = torch.autograd.grad(h, leaves, h.detach(), retain_graph=True)
    both = torch.autograd.grad((x_out, h), leaves, (zero, h.detach()), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(only_h, both, strict=True))
    if kind == "norm":
        return
    only_x = torch.autograd.grad(x_out, leaves, x_out.detach(), retain_graph=True)
    both = torch.autograd.grad((x_out, h), leaves, (x_out.detach(), zero))
    for name, a, b in zip(names, only_x, both, strict=True):
        assert torch.equal(a, b)
        assert (name in ("scale", "shift")) == (not a.any())


def test_two_runs_give_the_same_bits(place: Place) -> None:
    runs = []
    for _ in range(2):
        i = inputs((1, 70, 40), "shared", place[1])
        _, leaves = asking(i)
        outputs = run(i, "shared")
        runs.append((*outputs, *torch.autograd.grad(outputs, leaves, outputs)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_twice_differentiable(kind: str) -> None:
    i = inputs((2, 6, 5), kind, dtype=torch.float64)
    names, leaves = asking(i)

    def op(*given: Tensor) -> tuple[Tensor, Tensor]:
        return run(dict.fromkeys(NAMES) | dict(zip(names, given, strict=True)), kind)

    def formula(*given: Tensor) -> tuple[Tensor, Tensor]:
        now = dict.fromkeys(NAMES) | dict(zip(names, given, strict=True))
        for name in ("scale", "shift"):
            now[name] = now[name] if now[name].ndim == 3 else now[name][None, None]
        return reference.residual_norm(*(now[n] for n in NAMES), offset(kind), EPS)

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(formula, leaves)


def test_double_backward_is_refused(place: Place) -> None:
    i = inputs((1, 6, 8), "gated", place[1])
    asking(i)
    _, h = run(i, "gated")
    grad = torch.ones_like(h, requires_grad=True)
    (first,) = torch.autograd.grad(h, i["x"], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


def test_a_branch_and_its_stream_may_be_one_leaf(place: Place) -> None:
    """Without a gate both gradients are one tensor, which must be counted twice."""
    i = inputs((1, 6, 8), "plain", place[1])
    x = i["x"].requires_grad_()
    x_out, _ = run(i | {"branch": x}, "plain")
    (grad,) = torch.autograd.grad(x_out, x, torch.ones_like(x_out))
    assert torch.equal(grad, torch.full_like(x, 2.0))
    apart = [i["x"].detach().requires_grad_(), i["x"].detach().requires_grad_()]
    run(i | dict(zip(("x", "branch"), apart, strict=True)), "plain")[0].sum().backward()
    apart[0].grad.mul_(3)
    assert torch.equal(apart[1].grad, torch.ones_like(x))


def test_bad_input_names_the_argument() -> None:
    good = inputs((2, 6, 8), "gated")
    for change, needle in (
        ({"x": good["x"][0]}, r"x: got float32 \[6, 8\]"),
        ({"x": good["x"][:, :0]}, r"x: got float32 \[2, 0, 8\]"),
        ({"x": good["x"].int()}, "x: got int32"),
        ({"branch": good["branch"][:, :5]}, r"branch: got float32 \[2, 5, 8\]"),
        ({"branch": good["branch"].half()}, "branch: got float16"),
        ({"branch": None}, "gate: .* None, as there is no branch"),
        ({"gate": good["gate"][..., :7]}, r"gate: got .*; needed: float32 \[2, 3, 8\]"),
        ({"gate": good["gate"][0, 0]}, r"gate: got float32 \[8\]"),
        ({"gate": torch.zeros(2, 4, 8)}, "gate: .* with F dividing the 6 tokens"),
        ({"gate": torch.zeros(3, 3, 8)}, r"gate: got float32 \[3, 3, 8\]"),
        ({"scale": good["scale"].double()}, "scale: got float64"),
        ({"scale": torch.zeros(2, 0, 8)}, r"scale: got float32 \[2, 0, 8\]"),
        ({"scale": torch.zeros(7)}, r"scale: got float32 \[7\]"),
        ({"shift": torch.zeros(8)}, r"shift: got float32 \[8\]"),
        ({"shift": good["shift"].half()}, "shift: got float16"),
    ):
        with pytest.raises(ValueError, match=needle):
            run(good | change, "gated")


def test_a_tiny_row_keeps_a_tiny_eps(place: Place) -> None:
    """The square of the power of two that such a row is multiplied by is beyond float32."""
    i = inputs((1, 6, 64), "norm", place[1])
    x = 1e-18 * i["x"]
    h = ops.adaln(x, None, None, i["scale"], i["shift"], scale_offset=1.0, eps=1e-36)[1]
    normed = layer_norm(x.double(), x.shape[-1:], eps=1e-36)
    assert_elementwise(
        h, normed * (1 + per_token(i["scale"], x)) + per_token(i["shift"], x), scale=16.0
    )
