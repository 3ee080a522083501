"""KV cache of a stream: a preallocated ring with a fixed sink, never rolled or cloned.

Shape letters: B batch, S token slots, L tokens, T tokens per frame, h heads, d head channels.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from afd.models.wan.rope import rope_table
from afd.models.wan.types import LayerKV, TimeTable
from afd.ops import Intervals, intervals
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
    the sink, slots are counted from its first frame, `base`. A fork continues the streams of
    another cache: the frames held there are its first slots, which it reads and does not hold.

    Attributes:
        self_kv: per layer keys and values, each [B, S, h, d]; of a fork, the slots behind those it
            shares.
        cross_kv: per layer keys and values of the prompt, each [B, text_len, h, d]; of a fork,
            those of the streams that it continues, until its prompt changes.
        tokens_per_frame: T.
        frames: capacity in frames, those that a fork shares included.
        shared_frames: the first slots, in frames, that a fork reads from the cache it came from.
        copies: continuations of each stream of that cache.
        memory: a number that changes when keys and values move to other memory.
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
        heads: int | None = None,
    ) -> None:
        """An empty cache in the dtype and on the device of the text keys.

        Args:
            cross_kv: the prompt's keys and values (`CausalWan.text_kv`); kept, not copied, and
                overwritten when the prompt changes.
            frames: frames of the stream. With a window, the stream may be longer; None: unlimited.
            rows: rows of a frame's tokens.
            cols: columns of a frame's tokens.
            window: frames kept, including sink and current chunk; None keeps all of `frames`.
            sink: initial frames that always stay in the window.
            heads: heads of self-attention that it holds, of a sequence group those of this process;
                None: as many as the prompt's.

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
        self._window, self._sink = window, sink
        self._plan(frames)
        self.rows, self.cols = rows, cols
        self.tokens_per_frame = rows * cols
        self.cross_kv = cross_kv
        self._heads = cross_kv[0][0].shape[2] if heads is None else heads
        self.shared_kv: list[LayerKV] = []
        self.shared_frames, self.copies, self.memory = 0, 1, 0
        self._text_is_shared = False
        self._allocate(len(cross_kv[0][0]))
        self.start = self.end = self.base = 0

    def _plan(self, frames: int | None) -> None:
        """Set capacity, limit and sink for streams of `frames` frames."""
        window = self._window
        # A window that the stream does not fill keeps everything, as without a window.
        keeps_all = window is None or (frames is not None and frames <= window)
        kept = frames if keeps_all else window
        assert kept is not None
        self.frames, self.limit = kept, kept if keeps_all else None
        self.sink = 0 if keeps_all else self._sink

    def _allocate(self, batch: int) -> None:
        """Make the slots that are not shared, and everything that belongs to a position."""
        like = self.cross_kv[0][0]
        slots = (self.frames - self.shared_frames) * self.tokens_per_frame
        shape = (batch, slots, self._heads, like.shape[3])
        self.self_kv: list[LayerKV] = [
            (like.new_zeros(shape), like.new_zeros(shape)) for _ in self.cross_kv
        ]
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)
        self._ropes: dict[int, Tensor] = {}
        self._roped: tuple[int, int, int] | None = None
        # Where the chunks of a block-causal pass end, in its frames.
        self._ends: tuple[int, ...] = ()
        self._times: dict[int, tuple[Tensor, int, TimeTable]] = {}
        self._forks: list[weakref.ref[KVCache]] = []

    # --- forks ---

    def fork(self, copies: int = 1, frames: int | None = None) -> KVCache:
        """A cache in which each stream has `copies` continuations, as many rows one after another.

        The frames held, and the prompt, are read in place by all of them; only later frames take
        memory. Before either cache overwrites a shared slot (its ring turns, a recache, a new
        video), the fork copies what it shares.

        Args:
            copies: continuations of each stream.
            frames: frames of the continued streams, the past included; None: unlimited, for a
                window.

        Raises:
            ValueError: if the cache is empty, or the frames do not fit.
        """
        require(copies >= 1, "copies", copies, "at least one continuation")
        require(self.end > 0, "fork", "an empty cache", "at least one finished chunk")
        fits = self._window is not None if frames is None else frames >= self.end
        require(fits, "frames", frames, f"at least {self.end}, those of the past")
        self._unshare()
        fork = copy.copy(self)
        fork._plan(frames)
        fork.shared_frames, fork.copies = self.valid_frames, copies
        fork.shared_kv = [(k[:, : self.valid], v[:, : self.valid]) for k, v in self.self_kv]
        fork._text_is_shared = True
        fork._allocate(len(self.self_kv[0][0]) * copies)
        self._forks = [weakref.ref(cache) for cache in (*self._live_forks(), fork)]
        return fork

    def _unshare(self) -> None:
        """Copy the shared past into the cache's own memory."""
        if not self.shared_frames:
            return
        for layer, (past, own) in enumerate(zip(self.shared_kv, self.self_kv, strict=True)):
            self.self_kv[layer] = (
                torch.cat([past[0].repeat_interleave(self.copies, 0), own[0]], 1),
                torch.cat([past[1].repeat_interleave(self.copies, 0), own[1]], 1),
            )
        self._unshare_text()
        self.shared_kv, self.shared_frames, self.copies = [], 0, 1
        self._roped = None
        self.memory += 1

    def _unshare_text(self) -> None:
        if self._text_is_shared:
            self.cross_kv = [
                (k.repeat_interleave(self.copies, 0), v.repeat_interleave(self.copies, 0))
                for k, v in self.cross_kv
            ]
            self._text_is_shared = False
            self.memory += 1

    def _before_writing(self, frames: range) -> None:
        """Let forks, and the cache if it is one, copy shared slots that these frames overwrite."""
        forks = self._live_forks()
        if self.shared_frames or forks:
            lowest = min(map(self.slot, frames))
            for cache in (self, *forks):
                if lowest < cache.shared_frames:
                    cache._unshare()

    def _live_forks(self) -> list[KVCache]:
        return [fork for ref in self._forks if (fork := ref()) is not None]

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
        """Bytes of all keys and values that it holds; `cache_bytes` predicts it."""
        text = [] if self._text_is_shared else self.cross_kv
        tensors = [x for kv in (*self.self_kv, *text) for x in kv]
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

    def recache(self, *, new_sink: bool = False, chunks: Sequence[int] = ()) -> range:
        """Begin the pass that encodes cached frames again after a switch; returns those frames.

        The pass takes their clean latents, at their absolute positions, and overwrites their slots.
        While the stream fits the window these are all frames. Later they are the frames behind the
        sink, which is kept and attended to; with `new_sink` they are the newest `frames` frames, of
        which the first `sink` ones become the sink.

        Args:
            new_sink: replace the sink as well.
            chunks: frames of the newest chunks, oldest first: each attends to itself, to earlier
                ones and to the kept sink. Empty: every frame attends to all.

        Raises:
            ValueError: if the cache is empty, or `chunks` have fewer frames than the pass.
        """
        end = self.end
        require(end > 0, "recache", "an empty cache", "at least one finished chunk")
        whole = new_sink or end <= self.frames
        first = max(0, end - self.frames) if whole else end - self.ring
        extra = sum(chunks) - (end - first)
        needed = f"chunks of the newest {end - first} frames"
        require(not chunks or extra >= 0, "chunks", list(chunks), needed)
        self._move(first, end, first if whole else self.base)
        self._ends = tuple(e - extra for e in itertools.accumulate(chunks) if e > extra)
        return range(first, end)

    @property
    def append_sink(self) -> int:
        """The sink that the current pass writes with.

        A pass longer than the ring begins at slot 0 and fits the window: frame i goes to slot i,
        as without a sink. So does a fork's, until its ring turns.
        """
        whole = self.end - self.start > self.ring or self.shared_frames > 0
        return 0 if whole else self.sink

    def append(self, layer: int, k_BLhd: Tensor, v_BLhd: Tensor) -> None:
        """Write a layer's keys, normed and rotated, and values to the slots of the current pass."""
        T, sink = self.tokens_per_frame, self.append_sink
        first = self.start - self.base - self.shared_frames
        for kept, new in zip(self.self_kv[layer], (k_BLhd, v_BLhd), strict=True):
            ring = kept.shape[1] // T - sink
            for frame, written in enumerate(new.split(T, 1), first):
                slot = frame if frame < sink else sink + (frame - sink) % ring
                kept[:, slot * T : (slot + 1) * T] = written

    def _move(self, start: int, end: int, base: int) -> None:
        self.start, self.end, self.base, self._ends = start, end, base, ()
        frames = end - start
        self._before_writing(range(start, end))
        if end - base > self.frames:
            # The ring has turned, perhaps behind a longer sink than what is shared.
            self._unshare()
        if self._roped != (start, frames, base):
            # Of its own slots, which a pass writes to.
            self.position.fill_(start - base - self.shared_frames)
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
        first = self.base + self.shared_frames
        frame_F = self.position + torch.arange(first, first + frames, device=self.position.device)
        return rope_table(self.self_kv[0][0].shape[-1], frame_F, self.rows, self.cols)

    def view(self, layer: int) -> LayerKV:
        """Views of the keys and values of all slots in use, each [B, valid, h, d].

        Of a fork, the slots of its own: all continuations of a stream in one row after another.
        """
        k_BShd, v_BShd = self.self_kv[layer]
        if not self.shared_frames:
            return k_BShd[:, : self.valid], v_BShd[:, : self.valid]
        streams = len(k_BShd) // self.copies
        shape = (streams, self.copies * k_BShd.shape[1], *k_BShd.shape[2:])
        return k_BShd.view(shape), v_BShd.view(shape)

    def past(self, layer: int) -> LayerKV | tuple[None, None]:
        """Keys and values that a fork shares, which precede those of `view`; else None."""
        return self.shared_kv[layer] if self.shared_frames else (None, None)

    def intervals(self, queries: int) -> Intervals:
        """The keys of [past | view] that the current pass of `queries` tokens attends to.

        The queries of a fork are those of all continuations of a stream, one after another.
        """
        if self._ends:
            return self._block_causal()
        if not self.shared_frames:
            return intervals.cache(self.valid, queries)
        past = self.shared_frames * self.tokens_per_frame
        slots = self.self_kv[0][0].shape[1]
        return intervals.forked(past, self.valid - past, slots, queries, self.copies)

    def _block_causal(self) -> Intervals:
        """The keys of a block-causal recache: the kept sink and the pass up to a chunk's end."""
        first, kept = self.slot(self.start), self.sink if self.start > self.base else 0
        rows, begin = [], 0
        for end in self._ends:
            last = self.slot(self.start + end - 1) + 1
            # Where the ring turns, the slots after the turn follow those of the sink.
            low, high = (0, kept), (first, last)
            if last <= first:
                low, high = (0, last), (first, self.frames)
            elif not kept:
                low, high = high, low
            q0, q1, a0, a1, b0, b1 = (self.tokens_per_frame * x for x in (begin, end, *low, *high))
            rows.append((q0, q1, a0, a1, b0, b1))
            begin = end
        return Intervals((tuple(rows),))

    def snapshot(self) -> list[LayerKV]:
        """Copies of the keys and values of the frames held, in the order of `held`, for a clip that
        begins at `end` (`CausalWan.clean_context`)."""
        self._unshare()
        slots = torch.tensor([self.slot(frame) for frame in self.held()])
        token_S = slots[:, None] * self.tokens_per_frame + torch.arange(self.tokens_per_frame)
        token_S = token_S.flatten().to(self.position.device)
        return [(k.index_select(1, token_S), v.index_select(1, token_S)) for k, v in self.self_kv]

    def parts(self, row: int) -> list[list[LayerKV]]:
        """Keys and values of one stream, views [1, tokens, h, d] per layer: all slots in order, in
        as many parts as it has memory for them."""
        own = [(k[row : row + 1], v[row : row + 1]) for k, v in self.self_kv]
        of = row // self.copies
        past = [(k[of : of + 1], v[of : of + 1]) for k, v in self.shared_kv]
        return [past, own] if past else [own]

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
        self._unshare()
        slots = start * self.tokens_per_frame
        # .data has a separate version counter; a view would share the cache's.
        return [(k.data[:, :slots], v.data[:, :slots]) for k, v in self.self_kv]

    def reset(self, cross_kv: list[LayerKV] | None = None) -> None:
        """Start new videos in the same memory, with new prompts if given (same shapes).

        Also drops cached values that depend on the weights: call it when they have changed.
        """
        self._before_writing(range(self.base, self.base + 1))
        self.start = self.end = self.base = 0
        self._roped = None
        self._times.clear()
        if cross_kv is not None:
            self.switch_text(cross_kv)

    def switch_text(self, cross_kv: list[LayerKV]) -> None:
        """Overwrite the prompt's keys and values with another's (same shapes).

        In place, so that a captured graph reads them.
        """
        for cache in (self, *self._live_forks()):
            cache._unshare_text()
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
