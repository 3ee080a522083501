"""The student interface used by rollouts, and the behaviour shared by all students.

Shape letters: B videos, F frames, C channels, H x W latent size, K chunks, L text tokens, E text
channels. Times t are noise levels in [0, 1]; the network receives 1000 t.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afd.models.network import CausalNetwork
from afd.models.noise import EndlessLayout, Layout, NoiseSource, seeded_noise
from afd.models.wan.graphs import GraphedPasses
from afd.models.wan.kv_cache import KVCache
from afd.models.wan.network import CausalWan
from afd.models.wan.types import LayerKV
from afd.schedules import check_steps, x0_from_flow
from afd_kernels.contracts import require


@dataclass(frozen=True)
class Level:
    """One denoising step.

    Attributes:
        t: the timestep that conditions the network, on the 0-1000 scale.
        sigma: noise level of the chunk, in [0, 1].
        t_11: t as float32 [1, 1] on the network's device. Created before the loop, as creating it
            inside would synchronise; the network caches its modulation under this tensor.
    """

    t: float
    sigma: float
    t_11: Tensor

    @classmethod
    def at(cls, t: float, sigma: float, device: torch.device) -> Level:
        return cls(t, sigma, torch.tensor([[t]], dtype=torch.float32, device=device))


def frame_times(x_BFCHW: Tensor, t_BK: Tensor) -> Tensor:
    """Expand times per video [B, 1] or chunk [B, K] to every frame, [B, F]."""
    return t_BK.repeat_interleave(x_BFCHW.shape[1] // t_BK.shape[1], 1)


class Student(nn.Module, ABC):
    """A causal video student: a `CausalNetwork` with its parametrisation, steps and text encoding.

    Unless a subclass overrides it, the network's output is the rectified-flow velocity, a
    denoising step is its noise level in (0, 1], and noise comes from one CPU generator per video.
    """

    def __init__(self, net: CausalNetwork) -> None:
        super().__init__()
        self.net = net
        self._graphs: GraphedPasses | None = None

    # --- abstract methods ---

    @property
    @abstractmethod
    def frames(self) -> int:
        """Number of frames of a training video."""

    @property
    @abstractmethod
    def frame_shape(self) -> tuple[int, int, int]:
        """C, H, W of a frame."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> Tensor:
        """Text embeddings [B, L, E] on the student's device."""

    # --- methods a student may override ---

    def keep_text_encoder(self) -> None:
        """Keep what embeds new prompts in memory from its next use on, for streams that are steered
        by typed prompts; by default there is nothing to keep."""

    def levels(self, steps: Sequence[float]) -> list[Level]:
        """Convert a list of denoising steps in the student's units; raises on an invalid list."""
        check_steps(steps)
        return [Level.at(1000 * t, t, self.device) for t in steps]

    def times(self, steps: Sequence[float]) -> list[float]:
        """Noise levels of a list of steps, in (0, 1], descending from 1."""
        check_steps(steps)
        return list(steps)

    def x0_from_output(self, out_BFCHW: Tensor, x_t_BFCHW: Tensor, sigma: float | Tensor) -> Tensor:
        """Convert the network's output at x_t to clean frames, in the output's dtype.

        `sigma`: the noise level, one for all or one per frame [B, F]. The arithmetic is float64.
        """
        return x0_from_flow(out_BFCHW, x_t_BFCHW, sigma)

    def noise_source(
        self, seeds: Sequence[int] | Tensor, layout: Layout | EndlessLayout, draws: int
    ) -> NoiseSource:
        """Noise source of videos with these seeds, with at most `draws` draws per chunk.

        A video's noise depends only on its seed.
        """
        noise = seeded_noise(seeds, (self.chunk, *self.frame_shape))
        return lambda chunk, step: noise(chunk, step).to(self.device, self.dtype)

    # --- shared behaviour ---

    def velocity(
        self,
        x_t_BFCHW: Tensor,
        t_BK: Tensor,
        text_BLE: Tensor,
        context: list[LayerKV] | None = None,
        **how: Any,
    ) -> Tensor:
        """Rectified-flow velocity (noise minus video) at x_t, in its shape.

        Takes the arguments of `predict` and, unless a subclass overrides it, returns its output.
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
        start_frame: int = 0,
    ) -> Tensor:
        """The network's output for all frames in one pass, in x_t's shape and the compute dtype.

        Args:
            x_t_BFCHW: noisy frames, cast to the network's dtype.
            t_BK: their noise levels, float32 per video [B, 1] or per chunk [B, K].
            context: keys and values of clean frames that later chunks attend to
                (`clean_context`); or
            x0_BFCHW: the clean frames themselves, which pass through the network together with
                x_t, with gradients. With neither, chunks attend to earlier noisy chunks.
            context_noise: timestep of the clean frames x0_BFCHW, 0-1000.
            chunks_BN: indices of the chunks of each video in x_t and t, ascending, int64 on the
                CPU; the context covers the whole video. None: all chunks.
            start_frame: first frame of a clip of a stream; with x0_BFCHW, `context` is what the
                stream held there.
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
            start_frame=start_frame,
        )

    def predict_x0(
        self,
        x_t_BFCHW: Tensor,
        t_BK: Tensor,
        text_BLE: Tensor,
        context: list[LayerKV] | None = None,
        **how: Any,
    ) -> Tensor:
        """Predicted clean video, float32 in x_t's shape; arguments as in `predict`."""
        out = self.predict(x_t_BFCHW, t_BK, text_BLE, context, **how).float()
        return self.x0_from_output(out, x_t_BFCHW, frame_times(x_t_BFCHW, t_BK))

    def clean_context(
        self, x0_BFCHW: Tensor, text_BLE: Tensor, *, context_noise: float = 0.0, **clip: Any
    ) -> list[LayerKV]:
        """Keys and values of clean frames for every layer, to which later chunks attend.

        `context_noise`: timestep of the pass, on the 0-1000 scale. `clip`: `past` and `start_frame`
        of a clip of a stream (`CausalWan.clean_context`).
        """
        t_11 = x0_BFCHW.new_full((1, 1), context_noise, dtype=torch.float32)
        return self.net.clean_context(x0_BFCHW.to(self.dtype), text_BLE, t_11, **clip)

    @property
    def chunk(self) -> int:
        """Number of frames denoised together."""
        return self.net.config.chunk

    @property
    def independent_first_frame(self) -> bool:
        """Whether the first frame is a separate chunk."""
        return self.net.config.independent_first_frame

    @property
    def device(self) -> torch.device:
        return self.net.first_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.net.compute_dtype or self.net.first_weight.dtype

    def new_cache(self, text_BLE: Tensor, frames: int | None) -> KVCache:
        """An empty cache for streams of up to `frames` frames with these prompts.

        None: a stream without end, which needs a window in the network's configuration.
        """
        return self.net.new_cache(text_BLE, frames, *self.frame_shape[1:])

    def switch_text(self, cache: KVCache, text_BLE: Tensor) -> None:
        """Replace the prompt's keys and values in the cache."""
        cache.switch_text(self.net.text_kv(text_BLE))

    def use_graphs(self, enabled: bool = True) -> None:
        """Replay streaming passes as CUDA graphs; weights may be updated in place between
        streams."""
        if not enabled:
            self._graphs = None
            return
        require(isinstance(self.net, CausalWan), "cuda_graphs", enabled, "false, or a Wan network")
        assert isinstance(self.net, CausalWan)
        self._graphs = GraphedPasses(self.net)

    def denoise(self, x_t_BFCHW: Tensor, level: Level, cache: KVCache, start_frame: int) -> Tensor:
        """Predict the clean chunk from the noisy one that starts at frame `start_frame`."""
        out = self._pass(x_t_BFCHW, level, cache, start_frame, context=False)
        assert out is not None
        return self.x0_from_output(out, x_t_BFCHW, level.sigma)

    def remember(self, x0_BFCHW: Tensor, level: Level, cache: KVCache, start_frame: int) -> None:
        """The context pass: cache this chunk, at the level's timestep, for later chunks."""
        self._pass(x0_BFCHW, level, cache, start_frame, context=True)

    def recache(
        self,
        x0_BFCHW: Tensor,
        level: Level,
        cache: KVCache,
        *,
        new_sink: bool = False,
        chunks: Sequence[int] = (),
    ) -> None:
        """Encode cached frames again under the cache's present prompt (`CausalWan.recache`).

        `x0_BFCHW`: the newest finished frames, a window of them or the whole video so far.
        """
        # Never replayed as a graph: it is rare, and longer than a chunk.
        self.net.recache(x0_BFCHW, level.t_11, cache, new_sink=new_sink, chunks=chunks)

    def _pass(
        self, x_BFCHW: Tensor, level: Level, cache: KVCache, start: int, context: bool
    ) -> Tensor | None:
        if self._graphs is not None:
            return self._graphs(x_BFCHW, level.t_11, cache, start, context)
        return self.net.forward_cached(x_BFCHW, level.t_11, cache, start, context_only=context)
