"""Types of the causal Wan network: its configuration and the data passed between its layers.

Shape letters: B batch, F frames, D model width, h heads, d head channels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from afd.ops import Clip, Intervals, intervals

# Keys (normed, rotated) and values of one layer, each [B, tokens, h, d].
LayerKV = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class WanConfig:
    """Sizes of the network and its attention window; defaults: Wan2.1-T2V-1.3B, 3-frame chunks.

    Attributes:
        chunk: frames denoised together.
        window: most frames a query attends to, including its own chunk and the sink; None: all.
        sink: initial frames that always stay in the window. The released training mask has none;
            with a sink, training attends to the same frames as streaming.
        independent_first_frame: the first chunk is one frame.
    """

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
    window: int | None = None
    sink: int = 0
    independent_first_frame: bool = False

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of one frame."""
        rows, cols = height // self.patch[0], width // self.patch[1]
        if (rows * self.patch[0], cols * self.patch[1]) != (height, width) or not rows * cols:
            raise ValueError(f"x: a frame of {height}x{width} does not divide into {self.patch}")
        return rows, cols

    def sight(self, frames: int, tokens: int) -> Intervals:
        """Attention intervals of each chunk in one pass over all frames."""
        first = self.independent_first_frame
        if self.window is None or not self.sink:
            return intervals.causal(
                frames, self.chunk, tokens, independent_first_frame=first, window=self.window
            )
        return intervals.windowed(
            frames,
            self.chunk,
            tokens,
            window=self.window,
            sink=self.sink,
            independent_first_frame=first,
        )

    def clip(self, frames: int, start: int = 0) -> Clip:
        """`frames` frames of a stream from `start` on, as one training pass sees them."""
        return Clip(frames, self.chunk, start, self.window, self.sink if self.window else 0)


# Shift, scale, gate of attention, then of the feed-forward, each [B, F, D].
Modulation = tuple[Tensor, ...]


@dataclass(frozen=True)
class TimeTable:
    """Modulation of every layer for one set of times.

    Attributes:
        embed_BFD: time embedding, which modulates the head; B and F may be 1.
        mods: per layer [B, F, 6, D]; `layers` are its slices. Empty if the blocks make their own of
        time_BF6D: the projected embedding, [B, F, 6, D].
    """

    embed_BFD: Tensor
    mods: list[Tensor]
    time_BF6D: Tensor | None = None
    layers: list[Modulation] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", [mods.unbind(2) for mods in self.mods])


class AdapterSet(Protocol):
    """Low-rank adapters on a network's weights, those of one version active at a time."""

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active adapters; empty if all are disabled."""
        ...

    def recompute(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for a checkpointed block's forward and its recomputation."""
        ...
