"""Passes of a tiny Wan, alone or by a group of processes; a module, because processes import it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afd.distributed import ALONE, Ranks, join
from afd.models.sharding import sequence_over
from afd.models.wan.network import CausalWan
from afd.models.wan.self_forcing import self_forced
from tests.afd.tiny_wan import HEIGHT, WIDTH, text, tiny, video

FRAMES = 12
SIZES: dict[str, Any] = {"num_heads": 4}
WINDOWED: dict[str, Any] = {**SIZES, "window": 7, "sink": 1}


def passes(world: int) -> dict[str, Any]:
    """Every kind of pass by one group of `world` processes, the gradients summed over them."""
    with join("cpu", parts=world) as ranks:
        return dict(_passes(ranks))


def alone() -> dict[str, Any]:
    return dict(_passes(ALONE))


def _net(ranks: Ranks, sizes: dict[str, Any]) -> CausalWan:
    net = tiny(**sizes)
    net.sequence = sequence_over(ranks)
    return net


def _passes(ranks: Ranks) -> Iterator[tuple[str, np.ndarray]]:
    for name, sizes in (("whole", SIZES), ("windowed", WINDOWED)):
        net = _net(ranks, sizes)
        for kind, out, inputs in _trained(net):
            yield f"{name} {kind}", out.detach().numpy()
            yield from _gradients(f"{name} {kind}", net, out, inputs, ranks)
        with torch.no_grad():
            for kind, out in _streamed(net):
                yield f"{name} {kind}", out.numpy()
        half = net.bfloat16()
        with torch.no_grad():
            out = half(
                video(net, FRAMES).bfloat16(), torch.full((2, 1), 500.0), text(net).bfloat16()
            )
        yield f"{name} bf16", out.float().numpy()
    net = _net(ranks, SIZES)
    noise, generator = video(net, FRAMES), torch.Generator().manual_seed(5)
    draws = (torch.randn(noise[:, :3].shape, generator=generator) for _ in range(20))
    how = [[1000.0, 500.0]], [1]
    out = self_forced(net, text(net), noise, *how, lambda: next(draws), leak=True)
    yield "self-forced", out.detach().numpy()
    yield from _gradients("self-forced", net, out, [], ranks)


def _gradients(
    name: str, net: CausalWan, out: Tensor, inputs: list[Tensor], ranks: Ranks
) -> Iterator[tuple[str, np.ndarray]]:
    net.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    found = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
    ranks.sum_([*found.values()], over_parts=True)
    for key, grad in found.items():
        yield f"gradient {name} {key}", grad.numpy().copy()
    for i, x in enumerate(inputs):
        assert x.grad is not None
        yield f"gradient {name} input {i}", x.grad.numpy().copy()


def _trained(net: CausalWan) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Passes with gradients, their outputs and the inputs that have gradients."""
    x, x0, words = video(net, FRAMES), video(net, FRAMES, seed=3), text(net)
    t = torch.linspace(900, 100, FRAMES).expand(2, -1)
    x.requires_grad_(True)
    yield "noisy", net(x, t, words), [x]
    which = torch.tensor([[0, 2], [1, 3]])
    frames = (which[..., None] * 3 + torch.arange(3)).flatten(1)
    row = torch.arange(2)[:, None]
    drawn, drawn_t = x.detach()[row, frames], t[row, frames]
    net.checkpoint_blocks = True
    yield "recompute", net(drawn, drawn_t, words, x0_BFCHW=x0, chunks_BN=which), []
    with torch.no_grad():
        context = net.clean_context(x0, words)
    yield "own context", net(drawn, drawn_t, words, context, chunks_BN=which), []
    net.checkpoint_blocks = False
    if net.config.window is not None:
        # A clip of a stream, which attends to what the stream held.
        cache = net.new_cache(words, None, HEIGHT, WIDTH)
        zero = torch.zeros(1, 1)
        for start in range(0, FRAMES, 3):
            net.forward_cached(x0[:, start : start + 3], zero, cache, start, context_only=True)
        past = cache.snapshot()
        clip: dict[str, Any] = {"x0_BFCHW": x0, "start_frame": FRAMES}
        yield "clip", net(x.detach(), t, words, past, **clip), []


def _streamed(net: CausalWan) -> Iterator[tuple[str, Tensor]]:
    """The chunks of a stream of twice the length, past a switch, and of two continuations."""
    words, x = text(net), video(net, 2 * FRAMES, seed=4)
    endless = net.config.window is not None
    cache = net.new_cache(words, None if endless else 2 * FRAMES, HEIGHT, WIDTH)
    noisy, clean = torch.tensor([[700.0]]), torch.tensor([[0.0]])
    for start in range(0, 2 * FRAMES, 3):
        chunk = x[:, start : start + 3]
        out = net.forward_cached(chunk, noisy, cache, start)
        assert out is not None
        yield f"streamed {start}", out
        net.forward_cached(out, clean, cache, start, context_only=True)
        if start == FRAMES:
            cache.switch_text(net.text_kv(text(net, seed=9)))
            net.recache(x[:, : start + 3], clean, cache, new_sink=endless)
    root = net.new_cache(words, 6, HEIGHT, WIDTH)
    for start in (0, 3):
        net.forward_cached(x[:, start : start + 3], clean, root, start, context_only=True)
    fork = root.fork(2, FRAMES)
    for start in (6, 9):
        each = torch.cat([x[:, start : start + 3], -x[:, start : start + 3]])
        out = net.forward_cached(each, noisy, fork, start)
        assert out is not None
        yield f"forked {start}", out
        net.forward_cached(out, clean, fork, start, context_only=True)
    yield "cache bytes", torch.tensor(sum(x.numel() for kv in cache.self_kv for x in kv))
