"""The noise of the compiled core: known Philox words, float64 normals, one result everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from afd_kernels import native

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))

_ONES = 0xFFFFFFFF

# Known answers published with Random123 (kat_vectors, philox4x32 with 10 rounds).
KNOWN = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([_ONES] * 4, (_ONES, _ONES), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "digits of pi"])
def test_philox_gives_the_published_words(counter, key, words):
    assert native.philox(counter, key) == words


def _float64_normals(seed: int, first: int, count: int) -> np.ndarray:
    """The specification in float64, from the scalar Philox."""
    key = (seed & _ONES, (seed >> 32) & _ONES)
    quads = range(first // 4, (first + count + 3) // 4)
    words = np.array([native.philox([q & _ONES, q >> 32, 0, 0], key) for q in quads], np.uint32)
    scaled = words[:, 0::2].astype(np.float32).astype(np.float64) * 2.0**-32
    uniform = (scaled + 2.0**-33).astype(np.float32).astype(np.float64)
    angle = words[:, 1::2].astype(np.int32).astype(np.float64) * (math.pi * 2.0**-31)
    radius = np.sqrt(-2 * np.log(uniform))
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(-1)[first % 4 :][:count]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_normals_lie_within_four_ulps_of_float64(seed):
    count = 20_000
    exact = _float64_normals(seed, 0, count)
    got = native.normals(seed, 0, count).numpy()
    ulps = np.abs(got - exact) / np.spacing(np.abs(exact).astype(np.float32))
    assert ulps.max() <= 4


@pytest.mark.parametrize("isa", native.isas())
def test_every_instruction_set_gives_the_same_bits(isa):
    expected = native.normals(7, 0, 50_001)
    with native.use_isa(isa):
        assert torch.equal(native.normals(7, 0, 50_001), expected)


@pytest.mark.parametrize("isa", native.isas())
def test_an_element_does_not_depend_on_where_the_slice_starts_or_ends(isa):
    whole = native.normals(3, 0, 1200)
    with native.use_isa(isa):
        for first in (*range(18), 63, 64, 127, 255, 256, 511):
            for count in (1, 2, 3, 5, 31, 67, 300):
                part = native.normals(3, first, count)
                assert torch.equal(part, whole[first : first + count]), (first, count)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("boundary", [2**31, 2**32, 2**34, 2**40])
def test_the_counter_carries_into_its_second_word(isa, boundary):
    # 2^34 elements are 2^32 quads: there the first counter word wraps around.
    first = boundary - 37
    with native.use_isa(isa):
        got = native.normals(11, first, 101).double()
    exact = torch.from_numpy(_float64_normals(11, first, 101))
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)


def test_normals_have_the_moments_of_normals():
    x = native.normals(2024, 0, 4_000_000).double()
    assert abs(x.mean().item()) < 3e-3
    assert abs(x.var().item() - 1) < 4e-3
    assert abs((x**3).mean().item()) < 1e-2
    assert abs((x**4).mean().item() - 3) < 3e-2


def test_an_unknown_instruction_set_is_refused_by_name():
    with pytest.raises(ValueError, match="baseline"), native.use_isa("mmx"):
        pass
