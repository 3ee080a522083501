"""qk_norm_rope: normalised, turned, and put where the frame belongs.

Letters: B streams, L tokens, h heads, d channels of a head, T tokens of a frame, S cache slots.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from afd import ops
from afd_kernels.dispatch import use_backend
from afd_kernels.qk_norm_rope import reference
from tests.tolerances import assert_elementwise

Place = tuple[str, str]

OP = "qk_norm_rope"
EPS = 1e-6
HALVES = [torch.float32, torch.bfloat16, torch.float16]
# B, L, h, d: every head width of the students, odd counts, a D that is no power of two.
SHAPES = [
    (2, 5, 3, 40),
    (1, 7, 2, 128),
    (3, 19, 1, 64),
    (1, 1, 5, 32),
    (2, 3, 12, 128),
    (1, 4, 1, 2),
]


def table(batch: int, tokens: int, width: int, g: torch.Generator) -> Tensor:
    """Any unit complex numbers [batch, tokens, width/2, 2]."""
    angle = torch.rand(batch, tokens, width // 2, generator=g) * 6.3
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def inputs(
    shape: tuple[int, int, int, int],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
    tables: int = 1,
) -> dict[str, Tensor]:
    """q, k, v, weight_q, weight_k and rope."""
    g = torch.Generator().manual_seed(sum(shape))
    tokens, heads, width = shape[1:]
    x = {name: torch.randn(shape, generator=g).to(device, dtype) for name in "qkv"}
    for name in ("weight_q", "weight_k"):
        x[name] = torch.randn(heads * width, generator=g).to(device, weights or dtype)
    x["rope"] = table(tables, tokens, width, g).to(device)
    return x


def oracle(x: Tensor, weight: Tensor, rope: Tensor) -> Tensor:
    """float64, with complex numbers as the paper writes it."""
    x, weight = x.double(), weight.double()
    rms = (x.flatten(2).pow(2).mean(-1) + EPS).sqrt()[:, :, None, None]
    normed = x / rms * weight.view(x.shape[2:])
    pairs = torch.view_as_complex(normed.unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.view_as_complex(rope.double().contiguous())[:, :, None]
    return torch.view_as_real(turned).flatten(-2)


def forward(i: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return ops.qk_norm_rope(*(i[n] for n in ("q", "k", "weight_q", "weight_k", "rope")))


def expect_forward(i: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return tuple(oracle(i[n], i[f"weight_{n}"], i["rope"]).detach() for n in "qk")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_queries_and_keys_equal_float64(place: Place, dtype: torch.dtype, shape) -> None:
    i = inputs(shape, place[1], dtype)
    for out, expected in zip(forward(i), expect_forward(i), strict=True):
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_elementwise(out, expected, scale=4.0)


def test_weights_may_stay_in_float32(place: Place) -> None:
    i = inputs((2, 3, 2, 32), place[1], torch.bfloat16, weights=torch.float32)
    for out, expected in zip(forward(i), expect_forward(i), strict=True):
        assert_elementwise(out, expected, scale=4.0)


def test_every_stream_may_have_positions_of_its_own(place: Place) -> None:
    i = inputs((3, 5, 2, 32), place[1], tables=3)
    for out, expected in zip(forward(i), expect_forward(i), strict=True):
        assert_elementwise(out, expected, scale=4.0)
    i["rope"] = torch.cat((i["rope"], i["rope"]), dim=1)[:, 2:7]
    for out, expected in zip(forward(i), expect_forward(i), strict=True):
        assert_elementwise(out, expected, scale=4.0)


def layouts(shape: tuple[int, int, int, int], device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Views of other memory: q and k as slices of a projection, of a cache, or heads first."""
    batch, tokens, heads, width = shape
    g = torch.Generator().manual_seed(1)
    fused = torch.randn(batch, tokens, 3, heads, width, generator=g).to(device)
    cache = torch.randn(batch, tokens + 5, heads, width, generator=g).to(device)
    heads_first = torch.randn(batch, heads, tokens, width, generator=g).to(device)
    shared = torch.randn(1, 1, heads, width, generator=g).to(device).expand(shape)
    sparse = torch.randn(*shape[:3], 2 * width, generator=g).to(device)[..., ::2]
    return {
        "fused": (fused[:, :, 0], fused[:, :, 1]),
        "cache": (cache[:, 2 : 2 + tokens], cache[:, :tokens]),
        "heads_first": (heads_first.transpose(1, 2), shared),
        "sparse": (sparse, fused[:, :, 2].flip(1)),
    }


@pytest.mark.parametrize("layout", ["fused", "cache", "heads_first", "sparse"])
def test_any_strides_are_read(place: Place, layout: str) -> None:
    i = inputs((2, 4, 3, 8), place[1])
    i["q"], i["k"] = layouts((2, 4, 3, 8), place[1])[layout]
    for out, expected in zip(forward(i), expect_forward(i), strict=True):
        assert_elementwise(out, expected, scale=4.0)


@pytest.mark.parametrize(
    ("dtype", "shape", "layout"),
    [
        *((torch.float32, (2, 3, 3, 40), layout) for layout in ("cache", "heads_first", "sparse")),
        *((dtype, (2, 3, 3, 40), "fused") for dtype in HALVES),
        # More tokens than any kernel takes at once.
        (torch.float32, (2, 37, 1, 32), "fused"),
    ],
    ids=str,
)
def test_gradients_equal_float64(place: Place, dtype: torch.dtype, shape, layout: str) -> None:
    i = inputs(shape, place[1], dtype, tables=shape[0])
    names = ("q", "k", "weight_q", "weight_k")
    incoming = [x.to(dtype) for x in layouts(shape, place[1])[layout]]
    got = torch.autograd.grad(forward(asking(i, names)), [i[n] for n in names], incoming)
    wide = {n: i[n].detach().double().requires_grad_() for n in names} | {"rope": i["rope"]}
    expected = torch.autograd.grad(
        [oracle(wide[n], wide[f"weight_{n}"], wide["rope"]) for n in "qk"],
        [wide[n] for n in names],
        [x.double() for x in incoming],
    )
    for name, ours, theirs in zip(names, got, expected, strict=True):
        assert ours.dtype == dtype
        # A weight's gradient sums the tokens.
        assert_elementwise(ours, theirs, scale=8.0 if name in "qk" else 8.0 * shape[0] * shape[1])


def asking(i: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    for name in names:
        i[name].requires_grad_()
    return i


def test_an_unused_output_gives_no_gradient(place: Place) -> None:
    i = asking(inputs((1, 3, 2, 32), place[1]), ("q", "k", "weight_k"))
    q_out, _ = forward(i)
    dq, dk, dweight_k = torch.autograd.grad(q_out.sum(), (i["q"], i["k"], i["weight_k"]))
    assert dq.abs().max() > 0
    assert not dk.any()
    assert not dweight_k.any()


def test_two_runs_give_the_same_bits(place: Place) -> None:
    i = asking(inputs((2, 21, 3, 40), place[1]), ("q", "k", "weight_q", "weight_k"))
    runs = []
    for _ in range(2):
        q_out, k_out = forward(i)
        wanted = [i[n] for n in ("q", "k", "weight_q", "weight_k")]
        runs.append((q_out, k_out, *torch.autograd.grad((q_out, k_out), wanted, (k_out, q_out))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_reference_is_twice_differentiable() -> None:
    i = inputs((2, 2, 2, 4), dtype=torch.float64)
    q, k, weight_q, weight_k = (i[n].requires_grad_() for n in ("q", "k", "weight_q", "weight_k"))
    for rope in (i["rope"], i["rope"].double()):
        both = lambda *x, rope=rope: ops.qk_norm_rope(*x, rope)  # noqa: E731
        assert torch.autograd.gradcheck(both, (q, k, weight_q, weight_k))
    formula = lambda x, w: reference.norm_rope(x, w, i["rope"], EPS)  # noqa: E731
    assert torch.autograd.gradgradcheck(formula, (q, weight_q))


def test_double_backward_is_refused(place: Place) -> None:
    i = asking(inputs((1, 2, 1, 32), place[1]), ("q",))
    q_out, _ = forward(i)
    grad = torch.ones_like(q_out, requires_grad=True)
    (first,) = torch.autograd.grad(q_out, i["q"], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize("start", [0, 7, 1000])
def test_the_released_code_turns_the_same(
    place: Place, shared: Path, width: int, start: int
) -> None:
    """RoPE alone: the norm is multiplied out again."""
    units = load_file(shared / "golden" / "units.safetensors")
    x = units[f"rope{width}.x"]
    pairs, grid = width // 2, units[f"rope{width}.grid"].tolist()
    split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angle = torch.cat(
        [
            (place_ + (start if axis == 0 else 0)).reshape(-1, 1)
            * 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
            for axis, (place_, n) in enumerate(zip(axes, split, strict=True))
        ],
        dim=1,
    )
    rope = torch.stack((angle.cos(), angle.sin()), dim=-1)[None].float()
    weight = torch.ones(x.shape[2] * width)
    out, _ = ops.qk_norm_rope(*(t.to(place[1]) for t in (x, x, weight, weight, rope)))
    rms = (x.double().flatten(2).pow(2).mean(-1) + EPS).sqrt()[:, :, None, None]
    expected = units[f"rope{width}.out.start{start}"].double()
    assert_elementwise((out.cpu().double() * rms).float(), expected, scale=8.0)


def test_the_released_code_normalises_the_same(place: Place, shared: Path) -> None:
    units = load_file(shared / "golden" / "units.safetensors")
    x, weight = units["rms.x"].unflatten(-1, (6, 32)).to(place[1]), units["rms.w"].to(place[1])
    still = torch.tensor([1.0, 0.0], device=place[1]).expand(1, x.shape[1], 16, 2)
    out, _ = ops.qk_norm_rope(x, x, weight, weight, still)
    assert_elementwise(out.flatten(2).cpu(), units["rms.out"], scale=4.0)


def test_one_rounding_is_closer_than_the_released_ones(place: Place, shared: Path) -> None:
    if place == ("triton", "cpu"):
        pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding it")
    units = load_file(shared / "golden" / "units.safetensors")
    x = units["rms.x"].bfloat16().unflatten(-1, (6, 32)).to(place[1])
    weight = units["rms.w"].bfloat16().to(place[1])
    still = torch.tensor([1.0, 0.0], device=place[1]).expand(1, x.shape[1], 16, 2)
    out, _ = ops.qk_norm_rope(x, x, weight, weight, still)
    exact = oracle(x, weight, still).flatten(2).cpu()
    ours = (out.flatten(2).cpu() - exact).norm()
    assert ours < (units["rms.out_bf16"] - exact).norm()


def slot_of(frame: int, capacity: int, sink: int) -> int:
    """Where the ring keeps a frame."""
    return frame if frame < sink else sink + (frame - sink) % (capacity - sink)


def append(
    i: dict[str, Tensor], caches: tuple[Tensor, Tensor], position: Tensor, frame: int, sink: int
) -> Tensor:
    names = ("q", "k", "v", "weight_q", "weight_k", "rope")
    return ops.qk_norm_rope_append_(
        *(i[n] for n in names), *caches, position, tokens_per_frame=frame, sink_frames=sink
    )


# Tokens of a frame, frames at once, frames of the cache, sink frames, position of each stream.
RINGS = {
    "global": (4, 3, 9, 0, (0,)),
    "in_the_sink": (2, 2, 7, 3, (0,)),
    "over_the_sink's_border": (3, 3, 8, 2, (1,)),
    "over_the_ring's_end": (2, 3, 7, 2, (5,)),
    "far_round_the_ring": (1, 2, 6, 1, (1_000_003,)),
    "unequal_streams": (2, 3, 8, 3, (0, 2, 7)),
    "whole_ring_at_once": (2, 4, 4, 0, (3,)),
    "beyond_32_bits": (2, 2, 5, 1, (2**33 + 1, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ring", RINGS)
def test_frames_go_to_their_slots_and_nothing_else_changes(
    place: Place, ring: str, dtype: torch.dtype
) -> None:
    tokens, frames, capacity, sink, positions = RINGS[ring]
    batch = max(2, len(positions))
    shape = (batch, frames * tokens, 3, 8)
    i = inputs(shape, place[1], dtype, tables=batch)
    fused = torch.randn(batch, shape[1], 3, 3, 8).to(place[1], dtype)
    i |= dict(zip("qkv", fused.unbind(2), strict=True))
    before = [torch.randn(batch, capacity * tokens, 3, 8).to(place[1], dtype) for _ in "kv"]
    caches = tuple(x.clone() for x in before)
    position = torch.tensor(positions, device=place[1])

    q_out = append(i, caches, position, tokens, sink)

    q_alone, k_alone = forward(i)
    assert torch.equal(q_out, q_alone)
    assert_elementwise(q_out, expect_forward(i)[0], scale=4.0)
    expected = [x.clone() for x in before]
    for b in range(batch):
        for l in range(shape[1]):  # noqa: E741
            at = positions[b if len(positions) > 1 else 0] + l // tokens
            slot = slot_of(at, capacity, sink) * tokens + l % tokens
            expected[0][b, slot], expected[1][b, slot] = k_alone[b, l], i["v"][b, l]
    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])


def test_a_stream_of_chunks_leaves_the_sink_and_the_latest_frames(place: Place) -> None:
    tokens, capacity, sink = 2, 7, 3
    caches = tuple(torch.zeros(1, capacity * tokens, 1, 2, device=place[1]) for _ in "kv")
    i = inputs((1, 2 * tokens, 1, 2), place[1])
    position = torch.zeros(1, dtype=torch.int64, device=place[1])
    for frame in range(0, 12, 2):
        position.fill_(frame)
        i["v"] = torch.arange(frame, frame + 2.0, device=place[1]).repeat_interleave(tokens)
        i["v"] = i["v"].view(1, -1, 1, 1).expand(1, -1, 1, 2)
        append(i, caches, position, tokens, sink)
    kept = caches[1][0, ::tokens, 0, 0].tolist()
    assert kept[:sink] == [0, 1, 2]
    assert sorted(kept[sink:]) == [8, 9, 10, 11]


def test_a_repeated_call_overwrites_the_same_slots(place: Place) -> None:
    i = inputs((1, 4, 1, 8), place[1])
    position = torch.tensor([6], device=place[1])
    runs = []
    for first in ("q", "v"):
        caches = tuple(torch.zeros(1, 10, 1, 8, device=place[1]) for _ in "kv")
        append(i | {"k": i[first], "v": i["q"]}, caches, position, 2, 1)
        append(i, caches, position, 2, 1)
        runs.append(caches)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_negative_position_is_refused_where_it_can_be_seen(place: Place) -> None:
    i = inputs((1, 2, 1, 8), place[1])
    caches = tuple(torch.zeros(1, 4, 1, 8, device=place[1]) for _ in "kv")
    position = torch.tensor([-1], device=place[1])
    if place[1] == "cpu":
        with pytest.raises(ValueError, match=r"position: got \[-1\]; needed: frames >= 0"):
            append(i, caches, position, 1, 0)
    else:
        assert append(i, caches, position, 1, 0)[:, 0].isnan().all()


def test_a_negative_position_that_was_not_seen_makes_nan() -> None:
    """As on a GPU: from the first slot on, no two frames in one."""
    i = inputs((2, 2, 1, 8))
    k_cache, v_cache = (torch.zeros(2, 4, 1, 8) for _ in "kv")
    rest = (i["weight_q"], i["weight_k"], i["rope"], k_cache, v_cache, torch.tensor([-1, 1]))
    q_out = reference.qk_norm_rope_append_(i["q"], i["k"], i["v"], *rest, 1, 0, EPS)
    for out, stream in ((q_out, slice(0, 2)), (k_cache, slice(1, 3))):
        assert out[0, :2].isnan().all()
        assert out[1, stream].isfinite().all()
    assert torch.equal(v_cache[0, :2], i["v"][0])


def test_the_append_refuses_to_be_differentiated() -> None:
    i = inputs((1, 2, 1, 8))
    caches = tuple(torch.zeros(1, 4, 1, 8) for _ in "kv")
    i["weight_k"].requires_grad_()
    position = torch.tensor([0])
    with pytest.raises(RuntimeError, match=r"weight_k: got .*; needed: none, .* no derivative"):
        append(i, caches, position, 1, 0)
    with torch.no_grad():
        append(i, caches, position, 1, 0)


def test_bad_input_names_the_argument() -> None:
    good = inputs((2, 4, 3, 8))
    half = good["q"].bfloat16()
    for change, needle in (
        ({"q": good["q"][0]}, r"q: got float32 \[4, 3, 8\]"),
        ({"q": good["q"][:, :0]}, r"q: got float32 \[2, 0, 3, 8\]"),
        ({"q": good["q"][..., :7], "k": good["k"][..., :7]}, "an even d"),
        ({"q": good["q"].long()}, "q: got int64"),
        ({"q": half}, r"k: got float32 .*; needed: bfloat16 \[2, 4, 3, 8\]"),
        ({"weight_q": good["weight_q"][:-1]}, r"weight_q: got float32 \[23\]"),
        ({"weight_q": good["weight_q"].double()}, "weight_q: got float64"),
        ({"weight_k": good["weight_k"].half()}, "weight_k: got float16"),
        ({"rope": good["rope"][:, :3]}, r"rope: got .*; needed: float32 \[1, 4, 4, 2\]"),
        ({"rope": good["rope"].expand(3, -1, -1, -1)}, r"rope: got float32 \[3, 4, 4, 2\]"),
        ({"rope": good["rope"].requires_grad_(), "q": good["q"].clone().requires_grad_()}, "rope"),
    ):
        with pytest.raises(ValueError, match=needle):
            forward(good | change)
    good = inputs((2, 4, 3, 8))
    cache, position = torch.zeros(2, 8, 3, 8), torch.tensor([0])
    for args, needle in (
        ((cache[:1], cache, position, 2, 0), r"k_cache: got float32 \[1, 8, 3, 8\]"),
        ((cache, cache.half(), position, 2, 0), "v_cache: got float16"),
        ((torch.zeros(2, 16, 3, 8)[:, ::2], cache, position, 2, 0), "k_cache: .* contiguous"),
        ((cache, cache[:, :4], position, 2, 0), "v_cache: got"),
        ((cache, cache, position.int(), 2, 0), "position: got int32"),
        ((cache, cache, torch.zeros(3).long(), 2, 0), r"position: got int64 \[3\]"),
        ((cache, cache, position, 3, 0), "tokens_per_frame: got 3"),
        ((cache, cache, position, 2, 3), "sink_frames: got 3; needed: between 0 and 2"),
        ((cache, cache, position, 2, -1), "sink_frames: got -1"),
    ):
        with pytest.raises(ValueError, match=needle):
            append(good, args[:2], *args[2:])


def test_triton_has_no_float64() -> None:
    with use_backend("triton"), pytest.raises(RuntimeError, match="float64"):
        forward(inputs((1, 2, 1, 8), dtype=torch.float64))
