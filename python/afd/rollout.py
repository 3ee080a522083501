"""Streaming generation: chunk by chunk, with few denoising steps each and a KV cache.

All students share this code, from the toy to Wan: differences are behind `Student`. Shape letters:
B videos, F frames, C channels, H x W latent size, c frames of one chunk, L text tokens, E text
channels. Latents are [B, F, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Literal, get_args, overload

import torch
from torch import Generator, Tensor

from afd.context import Context, KeptContext, Recache, RecomputedContext, Switch, SwitchMode
from afd.models.noise import EndlessLayout, Layout, NoiseSource, counted_noise, seeded_noise
from afd.models.student import Level, Student
from afd.models.wan.kv_cache import KVCache
from afd.models.wan.self_forcing import self_forced
from afd.models.wan.student import WanStudent
from afd.schedules import check_steps, renoise
from afd_kernels.contracts import require

__all__ = [
    "STEPS",
    "EndlessLayout",
    "Layout",
    "NoiseSource",
    "Recache",
    "SelfForced",
    "Switch",
    "SwitchMode",
    "check_steps",
    "chunk_layout",
    "counted_noise",
    "denoise_chunk",
    "draw_exits",
    "rollout",
    "seeded_noise",
    "self_forcing_rollout",
    "stream",
    "stream_layout",
]
STEPS = (1.0, 0.9375, 0.833, 0.625)
# Prompts of later chunks: by chunk index, or asked for before every chunk (None: no change).
Switches = Mapping[int, Tensor | Switch] | Callable[[int], Tensor | Switch | None]


def chunk_layout(frames: int, chunk: int, *, first_alone: bool = False) -> Layout:
    """Split frames into chunks of `chunk`; with `first_alone` the first frame is its own chunk.

    Raises:
        ValueError: if the frames do not divide into chunks.
    """
    alone = int(first_alone and chunk > 1)
    needed = f"1 + a multiple of the chunk {chunk}" if alone else f"a multiple of the chunk {chunk}"
    require(frames > 0 and (frames - alone) % chunk == 0, "frames", frames, needed)
    starts = range(alone, frames, chunk)
    return ((0, 1),) * alone + tuple((start, chunk) for start in starts)


def stream(
    student: Student,
    text_BLE: Tensor,
    noise: NoiseSource,
    *,
    frames: int | Literal["trained"] | None = "trained",
    denoising_steps: Sequence[float] = STEPS,
    first_chunk_steps: Sequence[float] | None = None,
    prefix_BFCHW: Tensor | None = None,
    switches: Switches | None = None,
    context_noise: float = 0.0,
    remember_last: bool = False,
    cache: KVCache | None = None,
    from_chunk: int = 0,
    last_inputs: list[Tensor] | None = None,
    recache: Recache = "switch",
    reencode: Callable[[int], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield finished chunks [B, c, C, H, W] in order.

    Each chunk starts as noise and is denoised at the times of `denoising_steps`: predict the clean
    chunk, mix it with fresh noise for the next time; the last prediction is the result. A context
    pass then writes the finished chunk to the cache, except for the last chunk, which nothing would
    read. Only the cache is kept between chunks (and, if a switch may recache, the latents of its
    frames), and nothing in the loop synchronises.

    Args:
        text_BLE: embeddings of the prompts (`student.encode`).
        noise: the noise source; its chunks follow `stream_layout`.
        frames: length of the video, including the prefix; default the student's training length.
            With a window (in the student's configuration) only the sink and the newest frames are
            kept, and None streams without end. `noise` then needs an endless layout, too.
        denoising_steps: denoising steps of every chunk, in the student's units (`student.levels`).
        first_chunk_steps: denoising steps of the first generated chunk, if different.
        prefix_BFCHW: finished latents that begin the video: they are cached at time 0 and yielded
            as its first chunks. Whole chunks, or a single frame.
        switches: maps a chunk index to the prompt embeddings used from that chunk on, or to a
            `Switch`. A callable is called with the index of each chunk before its first step, after
            the context pass of the chunk before (recache="chunk" has none), and returns the same or
            None. With `remember_last`
            a mapping may also have the chunk after the last: the cache is then left as that chunk
            would find it.
        context_noise: timestep of the context pass and of a recache, on the 0-1000 scale; their
            latents stay clean.
        remember_last: also run the context pass of the last chunk, to read the cache afterwards.
        cache: holds the context (`student.new_cache` of the same prompts, or one that was reset to
            them) and can be read afterwards. The prompts in the cache are the ones attended to.
        from_chunk: the first chunk to generate; `cache` then holds the earlier ones, as a fork does
            (`KVCache.fork`). `first_chunk_steps` are those of chunk 0, and a recache needs chunks
            from here on for all frames that it encodes.
        last_inputs: a list to which the input of each chunk's last denoising step is appended.
        recache: "switch": a finished chunk's keys and values are computed once, and again at the
            switches that say so. "chunk": they are computed anew before every chunk, as the
            beginning of a video (`afd.context.RecomputedContext`), those of a prefix at
            `context_noise`, too. Until the stream fills the window, both give the same without
            switches. A "plain" switch then leaves the next chunk's context to the
            old prompts, any other mode encodes it under the new ones.
        reencode: with recache="chunk" and no sink, called once the context no longer begins with
            the stream's first frame: given the latent frame with which it begins, returns what
            takes its place, [B, 1, C, H, W]. Where a video's first latent frame is an image, that
            is the frame's last picture, encoded as one (`afd.models.codec.FrameDecoder`). The
            caller has taken all earlier chunks by then. None: the latent frame itself.

    Raises:
        ValueError: naming the argument, the value given and what is needed; before the first chunk,
            except for what a callable returns.
    """
    if frames == "trained":
        frames = student.frames
    given = 0 if prefix_BFCHW is None else prefix_BFCHW.shape[1]
    layout = stream_layout(student, frames, given)
    end = len(layout) if isinstance(layout, tuple) else None
    if prefix_BFCHW is not None:
        _check_prefix(student, prefix_BFCHW, len(text_BLE), layout)
    if from_chunk:
        _check_continued(from_chunk, layout, cache, given)
    after_last: Switch | None = None
    if isinstance(switches, Mapping):
        until = None if end is None else end + remember_last
        for chunk, switch in switches.items():
            inside = chunk >= from_chunk and (until is None or chunk < until)
            needed = f"a chunk in [{from_chunk}, {'…' if until is None else until})"
            require(inside, "switches", chunk, needed)
            checked = _checked(switch, text_BLE.shape)
            after_last = checked if chunk == end else after_last
    require(recache in get_args(Recache), "recache", recache, "switch or chunk")
    if recache == "chunk":
        require(not remember_last, "remember_last", remember_last, "false with recache=chunk")
        require(from_chunk == 0, "from_chunk", from_chunk, "0 with recache=chunk")
    levels = student.levels(denoising_steps)
    plan = _Plan(
        layout=layout,
        first=levels if first_chunk_steps is None else student.levels(first_chunk_steps),
        levels=levels,
        clean=Level.at(0.0, 0.0, student.device),
        context=Level.at(context_noise, 0.0, student.device),
        switch=switches.get if isinstance(switches, Mapping) else switches,
        after_last=after_last,
        recaches=callable(switches)
        or any(isinstance(s, Switch) and s.recaches for s in (switches or {}).values()),
        text_shape=text_BLE.shape,
        remember_last=remember_last,
        last_inputs=last_inputs,
        from_chunk=from_chunk,
        recache=recache,
        reencode=reencode,
    )
    if cache is None:
        cache = student.new_cache(text_BLE, frames)
    kept = cache.self_kv[0][0]
    require(len(kept) == len(text_BLE), "cache", kept, f"one of {len(text_BLE)} streams")
    return _chunks(student, cache, noise, plan, prefix_BFCHW)


@overload
def stream_layout(student: Student, frames: int, prefix_frames: int = 0) -> Layout: ...
@overload
def stream_layout(student: Student, frames: None, prefix_frames: int = 0) -> EndlessLayout: ...
@overload
def stream_layout(
    student: Student, frames: int | None, prefix_frames: int = 0
) -> Layout | EndlessLayout: ...
def stream_layout(
    student: Student, frames: int | None, prefix_frames: int = 0
) -> Layout | EndlessLayout:
    """Chunks of a stream; a single prefix frame (an image) is a separate chunk."""
    alone = student.independent_first_frame or prefix_frames == 1
    if frames is None:
        return EndlessLayout(student.chunk, alone)
    return chunk_layout(frames, student.chunk, first_alone=alone)


def _checked(switch: Tensor | Switch, shape: tuple[int, ...]) -> Switch:
    """A switch whose mode and shape are right; embeddings alone are a plain one."""
    if isinstance(switch, Tensor):
        switch = Switch(switch)
    require(isinstance(switch, Switch), "switches", switch, "embeddings or a Switch")
    text_BLE, modes = switch.text_BLE, get_args(SwitchMode)
    require(switch.mode in modes, "switches: mode", switch.mode, f"one of {', '.join(modes)}")
    require(text_BLE.shape == shape, "switches", text_BLE, f"{list(shape)}")
    return switch


@dataclass(frozen=True)
class _Plan:
    """Settings of a stream, all known before its first chunk."""

    layout: Layout | EndlessLayout
    first: list[Level]
    levels: list[Level]
    clean: Level
    context: Level
    switch: Callable[[int], Tensor | Switch | None] | None
    after_last: Switch | None
    recaches: bool
    text_shape: tuple[int, ...]
    remember_last: bool
    last_inputs: list[Tensor] | None
    from_chunk: int
    recache: Recache
    reencode: Callable[[int], Tensor] | None


@torch.no_grad()
def _chunks(
    student: Student, cache: KVCache, noise: NoiseSource, plan: _Plan, prefix: Tensor | None
) -> Iterator[Tensor]:
    given = 0 if prefix is None else prefix.shape[1]
    end = len(plan.layout) if isinstance(plan.layout, tuple) else None
    context = _context(student, cache, plan)
    for chunk, (start, count) in islice(enumerate(plan.layout), plan.from_chunk, None):
        found = None if plan.switch is None else plan.switch(chunk)
        switch = None if found is None else _checked(found, plan.text_shape)
        place = context.prepare(start, count, switch, given=start < given)
        if prefix is not None and start < given:
            x0, level = prefix[:, start : start + count], plan.clean
        else:
            levels = plan.first if start == given else plan.levels
            x0 = denoise_chunk(student, cache, noise, levels, chunk, place, plan.last_inputs)
            require(x0.shape[1] == count, "noise", x0, f"{count} frames for chunk {chunk}")
            level = plan.context
        yield x0
        context.append(x0, level, start, last=chunk + 1 == end and not plan.remember_last)
    if plan.after_last is not None:
        context.follow(plan.after_last)


def _context(student: Student, cache: KVCache, plan: _Plan) -> Context:
    if plan.recache == "switch":
        return KeptContext(student, cache, plan.context, recaches=plan.recaches)
    _, first = next(iter(plan.layout))
    return RecomputedContext(student, cache, plan.context, first=first, reencode=plan.reencode)


@torch.no_grad()
def denoise_chunk(
    student: Student,
    cache: KVCache,
    noise: NoiseSource,
    levels: list[Level],
    chunk: int,
    start: int,
    last_inputs: list[Tensor] | None = None,
) -> Tensor:
    """Denoise the chunk at frame `start` of the cache, [B, c, C, H, W]; its cache entry is noisy.

    `Student.remember` replaces it by the clean one. The input of the last step is appended to
    `last_inputs`.
    """
    x_t = noise(chunk, 0)
    for step, level in enumerate(levels):
        if last_inputs is not None and step + 1 == len(levels):
            last_inputs.append(x_t)
        x0 = student.denoise(x_t, level, cache, start)
        if step + 1 < len(levels):
            x_t = renoise(x0, noise(chunk, step + 1), levels[step + 1].sigma)
    return x0


def _check_continued(
    chunk: int, layout: Layout | EndlessLayout, cache: KVCache | None, given: int
) -> None:
    inside = 0 < chunk < len(layout) if isinstance(layout, tuple) else chunk > 0
    require(inside, "from_chunk", chunk, "a chunk of the stream")
    require(given == 0, "prefix", given, "none where a cache is continued")
    needed = f"one that holds the {layout[chunk][0]} frames before chunk {chunk}"
    ends = cache is not None and cache.end == layout[chunk][0]
    require(ends, "cache", None if cache is None else f"one of {cache.end} frames", needed)


def _check_prefix(
    student: Student, prefix: Tensor, batch: int, layout: Layout | EndlessLayout
) -> None:
    if isinstance(layout, tuple):
        ends = [start + count for start, count in layout[:-1]]
    else:
        chunks = takewhile(lambda chunk: chunk[0] < max(1, prefix.shape[1]), layout)
        ends = [start + count for start, count in chunks]
    shape = f"[{batch}, P, {', '.join(map(str, student.frame_shape))}]"
    require(
        prefix.shape == (batch, prefix.shape[1], *student.frame_shape)
        and (prefix.device, prefix.dtype) == (student.device, student.dtype),
        "prefix",
        prefix,
        f"{student.dtype} {shape} on {student.device}",
    )
    require(
        prefix.shape[1] in ends, "prefix", prefix, f"{shape} with P one of {ends}, whole chunks"
    )


def rollout(
    student: Student,
    prompts: list[str],
    seeds: Sequence[int] | Tensor,
    *,
    frames: int | None = None,
    denoising_steps: Sequence[float] = STEPS,
    first_chunk_steps: Sequence[float] | None = None,
    context_noise: float = 0.0,
    batch: int = 256,
) -> Tensor:
    """Generate full videos [B, F, C, H, W], one per prompt and seed, `batch` at a time.

    `frames`: None takes the student's training length; other arguments are those of `stream`.
    """
    require(bool(prompts), "prompts", prompts, "at least one prompt")
    if len(prompts) != len(seeds):
        raise ValueError(f"seeds: got {len(seeds)}; needed: {len(prompts)}, one per prompt")
    frames = student.frames if frames is None else frames
    layout = stream_layout(student, frames)
    draws = max(len(denoising_steps), len(first_chunk_steps or ()))
    videos = []
    for first in range(0, len(prompts), batch):
        part = slice(first, first + batch)
        chunks = stream(
            student,
            student.encode(prompts[part]),
            student.noise_source(seeds[part], layout, draws),
            frames=frames,
            denoising_steps=denoising_steps,
            first_chunk_steps=first_chunk_steps,
            context_noise=context_noise,
        )
        videos.append(torch.cat(list(chunks), 1))
    return torch.cat(videos)


@dataclass(frozen=True)
class SelfForced:
    """A rollout with gradients.

    Attributes:
        x0_BFCHW: its latents: the predictions of the exit steps, which carry the gradient.
        t_from, t_to: the step values at the exit and after it (0 after the last), unwarped, for
            trainers that bound their own times by them.
    """

    x0_BFCHW: Tensor
    t_from: float
    t_to: float


def draw_exits(
    chunks: int,
    denoising_steps: Sequence[float],
    generator: Generator,
    *,
    first_chunk_steps: Sequence[float] | None = None,
    same: bool = True,
) -> list[int]:
    """Draw the step of every chunk that takes the gradient, uniformly over its steps.

    `same`: one draw for all chunks; with `first_chunk_steps` the first chunk has a separate draw.
    """
    lists = [denoising_steps] * chunks
    if first_chunk_steps is not None:
        lists[0] = first_chunk_steps
    exits = [int(torch.randint(len(one), (), generator=generator)) for one in lists]
    start = 0 if first_chunk_steps is None else 1
    return exits[:start] + exits[start : start + 1] * (chunks - start) if same else exits


def self_forcing_rollout(
    student: WanStudent,
    text_BLE: Tensor,
    noise: NoiseSource,
    exits: Sequence[int],
    *,
    denoising_steps: Sequence[float],
    first_chunk_steps: Sequence[float] | None = None,
    leak: bool = False,
    frames_with_gradient: int | None = None,
) -> SelfForced:
    """A rollout as in `stream`, in which each chunk ends at its exit step, with gradient.

    Noise is used as in `stream`: step s of a chunk reads noise(chunk, s), and its context pass, on
    the slightly noised result, reads the draw after its exit step (so a list of n steps may need
    n + 1 draws). See `afd.models.wan.self_forcing` for details.

    Args:
        exits: the exit step of every chunk (`draw_exits`); its length is the number of chunks.
    """
    levels = student.levels(denoising_steps)
    lists = [[level.t for level in levels]] * len(exits)
    if first_chunk_steps is not None:
        lists[0] = [level.t for level in student.levels(first_chunk_steps)]
    # Draws between the steps of each chunk, then for its context pass; the last chunk has none.
    order = iter([(c, s) for c, leave in enumerate(exits) for s in range(1, leave + 2)])
    x0_BFCHW = self_forced(
        student.net,
        text_BLE,
        torch.cat([noise(chunk, 0) for chunk in range(len(exits))], 1),
        lists,
        exits,
        lambda: noise(*next(order)),
        schedule=student.schedule,
        leak=leak,
        frames_with_gradient=frames_with_gradient,
    )
    last = (
        first_chunk_steps if first_chunk_steps is not None and len(exits) == 1 else denoising_steps
    )
    after = [*last[1:], 0.0]
    return SelfForced(x0_BFCHW, last[exits[-1]], after[exits[-1]])
