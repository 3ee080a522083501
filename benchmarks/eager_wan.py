"""A naive causal Wan student: the baseline of benchmarks/rollout.py and, with teacher forcing
(eager_train.py), of benchmarks/train_step.py.

The same network and weights in unfused PyTorch ops: separate projections for q, k and v, separate
norms, rotary positions as float64 complex numbers from a table assembled on every call, a cache
with tensor indices whose content is moved when the window is full, and separate modulation and
gates. The context pass also runs the whole network. The text MLP runs once per prompt, as in ours,
or (`embeds_text`) in every call, although its result is cached; so does the released code, which
passes the prompt to each call.

Shape letters: B videos, F frames, L tokens, S cache slots, D width, h heads, d head channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.models.wan.network import CausalWan
from afd.models.wan.types import WanConfig
from afd.schedules import ShiftedFlow

EPS = 1e-6
FRAMES_IN_TABLE = 1024


@dataclass
class Layer:
    """Keys and values [B, S, h, d] of one layer, and their fill counts, int64 [1]."""

    k: Tensor
    v: Tensor
    global_end: Tensor
    local_end: Tensor


@dataclass
class Cache:
    """Cache of all layers; `text` holds keys and values of the prompt `prompt`, [B, L, h, d]."""

    layers: list[Layer]
    text: list[tuple[Tensor, Tensor]]
    sink_tokens: int
    windowed: bool
    prompt: Tensor


class EagerWan:
    """The network as functions of the weights of a `CausalWan` (its state dict)."""

    def __init__(
        self, config: WanConfig, weights: Mapping[str, Tensor], *, embeds_text: bool = False
    ) -> None:
        self.config, self.embeds_text = config, embeds_text
        self.w = {name: value.detach() for name, value in weights.items()}
        pairs = config.head_dim // 2
        self.split = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
        device = self.w["patch_embedding.weight"].device
        self.ladder = torch.cat([_ladder(count) for count in self.split], dim=1).to(device)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + EPS)
        return normed.type_as(x) * self.w[f"{name}.weight"]

    def heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.view(*x_BLD.shape[:2], self.config.num_heads, -1)

    # --- a stream ---

    def new_cache(
        self, text_BLE: Tensor, frames: int, tokens: int, window: int | None = None, sink: int = 0
    ) -> Cache:
        """A cache for `window` frames of `tokens` tokens, or for `frames` without a window."""
        text = self.text_kv(text_BLE)
        slots = (frames if window is None else window) * tokens
        shape = (len(text_BLE), slots, self.config.num_heads, self.config.head_dim)
        layers = []
        for k_BLhd, _ in text:
            ends = [torch.zeros(1, dtype=torch.int64, device=k_BLhd.device) for _ in range(2)]
            layers.append(Layer(k_BLhd.new_zeros(shape), k_BLhd.new_zeros(shape), *ends))
        return Cache(layers, text, sink * tokens, window is not None, text_BLE)

    def text_kv(self, text_BLE: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the prompts for every layer."""
        embedded, text = self.embed(text_BLE), []
        for i in range(self.config.num_layers):
            name = f"blocks.{i}.cross_attn"
            k_BLD = self.rms_norm(f"{name}.norm_k", self.linear(f"{name}.k", embedded))
            text.append((self.heads(k_BLD), self.heads(self.linear(f"{name}.v", embedded))))
        return text

    def embed(self, text_BLE: Tensor) -> Tensor:
        embedded = self.linear("text_embedding.0", text_BLE)
        return self.linear("text_embedding.2", F.gelu(embedded, approximate="tanh"))

    @torch.no_grad()
    def forward(self, x_BFCHW: Tensor, t_BF: Tensor, cache: Cache, start_frame: int) -> Tensor:
        """The network's output for one chunk starting at frame `start_frame`, like x."""
        if self.embeds_text:
            self.embed(cache.prompt)
        return self.network(x_BFCHW, t_BF, cache, start_frame)

    def network(self, x_BFCHW: Tensor, t_BF: Tensor, cache: Cache, start_frame: int) -> Tensor:
        """All layers, independent of the self-attention pattern."""
        B, frames, _, H, W = x_BFCHW.shape
        ph, pw = self.config.patch
        grid = (frames, H // ph, W // pw)
        x_BDFHW = F.conv3d(
            x_BFCHW.transpose(1, 2),
            self.w["patch_embedding.weight"],
            self.w["patch_embedding.bias"],
            stride=(1, ph, pw),
        )
        x_BLD = x_BDFHW.flatten(2).transpose(1, 2)
        half = self.config.freq_dim // 2
        steps = torch.arange(half, dtype=torch.float64, device=t_BF.device)
        angle = t_BF.double()[..., None] * torch.pow(10000, -steps / half)
        embed = torch.cat([angle.cos(), angle.sin()], dim=-1).type_as(x_BLD)
        embed = self.linear("time_embedding.0", embed)
        embed_BFD = self.linear("time_embedding.2", F.silu(embed)).expand(B, frames, -1)
        time_BF6D = self.linear("time_projection.1", F.silu(embed_BFD)).unflatten(-1, (6, -1))
        for i in range(self.config.num_layers):
            x_BLD = self.block(i, x_BLD, time_BF6D, cache, grid, start_frame)
        mods = self.w["head.modulation"].unsqueeze(1) + embed_BFD.unsqueeze(2)
        shift, scale = mods.chunk(2, dim=2)
        y_BLP = self.linear("head.head", self.modulated(x_BLD, shift, scale))
        y = y_BLP.view(B, *grid, ph, pw, -1).permute(0, 1, 6, 2, 4, 3, 5)
        return y.reshape(B, frames, -1, H, W)

    def block(
        self,
        i: int,
        x_BLD: Tensor,
        time_BF6D: Tensor,
        cache: Cache,
        grid: tuple[int, int, int],
        start_frame: int,
    ) -> Tensor:
        name = f"blocks.{i}"
        mods = (self.w[f"{name}.modulation"].unsqueeze(1) + time_BF6D).chunk(6, dim=2)
        h_BLD = self.modulated(x_BLD, mods[0], mods[1])
        attended = self.self_attention(f"{name}.self_attn", h_BLD, cache, i, grid, start_frame)
        x_BLD = x_BLD + self.gated(attended, mods[2])
        weight, bias = self.w[f"{name}.norm3.weight"], self.w[f"{name}.norm3.bias"]
        h_BLD = F.layer_norm(x_BLD, x_BLD.shape[-1:], weight, bias, EPS)
        cross = f"{name}.cross_attn"
        q_BLhd = self.heads(self.rms_norm(f"{cross}.norm_q", self.linear(f"{cross}.q", h_BLD)))
        x_BLD = x_BLD + self.linear(f"{cross}.o", attention(q_BLhd, *cache.text[i]))
        h_BLD = self.modulated(x_BLD, mods[3], mods[4])
        h_BLD = F.gelu(self.linear(f"{name}.ffn.0", h_BLD), approximate="tanh")
        return x_BLD + self.gated(self.linear(f"{name}.ffn.2", h_BLD), mods[5])

    def modulated(self, x_BLD: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor) -> Tensor:
        frames = shift_BF1D.shape[1]
        normed = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=EPS).unflatten(1, (frames, -1))
        return (normed * (1 + scale_BF1D) + shift_BF1D).flatten(1, 2)

    def gated(self, x_BLD: Tensor, gate_BF1D: Tensor) -> Tensor:
        return (x_BLD.unflatten(1, (gate_BF1D.shape[1], -1)) * gate_BF1D).flatten(1, 2)

    def self_attention(
        self,
        name: str,
        h_BLD: Tensor,
        cache: Cache,
        i: int,
        grid: tuple[int, int, int],
        start_frame: int,
    ) -> Tensor:
        q_BLhd = self.heads(self.rms_norm(f"{name}.norm_q", self.linear(f"{name}.q", h_BLD)))
        k_BLhd = self.heads(self.rms_norm(f"{name}.norm_k", self.linear(f"{name}.k", h_BLD)))
        v_BLhd = self.heads(self.linear(f"{name}.v", h_BLD))
        q_BLhd = self.rotated(q_BLhd, grid, start_frame)
        k_BLhd = self.rotated(k_BLhd, grid, start_frame)
        tokens = grid[1] * grid[2]
        k_BNhd, v_BNhd = append(cache, i, k_BLhd, v_BLhd, start_frame * tokens)
        return self.linear(f"{name}.o", attention(q_BLhd, k_BNhd, v_BNhd))

    def rotated(self, x_BLhd: Tensor, grid: tuple[int, int, int], start: int) -> Tensor:
        time, row, col = self.ladder.split(self.split, dim=1)
        frames, rows, cols = grid
        out = []
        for x_Lhd in x_BLhd:
            pairs = torch.view_as_complex(x_Lhd.double().reshape(*x_Lhd.shape[:2], -1, 2))
            turns = torch.cat(
                [
                    time[start : start + frames].view(frames, 1, 1, -1).expand(*grid, -1),
                    row[:rows].view(1, rows, 1, -1).expand(*grid, -1),
                    col[:cols].view(1, 1, cols, -1).expand(*grid, -1),
                ],
                dim=-1,
            ).reshape(frames * rows * cols, 1, -1)
            out.append(torch.view_as_real(pairs * turns).flatten(2))
        return torch.stack(out).type_as(x_BLhd)


def append(
    cache: Cache, i: int, k_BLhd: Tensor, v_BLhd: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """Append tokens, shifting old ones out if the window is full; returns all cached ones."""
    layer = cache.layers[i]
    count, slots = k_BLhd.shape[1], layer.k.shape[1]
    end = start + count
    grown = end - int(layer.global_end.item())
    local_end = int(layer.local_end.item()) + grown
    if cache.windowed and grown > 0 and local_end > slots:
        lost = local_end - slots
        keep = slice(cache.sink_tokens + lost, slots)
        to = slice(cache.sink_tokens, slots - lost)
        layer.k[:, to] = layer.k[:, keep].clone()
        layer.v[:, to] = layer.v[:, keep].clone()
        local_end = slots
    layer.k[:, local_end - count : local_end] = k_BLhd
    layer.v[:, local_end - count : local_end] = v_BLhd
    layer.global_end.fill_(end)
    layer.local_end.fill_(local_end)
    return layer.k[:, :local_end], layer.v[:, :local_end]


def attention(q_BLhd: Tensor, k_BNhd: Tensor, v_BNhd: Tensor) -> Tensor:
    """Attention [B, L, D] with PyTorch's fastest kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLhd, k_BNhd, v_BNhd))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def random_network(config: WanConfig, device: torch.device | str, dtype: torch.dtype) -> CausalWan:
    """A frozen network with fixed random weights, all of which affect the output."""
    torch.manual_seed(0)
    with torch.device(device):
        net = CausalWan(config)
    for parameter in net.parameters():
        if parameter.ndim == 1:  # norms begin at one, biases at zero
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    return net.to(dtype).requires_grad_(False)


def _ladder(pairs: int) -> Tensor:
    """Rotations of every position along an axis, complex128 [FRAMES_IN_TABLE, pairs]."""
    exponent = torch.arange(pairs, dtype=torch.float64) / pairs
    angle = torch.outer(torch.arange(FRAMES_IN_TABLE).double(), torch.pow(10000, -exponent))
    return torch.polar(torch.ones_like(angle), angle)


def denoised(
    net: EagerWan,
    cache: Cache,
    noise: list[Tensor],
    steps: tuple[float, ...],
    start: int,
    schedule: ShiftedFlow,
) -> Tensor:
    """Denoise one chunk, with noise [B, c, C, H, W] per step, and run its context pass.

    Noise levels are looked up in the table in every step, conversions are float64.
    """
    B, count = noise[0].shape[:2]
    device = noise[0].device
    times, sigmas = schedule.times.to(device).double(), schedule.sigmas.to(device).double()

    def sigma(t_BF: Tensor) -> Tensor:
        nearest = (times - t_BF.double().flatten()[:, None]).abs().argmin(dim=1)
        return sigmas[nearest].view(B, count, 1, 1, 1)

    x_t = noise[0]
    for step, t in enumerate(steps):
        t_BF = torch.full((B, count), t, device=device)
        flow = net.forward(x_t, t_BF, cache, start)
        x0 = (x_t.double() - sigma(t_BF) * flow.double()).type_as(flow)
        if step + 1 < len(steps):
            next_sigma = sigma(torch.full((B, count), steps[step + 1], device=device)).float()
            x_t = ((1 - next_sigma) * x0 + next_sigma * noise[step + 1]).type_as(x0)
    net.forward(x0, torch.zeros(B, count, device=device), cache, start)
    return x0
