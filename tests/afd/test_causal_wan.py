"""The causal Wan network: its passes agree with one another; `test_parity` has released values.

All modes are one network, so a stream must equal the one pass that sees the same keys.
"""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd.models.wan.block import Block
from afd.models.wan.kv_cache import KVCache
from afd.models.wan.network import CausalWan
from afd.models.wan.types import WanConfig
from afd.ops import intervals
from tests.afd.tiny_wan import HEIGHT, TOKENS, WIDTH, text, tiny, video
from tests.tolerances import NETWORK_REORDERED as SAME


def streamed(net: CausalWan, x: Tensor, t: Tensor, chunks: list[int]) -> tuple[Tensor, KVCache]:
    """The video, chunk by chunk through a new cache."""
    cache = net.new_cache(text(net, len(x)), x.shape[1], HEIGHT, WIDTH)
    out, start = [], 0
    for frames in chunks:
        part = slice(start, start + frames)
        flow = net.forward_cached(x[:, part], t[:, part], cache, start)
        assert flow is not None
        out.append(flow)
        start += frames
    return torch.cat(out, 1), cache


@pytest.mark.parametrize(
    ("changes", "chunks"),
    [
        ({}, [3, 3, 3, 3]),
        ({"chunk": 1}, [1] * 12),
        ({"chunk": 12}, [12]),
        ({"independent_first_frame": True}, [1, 3, 3, 3]),
        ({"window": 6}, [3, 3, 3, 3]),
        ({"window": 7, "sink": 2}, [3, 3, 3, 3]),
        ({"window": 6, "sink": 3}, [3, 3, 3, 3]),
        ({"chunk": 2, "window": 5, "sink": 2}, [2] * 6),
        ({"window": 4, "sink": 1, "independent_first_frame": True}, [1, 3, 3, 3]),
    ],
    ids=str,
)
def test_a_stream_equals_the_one_pass_over_all_frames(
    changes: dict[str, Any], chunks: list[int]
) -> None:
    net = tiny(**changes)
    x, t = video(net, sum(chunks)), 1000 * torch.rand(2, sum(chunks))
    out, cache = streamed(net, x, t, chunks)
    with torch.no_grad():
        torch.testing.assert_close(out, net(x, t, text(net)), **SAME)
        k_BLhd, v_BLhd = net.clean_context(x, text(net), t)[-1]
    slots = [cache.slot(frame) for frame in cache.held()]
    for ours, one_pass in zip(cache.self_kv[-1], (k_BLhd, v_BLhd), strict=True):
        by_frame = one_pass.unflatten(1, (-1, TOKENS))[:, cache.held()]
        torch.testing.assert_close(ours.unflatten(1, (-1, TOKENS))[:, slots], by_frame, **SAME)


def test_a_pass_for_the_context_leaves_what_a_whole_pass_leaves() -> None:
    net = tiny()
    caches = [net.new_cache(text(net), 6, HEIGHT, WIDTH) for _ in range(2)]
    for start in (0, 3):
        for cache, short in zip(caches, (True, False), strict=True):
            out = net.forward_cached(video(net, 3), torch.zeros(1, 1), cache, start, short)
            assert (out is None) == short
    for short_kv, whole_kv in zip(caches[0].self_kv, caches[1].self_kv, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(short_kv, whole_kv, strict=True))


def test_one_time_for_all_is_the_same_time_for_each() -> None:
    net, one = tiny(), torch.full((1, 1), 437.5)
    x, words = video(net, 6), text(net)
    with torch.no_grad():
        same = [net(x, t, words) for t in (one, one.expand(2, 1), one.expand(2, 6))]
    torch.testing.assert_close(same[1], same[0], **SAME)
    torch.testing.assert_close(same[2], same[0], **SAME)


def test_a_batch_of_streams_equals_its_streams() -> None:
    net = tiny(window=5, sink=1)
    x, t, words = video(net, 9, batch=3), torch.rand(3, 9) * 1000, text(net, 3)

    def run(rows: slice) -> Tensor:
        cache = net.new_cache(words[rows], None, HEIGHT, WIDTH)
        parts = [slice(start, start + 3) for start in (0, 3, 6)]
        chunks = [net.forward_cached(x[rows, p], t[rows, p], cache, p.start) for p in parts]
        return torch.cat([chunk for chunk in chunks if chunk is not None], 1)

    alone = torch.cat([run(slice(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(run(slice(None)), alone, **SAME)


def gradients(net: CausalWan, loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*net.parameters(), *inputs]))


def test_teacher_forcing_in_one_pass_equals_two_passes_with_gradients() -> None:
    net = tiny()
    x, clean = video(net, 6), video(net, 6, seed=5).requires_grad_()
    t, aug_t, weight = torch.rand(2, 6) * 1000, torch.rand(2, 6) * 200, video(net, 6, seed=9)
    one = net(x, t, text(net), x0_BFCHW=clean, clean_t_BF=aug_t)
    two = net(x, t, text(net), net.clean_context(clean, text(net), aug_t))
    torch.testing.assert_close(one, two, **SAME)
    both = [gradients(net, (out * weight).mean(), clean) for out in (one, two)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, **SAME)


def test_contexts_made_without_gradient_keep_the_value_and_stop_the_gradient() -> None:
    """own_context and shared_context of the trainer: the same pass, given other keys and values."""
    net, other = tiny(), copy.deepcopy(tiny())
    x, clean, t = video(net, 6), video(net, 6, seed=5).requires_grad_(), torch.rand(2, 6) * 1000
    with torch.no_grad():
        own = net.clean_context(clean, text(net))
        shared = other.clean_context(clean, text(net))
    whole = net(x, t, text(net), x0_BFCHW=clean)
    out = net(x, t, text(net), own)
    torch.testing.assert_close(out, whole, **SAME)
    assert torch.equal(net(x, t, text(net), shared), out)
    assert torch.autograd.grad(out.sum(), clean, allow_unused=True)[0] is None


def test_teacher_forcing_refuses_what_the_released_code_has_no_mask_for() -> None:
    net = tiny(independent_first_frame=True)
    x, t = video(net, 6), torch.zeros(1, 1)
    with pytest.raises(ValueError, match="config: "):
        net(x, t, text(net), x0_BFCHW=x)
    with pytest.raises(ValueError, match="context: got 'a list'; needed: None"):
        tiny()(x, t, text(net), tiny().clean_context(x, text(net)), x0_BFCHW=x)


def test_a_chunk_over_a_given_past_equals_the_stream_and_takes_gradients_to_it() -> None:
    net = tiny()
    x, t = video(net, 6), torch.full((1, 1), 250.0)
    out, cache = streamed(net, x, t.expand(2, 6), [3, 3])
    past = [(k.clone().requires_grad_(), v.clone().requires_grad_()) for k, v in cache.before(3)]
    flow, own = net.forward_over(x[:, 3:], t, text(net), past, 3)
    torch.testing.assert_close(flow, out[:, 3:], **SAME)
    torch.testing.assert_close(own[1][0], cache.self_kv[1][0][:, 3 * TOKENS :], **SAME)
    leaves = [leaf for kv in past for leaf in kv]
    assert all(grad.any() for grad in torch.autograd.grad(flow.square().sum(), leaves))
    first, _ = net.forward_over(x[:, :3], t, text(net), None, 0)
    torch.testing.assert_close(first, out[:, :3], **SAME)


def test_a_pass_without_gradient_lets_go_of_every_layer_s_keys_and_values() -> None:
    """Those of all layers together are as large as a clip's cache."""
    net, values, alive = tiny(num_layers=6), [], []

    def before(block: Block, *rest: Any) -> Any:
        alive.append(sum(value() is not None for value in values))
        out = block.before(*rest)
        values.append(weakref.ref(out[3]))
        return out

    net._before = before
    with torch.no_grad():
        net(video(net, 6), torch.zeros(1, 1), text(net))
    assert len(alive) == 6
    assert max(alive) == 1


@pytest.mark.parametrize("teacher_forced", [False, True])
def test_checkpointing_changes_no_gradient(teacher_forced: bool) -> None:
    net = tiny()
    x, t = video(net, 6), torch.rand(2, 6) * 1000
    clean = video(net, 6, seed=5) if teacher_forced else None

    def run() -> list[Tensor]:
        return gradients(net, net(x, t, text(net), x0_BFCHW=clean).square().mean())

    plain = run()
    net.checkpoint_blocks = True
    for a, b in zip(run(), plain, strict=True):
        assert torch.equal(a, b)


def test_one_chunk_over_all_frames_sees_everything() -> None:
    net = tiny(chunk=6)
    assert net.config.sight(6, TOKENS) == intervals.cache(6, 6, TOKENS)
    x, t = video(net, 6), torch.full((1, 1), 500.0)
    with torch.no_grad():
        before = net(x, t, text(net))[:, 0]
        after = net(torch.cat([x[:, :5], video(net, 1)], 1), t, text(net))[:, 0]
    assert not torch.allclose(before, after)


def test_fused_projections_are_the_same_parameters() -> None:
    net = tiny()
    x, t = video(net, 3), torch.full((1, 1), 500.0)
    names, plain = list(net.state_dict()), streamed(net, x, t.expand(2, 3), [3])[0]
    gradient = gradients(net, net(x, t, text(net)).sum())
    net.fuse_projections()
    assert list(net.state_dict()) == names
    torch.testing.assert_close(streamed(net, x, t.expand(2, 3), [3])[0], plain, **SAME)
    for a, b in zip(gradients(net, net(x, t, text(net)).sum()), gradient, strict=True):
        assert torch.equal(a, b)
    # An update in place is picked up; a copy and a moved network have memory of their own.
    twin = copy.deepcopy(net)
    with torch.no_grad():
        net.blocks[0].self_attn.q.weight.mul_(2.0)  # type: ignore[union-attr]
    changed = streamed(net, x, t.expand(2, 3), [3])[0]
    assert not torch.allclose(changed, plain)
    torch.testing.assert_close(streamed(twin, x, t.expand(2, 3), [3])[0], plain, **SAME)
    wide = net.double()
    wide.blocks[0].self_attn.q.weight.data.mul_(0.5)  # type: ignore[union-attr]
    back = wide.float()
    torch.testing.assert_close(streamed(back, x, t.expand(2, 3), [3])[0], plain, **SAME)


def test_fused_projections_give_way_to_adapters_and_assigned_weights(tmp_path: Path) -> None:
    net, other = tiny(), tiny(num_layers=2)
    x, t = video(net, 3), torch.zeros(2, 3)
    net.fuse_projections()
    save_file(net.state_dict(), tmp_path / "slices.safetensors")
    torch.nn.init.normal_(other.blocks[1].self_attn.v.weight)  # type: ignore[union-attr,arg-type]
    net.load_state_dict(other.state_dict(), assign=True)
    expected = streamed(other, x, t, [3])[0]
    torch.testing.assert_close(streamed(net, x, t, [3])[0], expected, **SAME)
    net.load_state_dict(load_file(tmp_path / "slices.safetensors"))
    net.fuse_projections()
    plain = streamed(net, x, t, [3])[0]
    attention = net.blocks[0].self_attn
    attention.q = torch.nn.Sequential(attention.q, torch.nn.Tanh())  # type: ignore[union-attr,arg-type]
    assert not torch.allclose(streamed(net, x, t, [3])[0], plain)


def test_a_stream_far_beyond_frame_1023_is_like_one_at_the_start() -> None:
    """The released code's table of positions ends there. What a query sees is relative to it."""
    net = tiny(num_layers=1, window=6)
    t, outs = torch.full((1, 1), 500.0), []
    for start in (0, 1020, 10**6):
        cache = net.new_cache(text(net), None, HEIGHT, WIDTH)
        cache.start = cache.end = start
        for step in range(0, 12, 3):
            out = net.forward_cached(video(net, 3, seed=step), t, cache, start + step)
        assert out is not None
        outs.append(out)
    # A million radians are known to 1e-10 in float64; the rest is float32's rounding.
    torch.testing.assert_close(outs[1], outs[0], **SAME)
    torch.testing.assert_close(outs[2], outs[0], **SAME)


def test_streams_run_in_inference_mode() -> None:
    net, t = tiny(window=6), torch.full((1, 1), 500.0)
    expected = streamed(net, video(net, 9), t.expand(2, 9), [3, 3, 3])[0]
    with torch.inference_mode():
        out = streamed(net, video(net, 9), t.expand(2, 9), [3, 3, 3])[0]
    assert torch.equal(out, expected)
    assert not expected.is_inference()


def test_two_compiled_pieces_serve_all_layers_chunks_and_copies() -> None:
    net, seen = tiny(num_layers=3), []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    x, t = video(net, 12), torch.full((1, 1), 500.0)
    plain = streamed(net, x, t.expand(2, 12), [3] * 4)[0]
    torch._dynamo.reset()
    net.compile_blocks(backend=backend, fullgraph=True)
    torch.testing.assert_close(streamed(net, x, t.expand(2, 12), [3] * 4)[0], plain, **SAME)
    # `before` of the first layer has no branch to close.
    assert len(seen) == 3
    twin = copy.deepcopy(net)
    with torch.no_grad():
        net.head.head.bias.add_(1.0)
        net.blocks[0].ffn[0].weight.zero_()  # type: ignore[index,union-attr]
    torch.testing.assert_close(streamed(twin, x, t.expand(2, 12), [3] * 4)[0], plain, **SAME)
    net.compile_blocks(False)
    assert not torch.allclose(streamed(net, x, t.expand(2, 12), [3] * 4)[0], plain)


def test_compiled_training_has_the_same_gradients() -> None:
    net = tiny()
    x, t = video(net, 6), torch.rand(2, 6) * 1000
    plain = gradients(net, net(x, t, text(net)).square().mean())
    torch._dynamo.reset()
    net.compile_blocks(backend="aot_eager")
    for a, b in zip(gradients(net, net(x, t, text(net)).square().mean()), plain, strict=True):
        torch.testing.assert_close(a, b, **SAME)


def test_bad_shapes_are_refused() -> None:
    net = tiny()
    with pytest.raises(ValueError, match="x: got 3 channels; needed: 4"):
        net(video(net, 3)[:, :, :3], torch.zeros(1, 1), text(net))
    with pytest.raises(ValueError, match="x: a frame of 5x4 does not divide into"):
        net(video(net, 3)[..., :5, :], torch.zeros(1, 1), text(net))
    with pytest.raises(ValueError, match=r"text: got \[2, 4, 8\]; needed: \[B, 5, 8\]"):
        net(video(net, 3), torch.zeros(1, 1), text(net)[:, :4])
    with pytest.raises(ValueError, match=r"t: got float32 \[2\] on cpu; needed: \[B, F\]"):
        net(video(net, 3), torch.zeros(2), text(net))
    with pytest.raises(ValueError, match=r"x0_BFCHW: .*the shape of x"):
        net(video(net, 3), torch.zeros(1, 1), text(net), x0_BFCHW=video(net, 6))
    with pytest.raises(ValueError, match=r"config: dim 30 needs num_heads \(4\) heads"):
        CausalWan(WanConfig(dim=30, num_heads=4))
