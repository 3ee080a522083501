"""The causal Wan2.1 network: block-causal, teacher-forced and streaming forwards.

Parameter names are those of the released checkpoints. Shape letters: B batch, F frames, C latent
channels, H x W latent size, T tokens per frame, L tokens, D model width, h heads, d head channels.
Source: Wan2.1 as used by Self-Forcing and Causal-Forcing (arXiv 2506.08009).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.models.kv_cache import KVCache, LayerKV, allocate

EPS = 1e-6


@dataclass(frozen=True)
class WanConfig:
    """Sizes of the network; the defaults are Wan2.1-T2V-1.3B with 3-frame chunks."""

    dim: int = 1536
    num_heads: int = 12
    ffn_dim: int = 8960
    num_layers: int = 30
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    patch: tuple[int, int] = (2, 2)
    chunk: int = 3

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of one frame."""
        rows, cols = height // self.patch[0], width // self.patch[1]
        if (rows * self.patch[0], cols * self.patch[1]) != (height, width) or not rows * cols:
            raise ValueError(f"x: a frame of {height}x{width} does not divide into {self.patch}")
        return rows, cols


@lru_cache(maxsize=256)
def rope_angles(
    head_dim: int, start: int, frames: int, rows: int, cols: int, device: torch.device
) -> Tensor:
    """Unit complex numbers [frames·rows·cols, head_dim/2] (complex64) of frames from `start` on.

    The pairs are split over time, row and column; every axis has its own ladder of frequencies.
    Angles are computed in float64, as the reference does: float32 loses them at far frames.
    """
    pairs = head_dim // 2
    split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    angles = []
    for axis, (count, size) in enumerate(zip(split, (frames, rows, cols), strict=True)):
        position = torch.arange(size, dtype=torch.float64) + (start if axis == 0 else 0)
        ladder = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
        shape = [1, 1, 1, count]
        shape[axis] = size
        angles.append(torch.outer(position, ladder).view(shape).expand(frames, rows, cols, count))
    theta = torch.cat(angles, dim=-1).reshape(frames * rows * cols, pairs)
    return torch.polar(torch.ones_like(theta), theta).to(torch.complex64).to(device)


def rotate(x_BhLd: Tensor, rope_Lp: Tensor) -> Tensor:
    """Turn interleaved channel pairs by the table's angles, in float32."""
    pairs = torch.view_as_complex(x_BhLd.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope_Lp).flatten(-2).to(x_BhLd.dtype)


@lru_cache(maxsize=64)
def block_mask(
    frames: int, chunk: int, tokens: int, with_clean: bool, device: torch.device
) -> Tensor:
    """True where a query token may see a key token: [F·T, F·T], or [F·T, 2·F·T] with clean keys.

    Without clean keys, a chunk sees itself and the past. With them (teacher forcing), noisy queries
    see the *clean* frames of earlier chunks, then the noisy frames of their own chunk.
    """
    chunk_F = torch.arange(frames, device=device) // chunk
    query, key = chunk_F[:, None], chunk_F[None, :]
    mask = torch.cat([key < query, key == query], dim=1) if with_clean else key <= query
    return mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    # Statistics in float32, then activation dtype, then the gain: the released order of roundings.
    return F.rms_norm(x.float(), (x.shape[-1],), eps=EPS).to(x.dtype) * weight


def _modulated_norm(x_BFTD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x_BFTD, (x_BFTD.shape[-1],), eps=EPS)
    return torch.addcmul(shift, normed, 1 + scale)


class Gain(nn.Module):
    """The gain of an RMS norm over all channels."""

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

    def _split(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def query(self, x_BLD: Tensor) -> Tensor:
        return self._split(_rms_norm(self.q(x_BLD), self.norm_q.weight))

    def key_value(self, x_BLD: Tensor) -> LayerKV:
        k_BLD = _rms_norm(self.k(x_BLD), self.norm_k.weight)
        return self._split(k_BLD), self._split(self.v(x_BLD))

    def attend(self, q_BhLd: Tensor, kv: LayerKV, mask: Tensor | None = None) -> Tensor:
        out_BhLd = F.scaled_dot_product_attention(q_BhLd, *kv, attn_mask=mask)
        return self.o(out_BhLd.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Modulated self-attention, cross-attention to the prompt, modulated feed-forward."""

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

    def modulations(self, time_BF6D: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale, gate of attention, then of the feed-forward, each [B, F, 1, D]."""
        return (self.modulation + time_BF6D).unsqueeze(3).unbind(2)

    def self_input(self, x_BFTD: Tensor, mods: tuple[Tensor, ...]) -> Tensor:
        return _modulated_norm(x_BFTD, mods[0], mods[1]).flatten(1, 2)

    def finish(
        self, x_BFTD: Tensor, attended_BLD: Tensor, mods: tuple[Tensor, ...], text_kv: LayerKV
    ) -> Tensor:
        """Everything after self-attention."""
        x_BFTD = torch.addcmul(x_BFTD, mods[2], attended_BLD.view_as(x_BFTD))
        q_BhLd = self.cross_attn.query(self.norm3(x_BFTD.flatten(1, 2)))
        x_BFTD = x_BFTD + self.cross_attn.attend(q_BhLd, text_kv).view_as(x_BFTD)
        return torch.addcmul(x_BFTD, mods[5], self.ffn(_modulated_norm(x_BFTD, mods[3], mods[4])))


class Head(nn.Module):
    """Last modulated norm and projection to patches, modulated by the bare time embedding."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = nn.Linear(config.dim, config.out_dim * config.patch[0] * config.patch[1])

    def forward(self, x_BFTD: Tensor, embed_BFD: Tensor) -> Tensor:
        shift, scale = (self.modulation + embed_BFD.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(_modulated_norm(x_BFTD, shift, scale))


class CausalWan(nn.Module):
    """The network. Videos are [B, F, C, H, W]; times are [B, F] on the 0-1000 scale."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        if config.dim % config.num_heads or config.head_dim % 2:
            raise ValueError(
                f"config: dim {config.dim} needs num_heads ({config.num_heads}) heads of even width"
            )
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(
            config.in_dim, dim, kernel_size=(1, *config.patch), stride=(1, *config.patch)
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    # --- pieces ---

    def _layers(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _patchify(self, x_BFCHW: Tensor) -> tuple[Tensor, int, int]:
        B, frames, C, H, W = x_BFCHW.shape
        if self.config.in_dim != C:
            raise ValueError(f"x: {C} channels came, the network takes {self.config.in_dim}")
        rows, cols = self.config.grid(H, W)
        ph, pw = self.config.patch
        patches = x_BFCHW.view(B, frames, C, rows, ph, cols, pw).permute(0, 1, 3, 5, 2, 4, 6)
        weight = self.patch_embedding.weight.flatten(1)
        x_BFTD = F.linear(
            patches.reshape(B, frames, rows * cols, -1), weight, self.patch_embedding.bias
        )
        return x_BFTD, rows, cols

    def _unpatchify(self, y_BFTP: Tensor, rows: int, cols: int) -> Tensor:
        B, frames = y_BFTP.shape[:2]
        ph, pw = self.config.patch
        y = y_BFTP.view(B, frames, rows, cols, ph, pw, self.config.out_dim)
        return y.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, frames, -1, rows * ph, cols * pw)

    def _time(self, t_BF: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Time embedding [B, F, D] and block modulation [B, F, 6, D]."""
        half = self.config.freq_dim // 2
        exponent = torch.arange(half, dtype=torch.float64, device=t_BF.device) / half
        angle = t_BF.double().unsqueeze(-1) * 10000.0**-exponent
        embed_BFD = self.time_embedding(torch.cat([angle.cos(), angle.sin()], -1).to(dtype))
        return embed_BFD, self.time_projection(embed_BFD).unflatten(-1, (6, -1))

    def _rope(self, start: int, frames: int, rows: int, cols: int, device: torch.device) -> Tensor:
        return rope_angles(self.config.head_dim, start, frames, rows, cols, device)

    def text_kv(self, text_BLE: Tensor) -> list[LayerKV]:
        """The prompt's keys and values for every layer; padding rows are attended to as well."""
        if text_BLE.shape[1:] != (self.config.text_len, self.config.text_dim):
            raise ValueError(
                f"text: shape {tuple(text_BLE.shape)} came, "
                f"[B, {self.config.text_len}, {self.config.text_dim}] is needed"
            )
        embedded = self.text_embedding(text_BLE)
        return [block.cross_attn.key_value(embedded) for block in self._layers()]

    # --- training forwards ---

    def clean_context(
        self, x_BFCHW: Tensor, text: Tensor | list[LayerKV], t_BF: Tensor | None = None
    ) -> list[LayerKV]:
        """Keys and values of clean frames, for the teacher-forced forward.

        Clean frames never see noisy ones, so this half of teacher forcing is a pass of its own; of
        the last layer only keys and values are needed. `t_BF` is the context's noise level (0).
        """
        context: list[LayerKV] = []
        self._run(x_BFCHW, self._times(x_BFCHW, t_BF), text, collect=context)
        return context

    def forward(
        self,
        x_BFCHW: Tensor,
        t_BF: Tensor,
        text: Tensor | list[LayerKV],
        context: list[LayerKV] | None = None,
    ) -> Tensor:
        """Block-causal prediction for all frames at once, [B, F, out, H, W].

        With `context` (from `clean_context`), earlier chunks are seen clean: teacher forcing.
        `text`: embeddings [B, text_len, text_dim], or the result of `text_kv`.
        """
        out = self._run(x_BFCHW, self._times(x_BFCHW, t_BF), text, context=context)
        assert out is not None
        return out

    def _times(self, x_BFCHW: Tensor, t_BF: Tensor | None) -> Tensor:
        B, frames = x_BFCHW.shape[:2]
        if t_BF is None:
            return x_BFCHW.new_zeros(B, frames, dtype=torch.float32)
        return t_BF.expand(B, frames)

    def _run(
        self,
        x_BFCHW: Tensor,
        t_BF: Tensor,
        text: Tensor | list[LayerKV],
        context: list[LayerKV] | None = None,
        collect: list[LayerKV] | None = None,
    ) -> Tensor | None:
        x_BFTD, rows, cols = self._patchify(x_BFCHW)
        frames = x_BFCHW.shape[1]
        embed_BFD, time_BF6D = self._time(t_BF, x_BFTD.dtype)
        text_kv = self.text_kv(text) if isinstance(text, Tensor) else text
        rope = self._rope(0, frames, rows, cols, x_BFTD.device)
        mask = block_mask(
            frames, self.config.chunk, rows * cols, context is not None, x_BFTD.device
        )
        for i, block in enumerate(self._layers()):
            mods = block.modulations(time_BF6D)
            h_BLD = block.self_input(x_BFTD, mods)
            k_BhLd, v_BhLd = block.self_attn.key_value(h_BLD)
            kv = (rotate(k_BhLd, rope), v_BhLd)
            if collect is not None:
                collect.append(kv)
                if i + 1 == len(self.blocks):
                    return None
            if context is not None:
                kv = (torch.cat([context[i][0], kv[0]], 2), torch.cat([context[i][1], kv[1]], 2))
            q_BhLd = rotate(block.self_attn.query(h_BLD), rope)
            x_BFTD = block.finish(
                x_BFTD, block.self_attn.attend(q_BhLd, kv, mask), mods, text_kv[i]
            )
        return self._unpatchify(self.head(x_BFTD, embed_BFD), rows, cols)

    # --- streaming ---

    def new_cache(self, text_BLE: Tensor, frames: int, height: int, width: int) -> KVCache:
        """An empty cache for streams of up to `frames` frames with these prompts."""
        rows, cols = self.config.grid(height, width)
        heads, head_dim = self.config.num_heads, self.config.head_dim
        cross_kv = self.text_kv(text_BLE)
        return allocate(cross_kv, text_BLE.shape[0], heads, head_dim, frames, rows * cols)

    def forward_cached(
        self,
        x_BFCHW: Tensor,
        t_BF: Tensor,
        cache: KVCache,
        start_frame: int,
        context_only: bool = False,
    ) -> Tensor | None:
        """One chunk at frames `start_frame`…, given the cache of everything before it.

        Full attention inside the chunk; its keys and values overwrite its slots in the cache.
        `context_only`: only the cache is wanted, so the end of the last layer is left out.
        No gradients: the cache is written in place.
        """
        B, frames = x_BFCHW.shape[:2]
        if start_frame + frames > cache.frames:
            raise ValueError(
                f"start_frame: frames {start_frame} to {start_frame + frames} do not fit a cache "
                f"of {cache.frames}"
            )
        x_BFTD, rows, cols = self._patchify(x_BFCHW)
        embed_BFD, time_BF6D = self._time(t_BF.expand(B, frames), x_BFTD.dtype)
        rope = self._rope(start_frame, frames, rows, cols, x_BFTD.device)
        for i, block in enumerate(self._layers()):
            mods = block.modulations(time_BF6D)
            h_BLD = block.self_input(x_BFTD, mods)
            k_BhLd, v_BhLd = block.self_attn.key_value(h_BLD)
            kv = cache.write(i, rotate(k_BhLd, rope), v_BhLd, start_frame * rows * cols)
            if context_only and i + 1 == len(self.blocks):
                return None
            q_BhLd = rotate(block.self_attn.query(h_BLD), rope)
            attended = block.self_attn.attend(q_BhLd, kv)
            x_BFTD = block.finish(x_BFTD, attended, mods, cache.cross_kv[i])
        return self._unpatchify(self.head(x_BFTD, embed_BFD), rows, cols)
