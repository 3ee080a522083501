"""The toy student: a small causal Wan network on raw pixels, with a fixed text encoder.

Shape letters: B videos, F frames, C colour channels, H x W pixels, K chunks, L text tokens, E text
channels. Videos are in [-1, 1]; times are in [0, 1] (1 is pure noise).
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from afd.files import replacing
from afd.lab.shipped import checkpoint_path
from afd.models.student import Student, frame_times
from afd.models.wan.network import CausalWan
from afd.models.wan.types import LayerKV, WanConfig


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of the toy network. One token per frame: a patch is the whole image."""

    wan: WanConfig = field(
        default_factory=lambda: WanConfig(
            dim=128,
            num_heads=4,
            ffn_dim=384,
            num_layers=3,
            freq_dim=64,
            text_dim=32,
            text_len=6,
            in_dim=3,
            out_dim=3,
            patch=(16, 16),
            chunk=3,
        )
    )
    frames: int = 12
    height: int = 16
    width: int = 16
    smallest_t: float = 0.05


# Stop words, which do not distinguish sentences.
FILLERS = {"a", "an", "the", "on", "in", "at", "of", "is", "are", "and", "with", "to", "going"}


@lru_cache(maxsize=4096)
def _word(word: str, channels: int) -> Tensor:
    return torch.randn(channels, generator=Generator().manual_seed(zlib.crc32(word.encode())))


def encode_prompts(prompts: list[str], length: int, channels: int) -> Tensor:
    """A fixed text encoder, [B, length, channels]: word plus position vectors, zero-padded.

    Each content word has its own random vector, seeded by the word, so any sentence can be encoded
    and a word has the same vector everywhere. Words past `length` are dropped.
    """
    text_BLE = torch.zeros(len(prompts), length, channels)
    for row, prompt in zip(text_BLE, prompts, strict=True):
        words = [w for w in re.findall(r"[a-z0-9]+", prompt.lower()) if w not in FILLERS]
        for place, word in enumerate(words[:length]):
            row[place] = (_word(word, channels) + _word(f"#{place}", channels)) / 2**0.5
    return text_BLE


class ToyStudent(Student):
    """A causal video student that predicts the clean video and exposes velocities."""

    net: CausalWan

    def __init__(self, config: ToyConfig | None = None) -> None:
        config = config or ToyConfig()
        super().__init__(CausalWan(config.wan))
        self.config = config
        # As in the released network, a zero-initialised head: the initial prediction is zero.
        nn.init.zeros_(self.net.head.head.weight)
        nn.init.zeros_(self.net.head.head.bias)

    def encode(self, prompts: list[str]) -> Tensor:
        """Text embeddings [B, L, E] on the student's device."""
        wan = self.config.wan
        return encode_prompts(prompts, wan.text_len, wan.text_dim).to(self.device)

    # --- training (the rest is in Student) ---

    def velocity(
        self,
        x_t_BFCHW: Tensor,
        t_BK: Tensor,
        text_BLE: Tensor,
        context: list[LayerKV] | None = None,
        **how: Any,
    ) -> Tensor:
        """Velocity from the network's prediction of the clean video, in float32."""
        x0_BFCHW = self.predict_x0(x_t_BFCHW, t_BK, text_BLE, context, **how)
        t_BF = frame_times(x_t_BFCHW, t_BK).clamp_min(self.config.smallest_t)
        return (x_t_BFCHW - x0_BFCHW) / t_BF[..., None, None, None]

    # --- streaming (the rest is in Student) ---

    @property
    def frames(self) -> int:
        return self.config.frames

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        return self.config.wan.in_dim, self.config.height, self.config.width

    def x0_from_output(self, out_BFCHW: Tensor, x_t_BFCHW: Tensor, sigma: float | Tensor) -> Tensor:
        """Return the output, which already is the clean chunk."""
        return out_BFCHW

    # --- files ---

    def save(self, path: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write weights and sizes as safetensors, atomically."""
        from safetensors.torch import save_file  # benchmarks build students without it

        weights = {k: v.detach().to(dtype).contiguous() for k, v in self.state_dict().items()}
        with replacing(path) as partial:
            save_file(weights, partial, metadata={"config": json.dumps(asdict(self.config))})

    @classmethod
    def load(cls, name: str = "base") -> ToyStudent:
        """Load a file written by `save`, or the shipped base student; float32, in train mode."""
        from safetensors.torch import load_file

        student = cls(cls.read_config(name))
        weights = load_file(checkpoint_path(name))
        student.load_state_dict({k: v.float() for k, v in weights.items()})
        return student

    @staticmethod
    def read_config(name: str = "base") -> ToyConfig:
        """Read the sizes of such a file from its header; no weights are loaded."""
        from safetensors import safe_open

        with safe_open(checkpoint_path(name), "pt") as opened:
            metadata: dict[str, Any] = json.loads(opened.metadata()["config"])
        wan = metadata.pop("wan")
        return ToyConfig(WanConfig(**{**wan, "patch": tuple(wan["patch"])}), **metadata)
