"""What is kept between calls changes nothing: plans, problems of the core, the bypass."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from afd import ops
from afd_kernels import dispatch, plans


def _noised(x0: Tensor, t: float = 0.25, **how: Any) -> Tensor:
    batch = len(x0)
    return ops.forward_noise(x0, torch.full((batch,), t), noise=torch.ones_like(x0), **how)


def test_a_kept_plan_sees_new_numbers() -> None:
    for _ in range(3):
        x0 = torch.randn(2, 8)
        torch.testing.assert_close(_noised(x0), 0.75 * x0 + 0.25)


def test_values_are_checked_in_every_call() -> None:
    x0 = torch.randn(2, 8)
    _noised(x0)
    for wrong in (-0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="t: got"):
            _noised(x0, wrong)


@pytest.mark.parametrize("end", [1e-5, 1.0])
def test_the_ends_of_a_schedule_are_inside(end: float) -> None:
    for batch in (2, 100):
        x0 = torch.randn(batch, 8)
        assert _noised(x0, end, schedule="vp_linear").isfinite().all()


def test_options_are_part_of_a_plan() -> None:
    x, row = torch.randn(1, 4, 8), torch.zeros(8)
    _, first = ops.adaln(x, None, None, row, row, eps=1e-6)
    _, second = ops.adaln(x, None, None, row, row, eps=1e3)
    _, third = ops.adaln(x, None, None, row, row, eps=1e-6, scale_offset=2.0)
    assert second.abs().max() < 0.2
    torch.testing.assert_close(third, 2 * first)


def test_strides_are_part_of_a_plan() -> None:
    x0 = torch.randn(8, 8)
    torch.testing.assert_close(_noised(x0), 0.75 * x0 + 0.25)
    torch.testing.assert_close(_noised(x0.T), 0.75 * x0.T + 0.25)


def test_a_request_counts_after_a_plan_is_kept() -> None:
    x0 = torch.randn(2, 8, dtype=torch.float64)
    _noised(x0)
    with dispatch.use_backend("native"), pytest.raises(RuntimeError, match="float64"):
        _noised(x0)
    with dispatch.use_backend("reference"):
        torch.testing.assert_close(_noised(x0), 0.75 * x0 + 0.25)


def test_overlaps_are_refused_in_every_call() -> None:
    q, cache = torch.randn(3, 1, 2, 1, 4), torch.zeros(2, 1, 4, 1, 4)
    weight, rope = torch.ones(4), torch.zeros(1, 2, 2, 2)

    def append(k: Tensor, k_cache: Tensor) -> Tensor:
        how = {"tokens_per_frame": 1, "sink_frames": 0}
        position = torch.tensor([0])
        return ops.qk_norm_rope_append_(
            q[0], k, q[2], weight, weight, rope, k_cache, cache[1], position, **how
        )

    append(q[1], cache[0])
    with pytest.raises(ValueError, match="share memory"):
        append(q[1], cache[1])
    with pytest.raises(ValueError, match="share memory"):
        append(cache[0][:, 2:], cache[0])


def test_what_is_kept_is_bounded_and_holds_no_tensor() -> None:
    x0 = torch.randn(1, 4)
    alive = weakref.ref(x0)
    for i in range(3 * plans._SIZE):
        row = torch.zeros(4)
        ops.adaln(x0[None], None, None, row, row, eps=1e-6 * (i + 1))
    assert len(plans._memory.newer) <= plans._SIZE
    assert len(plans._memory.older) <= plans._SIZE
    del x0
    gc.collect()
    assert alive() is None


def test_threads_share_a_plan() -> None:
    def run(seed: int) -> bool:
        x0 = torch.full((2, 64), float(seed))
        return all(bool((_noised(x0) == 0.75 * seed + 0.25).all()) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(8)))


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_and_profilers_see_the_op() -> None:
    x0 = torch.randn(2, 8)
    _noised(x0)
    with _Names() as mode:
        _noised(x0)
    assert "afd::forward_noise" in mode.seen
    with torch.profiler.profile() as profiler:
        _noised(x0)
    assert "afd::forward_noise" in {event.key for event in profiler.key_averages()}


def test_lazily_negated_tensors_are_resolved() -> None:
    x0 = torch.randn(2, 8)
    _noised(x0)
    torch.testing.assert_close(_noised(torch._neg_view(x0)), -0.75 * x0 + 0.25)


def test_a_vmapped_backward() -> None:
    x0 = torch.randn(2, 8, requires_grad=True)
    grads = torch.randn(3, 2, 8)
    (found,) = torch.autograd.grad(_noised(x0), x0, grads, is_grads_batched=True)
    torch.testing.assert_close(found, 0.75 * grads)
