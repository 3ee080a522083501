"""KV cache of a stream: a preallocated ring with a fixed sink, never rolled or cloned.

Shape letters: B batch, S token slots, L tokens, T tokens per frame, h heads, d head channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afd.models.wan.rope import rope_table
from afd.models.wan.types import LayerKV, TimeTable
from afd_kernels.contracts import require

# Number of step values with cached modulation; released lists have four, the context pass one.
TIMES_KEPT = 16


def cache_bytes(
    layers: int, batch: int, slots: int, text_len: int, channels: int, dtype: torch.dtype
) -> int:
    """Size in bytes of a stream's cache: keys and values of `slots` tokens and the prompt.

    `slots` counts tokens (frames kept times tokens per frame), `channels` those of all heads.
    """
    return 2 * layers * batch * (slots + text_len) * channels * dtype.itemsize


class KVCache:
    """Self-attention keys and values of a stream and cross-attention ones of the prompt, per layer.

    A frame f below `sink` stays in slot f; all later frames share the ring behind it. Keys are
    already rotated to their absolute position and softmax ignores order, so nothing is ever moved.
    A chunk's denoising steps and its context pass write the same slots; later chunks attend to the
    last write. Slots are host integers and the position is also a device tensor: a stream never
    synchronises, and a captured graph replays at any position. When a switch of the prompt replaces
    the sink, slots are counted from its first frame, `base`.

    Attributes:
        self_kv: per layer keys and values, each [B, S, h, d].
        cross_kv: per layer keys and values of the prompt, each [B, text_len, h, d].
        tokens_per_frame: T.
        frames: S / T, capacity in frames.
        limit: most frames the stream may have; None if the ring overwrites old frames and the
            stream may continue.
        sink: initial frames that are always kept.
        base: absolute frame held by slot 0: 0 until `recache` replaces the sink.
        position: int64 [1] on the device, the frame after `base` at which the current pass starts.
        start, end: the current pass's frames [start, end) as host integers, absolute.
    """

    def __init__(
        self,
        cross_kv: list[LayerKV],
        frames: int | None,
        rows: int,
        cols: int,
        *,
        window: int | None = None,
        sink: int = 0,
    ) -> None:
        """An empty cache in the dtype and on the device of the text keys.

        Args:
            cross_kv: the prompt's keys and values (`CausalWan.text_kv`); kept, not copied, and
                overwritten when the prompt changes.
            frames: frames of the stream. With a window, the stream may be longer; None: unlimited.
            rows, cols: tokens of a frame.
            window: frames kept, including sink and current chunk; None keeps all of `frames`.
            sink: initial frames that always stay in the window.

        Raises:
            ValueError: naming the argument, the value given and what is needed.
        """
        require(bool(cross_kv), "cross_kv", cross_kv, "keys and values of at least one layer")
        if window is None:
            require(frames is not None, "frames", frames, "a number, as there is no window")
            require(sink == 0, "sink", sink, "0 where there is no window")
        else:
            require(0 <= sink < window, "sink", sink, f"0 <= sink < window, {window}")
        require(frames is None or frames >= 1, "frames", frames, "at least one frame")
        like = cross_kv[0][0]
        batch, _, heads, head_dim = like.shape
        # A window that the stream does not fill keeps everything, as without a window.
        keeps_all = window is None or (frames is not None and frames <= window)
        kept = frames if keeps_all else window
        assert kept is not None
        self.frames, self.limit = kept, kept if keeps_all else None
        self.sink = 0 if keeps_all else sink
        self.rows, self.cols = rows, cols
        self.tokens_per_frame = rows * cols
        shape = (batch, kept * rows * cols, heads, head_dim)
        self.self_kv: list[LayerKV] = [
            (like.new_zeros(shape), like.new_zeros(shape)) for _ in cross_kv
        ]
        self.cross_kv = cross_kv
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.start = self.end = self.base = 0
        self._ropes: dict[int, Tensor] = {}
        self._roped: tuple[int, int, int] | None = None
        self._times: dict[int, tuple[Tensor, int, TimeTable]] = {}

    # --- slots ---

    @property
    def ring(self) -> int:
        """Capacity in frames of the ring behind the sink."""
        return self.frames - self.sink

    @property
    def valid_frames(self) -> int:
        """Frames held, including the current chunk; they fill the slots from 0."""
        return min(self.end - self.base, self.frames)

    @property
    def valid(self) -> int:
        """Token slots in use."""
        return self.valid_frames * self.tokens_per_frame

    def slot(self, frame: int) -> int:
        """Frame slot of an absolute frame index."""
        after = frame - self.base
        return after if after < self.sink else self.sink + (after - self.sink) % self.ring

    def held(self) -> list[int]:
        """Absolute indices of the frames held, ascending: the sink and the most recent ones."""
        sunk = list(range(self.base, min(self.base + self.sink, self.end)))
        return sunk + list(range(max(self.base + len(sunk), self.end - self.ring), self.end))

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values; `cache_bytes` predicts it."""
        tensors = [x for kv in (*self.self_kv, *self.cross_kv) for x in kv]
        return sum(x.numel() * x.element_size() for x in tensors)

    # --- streaming ---

    def seek(self, start: int, frames: int) -> None:
        """Make [start, start + frames) the current chunk.

        Repeating the current chunk keeps everything, the next chunk continues the stream, and 0
        begins a new video. Until the ring wraps around, the stream may resume from earlier frames;
        later ones are then discarded.

        Raises:
            ValueError: if the frames do not fit, leave a gap, or have been overwritten.
        """
        end = start + frames
        require(frames >= 1, "frames", frames, "at least one frame")
        require(
            0 <= start <= self.end, "start_frame", start, f"0 to {self.end}, the next frame at most"
        )
        require(
            self.limit is None or end <= self.limit,
            "start_frame",
            f"frames {start} to {end}",
            f"frames that fit a cache of {self.limit}",
        )
        require(
            frames <= self.ring,
            "frames",
            frames,
            f"at most {self.ring}, the frames behind the sink: a chunk attends to all of itself",
        )
        require(
            start == 0 or end >= self.end or self.end <= self.frames,
            "start_frame",
            start,
            f"the current chunk or the next one: the ring of {self.ring} frames has turned",
        )
        self._move(start, end, 0 if start == 0 else self.base)

    def recache(self, *, new_sink: bool = False) -> range:
        """Begin the pass that encodes cached frames again after a switch; returns those frames.

        The pass takes their clean latents, at their absolute positions, and overwrites their slots.
        While the stream fits the window these are all frames. Later they are the frames behind the
        sink, which is kept and attended to; with `new_sink` they are the newest `frames` frames, of
        which the first `sink` ones become the sink.

        Raises:
            ValueError: if the cache is empty.
        """
        end = self.end
        require(end > 0, "recache", "an empty cache", "at least one finished chunk")
        whole = new_sink or end <= self.frames
        first = max(0, end - self.frames) if whole else end - self.ring
        self._move(first, end, first if whole else self.base)
        return range(first, end)

    @property
    def append_sink(self) -> int:
        """The sink that the current pass writes with.

        A pass longer than the ring begins at slot 0 and fits the window: frame i goes to slot i,
        as without a sink.
        """
        return self.sink if self.end - self.start <= self.ring else 0

    def _move(self, start: int, end: int, base: int) -> None:
        self.start, self.end, self.base = start, end, base
        frames = end - start
        if self._roped != (start, frames, base):
            self.position.fill_(start - base)
            table = self._rope_table(frames)
            kept = self._ropes.setdefault(frames, table)
            if kept is not table:
                kept.copy_(table)
            self._roped = (start, frames, base)

    def rope(self, frames: int) -> Tensor:
        """Rotary table of the current chunk, fp32 [1, frames·T, d/2, 2], at a fixed address.

        It is computed when the position changes, for all layers and steps of a chunk.
        """
        return self._ropes[frames]

    def _rope_table(self, frames: int) -> Tensor:
        frame_F = self.position + torch.arange(
            self.base, self.base + frames, device=self.position.device
        )
        return rope_table(self.self_kv[0][0].shape[-1], frame_F, self.rows, self.cols)

    def view(self, layer: int) -> LayerKV:
        """Views of the keys and values of all slots in use, each [B, valid, h, d]."""
        k_BShd, v_BShd = self.self_kv[layer]
        return k_BShd[:, : self.valid], v_BShd[:, : self.valid]

    def before(self, start: int) -> list[LayerKV]:
        """Per layer keys and values of frames [0, start), for a pass with gradients.

        They are not copied, and autograd does not treat later writes as modifications: until the
        ring wraps around, those go to other slots.

        Raises:
            ValueError: if the ring has wrapped around.
        """
        require(
            self.end <= self.frames,
            "start",
            start,
            f"a stream of at most {self.frames} frames: the ring has turned, the context is "
            f"overwritten before its gradient is taken",
        )
        slots = start * self.tokens_per_frame
        # .data has a separate version counter; a view would share the cache's.
        return [(k.data[:, :slots], v.data[:, :slots]) for k, v in self.self_kv]

    def reset(self, cross_kv: list[LayerKV] | None = None) -> None:
        """Start new videos in the same memory, with new prompts if given (same shapes).

        Also drops cached values that depend on the weights: call it when they have changed.
        """
        self.start = self.end = self.base = 0
        self._roped = None
        self._times.clear()
        if cross_kv is not None:
            self.switch_text(cross_kv)

    def switch_text(self, cross_kv: list[LayerKV]) -> None:
        """Overwrite the prompt's keys and values with another's (same shapes).

        In place, so that a captured graph reads them.
        """
        for old, new in zip(self.cross_kv, cross_kv, strict=True):
            for kept, value in zip(old, new, strict=True):
                if kept is not value:
                    require(kept.shape == value.shape, "cross_kv", value, f"{list(kept.shape)}")
                    kept.copy_(value)

    # --- step values ---

    def known_time(self, t_BF: Tensor) -> TimeTable | None:
        """Cached modulation of this tensor object, if it has not been modified since."""
        entry = self._times.get(id(t_BF))
        return entry[2] if entry is not None and entry[1] == _version(t_BF) else None

    def keep_time(self, t_BF: Tensor, table: TimeTable) -> None:
        """Cache the modulation of a step value, evicting the oldest."""
        while len(self._times) >= TIMES_KEPT:
            self._times.pop(next(iter(self._times)))
        # The tensor is kept too, so that its id cannot be reused.
        self._times[id(t_BF)] = (t_BF, _version(t_BF), table)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
