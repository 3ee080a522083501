"""A causal Wan network of a few thousand parameters, every one of them random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd.models.wan.network import CausalWan
from afd.models.wan.types import WanConfig

HEIGHT, WIDTH = 6, 4
TOKENS = (HEIGHT // 2) * (WIDTH // 2)


def tiny(**changes: Any) -> CausalWan:
    """Two layers of two heads of 16 channels, chunks of 3 frames; `changes` go to the config."""
    sizes: dict[str, Any] = {
        "dim": 32,
        "num_heads": 2,
        "ffn_dim": 48,
        "num_layers": 2,
        "freq_dim": 16,
        "text_dim": 8,
        "text_len": 5,
        "in_dim": 4,
        "out_dim": 4,
    }
    torch.manual_seed(0)
    net = CausalWan(WanConfig(**{**sizes, **changes}))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 0.2)
    return net


def video(net: CausalWan, frames: int, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, frames, net.config.in_dim, HEIGHT, WIDTH)
    return torch.randn(shape, generator=generator)


def text(net: CausalWan, batch: int = 2, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, net.config.text_len, net.config.text_dim, generator=generator)
