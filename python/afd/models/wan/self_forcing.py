"""Self-forcing: a rollout with gradients through its exit steps (Huang et al., arXiv 2506.08009).

Shape letters: B videos, F frames, c frames of a chunk, C channels, H x W latent size, L tokens,
h heads, d head channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from afd.models.wan.kv_cache import KVCache
from afd.models.wan.network import CausalWan
from afd.models.wan.types import LayerKV
from afd.schedules import ShiftedFlow, renoise, x0_from_flow
from afd_kernels.contracts import require


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *written: Tensor) -> Tensor:
        ctx.tokens = [part.shape[1] for part in written]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.split(ctx.tokens, 1)


def straight_through(value_BLhd: Tensor, written: Sequence[Tensor]) -> Tensor:
    """Straight-through: returns `value`; its gradient goes to `written`, split along tokens.

    Nothing is copied, so the value may be slots of a cache.
    """
    tokens = sum(part.shape[1] for part in written)
    require(tokens == value_BLhd.shape[1], "written", tokens, f"{value_BLhd.shape[1]} tokens")
    return _StraightThrough.apply(value_BLhd, *written)


def self_forced(
    net: CausalWan,
    text_BLE: Tensor,
    noise_BFCHW: Tensor,
    lists: Sequence[Sequence[float]],
    exits: Sequence[int],
    draw: Callable[[], Tensor],
    *,
    schedule: ShiftedFlow | None = None,
    leak: bool = False,
    frames_with_gradient: int | None = None,
) -> Tensor:
    """Clean latents [B, F, C, H, W] of a rollout, differentiable with respect to the weights.

    Each chunk is denoised without gradient up to its exit step; that step is taken with gradient
    and its prediction is the result. The chunk's context pass follows without gradient, at time 0
    on the slightly noised result (the schedule's last level), as in the released training.

    Args:
        net: the network, without window; `checkpoint_blocks` reduces memory.
        text_BLE: embeddings of the prompts.
        noise_BFCHW: initial noise of the chunks.
        lists: times of the denoising steps (0-1000 scale) of every chunk, or one list for all.
        exits: the exit step of every chunk, or one for all.
        draw: returns fresh standard normal noise [B, c, C, H, W], in order of use: one draw
            between two steps, one per context pass.
        schedule: maps times to noise levels; default shift 5.
        leak: let gradients of later chunks reach the keys and values of earlier exit steps, with
            the context's values, as the released code does. False: the context is a constant.
        frames_with_gradient: take gradients only in the chunks of this many last frames.

    Raises:
        ValueError: naming the argument, the value given and what is needed.
    """
    schedule = schedule or ShiftedFlow()
    frames, chunk = noise_BFCHW.shape[1], net.config.chunk
    require(frames % chunk == 0, "noise", noise_BFCHW, f"whole chunks of {chunk} frames")
    require(net.config.window is None, "config.window", net.config.window, "None")
    chunks = frames // chunk
    lists = list(lists) * (chunks if len(lists) == 1 else 1)
    exits = list(exits) * (chunks if len(exits) == 1 else 1)
    require(len(lists) == chunks, "lists", len(lists), f"1 or {chunks}, one per chunk")
    require(len(exits) == chunks, "exits", len(exits), f"1 or {chunks}, one per chunk")
    for steps, leave in zip(lists, exits, strict=True):
        require(0 <= leave < len(steps), "exits", leave, f"a step in [0, {len(steps)})")
    first = 0 if frames_with_gradient is None else frames - frames_with_gradient
    kept = {t: _level(t, schedule, noise_BFCHW) for steps in lists for t in steps}
    clean_t, clean_sigma = _level(0.0, schedule, noise_BFCHW)

    text_kv = net.text_kv(text_BLE)
    height, width = noise_BFCHW.shape[3:]
    cache = net.new_cache([(k.detach(), v.detach()) for k, v in text_kv], frames, height, width)
    written: list[list[LayerKV]] = []
    result = []
    for i, start in enumerate(range(0, frames, chunk)):
        x_t = noise_BFCHW[:, start : start + chunk]
        levels = [kept[t] for t in lists[i][: exits[i] + 1]]
        for (t, sigma), (_, next_sigma) in pairwise(levels):
            flow = net.forward_cached(x_t, t, cache, start)
            assert flow is not None
            x_t = renoise(x0_from_flow(flow, x_t, sigma), draw(), next_sigma)
        t, sigma = levels[-1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and start >= first):
            past = _past(cache, start, written if leak else None)
            flow, own = net.forward_over(x_t, t, text_kv, past, start)
            x0 = x0_from_flow(flow, x_t, sigma)
        result.append(x0)
        if start + chunk < frames:
            if leak:
                written.append(own)
            context = renoise(x0.detach(), draw(), clean_sigma)
            net.forward_cached(context, clean_t, cache, start, context_only=True)
    return torch.cat(result, 1)


def _level(t: float, schedule: ShiftedFlow, like: Tensor) -> tuple[Tensor, float]:
    """The network's timestep, [1, 1], and the noise level."""
    time = torch.full((1, 1), t, dtype=torch.float32, device=like.device)
    return time, schedule.sigma_of(t)


def _past(cache: KVCache, start: int, written: list[list[LayerKV]] | None) -> list[LayerKV] | None:
    """Keys and values of frames before `start`, with the gradient of `written` if given."""
    if start == 0:
        return None
    past = cache.before(start)
    if written is None:
        return past
    return [
        (
            straight_through(k, [own[layer][0] for own in written]),
            straight_through(v, [own[layer][1] for own in written]),
        )
        for layer, (k, v) in enumerate(past)
    ]
