"""The causal Wan2.1 network: block-causal, teacher-forced and streaming forwards.

Parameter names are those of the released checkpoints. Shape letters: B batch, F frames, C latent
channels, H x W latent size, T tokens per frame, L tokens, D model width, h heads, d head channels.
Source: Wan2.1 as used by Self-Forcing and Causal-Forcing (arXiv 2506.08009).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from afd.models.network import CausalNetwork
from afd.models.wan.block import Block, Head
from afd.models.wan.kv_cache import KVCache
from afd.models.wan.passes import ClipKeys, Pass
from afd.models.wan.patches import from_patches, to_patches
from afd.models.wan.rope import rope_table, sinusoid
from afd.models.wan.types import LayerKV, Modulation, TimeTable, WanConfig
from afd.ops import Clip, intervals
from afd_kernels.contracts import require


class CausalWan(CausalNetwork):
    """Causal Wan2.1. Videos are [B, F, C, H, W]; times are [B, F] or [B, 1] on the 0-1000 scale."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        if config.dim % config.num_heads or config.head_dim % 2:
            raise ValueError(
                f"config: dim {config.dim} needs num_heads ({config.num_heads}) heads of even width"
            )
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(
            config.in_dim, dim, kernel_size=(1, *config.patch), stride=(1, *config.patch)
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.compile_blocks(False)

    # --- switches ---

    def compile_blocks(self, enabled: bool = True, **options: Any) -> None:
        """Compile the parts around self-attention, once for all layers (regional compilation).

        Attention and the cache are left out: they are custom ops already, and their lengths change
        from chunk to chunk while these shapes do not. `options` go to torch.compile.
        """
        self._before: Callable[..., Any] = Block.before
        self._after: Callable[..., Any] = Block.after
        if enabled:
            self._before = torch.compile(Block.before, **options)
            self._after = torch.compile(Block.after, **options)

    def fuse_projections(self) -> None:
        """Compute q, k and v of self-attention in one matmul when no gradient is needed.

        Their parameters become slices of one buffer, in place; names are unchanged. Moving, casting
        or copying the network separates them again.
        """
        for block in self._layers():
            block.self_attn.fuse()

    @property
    def fused(self) -> bool:
        """Whether `fuse_projections` has been called since the network was last copied or moved."""
        return all(block.self_attn.fused for block in self._layers())

    @property
    def groups(self) -> list[nn.Module]:
        return list(self.blocks)

    @property
    def shares_sequences(self) -> bool:
        return True

    @property
    def first_weight(self) -> Tensor:
        return self.patch_embedding.weight

    # --- pieces ---

    @property
    def sharded(self) -> bool:
        """Whether a block's weights are whole only while its forward runs (`models.sharding`)."""
        return self.compute_dtype is not None

    def _layers(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _patchify(self, x_BFCHW: Tensor) -> tuple[Tensor, int, int]:
        """Embed patches as tokens [B, L, D] in (frame, row, column) order; also rows, columns.

        Of a sequence group, this process's tokens of every frame.
        """
        C, H, W = x_BFCHW.shape[2:]
        if self.config.in_dim != C:
            raise ValueError(f"x: got {C} channels; needed: {self.config.in_dim}")
        rows, cols = self.config.grid(H, W)
        patches_BLP = self._split(to_patches(x_BFCHW, self.config.patch), rows * cols)
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(patches_BLP, weight, self.patch_embedding.bias), rows, cols

    def _unpatchify(self, y_BLP: Tensor, rows: int, cols: int) -> Tensor:
        if self.sequence is not None:
            y_BLP = self.sequence.join(y_BLP, rows * cols)
        return from_patches(y_BLP, rows, cols, self.config.patch)

    def _split(self, x_BL: Tensor, tokens: int) -> Tensor:
        """This process's part of the `tokens` tokens of every frame."""
        return x_BL if self.sequence is None else self.sequence.split(x_BL, tokens)

    def time_table(self, t_BF: Tensor) -> TimeTable:
        """Time embedding and every block's modulation at times [B, F]; both sizes may be 1.

        Blocks of a sharded network compute their own modulation from `time_BF6D`.
        """
        require(t_BF.ndim == 2, "t", t_BF, "[B, F] or [B, 1]")
        embed_BFD = self.time_embedding(
            sinusoid(t_BF, self.config.freq_dim).to(self.patch_embedding.weight.dtype)
        )
        time_BF6D = self.time_projection(embed_BFD).unflatten(-1, (6, -1))
        blocks = [] if self.sharded else self._layers()
        return TimeTable(embed_BFD, [block.modulation + time_BF6D for block in blocks], time_BF6D)

    def text_kv(self, text_BLE: Tensor) -> list[LayerKV]:
        """The prompt's keys and values for every layer; padding rows are attended to as well."""
        embedded = self._embedded(text_BLE)
        return [block(block.cross_attn.text_kv, embedded) for block in self._layers()]

    def _embedded(self, text_BLE: Tensor) -> Tensor:
        if text_BLE.shape[1:] != (self.config.text_len, self.config.text_dim):
            raise ValueError(
                f"text: got {list(text_BLE.shape)}; needed: "
                f"[B, {self.config.text_len}, {self.config.text_dim}]"
            )
        embedded: Tensor = self.text_embedding(text_BLE)
        return embedded

    def _rope(self, rows: int, cols: int, frames: range, chunks_BN: Tensor | None = None) -> Tensor:
        """Rotary table of these frames, or of the selected chunks in them, [1 or B, L, d/2, 2]."""
        device = self.patch_embedding.weight.device
        frame_BF = torch.arange(frames.start, frames.stop, device=device)[None]
        if chunks_BN is not None:
            frame_BF = frame_BF.unflatten(1, (-1, self.config.chunk))[0, chunks_BN].flatten(1)
        table = rope_table(self.config.head_dim, frame_BF.flatten(), rows, cols)
        return self._split(table.view(len(frame_BF), -1, *table.shape[2:]), rows * cols)

    # --- one pass through the layers ---

    def _layer(
        self,
        i: int,
        how: Pass,
        x_BLD: Tensor,
        branch_BLD: Tensor | None,
        gate_BFD: Tensor | None,
        mods: Modulation | Tensor,
        text_kv: LayerKV | Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor, LayerKV]:
        """Run block i; returns the deferred residual (x, branch, gate), and its keys and values.

        `mods`, `text_kv`: of this block, or what a sharded one makes them of.
        """
        block, last = self._layers()[i], i + 1 == len(self.blocks)
        if isinstance(mods, Tensor):
            mods = (block.modulation + mods).unbind(2)
        if isinstance(text_kv, Tensor):
            text_kv = block.cross_attn.text_kv(text_kv)
        x_BLD, q, k, v = self._before(block, x_BLD, branch_BLD, gate_BFD, mods)
        q, own, context = how.placed(i, block.self_attn, q, k, v)
        if last and how.keys_only:
            return x_BLD, None, mods[5], own
        seen = how.intervals
        if last and how.last is not None:
            frames, seen = how.last
            x_BLD, q = x_BLD[:, frames * how.own_tokens :], q[:, frames * how.tokens :]
            mods = tuple(part[:, frames:] for part in mods)
        attended = how.attended(q, own, context, seen)
        x_BLD, branch_BLD = self._after(block, x_BLD, attended, mods, text_kv)
        return x_BLD, branch_BLD, mods[5], own

    def _run(
        self, x_BLD: Tensor, times: TimeTable, text_kv: list[LayerKV] | Tensor, how: Pass
    ) -> tuple[Tensor | None, list[LayerKV]]:
        """Run all layers and the head; returns patches [B, L, P] (None if keys_only), kept k, v."""
        branch_BLD: Tensor | None = None
        gate_BFD: Tensor | None = None
        own: list[LayerKV] = []
        again = noop_context_fn if self.adapters is None else self.adapters.recompute
        run: Callable[..., Any] = self._layer
        if self.checkpoint_blocks and torch.is_grad_enabled() and how.cache is None:
            run = partial(checkpoint, self._layer, use_reentrant=False, context_fn=again)
        for i, block in enumerate(self.blocks):
            mods = times.layers[i] if times.layers else times.time_BF6D
            text = text_kv if isinstance(text_kv, Tensor) else text_kv[i]
            x_BLD, branch_BLD, gate_BFD, kv = block(
                run, i, how, x_BLD, branch_BLD, gate_BFD, mods, text
            )
            if how.keep:
                own.append(kv)
        if how.keys_only:
            return None, own
        embed_BFD = times.embed_BFD
        if how.last is not None and embed_BFD.shape[1] > 1:
            embed_BFD = embed_BFD[:, how.last[0] :]
        return self.head(x_BLD, branch_BLD, gate_BFD, embed_BFD), own

    def _text(self, text: Tensor | list[LayerKV]) -> list[LayerKV] | Tensor:
        """The prompt's keys and values per layer; its embedding, if blocks are to make them."""
        if not isinstance(text, Tensor):
            return text
        return self._embedded(text) if self.sharded else self.text_kv(text)

    # --- training passes ---

    def forward(
        self,
        x_BFCHW: Tensor,
        t_BF: Tensor,
        text: Tensor | list[LayerKV],
        context: list[LayerKV] | None = None,
        *,
        x0_BFCHW: Tensor | None = None,
        clean_t_BF: Tensor | None = None,
        chunks_BN: Tensor | None = None,
        start_frame: int = 0,
    ) -> Tensor:
        """Block-causal prediction for all frames in one pass, [B, F, out, H, W].

        Teacher forcing, where a chunk attends to clean earlier chunks:
        - `x0_BFCHW` (with the noise level `clean_t_BF`, default 0): clean and noisy frames in
          one pass, with gradients through the clean half too (mode `recompute`);
        - `context` from `clean_context`: the noisy half alone. Computed without gradient this is
          mode `own_context`; computed by another network, `shared_context`.

        Args:
            x_BFCHW: noisy frames.
            t_BF: their times, [B, F] or [B, 1].
            text: embeddings [B, text_len, text_dim], or the result of `text_kv`.
            chunks_BN: under teacher forcing, indices of the chunks of each video in `x_BFCHW` and
                `t_BF`, ascending, int64 [B, N] on the CPU; the clean frames are whole videos.
                None: all chunks.
            start_frame: under teacher forcing, the first clean frame, of a clip of a stream. With
                x0_BFCHW, `context` then is what the stream held there (`KVCache.snapshot`).
        """
        x_BLD, rows, cols = self._patchify(x_BFCHW)
        frames, tokens, chunk = x_BFCHW.shape[1], rows * cols, self.config.chunk
        if x0_BFCHW is None and context is None:
            require(chunks_BN is None, "chunks", chunks_BN, "None where nothing clean is given")
            require(start_frame == 0, "start_frame", start_frame, "0 where nothing clean is given")
            rope, sight = self._rope(rows, cols, range(frames)), self.config.sight(frames, tokens)
            how = Pass(rope, sight, tokens, self.sequence)
        else:
            first, drawn = self.config.independent_first_frame, None
            require(not first, "config", self.config, "no independent first frame (context)")
            if x0_BFCHW is not None and start_frame == 0:
                require(context is None, "context", "a list", "None where x0_BFCHW is given")
            if chunks_BN is not None:
                n = chunks_BN.shape[1] * chunk
                require(n == frames, "chunks", chunks_BN, f"[B, N] with {frames} frames in x")
                drawn = chunks_BN.tolist()
                frames = self._clean_frames(x0_BFCHW, context, tokens, start_frame)
            clip = self.config.clip(frames, start_frame)
            self._check_past(context if x0_BFCHW is not None else None, clip, tokens, x0_BFCHW)
            within = {"start": start_frame, "window": clip.window, "sink": clip.sink}
            noisy = intervals.noisy_half(frames, chunk, tokens, drawn, **within)
            frame = range(start_frame, start_frame + frames)
            rope = self._rope(rows, cols, frame, chunks_BN)
            keys = ClipKeys(sink=clip.copied * tokens, chunk=chunk * tokens)
            how = Pass(rope, noisy, tokens, self.sequence, context, keys=keys)
            if x0_BFCHW is not None:
                shape = (len(x_BFCHW), frames, *x_BFCHW.shape[2:])
                alike = x0_BFCHW.shape == shape
                require(alike, "x0_BFCHW", x0_BFCHW, f"the shape of x, {list(shape)}")
                clean_rope = self._rope(rows, cols, frame).expand(len(rope), -1, -1, -1)
                clean = (clip.past + frames) * tokens
                how = Pass(
                    torch.cat([clean_rope, rope], 1),
                    intervals.teacher_forcing(frames, chunk, tokens, drawn, **within),
                    tokens,
                    self.sequence,
                    keys=replace(keys, past=context, clean=clean),
                    last=(frames, noisy),
                )
                x_BLD = torch.cat([self._patchify(x0_BFCHW)[0], x_BLD], 1)
                t_BF = torch.cat([_times(clean_t_BF, x0_BFCHW), _times(t_BF, x_BFCHW)], 1)
        y_BLP, _ = self._run(x_BLD, self.time_table(t_BF), self._text(text), how)
        assert y_BLP is not None
        return self._unpatchify(y_BLP, rows, cols)

    def clean_context(
        self,
        x_BFCHW: Tensor,
        text: Tensor | list[LayerKV],
        t_BF: Tensor | None = None,
        *,
        past: list[LayerKV] | None = None,
        start_frame: int = 0,
    ) -> list[LayerKV]:
        """Keys and values of clean frames, for the teacher-forced forward.

        Clean frames never attend to noisy ones, so this half of teacher forcing can be a separate
        pass; the last layer computes only keys and values. `t_BF`: the context's time, default 0.
        Of a clip of a stream that begins at `start_frame`, `past` is what the stream held there
        (`KVCache.snapshot`); it comes first in the result.
        """
        x_BLD, rows, cols = self._patchify(x_BFCHW)
        frames, tokens = x_BFCHW.shape[1], rows * cols
        sight = self.config.sight(frames, tokens)
        if start_frame:
            clip = self.config.clip(frames, start_frame)
            self._check_past(past, clip, tokens, x_BFCHW)
            sight = intervals.clean_half(clip, tokens)
        how = Pass(
            self._rope(rows, cols, range(start_frame, start_frame + frames)),
            sight,
            tokens,
            self.sequence,
            keep=True,
            keys_only=True,
            keys=ClipKeys(past),
        )
        if t_BF is None:
            t_BF = x_BFCHW.new_zeros(1, 1, dtype=torch.float32)
        return self._run(x_BLD, self.time_table(t_BF), self._text(text), how)[1]

    def _check_past(
        self, past: list[LayerKV] | None, clip: Clip, tokens: int, x_BFCHW: Tensor | None
    ) -> None:
        if x_BFCHW is None:
            return
        held = 0 if past is None else past[0][0].shape[1]
        needed = f"keys of the {clip.past} frames held at frame {clip.start}"
        require(held == clip.past * tokens, "past", past and past[0][0], needed)

    def _clean_frames(
        self, clean: Tensor | None, context: list[LayerKV] | None, tokens: int, start: int
    ) -> int:
        """Number of clean frames given."""
        if clean is not None:
            return clean.shape[1]
        assert context is not None
        return context[0][0].shape[1] // tokens - self.config.clip(self.config.chunk, start).past

    def forward_over(
        self,
        x_BFCHW: Tensor,
        t_BF: Tensor,
        text: Tensor | list[LayerKV],
        context: list[LayerKV] | None,
        start_frame: int,
    ) -> tuple[Tensor, list[LayerKV]]:
        """One chunk with gradients over a given past: the trained step of self-forcing.

        The chunk attends to itself and all of `context` (None: no past). Gradients flow into the
        context if it requires them: detached values stop them, `straight_through` passes them to
        the keys of another pass. Returns the prediction [B, F, out, H, W] and the chunk's own keys
        and values, both differentiable; no cache is written.
        """
        x_BLD, rows, cols = self._patchify(x_BFCHW)
        past = 0 if context is None else context[0][0].shape[1]
        frames, tokens = x_BFCHW.shape[1], rows * cols
        how = Pass(
            self._rope(rows, cols, range(start_frame, start_frame + frames)),
            intervals.after_context(past, frames * tokens),
            tokens,
            self.sequence,
            context if past else None,
            keep=True,
        )
        y_BLP, own = self._run(x_BLD, self.time_table(t_BF), self._text(text), how)
        assert y_BLP is not None
        return self._unpatchify(y_BLP, rows, cols), own

    # --- streaming ---

    @torch.no_grad()
    def new_cache(
        self, text: Tensor | list[LayerKV], frames: int | None, height: int, width: int
    ) -> KVCache:
        """An empty cache for streams of `frames` frames with these prompts.

        With a window in the configuration it holds that many frames and the stream may continue
        (`frames` None: indefinitely); otherwise it holds all of `frames`. A list is copied, as a
        prompt switch overwrites the cache's tensors and other streams may share the list.
        """
        window, sink = self.config.window, self.config.sink
        grid = self.config.grid(height, width)
        own = self.text_kv(text) if isinstance(text, Tensor) else [_copies(kv) for kv in text]
        heads = self.config.num_heads // (1 if self.sequence is None else self.sequence.parts)
        return KVCache(own, frames, *grid, window=window, sink=sink, heads=heads)

    def forward_cached(
        self,
        x_BFCHW: Tensor,
        t_BF: Tensor,
        cache: KVCache,
        start_frame: int,
        context_only: bool = False,
    ) -> Tensor | None:
        """Forward of one chunk at frames `start_frame`…, given the cache of all earlier frames.

        Full attention inside the chunk; its keys and values overwrite its slots in the cache.
        `context_only`: only update the cache, skipping the end of the last layer.
        `t_BF`: [B, F], [B, 1] or [1, 1]; the modulation is computed once per tensor object, so
        reuse the same one. No gradients: the cache is written in place.
        """
        cache.seek(start_frame, x_BFCHW.shape[1])
        return self.streamed(x_BFCHW, self.streaming_times(t_BF, cache), cache, context_only)

    def recache(
        self,
        x_BFCHW: Tensor,
        t_BF: Tensor,
        cache: KVCache,
        *,
        new_sink: bool = False,
        chunks: Sequence[int] = (),
        context_only: bool = True,
    ) -> Tensor | None:
        """Encode cached frames again under the cache's present prompt (LongLive's KV recache).

        One pass over the frames that `KVCache.recache` returns, at their absolute positions, with
        full or block-causal attention among them and to the kept sink. Source: LongLive
        (arXiv 2509.22622) and its released code.

        Args:
            x_BFCHW: the newest clean frames; the last ones are taken, as many as the pass needs.
            t_BF: the context's time, [1, 1].
            new_sink: replace the sink too, by the oldest frames of the window.
            chunks: frames of the chunks in `x_BFCHW`, for block-causal attention; empty: full.
            context_only: only update the cache; otherwise also return the prediction.

        Raises:
            ValueError: if `x_BFCHW` holds too few frames or the cache is empty.
        """
        frames = cache.recache(new_sink=new_sink, chunks=chunks)
        first = x_BFCHW.shape[1] - len(frames)
        require(first >= 0, "x", x_BFCHW, f"the newest {len(frames)} frames")
        times = self.streaming_times(t_BF, cache)
        return self.streamed(x_BFCHW[:, first:], times, cache, context_only)

    @torch.no_grad()
    def streaming_times(self, t_BF: Tensor, cache: KVCache) -> TimeTable:
        """The modulation at a step value, computed once per cache."""
        table = cache.known_time(t_BF)
        if table is None:
            table = self.time_table(t_BF)
            cache.keep_time(t_BF, table)
        return table

    def streamed(
        self, x_BFCHW: Tensor, times: TimeTable, cache: KVCache, context_only: bool = False
    ) -> Tensor | None:
        """`forward_cached` at the cache's current chunk; depends on no host value."""
        # Autograd's host overhead per op exceeds the run time of some ops. Gathered weights must
        # not become inference tensors, as training passes use the same ones.
        with torch.no_grad() if self.sharded else torch.inference_mode():
            x_BLD, rows, cols = self._patchify(x_BFCHW)
            frames, tokens = x_BFCHW.shape[1], rows * cols
            how = Pass(
                self._split(cache.rope(frames), tokens),
                cache.intervals(frames * tokens),
                tokens,
                self.sequence,
                cache=cache,
                keys_only=context_only,
            )
            y_BLP, _ = self._run(x_BLD, times, cache.cross_kv, how)
        if y_BLP is None:
            return None
        # Rearranged outside inference mode, as autograd may save the result.
        out = self._unpatchify(y_BLP, rows, cols)
        return out.clone() if out.is_inference() else out


def _copies(kv: LayerKV) -> LayerKV:
    return kv[0].clone(), kv[1].clone()


def _times(t_BF: Tensor | None, x_BFCHW: Tensor) -> Tensor:
    """Times [B, F]; 0 if None."""
    shape = x_BFCHW.shape[:2]
    return x_BFCHW.new_zeros(shape, dtype=torch.float32) if t_BF is None else t_BF.expand(shape)
