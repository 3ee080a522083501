"""The simulated device itself: what kernels may use works, what they may not is reported."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu.device import Memory

THREADS = 96


def run(
    kernels: ctypes.CDLL,
    name: str,
    wrong: int = 0,
    *,
    reverse: bool = False,
    n: int = THREADS,
    block: int = THREADS,
    blocks: int = 1,
    shared: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, str]:
    """The input, the output and the device's words."""
    memory = Memory()
    x = memory.place(torch.rand(n, generator=torch.Generator().manual_seed(1)) - 0.3)
    y = memory.place(torch.zeros(n) if out is None else out)
    kernels.cuda_on_cpu_reverse(int(reverse))
    words = kernels.launch(
        *(name.encode(), x.data_ptr(), y.data_ptr(), n, wrong, block, blocks, shared)
    )
    kernels.cuda_on_cpu_reverse(0)
    if not words:
        memory.check()
    return x, y, words.decode()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_block_adds_up_its_numbers(kernels: ctypes.CDLL, reverse: bool) -> None:
    x, y, words = run(kernels, "reduce", reverse=reverse)
    assert words == ""
    torch.testing.assert_close(y[0], x.sum())


@pytest.mark.parametrize("reverse", [False, True])
def test_halves_of_a_warp_shuffle_and_vote_apart(kernels: ctypes.CDLL, reverse: bool) -> None:
    x, y, words = run(kernels, "halves_of_a_warp", reverse=reverse)
    assert words == ""
    lanes = x.view(3, 32).clone()
    lanes[:, 1:16] = x.view(3, 32)[:, :15]
    lanes[:, 16:] = x.view(3, 32)[:, 19:20]
    votes = (lanes > 0).sum(1, keepdim=True)
    torch.testing.assert_close(y.view(3, 32), lanes + votes + 31)


def test_shared_memory_of_a_launch(kernels: ctypes.CDLL) -> None:
    x, y, words = run(kernels, "dynamic", shared=4 * THREADS)
    assert words == ""
    assert torch.equal(y, x.flip(0))


@pytest.mark.parametrize("n", [THREADS, THREADS + 3])
def test_vectors_and_intrinsics(kernels: ctypes.CDLL, n: int) -> None:
    x, y, words = run(kernels, "vectors", n=n, block=32)
    assert words == ""
    expected = x[:THREADS].view(-1, 4).clone()
    expected[:, 0] = expected[:, 0].rsqrt()
    expected[:, 1] = expected[:, 1].square() + 1
    torch.testing.assert_close(y[:THREADS].view(-1, 4), expected, equal_nan=True)


def test_atomics(kernels: ctypes.CDLL) -> None:
    x, y, words = run(kernels, "atomics", blocks=3)
    assert words == ""
    torch.testing.assert_close(y[0], 3 * x.sum())
    assert y[1].view(torch.int32) == THREADS - 1


def test_pairs_of_halves(kernels: ctypes.CDLL) -> None:
    x, y, words = run(kernels, "pairs")
    assert words == ""
    half = (x.half().double() * 2 + 1).half().float()
    torch.testing.assert_close(y, x.bfloat16().float() + 1.5 + half + 4.0, rtol=0, atol=0)


def test_halves_are_read_and_rounded_as_pytorch_does(kernels: ctypes.CDLL) -> None:
    for dtype, code in ((torch.float16, 0), (torch.bfloat16, 1)):
        every = torch.arange(0, 2**16, 7, dtype=torch.int32).to(torch.uint16)
        read = torch.tensor([kernels.read_half(bits, code) for bits in every.tolist()])
        torch.testing.assert_close(read, every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
        finite = read[read.isfinite()]
        between = (finite + finite.roll(1)) / 2
        values = torch.cat([finite, between, between.nextafter(finite), torch.randn(2000) * 1e-6])
        bits = [kernels.round_to_half(value, code) for value in values.tolist()]
        assert bits == values.to(dtype).view(torch.uint16).tolist()


WRONG = {
    ("reduce", 2): "reads lane 31, which its mask does not name",
    ("reduce", 4): "written beyond its end",
    ("divergent", 1): "a thread has returned before it",
    ("divergent", 2): "threads wait at features.cu",
    ("divergent", 3): "is in __syncwarp at features.cu",
    ("divergent", 4): "waits for lanes that do not come there",
    ("halves_of_a_warp", 1): "__shfl_sync at features.cu",
    ("halves_of_a_warp", 2): "reads lane 0, which its mask does not name",
    ("dynamic", 1): "dynamic shared memory was written beyond its end",
    ("vectors", 1): "illegal memory access",
    ("vectors", 2): "misaligned address",
    ("vectors", 3): "misaligned access of 16 bytes",
    ("in_place", 1): "was read through __ldg and written",
}


@pytest.mark.parametrize(("name", "wrong"), WRONG, ids=str)
def test_what_is_wrong_is_reported(kernels: ctypes.CDLL, name: str, wrong: int) -> None:
    *_, words = run(kernels, name, wrong, shared=4 * THREADS if name == "dynamic" else 0)
    assert WRONG[name, wrong] in words
    assert words.startswith("kernel") or name in words
    # The device continues afterwards.
    x, y, words = run(kernels, "reduce")
    assert words == ""
    torch.testing.assert_close(y[0], x.sum())


@pytest.mark.parametrize("wrong", [1, 3, 5])
def test_wrong_values_show_in_one_order_at_least(kernels: ctypes.CDLL, wrong: int) -> None:
    results = [run(kernels, "reduce", wrong, reverse=reverse) for reverse in (False, True)]
    assert any(words or not torch.allclose(y[0], x.sum()) for x, y, words in results)


def test_shared_memory_is_undefined_at_first(kernels: ctypes.CDLL) -> None:
    _, y, words = run(kernels, "undefined", 0, blocks=2)
    assert (words, y[0].item()) == ("", 1.0)
    _, y, words = run(kernels, "undefined", 1)
    assert words == ""
    assert y[0].isnan()


def test_a_partial_warp_has_no_full_mask(kernels: ctypes.CDLL) -> None:
    *_, words = run(kernels, "divergent", block=40)
    assert "names lanes of a partial warp that do not exist" in words


def test_a_launch_beyond_the_limits_is_refused(kernels: ctypes.CDLL) -> None:
    for how in ({"block": 1025}, {"block": 0}, {"blocks": 0}, {"shared": 49153}):
        *_, words = run(kernels, "reduce", **how)
        assert words == "invalid configuration argument"
    *_, words = run(kernels, "bounded", block=96)
    assert "__launch_bounds__(64)" in words
    assert run(kernels, "bounded", block=64)[2] == ""
    assert "asks for none" in run(kernels, "dynamic")[2]
