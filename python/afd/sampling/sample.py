"""`afd sample`: stream videos from prompts, writing the mp4 files as frames are generated.

Shape letters: B videos, F frames, C channels, H x W size, L text tokens, E text channels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from afd.config.run import flatten
from afd.errors import ConfigError, VideoError
from afd.files import only_one
from afd.listing import counted
from afd.models.codec import Codec, FrameDecoder
from afd.models.student import Student
from afd.models.wan.kv_cache import KVCache, cache_bytes
from afd.rollout import Layout, Switch, chunk_layout, counted_noise, stream, stream_layout
from afd.sampling.config import SampleConfig, StreamConfig
from afd.sampling.jobs import Job, read_jobs
from afd.video import read_comment, read_video
from afd.video.config import VideoConfig
from afd.video.recorder import Recorder


class Decoder(NamedTuple):
    """Decodes a stream's chunks. `reencode`: see `afd.rollout.stream`."""

    decode: Callable[[Tensor], Tensor]
    reencode: Callable[[int], Tensor] | None = None


@dataclass
class Pipeline:
    """The loaded models."""

    student: Student
    codec: Codec
    graphs: bool = False
    kept: KVCache | None = None

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, L, E] on the student's device."""
        return self.student.encode(list(prompts)).to(self.student.dtype)

    def decoder(self, config: StreamConfig) -> Decoder:
        """A decoder for one batch of streams."""
        if config.window is None or config.recache == "switch" or config.sink:
            return Decoder(self.codec.stream())
        kept = config.window - config.student.chunk_frames
        frames = FrameDecoder(self.codec, config.student.scale[0], kept)
        return Decoder(frames, frames.reencode)

    def cache(self, text_BLE: Tensor, frames: int | None) -> KVCache:
        """The KV cache, reused from batch to batch and reallocated when the batch size changes."""
        if self.kept is not None and len(self.kept.self_kv[0][0]) == len(text_BLE):
            self.kept.reset(self.student.net.text_kv(text_BLE))
            return self.kept
        # The last batch may be smaller: free the old cache and its holders before allocating.
        self.kept = None
        if self.graphs:
            self.student.use_graphs()
        self.kept = self.student.new_cache(text_BLE, frames)
        return self.kept


@dataclass(frozen=True)
class Sampled:
    """Result of a run: files written, files that already existed, and timings of every chunk."""

    written: list[Path]
    skipped: int
    chunk_seconds: list[float]


def sample(config: SampleConfig, console: Console) -> Sampled:
    """Stream every missing video into `config.out`, which is locked meanwhile.

    Raises:
        ConfigError: the configuration or a file it names is wrong, `out` holds a video of the same
            name made with other settings, or another process is writing there.
    """
    if config.out is None:
        raise ConfigError("out: not given; needed: a folder for the mp4 files")
    jobs = read_jobs(config)
    with only_one(config.out, made=(".mp4.partial", ".mp4.whole")):
        return make_videos(config, jobs, console)


@contextmanager
def _said_when_full() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: too little memory ({reason}); --dry-run shows what is needed; a smaller "
            "batch, a window or fewer frames need less"
        ) from error


@_said_when_full()
def make_videos(config: SampleConfig, jobs: list[Job], console: Console) -> Sampled:
    """`sample` for given jobs; locking `config.out` is left to the caller."""
    out = config.out
    assert out is not None
    config.student.require_weights()
    # Checked before anything is downloaded or loaded.
    if config.torch_device.type != "cuda" and config.cuda_graphs:
        raise ConfigError("cuda_graphs: got 'cpu'; needed: a CUDA device")
    layout = _layout(config, jobs)
    for job in jobs:
        if job.prefix is not None and not job.prefix.is_file():
            named = "image" if job.image is not None else "video"
            raise ConfigError(f"{named}: got {job.prefix} for {job.name}; needed: a file")
        for switch in job.switches:
            if switch.chunk >= len(layout(job)):
                raise ConfigError(
                    f"prompts: {job.name} switches at chunk {switch.chunk}; it has "
                    f"{len(layout(job))}"
                )
    config = config.model_copy(update={"student": config.student.pinned()})
    todo = [job for job in jobs if not _finished(job, config)]
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} videos exist already")
    result = Sampled([], len(jobs) - len(todo), [])
    if not todo:
        return result
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        pipeline = load(config, sorted({prompt for job in todo for prompt in job.prompts}))
    except ValueError as error:  # a file does not match the configuration
        raise ConfigError(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    with _progress(console, todo, layout) as advance:
        for batch in _batches(todo, config):
            started = time.monotonic()
            recorder = _record(pipeline, config, batch, advance)
            seconds = [b - a for a, b in pairwise([started, *recorder.times])]
            result.written.extend(recorder.paths)
            result.chunk_seconds.extend(seconds)
            console.print(_told(config, batch, seconds), highlight=False, soft_wrap=True)
    return result


def _record(
    pipeline: Pipeline, config: SampleConfig, batch: list[Job], advance: Callable[[], None]
) -> Recorder:
    """Stream one batch to its files."""
    student = pipeline.student
    frames = config.latent_frames
    prefix = _prefix(pipeline, config, batch)
    layout = stream_layout(student, frames, 0 if prefix is None else prefix.shape[1])
    draws = max(len(config.student.denoising_steps), len(config.student.first_chunk_steps or ()))
    noise = counted_noise(
        [job.seed for job in batch],
        layout,
        draws,
        student.frame_shape,
        device=student.device,
        dtype=student.dtype,
    )
    changes = sorted({switch.chunk for job in batch for switch in job.switches})
    switches = {
        c: Switch(
            pipeline.text([job.prompt_at(c) for job in batch]), batch[0].recaches.get(c, "plain")
        )
        for c in changes
    }
    text_BLE = pipeline.text([job.prompt_at(0) for job in batch])
    decoder = pipeline.decoder(config)
    chunks = stream(
        student,
        text_BLE,
        noise,
        frames=frames,
        denoising_steps=config.student.denoising_steps,
        first_chunk_steps=config.student.first_chunk_steps,
        prefix_BFCHW=prefix,
        switches=switches,
        context_noise=config.student.context_noise,
        cache=pipeline.cache(text_BLE, frames),
        recache=config.recache,
        reencode=decoder.reencode,
    )
    assert config.out is not None
    comments = [json.dumps(job.record(config), ensure_ascii=False) for job in batch]
    paths = [config.out / f"{job.name}.mp4" for job in batch]
    with torch.no_grad(), Recorder(paths, comments, config.fps, config.crf, advance) as recorder:
        for chunk_BFCHW in chunks:
            recorder.put(decoder.decode(chunk_BFCHW))
    return recorder


# --- jobs ---


def _finished(job: Job, config: SampleConfig) -> bool:
    assert config.out is not None
    path = config.out / f"{job.name}.mp4"
    if not path.exists():
        return False
    try:
        there = json.loads(read_comment(path) or "null")
    except (VideoError, json.JSONDecodeError):
        there = None
    wanted = job.record(config)
    if there == wanted:
        return True
    differing = (
        "its inputs are not recorded" if not isinstance(there, dict) else _difference(there, wanted)
    )
    raise ConfigError(f"out: {path} was made from other inputs ({differing}); use another folder")


def _difference(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    a, b = (dict(flatten(record | (record.get("settings") or {}))) for record in (there, wanted))
    keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k) and "settings." not in k]
    return "; ".join(f"{key}: {a.get(key)!r} there, {b.get(key)!r} now" for key in keys)


def _prefix_frames(config: SampleConfig, job: Job) -> int:
    """Number of latent frames in the job's prefix."""
    if job.image is not None:
        return 1
    if job.video is None:
        return 0
    if config.prefix_frames is None:
        return config.student.chunk_frames
    return 1 + (config.prefix_frames - 1) // config.student.scale[0]


def _layout(config: SampleConfig, jobs: list[Job]) -> Callable[[Job], Layout]:
    """The chunk layout of each job, validated before anything is loaded."""

    chunk = config.student.chunk_frames

    def layout(job: Job) -> Layout:
        given = _prefix_frames(config, job)
        alone = config.independent_first_frame or given == 1
        try:
            chunks = chunk_layout(config.latent_frames, chunk, first_alone=alone)
        except ValueError:
            single = int(alone and chunk > 1)
            whole = max(1, -(-(config.latent_frames - single) // chunk))
            fits = 1 + (single + whole * chunk - 1) * config.student.scale[0]
            needed = f"{'one frame and ' * single}chunks of {chunk}"
            raise ConfigError(
                f"frames: got {config.frames}, which is {config.latent_frames} latent frames; "
                f"needed: {needed}, such as frames={fits}"
            ) from None
        ends = [start + count for start, count in chunks[:-1]]
        if given and given not in ends:
            raise ConfigError(
                f"prefix_frames: got {given} latent frames for {job.name}; needed: one of {ends}"
            )
        return chunks

    for job in jobs:
        layout(job)
    return layout


def _batches(jobs: list[Job], config: SampleConfig) -> Iterator[list[Job]]:
    """Batches of jobs that can be streamed together: equal prefix lengths and recaches."""
    groups: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        alike = _prefix_frames(config, job), *job.recaches.items()
        groups.setdefault(alike, []).append(job)
    for group in groups.values():
        for first in range(0, len(group), config.batch):
            yield group[first : first + config.batch]


def _prefix(pipeline: Pipeline, config: SampleConfig, batch: list[Job]) -> Tensor | None:
    """Prefix latents [B, P, C, H, W] of a batch."""
    latent_frames = _prefix_frames(config, batch[0])
    if latent_frames == 0:
        return None
    frames = 1 + (latent_frames - 1) * config.student.scale[0]
    videos = [
        read_video(
            path,
            frames=frames,
            height=config.height,
            width=config.width,
            # The frame rate matters: the video continues from the prefix.
            fps=None if job.image is not None else config.fps,
        )
        for job in batch
        if (path := job.prefix) is not None
    ]
    student = pipeline.student
    with torch.no_grad():
        return pipeline.codec.encode(torch.stack(videos).to(student.device)).to(student.dtype)


# --- loading ---


def load(config: SampleConfig, prompts: list[str]) -> Pipeline:
    """Load the student, ready to encode the prompts, and its codec."""
    device = config.torch_device
    if device.index is not None:
        # Kernels and graphs are launched on the current device.
        torch.cuda.set_device(device)
    video = VideoConfig(frames=config.frames, height=config.height, width=config.width)
    try:
        student, codec = config.student.build(video, prompts, device=device)
    except FileNotFoundError as error:
        raise ConfigError(f"student: {error}") from error
    size = config.student.latent_size(config.height, config.width)
    if student.frame_shape[1:] != size:
        rows, columns = student.frame_shape[1:]
        raise ConfigError(
            f"height, width: got {config.height}, {config.width}; needed: {rows}, {columns}, those "
            "of the checkpoint"
        )
    student.requires_grad_(False).eval()
    student.net.config = replace(student.net.config, **config.memory)
    student.net.fuse_projections()
    if config.compile:
        student.net.compile_blocks()
    return Pipeline(student, codec, config.cuda_graphs)


# --- dry run ---


def _told(config: SampleConfig, batch: list[Job], seconds: list[float]) -> str:
    names = batch[0].name if len(batch) == 1 else f"{batch[0].name} … {batch[-1].name}"
    rate = len(batch) * config.frames / sum(seconds)
    return (
        f"{names}: {counted(config.frames, 'frame')}, first chunk after {seconds[0]:.2f} s, "
        f"then {median(seconds[1:] or seconds):.2f} s a chunk, {rate:.1f} frames a second"
    )


@contextmanager
def _progress(
    console: Console, jobs: list[Job], layout: Callable[[Job], Layout]
) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("chunks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = sum(len(layout(job)) for job in jobs)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("chunks", total=total)
        yield lambda: progress.advance(task)


@dataclass(frozen=True)
class Memory:
    """Computed memory of a batch in bytes; nothing is allocated."""

    parameters: int
    weights: int
    cache: int
    latents: int
    kept_frames: int


def memory(config: SampleConfig) -> Memory:
    """Memory of the network, its cache, and the latents and noise of a chunk.

    The sizes of a Wan network come from the checkpoint if it exists, else they are those of
    `student.size`.
    """
    wan = replace(config.student.sizes(), **config.memory)
    parameters = config.student.parameters()
    height, width = config.student.latent_size(config.height, config.width)
    rows, cols = wan.grid(height, width)
    frames = config.latent_frames
    kept = frames if wan.window is None else min(frames, wan.window)
    dtype = config.student.torch_dtype
    cache = cache_bytes(
        wan.num_layers, config.batch, kept * rows * cols, wan.text_len, wan.dim, dtype
    )
    # Input, fresh noise, and output.
    latents = 3 * config.batch * wan.chunk * wan.in_dim * height * width * dtype.itemsize
    return Memory(parameters, parameters * dtype.itemsize, cache, latents, kept)


def _sized_by(config: SampleConfig) -> str:
    missing = list(config.student.missing_weights())
    if missing:
        size = getattr(config.student, "size", None)
        sizes = "the released sizes" if size is None else f"the sizes of {size}"
        return f"{sizes} ({missing[0]})"
    return f"as in {config.student.checkpoint}"


def _recomputed(config: SampleConfig, chunks: Layout, given: int) -> int:
    """Passes over past frames with recache=chunk: for each chunk after the prefix as many as the
    frames of its context make chunks."""
    kept = min(config.window or config.latent_frames, config.latent_frames)
    held = [min(start, kept - count) for start, count in chunks if start >= given]
    (_, first), whole = chunks[0], config.student.chunk_frames
    return sum(1 + -(-max(0, frames - first) // whole) for frames in held if frames)


def dry_run(config: SampleConfig, console: Console) -> Memory:
    """Print the plan of `sample` and its memory estimate; nothing is loaded or allocated."""
    jobs = read_jobs(config) if config.prompts else []
    layout = _layout(config, jobs)
    job = jobs[0] if jobs else Job("video", "", 0, config.image, config.video)
    chunks, given = layout(job), _prefix_frames(config, job)
    try:
        held = memory(config)
    except ValueError as error:  # a file does not match the configuration
        raise ConfigError(str(error)) from error
    steps, first = (
        len(config.student.denoising_steps),
        len(config.student.first_chunk_steps or config.student.denoising_steps),
    )
    generated = sum(start >= given for start, _ in chunks)
    again = _recomputed(config, chunks, given)
    context = len(chunks) - 1 if config.recache == "switch" else again
    passes = first + (generated - 1) * steps + context
    recaches = len(job.recaches) if config.recache == "switch" else 0
    gib = 2**30
    lines = [
        f"videos      {len(jobs)}, {config.batch} at a time",
        f"video       {counted(config.frames, 'frame')} of {config.height}x{config.width}; "
        f"{counted(config.latent_frames, 'latent frame')} in {counted(len(chunks), 'chunk')}, "
        f"{counted(passes, 'pass')}"
        + (f", {again} of them over past frames" if config.recache == "chunk" else "")
        + (f" and {recaches} of a recache" if recaches else ""),
        f"weights     {held.parameters:,} parameters, {held.weights / gib:.3f} GiB "
        f"{config.student.dtype}, {_sized_by(config)}",
        f"cache       {held.cache / gib:.3f} GiB: {counted(held.kept_frames, 'frame')} and the "
        f"prompt, keys and values of every layer",
        f"latents     {held.latents / 2**20:.3f} MiB: a chunk's input, noise and result",
        f"together    {(held.weights + held.cache + held.latents) / gib:.3f} GiB, and the "
        f"activations of one chunk and the autoencoder; the text encoder is gone by then",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return held
