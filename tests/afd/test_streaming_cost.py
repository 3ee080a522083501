"""What a stream may not do: wait for the device, allocate more and more, or move its cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from afd.models.wan.graphs import FixedPasses, GraphedPasses
from afd.models.wan.kv_cache import KVCache
from afd.models.wan.network import CausalWan
from tests.afd.tiny_wan import HEIGHT, WIDTH, text, tiny, video
from tests.fake_cuda import fake_cuda
from tests.tolerances import NETWORK_REORDERED as SAME

STEPS = (1000.0, 625.0)


class Counting(TorchDispatchMode):
    """Names of all ops, how many bytes they returned anew, how often a value went to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.allocated = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops.append(str(func))
        self.waits += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.nonzero.default,
        )
        aliases = any(r.alias_info is not None for r in func._schema.returns)
        if not aliases:
            tensors = [x for x in (out if isinstance(out, (tuple, list)) else [out])]
            self.allocated += sum(x.nbytes for x in tensors if isinstance(x, Tensor))
        return out


def play(net: CausalWan, cache: KVCache, start: int, times: list[Tensor]) -> Tensor:
    """All calls of one chunk, as a rollout makes them; returns the finished chunk."""
    x = torch.zeros(2, 3, net.config.in_dim, HEIGHT, WIDTH, device=cache.position.device)
    for t in times[:-1]:
        flow = net.forward_cached(x, t, cache, start)
        assert flow is not None
        x = x - flow
    net.forward_cached(x, times[-1], cache, start, context_only=True)
    return x


@pytest.mark.parametrize("fused", [False, True])
def test_every_chunk_costs_what_the_one_before_did(fused: bool) -> None:
    net = tiny(window=7, sink=1).requires_grad_(False)
    if fused:
        net.fuse_projections()
    cache = net.new_cache(text(net), None, HEIGHT, WIDTH)
    times = [torch.full((1, 1), t) for t in (*STEPS, 0.0)]
    costs = []
    for start in range(0, 30, 3):
        with Counting() as counting:
            play(net, cache, start, times)
        assert counting.waits == 0
        costs.append((counting.ops, counting.allocated))
    # The first chunk makes the tables of the steps; the ring is full after the third.
    assert all(cost == costs[3] for cost in costs[3:])
    assert all(len(cost[0]) == len(costs[3][0]) for cost in costs[1:3])
    attention = [op for op in costs[5][0] if op == "afd.block_attention.default"]
    # Two whole passes and a context pass, which leaves the last layer's attention out.
    assert len(attention) == 2 * 2 + 1
    # The rotary table is put together once for a chunk; keys and values never are.
    assert costs[5][0].count("aten.cat.default") == 1
    assert "aten.roll.default" not in costs[5][0]


@pytest.fixture(params=["fake", "meta"])
def valueless(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device whose tensors have shapes and no values: whatever waits for a value raises.

    Meta tensors also refuse to meet a tensor made on the host. Fake ones are on the GPU where
    there is one; PyTorch without CUDA cannot make those.
    """
    device = "meta" if request.param == "meta" else "cuda" if torch.cuda.is_available() else "cpu"
    mode = nullcontext() if request.param == "meta" else FakeTensorMode(allow_non_fake_inputs=False)
    with mode:
        # The guard itself works: this is what waiting looks like.
        with pytest.raises((RuntimeError, DataDependentOutputException)):
            torch.zeros(1, device=device).item()
        yield device


def test_a_stream_without_values_never_looks_at_one(valueless: str) -> None:
    with torch.device(valueless):
        net = tiny(window=7, sink=2).requires_grad_(False)
        words = torch.zeros(2, net.config.text_len, net.config.text_dim)
        times = [torch.full((1, 1), t) for t in (*STEPS, 0.0)]
    cache = net.new_cache(words, None, HEIGHT, WIDTH)
    for start in range(0, 15, 3):
        assert play(net, cache, start, times).device.type == valueless


def test_training_passes_without_values_never_look_at_one(valueless: str) -> None:
    with torch.device(valueless):
        net = tiny()
        x = torch.zeros(2, 6, net.config.in_dim, HEIGHT, WIDTH)
        words = torch.zeros(2, net.config.text_len, net.config.text_dim)
        t = torch.zeros(2, 6)
    for out in (net(x, t, words), net(x, t, words, x0_BFCHW=x)):
        out.sum().backward()
    net(x, t, words, net.clean_context(x, words)).sum().backward()
    flow, _ = net.forward_over(x[:, 3:], t[:, 3:], words, net.clean_context(x[:, :3], words), 3)
    flow.sum().backward()


def chunk_results(net: CausalWan, call: Any, device: str) -> list[Tensor]:
    times = [torch.full((1, 1), t, device=device) for t in (*STEPS, 0.0)]
    out = []
    for start in range(0, 21, 3):
        x = video(net, 3, seed=start).to(device)
        for t in times[:-1]:
            x = x - call(x, t, start)
        out.append(x)
        call(x, times[-1], start, context_only=True)
    return out


def compare_replay(passes: FixedPasses, net: CausalWan, device: str) -> None:
    """A stream of 21 frames, recorded and not; twice, so that the second one only replays."""
    plain_cache, fixed_cache = (
        net.new_cache(text(net).to(device), None, HEIGHT, WIDTH) for _ in range(2)
    )

    def plain(x: Tensor, t: Tensor, start: int, context_only: bool = False) -> Tensor | None:
        return net.forward_cached(x, t, plain_cache, start, context_only)

    def fixed(x: Tensor, t: Tensor, start: int, context_only: bool = False) -> Tensor | None:
        return passes(x, t, fixed_cache, start, context_only)

    for _ in range(2):
        expected = chunk_results(net, plain, device)
        actual = chunk_results(net, fixed, device)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, **SAME)
        # Chunks before the ring is full have passes of their own, all later ones share theirs.
        assert passes.count == 2 * 3


def test_a_recorded_stream_equals_the_plain_one() -> None:
    """On the CPU a replay runs the pass again, on the fixed memory that a graph would read."""
    net = tiny(window=7, sink=1).requires_grad_(False)
    compare_replay(FixedPasses(net), net, "cpu")


def test_a_recorded_stream_takes_new_prompts_weights_and_caches() -> None:
    net = tiny(window=7, sink=1).requires_grad_(False)
    cache, passes = net.new_cache(text(net), None, HEIGHT, WIDTH), FixedPasses(net)
    x, t = video(net, 3), torch.full((1, 1), 500.0)
    first = passes(x, t, cache, 0, False)
    for parameter in net.parameters():
        parameter.mul_(1.05)
    cache.reset(net.text_kv(text(net, seed=8)))
    second = passes(x, t, cache, 0, False)
    assert passes.count == 1
    fresh = net.new_cache(text(net, seed=8), 3, HEIGHT, WIDTH)
    expected = net.forward_cached(x, t, fresh, 0)
    assert first is not None
    assert second is not None
    assert expected is not None
    torch.testing.assert_close(second, expected, **SAME)
    # What came out first is still what it was.
    assert not torch.allclose(first, second)
    other = passes(x, t, fresh, 0, False)
    assert other is not None
    torch.testing.assert_close(other, expected, **SAME)
    assert passes.count == 1


def test_every_pass_is_warmed_up_and_captured_on_one_stream_of_the_network_s_device() -> None:
    """PyTorch's own default would be a stream of the device that was current first."""
    used: list[tuple[str, Any]] = []

    @contextmanager
    def running(stream: Any) -> Iterator[None]:
        used.append(("warm-up", stream))
        yield

    @contextmanager
    def capturing(graph: Any, pool: Any = None, stream: Any = None, **_: Any) -> Iterator[None]:
        used.append(("capture", stream))
        yield

    class Graph:
        def replay(self) -> None: ...

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.device = device

        def wait_stream(self, other: Any) -> None: ...

    with fake_cuda(), torch.no_grad():
        changes = {"CUDAGraph": Graph, "graph": capturing, "stream": running, "Stream": Stream}
        with patch.multiple(torch.cuda, **changes):
            net = tiny(window=7, sink=1).requires_grad_(False).cuda()
            cache = net.new_cache(text(net).cuda(), None, HEIGHT, WIDTH)
            passes = GraphedPasses(net)
            for start in (0, 3):
                x = video(net, 3).cuda()
                passes(x, torch.zeros(1, 1, device="cuda"), cache, start, False)
        device = net.patch_embedding.weight.device
        assert [kind for kind, _ in used] == ["warm-up", "capture"] * 2
        assert len({id(stream) for _, stream in used}) == 1
        assert used[0][1].device == device


@pytest.mark.gpu
def test_captured_graphs_replay_with_other_inputs_and_positions() -> None:
    net = tiny(window=7, sink=1).requires_grad_(False).cuda()
    compare_replay(GraphedPasses(net), net, "cuda")


@pytest.mark.gpu
def test_a_stream_on_a_gpu_never_waits_for_it() -> None:
    net = tiny(window=7, sink=1).requires_grad_(False).cuda()
    cache = net.new_cache(text(net).cuda(), None, HEIGHT, WIDTH)
    times = [torch.full((1, 1), t, device="cuda") for t in (*STEPS, 0.0)]
    play(net, cache, 0, times)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for start in range(3, 15, 3):
            play(net, cache, start, times)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        for start in range(15, 60, 3):
            play(net, cache, start, times)
        assert torch.cuda.memory_allocated() == held
    finally:
        torch.cuda.set_sync_debug_mode("default")
