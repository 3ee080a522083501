"""Rollouts with gradients: what the leak changes, which chunks train, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from afd.models.wan.network import CausalWan
from afd.models.wan.self_forcing import self_forced, straight_through
from afd.schedules import ShiftedFlow
from tests.afd.tiny_wan import HEIGHT, WIDTH, text, tiny, video
from tests.tolerances import NETWORK_REORDERED as SAME

STEPS = ShiftedFlow().warp([1000, 500])


def drawing(net: CausalWan, seed: int = 3) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, net.config.chunk, net.config.in_dim, HEIGHT, WIDTH)
    return lambda: torch.randn(shape, generator=generator)


def run(net: CausalWan, **options: Any) -> Tensor:
    options = {"lists": [STEPS], "exits": [1], **options}
    return self_forced(net, text(net), video(net, 9), draw=drawing(net), **options)


def gradient(net: CausalWan, result: Tensor) -> Tensor:
    loss = (result * video(net, result.shape[1], seed=8)).sum()
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def test_a_value_of_one_tensor_has_the_gradient_of_others() -> None:
    value = torch.randn(1, 6, 2, 4)
    parts = [torch.randn(1, n, 2, 4, requires_grad=True) for n in (2, 4)]
    out = straight_through(value, parts)
    assert torch.equal(out, value)
    weight = torch.randn_like(value)
    (out * weight).sum().backward()
    assert torch.equal(torch.cat([p.grad for p in parts if p.grad is not None], 1), weight)
    with pytest.raises(ValueError, match="written: got 2; needed: 6 tokens"):
        straight_through(value, parts[:1])


def test_the_leak_changes_gradients_and_no_value() -> None:
    net = tiny()
    detached, leaky = run(net), run(net, leak=True)
    assert torch.equal(detached, leaky)
    kept, leaked = gradient(net, detached), gradient(net, leaky)
    assert (kept - leaked).norm() > 1e-3 * kept.norm()


def test_one_chunk_has_nothing_to_leak() -> None:
    net = tiny(chunk=9)
    assert torch.equal(gradient(net, run(net)), gradient(net, run(net, leak=True)))


@pytest.mark.parametrize("leak", [False, True])
def test_checkpointing_changes_no_gradient(leak: bool) -> None:
    net = tiny()
    plain = gradient(net, run(net, leak=leak))
    net.checkpoint_blocks = True
    torch.testing.assert_close(gradient(net, run(net, leak=leak)), plain, **SAME)


def test_only_the_last_frames_train() -> None:
    net = tiny()
    result = run(net, frames_with_gradient=3)
    (of_first,) = torch.autograd.grad(result[:, 6:].sum(), [net.head.head.bias], retain_graph=True)
    assert of_first.any()
    with pytest.raises(RuntimeError, match="does not require grad"):
        run(net, frames_with_gradient=0).sum().backward()
    assert torch.equal(result, run(net))


def test_every_chunk_may_have_its_own_list_and_exit() -> None:
    net = tiny()
    lists = [ShiftedFlow().warp([1000, 750, 500, 250]), STEPS, STEPS]
    own = run(net, lists=lists, exits=[3, 1, 0])
    assert own.shape == (2, 9, net.config.in_dim, HEIGHT, WIDTH)
    assert not torch.allclose(own[:, :3], run(net)[:, :3])


def test_bad_lists_and_exits_are_refused() -> None:
    net = tiny()
    with pytest.raises(ValueError, match="exits: got 2; needed: a step in"):
        run(net, exits=[2])
    with pytest.raises(ValueError, match="lists: got 2; needed: 1 or 3"):
        run(net, lists=[STEPS, STEPS])
    with pytest.raises(ValueError, match=r"config\.window: got 6; needed: None"):
        run(tiny(window=6))
    with pytest.raises(ValueError, match=r"noise: .*whole chunks of 2 frames"):
        run(tiny(chunk=2))
