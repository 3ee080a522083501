"""One transformer block of the causal Wan network, and the head, on the fused ops.

The residual addition is deferred: (x, branch, gate) represents x + gate·branch, so that the
addition, the next norm and its modulation are one fused pass (`ops.adaln`).
Shape letters: B batch, F frames, L tokens, D model width, h heads, d head channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd import ops
from afd.models.wan.types import LayerKV, Modulation, WanConfig

EPS = 1e-6


def rms_norm(x_BLD: Tensor, weight_D: Tensor) -> Tensor:
    """RMS norm over all heads' channels with a gain; computed in fp32, rounded once."""
    return F.rms_norm(x_BLD, (x_BLD.shape[-1],), weight_D, EPS)


class Gain(nn.Module):
    """Gain of an RMS norm over all channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """Projections shared by self- and cross-attention; keys and queries are RMS-normed over D."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_heads
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v, self.o = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = Gain(dim), Gain(dim)
        # Fused weight [3D, D] and bias [3D], and the q, k and v parameters that are its slices.
        self._fused: tuple[Tensor, Tensor, list[Tensor | None]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy's parameters have their own memory, not slices of the original's.
        return {**super().__getstate__(), "_fused": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._fused = None
        return super()._apply(fn, recurse)

    @property
    def fused(self) -> bool:
        """Whether the projections are fused and no copy or move has undone it."""
        return self._fused is not None

    def fuse(self) -> None:
        """Make q, k and v slices of one buffer, so that one matmul computes all three."""
        parameters = self._slices()
        if parameters:
            weight, bias = (
                torch.cat([p.data for p in parameters[i::2] if p is not None]) for i in (0, 1)
            )
            parts = zip(weight.chunk(3), bias.chunk(3), strict=True)
            for parameter, part in zip(
                parameters, (p for pair in parts for p in pair), strict=True
            ):
                assert parameter is not None
                parameter.data = part
            self._fused = (weight, bias, parameters)

    def _slices(self) -> list[Tensor | None]:
        """Weight and bias of q, k and v; empty if one is not a plain `nn.Linear` (an adapter)."""
        linears = [self._modules[name] for name in "qkv"]
        if any(type(linear) is not nn.Linear for linear in linears):
            return []
        return [x for m in linears if m is not None for x in m._parameters.values()]

    def _is_fused(self) -> bool:
        # Adapters wrap projections and loaders may assign parameters, which makes the slices stale.
        if self._fused is None or torch.is_grad_enabled():
            return False
        now = self._slices()
        return bool(now) and all(a is b for a, b in zip(now, self._fused[2], strict=True))

    def split(self, x_BLD: Tensor) -> Tensor:
        """[B, L, h, d] view."""
        return x_BLD.view(*x_BLD.shape[:2], self.heads, -1)

    def project(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw q, k, v, each [B, L, h, d], before norm and RoPE."""
        if self._fused is not None and self._is_fused():
            q_BLD, k_BLD, v_BLD = F.linear(x_BLD, *self._fused[:2]).chunk(3, -1)
        else:
            q_BLD, k_BLD, v_BLD = self.q(x_BLD), self.k(x_BLD), self.v(x_BLD)
        return self.split(q_BLD), self.split(k_BLD), self.split(v_BLD)

    def text_kv(self, text_BLD: Tensor) -> LayerKV:
        """Normalised keys, and values, of the prompt."""
        k_BLD = rms_norm(self.k(text_BLD), self.norm_k.weight)
        return self.split(k_BLD), self.split(self.v(text_BLD))

    def cross(self, x_BLD: Tensor, text_kv: LayerKV) -> Tensor:
        """Cross-attention to the prompt, including its padding, with the output projection.

        With fewer prompts than rows of x, each serves as many rows, one after another.
        """
        q_BLhd = self.split(rms_norm(self.q(x_BLD), self.norm_q.weight))
        q_BLhd = q_BLhd.view(len(text_kv[0]), -1, *q_BLhd.shape[2:])
        q, k, v = (x.transpose(1, 2) for x in (q_BLhd, *text_kv))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.o(attended.reshape(x_BLD.shape))


class Block(nn.Module):
    """Modulated self-attention, cross-attention to the prompt, modulated feed-forward.

    Self-attention itself runs between `before` and `after`, as its keys differ from pass to pass.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(dim, eps=EPS)
        self.cross_attn = Attention(config)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim)
        )

    def forward(self, run: Callable[..., Any], *args: Any) -> Any:
        """run(*args) as this module's forward, around which sharding gathers its weights."""
        return run(*args)

    def before(
        self, x_BLD: Tensor, branch_BLD: Tensor | None, gate_BFD: Tensor | None, mods: Modulation
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Applies the deferred residual; returns x [B, L, D] and raw q, k, v [B, L, h, d]."""
        x_BLD, h_BLD = ops.adaln(x_BLD, branch_BLD, gate_BFD, mods[1], mods[0], eps=EPS)
        return x_BLD, *self.self_attn.project(h_BLD)

    def after(
        self, x_BLD: Tensor, attended_BLhd: Tensor, mods: Modulation, text_kv: LayerKV
    ) -> tuple[Tensor, Tensor]:
        """Everything after self-attention; returns x and the feed-forward branch (gate mods[5])."""
        _, _, gate_sa, shift_ff, scale_ff, _ = mods
        branch = self.self_attn.o(attended_BLhd.flatten(2))
        weight, bias = self.norm3.weight, self.norm3.bias
        x_BLD, h_BLD = ops.adaln(x_BLD, branch, gate_sa, weight, bias, scale_offset=0.0, eps=EPS)
        branch = self.cross_attn.cross(h_BLD, text_kv)
        x_BLD, h_BLD = ops.adaln(x_BLD, branch, None, scale_ff, shift_ff, eps=EPS)
        return x_BLD, self.ffn(h_BLD)


class Head(nn.Module):
    """Final modulated norm and projection to patches; the modulation is the time embedding."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = nn.Linear(config.dim, config.out_dim * config.patch[0] * config.patch[1])

    def forward(
        self, x_BLD: Tensor, branch_BLD: Tensor | None, gate_BFD: Tensor | None, embed_BFD: Tensor
    ) -> Tensor:
        """Patches [B, L, out_dim·ph·pw]."""
        shift, scale = (self.modulation.unsqueeze(0) + embed_BFD.unsqueeze(2)).unbind(2)
        _, h_BLD = ops.adaln(x_BLD, branch_BLD, gate_BFD, scale, shift, eps=EPS)
        return self.head(h_BLD)
