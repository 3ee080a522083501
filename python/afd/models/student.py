"""What the rollout knows of a student, and what all students do alike.

Shape letters: B videos, F frames, C channels, H x W latent size, K chunks, L text tokens, E text
channels. Times t are noise levels in [0, 1]; the network is told 1000 t.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afd.models.noise import Layout, NoiseSource, seeded_noise
from afd.models.wan.graphs import GraphedPasses
from afd.models.wan.kv_cache import KVCache
from afd.models.wan.network import CausalWan
from afd.models.wan.types import LayerKV
from afd.schedules import check_steps, x0_from_flow


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


def frame_times(x_BFCHW: Tensor, t_BK: Tensor) -> Tensor:
    """The time of every frame, [B, F], of times per video [B, 1] or chunk [B, K]."""
    return t_BK.repeat_interleave(x_BFCHW.shape[1] // t_BK.shape[1], 1)


class Student(nn.Module, ABC):
    """A causal video student: a `CausalWan` and what its output, its steps and its text mean.

    Unless a subclass says otherwise the network's output is the rectified-flow velocity, a
    denoising step is its noise level in (0, 1], and noise comes from one CPU generator per video.
    """

    def __init__(self, net: CausalWan) -> None:
        super().__init__()
        self.net = net
        self._graphs: GraphedPasses | None = None

    # --- what every student has to say ---

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

    # --- what a student may say otherwise ---

    def levels(self, steps: Sequence[float]) -> list[Level]:
        """The denoising steps of a list in the student's own units; refuses a wrong list."""
        check_steps(steps)
        return [Level.at(1000 * t, t, self.device) for t in steps]

    def times(self, steps: Sequence[float]) -> list[float]:
        """The noise levels of a list of steps, in (0, 1], falling from 1."""
        check_steps(steps)
        return list(steps)

    def x0_from_output(self, out_BFCHW: Tensor, x_t_BFCHW: Tensor, sigma: float | Tensor) -> Tensor:
        """The clean frames that the network's output at x_t means, in its dtype.

        `sigma`: the noise level, one for all or one for each frame [B, F]. The arithmetic is
        float64.
        """
        return x0_from_flow(out_BFCHW, x_t_BFCHW, sigma)

    def noise_source(
        self, seeds: Sequence[int] | Tensor, layout: Layout, draws: int
    ) -> NoiseSource:
        """The noise of videos with these seeds: at most `draws` draws for a chunk of the layout.

        A video's noise depends on its own seed alone.
        """
        noise = seeded_noise(seeds, (self.chunk, *self.frame_shape))
        return lambda chunk, step: noise(chunk, step).to(self.device, self.dtype)

    # --- what is alike ---

    def velocity(
        self,
        x_t_BFCHW: Tensor,
        t_BK: Tensor,
        text_BLE: Tensor,
        context: list[LayerKV] | None = None,
        **how: Any,
    ) -> Tensor:
        """Rectified-flow velocity (noise minus video) at x_t, shaped like it.

        Arguments as in `predict`, whose output it is unless a student's network says otherwise.
        """
        return self.predict(x_t_BFCHW, t_BK, text_BLE, context, **how)

    def predict(
        self,
        x_t_BFCHW: Tensor,
        t_BK: Tensor,
        text_BLE: Tensor,
        context: list[LayerKV] | None = None,
        *,
        x0_BFCHW: Tensor | None = None,
        context_noise: float = 0.0,
        chunks_BN: Tensor | None = None,
    ) -> Tensor:
        """The network's output for all frames at once, in its own dtype, like x_t.

        Args:
            x_t_BFCHW: noisy frames; they are cast to the network's dtype.
            t_BK: their noise levels, float32 per video [B, 1] or per chunk [B, K].
            context: what chunks see of the earlier ones clean (`clean_context`); or
            x0_BFCHW: the clean frames themselves, to go through the network in the same pass,
                with gradients. Neither: chunks see the earlier ones noisy.
            context_noise: the time that the clean frames of that pass are told, 0-1000.
            chunks_BN: which chunks of each video x_t and t hold, rising, int64 on the CPU; the
                context is that of the whole video. None: all.
        """
        t_BF = frame_times(x_t_BFCHW, t_BK)
        clean_t_BF = None
        if x0_BFCHW is not None:
            x0_BFCHW = x0_BFCHW.to(self.dtype)
            clean_t_BF = t_BK.new_full((1, 1), context_noise)
        return self.net(
            x_t_BFCHW.to(self.dtype),
            1000 * t_BF,
            text_BLE,
            context,
            x0_BFCHW=x0_BFCHW,
            clean_t_BF=clean_t_BF,
            chunks_BN=chunks_BN,
        )

    def predict_x0(
        self,
        x_t_BFCHW: Tensor,
        t_BK: Tensor,
        text_BLE: Tensor,
        context: list[LayerKV] | None = None,
        **how: Any,
    ) -> Tensor:
        """The clean video seen in x_t, float32 like it; arguments as in `predict`."""
        out = self.predict(x_t_BFCHW, t_BK, text_BLE, context, **how).float()
        return self.x0_from_output(out, x_t_BFCHW, frame_times(x_t_BFCHW, t_BK))

    def clean_context(
        self, x0_BFCHW: Tensor, text_BLE: Tensor, *, context_noise: float = 0.0
    ) -> list[LayerKV]:
        """What later chunks see of clean frames: keys and values of every layer.

        `context_noise`: the time that the pass is told, on the 0-1000 scale.
        """
        t_11 = x0_BFCHW.new_full((1, 1), context_noise, dtype=torch.float32)
        return self.net.clean_context(x0_BFCHW.to(self.dtype), text_BLE, t_11)

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
        return self.net.compute_dtype or self.net.patch_embedding.weight.dtype

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

    def remember(self, x0_BFCHW: Tensor, level: Level, cache: KVCache, start_frame: int) -> None:
        """The context pass: later chunks will see this chunk as it is, told to be at the level."""
        self._pass(x0_BFCHW, level, cache, start_frame, context=True)

    def _pass(
        self, x_BFCHW: Tensor, level: Level, cache: KVCache, start: int, context: bool
    ) -> Tensor | None:
        if self._graphs is not None:
            return self._graphs(x_BFCHW, level.t_11, cache, start, context)
        return self.net.forward_cached(x_BFCHW, level.t_11, cache, start, context_only=context)
