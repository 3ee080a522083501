"""use_backend per thread and task, and what a backward runs on; tensors that share memory."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from afd import ops
from afd_kernels import dispatch
from afd_kernels.adaln import reference

AFD = torch.ops.afd


def asked() -> str | None:
    """The backend that is asked of adaln here."""
    return next((x.backend for x in reversed(dispatch.requested())), None)


def test_threads_and_tasks_do_not_see_each_others_blocks() -> None:
    async def work(backend: str) -> list[str | None]:
        seen = []
        for _ in range(20):
            with ops.use_backend(backend, "adaln"):
                await asyncio.sleep(0)
                seen.append(asked())
        return [*seen, asked()]

    async def both() -> list[list[str | None]]:
        return await asyncio.gather(work("native"), work("reference"))

    assert asyncio.run(both()) == [[x] * 20 + [None] for x in ("native", "reference")]
    with ThreadPoolExecutor(2) as pool, ops.use_backend("reference"):
        threads = [pool.submit(lambda b=b: asyncio.run(work(b))) for b in ("native", "triton")]
        assert [t.result()[:20] for t in threads] == [["native"] * 20, ["triton"] * 20]
        assert pool.submit(asked).result() is None
        assert pool.submit(contextvars.copy_context().run, asked).result() == "reference"
        assert asked() == "reference"
    assert asked() is None


def test_blocks_nest_and_end_in_any_order() -> None:
    def generator() -> Iterator[str | None]:
        with ops.use_backend("reference"):
            yield asked()

    steps = generator()
    assert next(steps) == "reference"
    with ops.use_backend("native"):
        assert next(steps, None) is None
        assert asked() == "native"
    assert asked() is None
    with pytest.raises(KeyError), ops.use_backend("native"), ops.use_backend("reference"):
        raise KeyError
    assert asked() is None


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the reference of adaln runs from now on."""
    calls: list[str] = []
    for name in ("adaln", "adaln_bwd"):
        original = getattr(reference, name)

        def run(*args: object, name: str = name, original: object = original) -> object:
            calls.append(name)
            return original(*args)  # type: ignore[operator]

        monkeypatch.setattr(reference, name, run)
    return calls


def adaln(x: Tensor, scale: Tensor) -> Tensor:
    out: Tensor = AFD.adaln(x, None, None, scale, scale, 1.0, 1e-6)[1]
    return out


def test_a_backward_runs_on_what_its_forward_was_asked(ran: list[str]) -> None:
    x, scale = torch.randn(1, 4, 16, requires_grad=True), torch.randn(16)
    with ops.use_backend("reference"):
        loss = adaln(x, scale).sum()
    with ops.use_backend("triton"):
        loss.backward()
        assert asked() == "triton"
    assert ran == ["adaln", "adaln_bwd"]
    with ThreadPoolExecutor(1) as pool, ops.use_backend("reference"):
        pool.submit(adaln(x, scale).sum().backward).result()
    assert ran[2:] == ["adaln", "adaln_bwd"]


def test_a_recomputed_forward_and_a_compiled_one_run_on_what_was_asked(ran: list[str]) -> None:
    x, scale = torch.randn(1, 4, 16, requires_grad=True), torch.randn(16)
    with ops.use_backend("reference"):
        loss = checkpoint(adaln, x, scale, use_reentrant=False).sum()
    loss.backward()
    assert ran == ["adaln", "adaln", "adaln_bwd"]
    ran.clear()
    compiled = torch.compile(adaln, backend="aot_eager", fullgraph=True)
    with ops.use_backend("reference"):
        compiled(x, scale).sum().backward()
    compiled(x, scale).sum().backward()
    assert ran == ["adaln", "adaln_bwd"]


@pytest.mark.parametrize("fake", [False, True])
def test_a_cache_that_shares_memory_is_refused(fake: bool) -> None:
    with torch.no_grad(), FakeTensorMode() if fake else torch.no_grad():
        buffer = torch.zeros(3 * 12 * 16)
        k_cache, v_cache = (buffer[i * 192 :][:192].view(1, 12, 2, 8) for i in range(2))
        rows = torch.zeros(1, 6, 2, 8)
        weight, rope = torch.ones(16), torch.zeros(1, 6, 4, 2)
        position = torch.zeros(1, dtype=torch.int64)
        good = {"q": rows, "k": rows, "v": rows, "k_cache": k_cache, "v_cache": v_cache}

        def append(**changed: Tensor) -> None:
            x = good | changed
            AFD.qk_norm_rope_append_(
                x["q"], x["k"], x["v"], weight, weight, rope, x["k_cache"], x["v_cache"],
                position, 3, 1, 1e-6,
            )  # fmt: skip

        append()
        partly = buffer[100:][:192].view(1, 12, 2, 8)
        strided = buffer[190:].as_strided((1, 6, 2, 8), (0, 24, 8, 1))
        for changed, names in (
            ({"v_cache": k_cache}, "k_cache, v_cache"),
            ({"v_cache": partly}, "k_cache, v_cache"),
            ({"q": k_cache[:, :6]}, "k_cache, q"),
            ({"k": v_cache[:, 6:]}, "v_cache, k"),
            ({"v": strided}, "k_cache, v"),
        ):
            with pytest.raises(ValueError, match=f"{names}: got tensors that share memory"):
                append(**changed)
        grad = torch.zeros(8)
        AFD.nft_loss_bwd_(grad[1:], grad[0])
        with pytest.raises(ValueError, match="grad, grad_loss: got tensors that share memory"):
            AFD.nft_loss_bwd_(grad, grad[3])
