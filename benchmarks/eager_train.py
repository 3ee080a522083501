"""A naive implementation of an AFD iteration: the baseline of benchmarks/train_step.py.

Three networks each run clean and noisy frames as one sequence of twice the length through all
layers. Attention uses a dense mask (or, if that is too large, a call of PyTorch's attention per
chunk). Norms, modulation and rotation are separate ops; x_t, the noise and the target are
materialised; the loss is the official formula.

Shape letters: B videos, F frames, C channels, H x W latent size, K chunks, L tokens of both halves,
E text channels, D width, h heads, d head channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from afd.models.noise import NoiseSource
from afd.models.student import Level
from afd.models.wan.types import WanConfig
from benchmarks import official
from benchmarks.eager_wan import Cache, EagerWan, attention

# Largest mask in tokens per side; beyond it takes gigabytes.
LARGEST_MASK = 4096


@dataclass(frozen=True)
class Lora:
    """A projection's LoRA: down [rank, in], up [out, rank], and the scale of their product."""

    down: Tensor
    up: Tensor
    scale: float


class EagerTrained(EagerWan):
    """The network with teacher forcing and gradients to the given weights.

    Args:
        config: sizes.
        weights: by their names in `CausalWan`; those with requires_grad receive gradients.
        lora: adapters by the name of their projection.
        checkpoint_blocks: recompute blocks in the backward.
    """

    def __init__(
        self,
        config: WanConfig,
        weights: Mapping[str, Tensor],
        lora: Mapping[str, Lora] | None = None,
        *,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__(config, weights)
        self.w, self.lora = dict(weights), dict(lora or {})
        self.checkpoint_blocks = checkpoint_blocks
        self._masks: dict[tuple[int, int], Tensor] = {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = super().linear(name, x)
        adapter = self.lora.get(name)
        if adapter is None:
            return y
        return y + adapter.scale * F.linear(F.linear(x, adapter.down), adapter.up)

    def teacher_forced(
        self, x_t_BFCHW: Tensor, t_BF: Tensor, text_BLE: Tensor, x0_BFCHW: Tensor
    ) -> Tensor:
        """The network's output for noisy frames at times [B, F] (0-1000), like x_t."""
        both_BFCHW = torch.cat([x0_BFCHW.to(x_t_BFCHW.dtype), x_t_BFCHW], dim=1)
        both_BF = torch.cat([torch.zeros_like(t_BF), t_BF], dim=1)
        text = Cache([], self.text_kv(text_BLE), 0, False, text_BLE)
        return self.network(both_BFCHW, both_BF, text, 0)[:, x_t_BFCHW.shape[1] :]

    def block(
        self,
        i: int,
        x_BLD: Tensor,
        time_BF6D: Tensor,
        cache: Cache,
        grid: tuple[int, int, int],
        start_frame: int,
    ) -> Tensor:
        args = (i, x_BLD, time_BF6D, cache, grid, start_frame)
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(super().block, *args, use_reentrant=False)
        return super().block(*args)

    def self_attention(
        self,
        name: str,
        h_BLD: Tensor,
        cache: Cache,
        i: int,
        grid: tuple[int, int, int],
        start_frame: int,
    ) -> Tensor:
        if cache.layers:  # a stream
            return super().self_attention(name, h_BLD, cache, i, grid, start_frame)
        half = (grid[0] // 2, *grid[1:])
        q_BLhd = self.heads(self.rms_norm(f"{name}.norm_q", self.linear(f"{name}.q", h_BLD)))
        k_BLhd = self.heads(self.rms_norm(f"{name}.norm_k", self.linear(f"{name}.k", h_BLD)))
        v_BLhd = self.heads(self.linear(f"{name}.v", h_BLD))
        q_BLhd, k_BLhd = (
            torch.cat([self.rotated(part, half, 0) for part in x.chunk(2, dim=1)], dim=1)
            for x in (q_BLhd, k_BLhd)
        )
        chunk = self.config.chunk * grid[1] * grid[2]
        if q_BLhd.shape[1] > LARGEST_MASK:
            attended = by_chunk(q_BLhd, k_BLhd, v_BLhd, chunk)
        else:
            mask_LL = self.mask(q_BLhd.shape[1], chunk, q_BLhd.device)
            q, k, v = (x.transpose(1, 2) for x in (q_BLhd, k_BLhd, v_BLhd))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL)
            attended = attended.transpose(1, 2).flatten(2)
        return self.linear(f"{name}.o", attended)

    def mask(self, length: int, chunk: int, device: torch.device) -> Tensor:
        """Mask [L, L], true where a query (row) attends a key; clean half first."""
        if (length, chunk) not in self._masks:
            at = torch.arange(length, device=device)
            noisy, number = at >= length // 2, at % (length // 2) // chunk
            earlier, same = number[:, None] > number, number[:, None] == number
            own = noisy[:, None] == noisy
            self._masks[length, chunk] = (~noisy & earlier) | (own & same)
        return self._masks[length, chunk]


def by_chunk(q_BLhd: Tensor, k_BLhd: Tensor, v_BLhd: Tensor, chunk: int) -> Tensor:
    """Teacher-forced attention with one call per chunk and half; [B, L, D]."""
    half = q_BLhd.shape[1] // 2
    starts = range(0, half, chunk)
    out = [
        attention(q_BLhd[:, a : a + chunk], k_BLhd[:, : a + chunk], v_BLhd[:, : a + chunk])
        for a in starts
    ]
    for a in starts:
        own = slice(half + a, half + a + chunk)
        k, v = (torch.cat([x[:, :a], x[:, own]], dim=1) for x in (k_BLhd, v_BLhd))
        out.append(attention(q_BLhd[:, own], k, v))
    return torch.cat(out, dim=1)


@torch.no_grad()
def rolled_out(
    net: EagerTrained,
    text_BLE: Tensor,
    draw: NoiseSource,
    levels: Sequence[Level],
    x0_from_output: Callable[[Tensor, Tensor, float], Tensor],
    chunks: int,
) -> Tensor:
    """Stream `chunks` chunks; every denoising step and context pass runs the whole network."""
    cache, video = None, []
    for k in range(chunks):
        x_t = draw(k, 0)
        B, count, _, H, W = x_t.shape
        if cache is None:
            rows, cols = net.config.grid(H, W)
            cache = net.new_cache(text_BLE, chunks * count, rows * cols)
        for step, level in enumerate(levels):
            t_BF = torch.full((B, count), level.t, device=x_t.device)
            x0 = x0_from_output(net.forward(x_t, t_BF, cache, k * count), x_t, level.sigma)
            if step + 1 < len(levels):
                sigma = levels[step + 1].sigma
                x_t = ((1 - sigma) * x0 + sigma * draw(k, step + 1)).type_as(x_t)
        net.forward(x0.type_as(x_t), torch.zeros(B, count, device=x_t.device), cache, k * count)
        video.append(x0)
    return torch.cat(video, dim=1)


@dataclass
class EagerUpdate:
    """Three networks and the optimizer of the trained one.

    Attributes:
        velocity: converts an output at x_t and t [B, F, 1, 1, 1] to a velocity; the network is
            given 1000 t.
    """

    theta: EagerTrained
    old: EagerTrained
    ref: EagerTrained
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor]
    learning_rate: float
    nft_beta: float
    prior_weight: float
    adv_clip: float
    old_decay: float = 0.99
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        self.trained = _trained(self.theta)
        self.adam = torch.optim.AdamW(self.trained, lr=self.learning_rate, weight_decay=1e-4)

    def loss(self, x0_BFCHW: Tensor, t_BK: Tensor, text_BLE: Tensor, r_B: Tensor) -> Tensor:
        """The official loss on a noised copy of every video."""
        noise = torch.randn_like(x0_BFCHW)
        return self.loss_of(x0_BFCHW, noise, t_BK, text_BLE, r_B)

    def loss_of(
        self, x0_BFCHW: Tensor, noise: Tensor, t_BK: Tensor, text_BLE: Tensor, r_B: Tensor
    ) -> Tensor:
        """The official loss with given noise."""
        t_BF = t_BK.repeat_interleave(x0_BFCHW.shape[1] // t_BK.shape[1], dim=1)
        t_BF111 = t_BF[..., None, None, None]
        x_t = official.noised(x0_BFCHW, noise, t_BF111)
        dtype = text_BLE.dtype

        def predicted(net: EagerTrained) -> Tensor:
            out = net.teacher_forced(x_t.to(dtype), 1000 * t_BF, text_BLE, x0_BFCHW)
            return self.velocity(out, x_t, t_BF111)

        with torch.no_grad():
            v_old, v_ref = predicted(self.old), predicted(self.ref)
        loss, _ = official.diffusionnft_loss(
            v_theta=predicted(self.theta),
            v_old=v_old,
            v_ref=v_ref,
            x0=x0_BFCHW,
            x_t=x_t,
            t=t_BF111,
            r=r_B,
            nft_beta=self.nft_beta,
            prior_weight=self.prior_weight,
            adv_clip=self.adv_clip,
        )
        return loss

    def add(self, loss: Tensor) -> None:
        """Accumulate the gradients of a part of the update's loss."""
        loss.backward()

    def step(self) -> None:
        """Apply the accumulated gradients and update the old policy."""
        torch.nn.utils.clip_grad_norm_(self.trained, self.grad_clip)
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad():
            for mine, theirs in zip(_trained(self.old), self.trained, strict=True):
                mine.copy_(self.old_decay * mine + (1 - self.old_decay) * theirs)


def _trained(net: EagerTrained) -> list[Tensor]:
    """The adapters if there are any, else all weights."""
    adapters = [part for lora in net.lora.values() for part in (lora.down, lora.up)]
    return adapters or list(net.w.values())
