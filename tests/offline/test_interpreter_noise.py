"""Triton's noise against its float64 formula, interpreted on the CPU or run on a GPU."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.tolerances import assert_normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]
# The first, one across the 32-bit border of the counter, one far beyond it.
STARTS = [0, 4 * (2**32 - 10), 4 * (2**40 + 3)]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed here")
    from tests.offline import noise_kernels

    if DEVICE == "cpu" and not noise_kernels.INTERPRETED:
        pytest.skip("Triton was imported without TRITON_INTERPRET=1")
    return noise_kernels


def _words(seed: int, counter: int) -> list[int]:
    """Philox4x32-10 in Python integers."""
    low = 0xFFFFFFFF
    c = [counter & low, counter >> 32, 0, 0]
    k = [seed & low, (seed >> 32) & low]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def _normals(seed: int, start: int, count: int) -> Tensor:
    """The formula of docs/NUMERICS.md; only u is rounded to fp32 on the way, as specified."""
    values = []
    for quad in range(start // 4, (start + count - 1) // 4 + 1):
        words = _words(seed, quad)
        for radius_word, angle_word in (words[:2], words[2:]):
            # Two roundings to fp32, as an fma of the converted word makes them.
            rounded = torch.tensor(radius_word, dtype=torch.float64).float().double()
            u = (rounded * 2.0**-32 + 2.0**-33).float().double().item()
            radius = math.sqrt(-2 * math.log(u))
            signed = angle_word - 2**32 if angle_word >= 2**31 else angle_word
            angle = signed * math.pi * 2.0**-31
            values += [radius * math.cos(angle), radius * math.sin(angle)]
    return torch.tensor(values, dtype=torch.float64)[start % 4 :][:count]


def test_philox_gives_the_published_vector(kernels: ModuleType) -> None:
    # Random123's known answer for a zero counter and a zero key.
    out = torch.empty(4, 1, dtype=torch.int64, device=DEVICE)
    kernels.words(0, 0, out)
    assert out[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_words_equal_integer_philox(kernels: ModuleType, seed: int, start: int) -> None:
    out = torch.empty(4, 16, dtype=torch.int64, device=DEVICE)
    kernels.words(seed, start // 4, out)
    expected = [_words(seed, start // 4 + i) for i in range(16)]
    assert out.T.tolist() == expected


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("seed", SEEDS[:3])
def test_noise_equals_its_float64_formula(kernels: ModuleType, seed: int, start: int) -> None:
    out = torch.empty(1024, device=DEVICE)
    kernels.noise(seed, start, out, quads=True, vector=4)
    assert_normal(out.cpu(), _normals(seed, start, 1024))


def test_noise_does_not_depend_on_how_a_thread_walks(kernels: ModuleType) -> None:
    out = [torch.empty(256, device=DEVICE) for _ in range(3)]
    kernels.noise(7, 64, out[0], quads=True, vector=4)
    kernels.noise(7, 64, out[1], quads=True, vector=8)
    kernels.noise(7, 64, out[2], quads=False, vector=4)
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])


def test_noise_of_an_odd_start_is_a_slice_of_the_same_stream(kernels: ModuleType) -> None:
    whole = torch.empty(256, device=DEVICE)
    odd = torch.empty(128, device=DEVICE)
    kernels.noise(11, 0, whole, quads=True, vector=4)
    kernels.noise(11, 13, odd, quads=False, vector=4)
    assert torch.equal(whole[13:141], odd)


@pytest.mark.parametrize("schedule", ["vp_cosine", "vp_linear"])
def test_a_schedule_s_coefficients_are_good_to_fp64(kernels: ModuleType, schedule: str) -> None:
    """Constants that were rounded to fp32 on the way showed as an error of 3e-9."""
    t = torch.linspace(1e-5, 1, 101, device=DEVICE)
    wide, least, slope = t.cpu().double(), 0.1, 19.9
    if schedule == "vp_cosine":
        quarter = torch.pi / 2
        alpha, sigma = torch.cos(quarter * wide), torch.sin(quarter * wide)
        columns = (alpha, sigma, -quarter * sigma, quarter * alpha)
    else:
        integral, rate = least * wide + slope * wide.square() / 2, least + slope * wide
        alpha, sigma = torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))
        columns = (alpha, sigma, -rate * alpha / 2, rate * alpha.square() / 2 / sigma)
    found = kernels.coefficients(t, schedule, (least, least + slope)).cpu()
    # vp_linear's 1 - alpha^2 cancels some digits where t is small.
    rtol = 4e-15 if schedule == "vp_cosine" else 1e-11
    expected = torch.stack(columns, -1)
    torch.testing.assert_close(found[1:], expected[1:], rtol=rtol, atol=1e-15)


def test_noise_has_the_bits_of_the_compiled_core(kernels: ModuleType) -> None:
    from afd_kernels.dispatch import explain, use_backend

    refusal = explain("forward_noise", "cpu", {torch.float32})["native"]
    if refusal:
        pytest.skip(f"no compiled core: {refusal}")
    out = torch.empty(4096, device=DEVICE)
    kernels.noise(-5, 0, out, quads=True, vector=4)
    with use_backend("native"):
        # At t = 1 rectified flow is noise alone.
        native = torch.ops.afd.forward_noise(
            torch.zeros(1, 4096),
            torch.ones(1),
            torch.tensor([-5]),
            None,
            "rectified_flow",
            [],
            "BCFHW",
        )
    if kernels.fma_rounds_once(DEVICE):
        assert torch.equal(out.cpu(), native[0])
    else:
        assert_normal(out.cpu(), native[0])
