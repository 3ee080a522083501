"""Noised copies of an update's videos: their videos, noise seeds, times and selected chunks.

All random numbers of an update are drawn for the whole batch before the first pass; a process takes
the copies of its own videos, and a micro-batch a part of them, so neither affects the result.
Shape letters: N copies, B videos, F frames, C channels, H x W, K chunks, M drawn chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Generator, Tensor

from afd import ops
from afd.methods.base import draw_times
from afd.methods.config import AfdConfig, TimesConfig, Timesteps
from afd_kernels.contracts import require


@dataclass(frozen=True)
class Copies:
    """This process's copies, all on the CPU.

    Attributes:
        video_N: index of each copy's video among this process's videos, int64.
        t_NK: times, float32; K may be 1.
        seed_N: seeds of the noise, int64.
        total: number of copies of all processes.
        chunks_NM: the chunks used by the update, ascending, int64; None: all.
        level_N: noise level of the clean context, and
        context_seed_N: the seeds of that noise; None if the context stays clean.
    """

    video_N: Tensor
    t_NK: Tensor
    seed_N: Tensor
    total: int
    chunks_NM: Tensor | None = None
    level_N: Tensor | None = None
    context_seed_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.video_N)

    @property
    def share(self) -> float:
        """Fraction of all copies; a mean over these times it is their contribution to the loss."""
        return len(self) / self.total

    def of(self, rows: slice | Tensor) -> Copies:
        """Select some of the copies."""
        held: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        some = {key: x[rows] for key, x in held.items() if isinstance(x, Tensor)}
        return Copies(**held | some)

    def pieces(self, size: int | None) -> Iterator[Copies]:
        """Yield the copies in pieces of at most `size`; None: in one piece."""
        width = size or len(self)
        return (self.of(slice(at, at + width)) for at in range(0, len(self), width))

    def noise(self, x0_NFCHW: Tensor) -> Tensor:
        """x_t of the copies' videos x0."""
        return _noised(x0_NFCHW, self.t_NK, self.seed_N)

    def pure_noise(self, x0_NFCHW: Tensor) -> Tensor:
        """Only the noise in x_t, in x0's shape."""
        return _noised(torch.zeros_like(x0_NFCHW), torch.ones(len(self)), self.seed_N)

    def noise_context(self, x0_NFCHW: Tensor) -> Tensor:
        """The clean context with its separate noise added, if any."""
        if self.level_N is None or self.context_seed_N is None:
            return x0_NFCHW
        return _noised(x0_NFCHW, self.level_N, self.context_seed_N)

    def frames(self, chunk: int) -> Tensor:
        """Frame indices of the drawn chunks, int64 [N, M·chunk]."""
        assert self.chunks_NM is not None
        return (self.chunks_NM[..., None] * chunk + torch.arange(chunk)).flatten(1)

    def drawn(self, x_NFCHW: Tensor, chunk: int) -> Tensor:
        """Gather the drawn chunks of whole videos, [N, M·chunk, C, H, W]."""
        if self.chunks_NM is None:
            return x_NFCHW
        row_N1 = torch.arange(len(self))[:, None]
        return x_NFCHW[row_N1, self.frames(chunk)]

    def whole(self, x_NFCHW: Tensor, frames: int, chunk: int) -> Tensor:
        """Scatter the drawn chunks into videos of `frames` frames, 0 elsewhere."""
        if self.chunks_NM is None:
            return x_NFCHW
        whole_NFCHW = x_NFCHW.new_zeros(len(self), frames, *x_NFCHW.shape[2:])
        row_N1 = torch.arange(len(self))[:, None]
        return whole_NFCHW.index_put((row_N1, self.frames(chunk)), x_NFCHW)

    def mask(self, frames: int, chunk: int) -> Tensor | None:
        """Mask of the frames used by the update, bool [N, F]; None: all."""
        if self.chunks_NM is None:
            return None
        mask_NF = torch.zeros(len(self), frames, dtype=torch.bool)
        return mask_NF.scatter(1, self.frames(chunk), True)

    @property
    def drawn_t(self) -> Tensor:
        """The times of the drawn chunks, [N, M] or [N, 1]."""
        if self.chunks_NM is None or self.t_NK.shape[1] == 1:
            return self.t_NK
        return self.t_NK.gather(1, self.chunks_NM)


def _noised(x0_NFCHW: Tensor, t: Tensor, seed_N: Tensor) -> Tensor:
    t, seed_N = t.to(x0_NFCHW.device), seed_N.to(x0_NFCHW.device)
    return ops.forward_noise(x0_NFCHW, t, seed=seed_N, layout="BFCHW")


def draw_copies(
    config: TimesConfig,
    videos: int,
    chunks: int,
    times: Sequence[float],
    generator: Generator,
    *,
    own: slice = slice(None),
    first_times: Sequence[float] | None = None,
    context_noise: float | None = None,
    from_chunk: int = 0,
) -> Copies:
    """Draw `config.draws` copies of every video, grouped by draw.

    Args:
        videos: number of videos of all processes.
        chunks: number of chunks of a video.
        times: the student's own noise levels, for timesteps="student".
        own: slice of this process's videos.
        first_times: noise levels of the first chunk, if different.
        context_noise: largest noise level of the clean context; None: it stays clean.
        from_chunk: the first chunk that the update is about.
    """
    rows, each = config.draws * videos, config.timestep_per == "chunk"
    law: Timesteps = "student" if config.timesteps == "list" else config.timesteps
    t_NK = draw_times(
        law,
        rows,
        chunks if each else 1,
        config.timestep_list or times,
        generator,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
    )
    if config.timesteps == "student" and each and first_times is not None:
        t_NK[:, :1] = draw_times("student", rows, 1, first_times, generator)
    level_N = context_seed_N = chunks_NM = None
    if context_noise is not None:
        level_N = context_noise * torch.rand(rows, generator=generator)
        context_seed_N = ops.draw_seeds(rows, generator)
    seed_N = ops.draw_seeds(rows, generator)
    count = config.chunks_per_update
    if count is not None:
        check_chunks(config, chunks)
        order_NK = torch.rand(rows, chunks - from_chunk, generator=generator).argsort(1)
        chunks_NM = from_chunk + order_NK[:, :count].sort(1).values
    elif from_chunk:
        chunks_NM = torch.arange(from_chunk, chunks).expand(rows, -1)
    number_B = torch.arange(videos)
    video_N = (number_B - number_B[own][:1]).repeat(config.draws)
    every = Copies(video_N, t_NK, seed_N, rows, chunks_NM, level_N, context_seed_N)
    return every.of(torch.arange(rows).view(config.draws, videos)[:, own].flatten())


def check_chunks(config: TimesConfig, chunks: int) -> None:
    """Raise ValueError if more chunks would be drawn, or shared, than a video has."""
    count = config.chunks_per_update or 1
    require(count <= chunks, "chunks_per_update", count, f"at most the {chunks} of a video")
    shared = config.group_from_chunk if isinstance(config, AfdConfig) else None
    if shared is not None:
        least = shared if isinstance(shared, int) else 1
        needed = f"null, or less than the {chunks} chunks of a video, of which one has its own"
        require(least < chunks, "group_from_chunk", shared, needed)


@dataclass(frozen=True)
class Place:
    """Where in the streams of an update's rollouts the update is; chunks.

    Attributes:
        clip: where the clip begins that is scored; 0: with the stream, which is the whole video.
        fork: from where on the videos of a prompt differ; None: from the beginning.
        first: the first chunk of the clip that the update is about.
        switch: where the streams switch from an earlier prompt to their own, at most `clip`; None:
            they have one prompt.
    """

    clip: int = 0
    fork: int | None = None
    first: int = 0
    switch: int | None = None


def draw_place(config: AfdConfig, chunks: int, chunk: int, generator: Generator) -> Place:
    """Draw the place of an update on clips of `chunks` chunks of `chunk` frames."""
    shared = draw_fork(config.group_from_chunk, chunks, generator)
    clip, first, switch = 0, shared, None
    if config.stream_frames is not None:
        begins = config.stream_frames // chunk - chunks + 1
        clip = int(torch.randint(begins, (), generator=generator))
        if config.stream_start and float(torch.rand((), generator=generator)) < config.stream_start:
            clip = 0
    if config.stream_switch is not None and clip:
        switch = 1 + int(torch.randint(clip, (), generator=generator))
    if config.train_window is not None:
        first = max(shared, chunks - config.train_window // chunk)
    fork = None if config.group_from_chunk is None else clip + shared
    return Place(clip, fork or None, first, switch)


def draw_fork(shared: int | str | None, chunks: int, generator: Generator) -> int:
    """The chunk from which the videos of a prompt differ in this update: `afd.group_from_chunk`."""
    if shared == "random":
        return int(torch.randint(chunks, (), generator=generator))
    if shared == "last":
        return chunks - 1
    return int(shared or 0)
