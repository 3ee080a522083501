"""What the rollout knows of a student, and what all students do alike.

Shape letters: B videos, F frames, C channels, H x W latent size, L text tokens, E text channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from afd.models.causal_wan import CausalWan
from afd.models.graphs import GraphedPasses
from afd.models.kv_cache import KVCache


@dataclass(frozen=True)
class Level:
    """One denoising step.

    Attributes:
        t: what the network is told, on the 0-1000 scale.
        sigma: how much of the chunk is noise, in [0, 1].
        t_11: t as float32 [1, 1] on the network's device. Made before the loop, as making it in the
            loop would wait for the device; the network knows its modulation by this tensor.
    """

    t: float
    sigma: float
    t_11: Tensor

    @classmethod
    def at(cls, t: float, sigma: float, device: torch.device) -> Level:
        return cls(t, sigma, torch.tensor([[t]], dtype=torch.float32, device=device))


class Student(nn.Module, ABC):
    """A causal video student: a `CausalWan` and what its output, its steps and its text mean."""

    def __init__(self, net: CausalWan) -> None:
        super().__init__()
        self.net = net
        self._graphs: GraphedPasses | None = None

    # --- what differs ---

    @property
    @abstractmethod
    def frames(self) -> int:
        """Frames of a video of the training length."""

    @property
    @abstractmethod
    def frame_shape(self) -> tuple[int, int, int]:
        """C, H, W of a frame."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> Tensor:
        """Text embeddings [B, L, E] on the student's device."""

    @abstractmethod
    def levels(self, steps: Sequence[float]) -> list[Level]:
        """The denoising steps of a list in the student's own units; refuses a wrong list."""

    @abstractmethod
    def x0_from_output(self, out_BFCHW: Tensor, x_t_BFCHW: Tensor, sigma: float) -> Tensor:
        """The clean chunk that the network's output at x_t means."""

    # --- what is alike ---

    @property
    def chunk(self) -> int:
        """Frames denoised together."""
        return self.net.config.chunk

    @property
    def independent_first_frame(self) -> bool:
        """Whether the first frame is a chunk of its own."""
        return self.net.config.independent_first_frame

    @property
    def device(self) -> torch.device:
        return self.net.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.net.patch_embedding.weight.dtype

    def new_cache(self, text_BLE: Tensor, frames: int) -> KVCache:
        """An empty cache for streams of up to `frames` frames with these prompts."""
        return self.net.new_cache(text_BLE, frames, *self.frame_shape[1:])

    def switch_text(self, cache: KVCache, text_BLE: Tensor) -> None:
        """Put another prompt's keys and values where the cache holds the last one's."""
        cache.switch_text(self.net.text_kv(text_BLE))

    def use_graphs(self, enabled: bool = True) -> None:
        """Replay streaming passes as CUDA graphs; weights may change in place between streams."""
        self._graphs = GraphedPasses(self.net) if enabled else None

    def denoise(self, x_t_BFCHW: Tensor, level: Level, cache: KVCache, start_frame: int) -> Tensor:
        """The clean chunk seen in the noisy one at frames `start_frame` and on."""
        out = self._pass(x_t_BFCHW, level, cache, start_frame, context=False)
        assert out is not None
        return self.x0_from_output(out, x_t_BFCHW, level.sigma)

    def remember(self, x_BFCHW: Tensor, level: Level, cache: KVCache, start_frame: int) -> None:
        """The context pass: later chunks will see this chunk as it is, told to be at the level."""
        self._pass(x_BFCHW, level, cache, start_frame, context=True)

    def _pass(
        self, x_BFCHW: Tensor, level: Level, cache: KVCache, start: int, context: bool
    ) -> Tensor | None:
        if self._graphs is not None:
            return self._graphs(x_BFCHW, level.t_11, cache, start, context)
        return self.net.forward_cached(x_BFCHW, level.t_11, cache, start, context_only=context)
