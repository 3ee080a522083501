"""The context of a stream: what its next chunk attends to, and how it follows prompt switches.

Shape letters: B videos, F frames, C channels, H x W latent size, L text tokens, E text channels.
Latents are [B, F, C, H, W].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from afd.models.student import Level, Student
from afd.models.wan.kv_cache import KVCache
from afd_kernels.contracts import require

# How the context follows a switch of the prompt.
SwitchMode = Literal["plain", "recache", "recache_causal", "new_sink"]
# When keys and values of past frames are computed again: at switches, or before every chunk.
Recache = Literal["switch", "chunk"]


@dataclass(frozen=True)
class Switch:
    """A change of prompt at the start of a chunk.

    Attributes:
        text_BLE: embeddings of the new prompts.
        mode: "plain": cached frames keep the keys and values of the old prompts. "recache": the
            frames in the window are encoded again under the new prompts; once the stream is longer
            than the window, the sink keeps its own (LongLive's released setting).
            "recache_causal": the same, but each chunk attends only to itself and earlier frames, as
            when it was generated. "new_sink": as "recache", but so is the sink, which then holds
            the oldest frames of the window.
    """

    text_BLE: Tensor
    mode: SwitchMode = "plain"

    @property
    def recaches(self) -> bool:
        """Whether cached frames are encoded again."""
        return self.mode != "plain"


class Context(ABC):
    """The finished frames of a stream, as keys and values in a cache.

    Args:
        student: encodes them.
        cache: holds them.
        level: of the passes that encode them.
    """

    def __init__(self, student: Student, cache: KVCache, level: Level) -> None:
        self.student, self.cache, self.level = student, cache, level

    def prepare(self, start: int, count: int, switch: Switch | None, *, given: bool) -> int:
        """Make the cache ready for the `count` frames of the stream from `start` on, after `switch`
        if there is one; returns their place in the cache.

        `given`: they are part of the prefix, and nothing is denoised."""
        if switch is not None:
            self.follow(switch)
        return start

    def follow(self, switch: Switch) -> None:
        """Switch the prompt."""
        self.student.switch_text(self.cache, switch.text_BLE)

    @abstractmethod
    def append(self, x0_BFCHW: Tensor, level: Level, start: int, last: bool) -> None:
        """Take a finished chunk that starts at frame `start` of the stream. `last`: nothing attends
        to it."""


class KeptContext(Context):
    """Keys and values are computed once, by a pass over each finished chunk, and again at switches
    only.

    Args:
        recaches: whether a switch may recache, so that latents are kept, too.
    """

    def __init__(self, student: Student, cache: KVCache, level: Level, *, recaches: bool) -> None:
        super().__init__(student, cache, level)
        self._recaches = recaches
        # The chunks of the cache's newest frames, and their frames.
        self._newest: deque[Tensor] = deque()
        self._frames = 0

    def follow(self, switch: Switch) -> None:
        """Switch the prompt, and encode the cached frames under it if the switch recaches."""
        super().follow(switch)
        if switch.recaches and self._newest:
            causal = switch.mode == "recache_causal"
            self.student.recache(
                torch.cat(list(self._newest), 1),
                self.level,
                self.cache,
                new_sink=switch.mode == "new_sink",
                chunks=[x0.shape[1] for x0 in self._newest] if causal else (),
            )

    def append(self, x0_BFCHW: Tensor, level: Level, start: int, last: bool) -> None:
        if not last:
            self.student.remember(x0_BFCHW, level, self.cache, start)
        if self._recaches:
            self._newest.append(x0_BFCHW)
            self._frames += x0_BFCHW.shape[1]
            while self._frames - self._newest[0].shape[1] >= self.cache.frames:
                self._frames -= self._newest.popleft().shape[1]


class RecomputedContext(Context):
    """Keys and values are computed anew before every chunk, from clean latents: the KV cache
    recomputation of Krea Realtime (krea-ai/realtime-video).

    The sink and the newest frames that the window has room for are encoded as the beginning of a
    video: block-causally in chunks, from position 0 on; the chunk follows at the next position.

    Args:
        first: frames of a stream's first chunk.
        reencode: see `afd.rollout.stream`.
    """

    def __init__(
        self,
        student: Student,
        cache: KVCache,
        level: Level,
        *,
        first: int,
        reencode: Callable[[int], Tensor] | None = None,
    ) -> None:
        super().__init__(student, cache, level)
        self._first, self._reencode = first, reencode
        self._sink: list[Tensor] = []
        self._newest: deque[Tensor] = deque(maxlen=cache.frames)

    def prepare(self, start: int, count: int, switch: Switch | None, *, given: bool) -> int:
        # A plain switch leaves the context to the old prompts, for this chunk.
        before = switch is None or not switch.recaches
        place = self._encode(start, count) if before and not given else start
        super().prepare(start, count, switch, given=given)
        return place if before or given else self._encode(start, count)

    def append(self, x0_BFCHW: Tensor, level: Level, start: int, last: bool) -> None:
        frames = x0_BFCHW.split(1, 1)
        self._sink += frames[: self.cache.sink - len(self._sink)]
        self._newest += frames

    def _encode(self, start: int, count: int) -> int:
        """Build the cache for a chunk; returns the number of frames that it then holds."""
        frames_B1CHW = self._held(start, self.cache.frames - count)
        place, size = 0, self._first
        while place < len(frames_B1CHW):
            chunk_BFCHW = torch.cat(frames_B1CHW[place : place + size], 1)
            self.student.remember(chunk_BFCHW, self.level, self.cache, place)
            place, size = place + chunk_BFCHW.shape[1], self.student.chunk
        return place

    def _held(self, start: int, room: int) -> list[Tensor]:
        """The frames of the context of a chunk at `start`, in order, at most `room`."""
        newest = list(self._newest)
        if start <= room:
            return newest
        held = self._sink + newest[len(newest) - (room - len(self._sink)) :]
        if held and not self._sink and self._reencode is not None:
            given, like = self._reencode(start - room), held[0]
            require(given.shape == like.shape, "reencode", given, f"{list(like.shape)}")
            held[0] = given.to(like)
        return held
