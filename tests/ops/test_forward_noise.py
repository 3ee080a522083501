"""forward_noise: known noise, the same everywhere, mixed by the schedule's coefficients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afd import ops, schedules
from afd_kernels.dispatch import use_backend
from afd_kernels.forward_noise.reference import normal, philox4x32
from tests.tolerances import assert_elementwise, assert_normal

Place = tuple[str, str]

# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
]


def seeds(batch: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return ops.draw_seeds(batch, torch.Generator().manual_seed(seed)).to(device)


def pure_noise(shape: tuple[int, ...], seed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """At t = 1 the rectified flow is the noise itself."""
    x0 = torch.zeros(shape, dtype=dtype, device=seed.device)
    return ops.forward_noise(x0, torch.ones(shape[0], device=seed.device), seed=seed)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_words(counter, key, words) -> None:
    c, k = torch.tensor([counter[0]]), torch.tensor([key[0]])
    assert tuple(philox4x32(c, k)[0].tolist()) == words


def test_noise_is_standard_normal() -> None:
    x = pure_noise((4, 500_000), seeds(4)).double()
    assert x.mean(1).abs().max() < 5 / 500_000**0.5
    assert (x.var(1) - 1).abs().max() < 5 * (2 / 500_000) ** 0.5
    assert (x.pow(3).mean(1)).abs().max() < 5 * (15 / 500_000) ** 0.5
    assert (x.pow(4).mean(1) - 3).abs().max() < 5 * (96 / 500_000) ** 0.5
    neighbours = (x[:, 1:] * x[:, :-1]).mean(1)
    assert neighbours.abs().max() < 5 / 500_000**0.5
    assert (x[0] * x[1]).mean().abs() < 5 / 500_000**0.5


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 3), (2, 4097), (2, 3, 4, 5, 6)])
def test_noise_equals_its_float64_formula(place: Place, shape: tuple[int, ...]) -> None:
    seed = seeds(shape[0], place[1])
    expected = normal(seed.cpu(), pure_noise(shape, seed)[0].numel()).reshape(shape)
    assert_normal(pure_noise(shape, seed).cpu(), expected)


def test_noise_does_not_depend_on_the_batch_split(place: Place) -> None:
    seed = seeds(5, place[1])
    whole = pure_noise((5, 3, 4, 5, 7), seed)
    parts = [pure_noise((1, 3, 4, 5, 7), seed[b : b + 1]) for b in range(5)]
    assert torch.equal(whole, torch.cat(parts))


def test_a_prefix_of_a_sample_has_the_same_noise(place: Place) -> None:
    seed = seeds(1, place[1])
    assert torch.equal(pure_noise((1, 4099), seed)[:, :1001], pure_noise((1, 1001), seed))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    frames=st.integers(1, 6),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    layout=st.sampled_from(["BCFHW", "BFCHW"]),
    name=st.sampled_from(["rectified_flow", "vp_cosine", "vp_linear"]),
    kind=st.sampled_from(["video", "frame"]),
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_mixes_by_the_schedule(
    backend, batch, channels, frames, height, width, layout, name, kind
) -> None:
    g = torch.Generator().manual_seed(frames)
    shape = (batch, channels, frames, height, width)
    if layout == "BFCHW":
        shape = (batch, frames, channels, height, width)
    x0, noise = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    t = torch.rand((batch,) if kind == "video" else (batch, frames), generator=g) * 0.98 + 0.01
    alpha, sigma, _, _ = schedules.resolve(name).coefficients(t.double())
    view = [batch] + [1] * 4
    if kind == "frame":
        view[layout.index("F")] = frames
    expected = alpha.view(view) * x0.double() + sigma.view(view) * noise.double()
    with use_backend(backend):
        x_t = ops.forward_noise(x0, t, schedule=name, noise=noise, layout=layout)
    assert_elementwise(x_t, expected, scale=4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunks", [0, 2])
def test_every_dtype_equals_float64(place: Place, dtype: torch.dtype, chunks: int) -> None:
    x0 = torch.randn(2, 3, 4, 5, 6).to(place[1], dtype)
    t = torch.rand((2, chunks) if chunks else (2,)).to(place[1])
    seed = seeds(2, place[1])
    with use_backend("reference"):
        expected = ops.forward_noise(x0.cpu().double(), t.cpu(), seed=seed.cpu())
    assert_elementwise(ops.forward_noise(x0, t, seed=seed).cpu(), expected, scale=4.0)


def test_the_gradient_is_alpha(place: Place) -> None:
    x0 = torch.randn(2, 3, 4, 5, 6, device=place[1], requires_grad=True)
    t = torch.rand(2, 2).to(place[1])
    x_t = ops.forward_noise(x0, t, seed=seeds(2, place[1]))
    alpha = (1 - t).repeat_interleave(2, 1)[:, None, :, None, None].expand_as(x0)
    incoming = [
        torch.randn_like(x_t),
        torch.randn(2, device=place[1])[:, None, None, None, None].expand_as(x_t),
        torch.randn(2, 3, 4, 5, 12, device=place[1])[..., ::2],
        torch.randn(2, 6, 5, 4, 3, device=place[1]).permute(0, 4, 3, 2, 1),
    ]
    for grad in incoming:
        (got,) = torch.autograd.grad(x_t, x0, grad, retain_graph=True)
        assert_elementwise(got, alpha.double() * grad.double(), scale=1.0)


def test_gradcheck_in_double() -> None:
    x0 = torch.randn(2, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.rand(2, 2, dtype=torch.float64)
    seed = seeds(2)
    assert torch.autograd.gradcheck(lambda x: ops.forward_noise(x, t, seed=seed), x0)


def test_double_backward_is_refused(place: Place) -> None:
    x0 = torch.randn(2, 3, device=place[1], requires_grad=True)
    x_t = ops.forward_noise(x0, torch.rand(2).to(place[1]), seed=seeds(2, place[1]))
    grad = torch.ones_like(x_t, requires_grad=True)
    (first,) = torch.autograd.grad(x_t, x0, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


def test_bad_input_names_the_argument() -> None:
    x0, t = torch.randn(2, 3, 4, 5, 6), torch.rand(2)
    for kwargs, needle in (
        ({}, "got neither"),
        ({"seed": seeds(2), "noise": x0}, "got both"),
        ({"seed": seeds(3)}, "seed: got int64 \\[3\\]"),
        ({"seed": seeds(2), "schedule": "ddpm"}, "schedule: got 'ddpm'"),
        ({"seed": seeds(2), "schedule": schedules.Schedule("vp_linear", (2.0, 1.0))}, "args: got"),
    ):
        with pytest.raises(ValueError, match=needle):
            ops.forward_noise(x0, t, **kwargs)
    with pytest.raises(ValueError, match=r"t: got values in .2, 2.; needed: .0, 1."):
        ops.forward_noise(x0, t * 0 + 2, seed=seeds(2))
    with pytest.raises(ValueError, match=r"x0: got float32 .0, 3."):
        ops.forward_noise(torch.zeros(0, 3), torch.zeros(0), seed=seeds(2)[:0])
