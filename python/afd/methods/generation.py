"""Videos of an update, generated a batch at a time; those of a prompt may share their beginning.

Shape letters: B videos of a batch, F frames, C channels, H x W latent size, L text tokens, E text
channels; P prompts of a batch, G videos of each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afd.models.student import Student
from afd.models.wan.kv_cache import KVCache
from afd.models.wan.types import LayerKV
from afd.rollout import NoiseSource, Switch, SwitchMode, stream, stream_layout
from afd_kernels.contracts import require


@dataclass(frozen=True)
class Streaming:
    """Generation settings of the student (see `afd.rollout.stream`), `batch` videos at a time.

    Attributes:
        overlap: whether those of a batch are decoded and rated while the next are generated.
    """

    denoising_steps: Sequence[float]
    first_chunk_steps: Sequence[float] | None = None
    context_noise: float = 0.0
    batch: int | None = None
    overlap: bool = True

    def roll(
        self, student: Student, text_BLE: Tensor, noise: NoiseSource, cache: KVCache, **how: object
    ) -> Iterator[Tensor]:
        """The chunks of streams."""
        return stream(
            student,
            text_BLE,
            noise,
            denoising_steps=self.denoising_steps,
            first_chunk_steps=self.first_chunk_steps,
            context_noise=self.context_noise,
            cache=cache,
            **how,  # type: ignore[arg-type]
        )

    @property
    def draws(self) -> int:
        """Most draws of noise in a chunk."""
        return max(len(self.denoising_steps), len(self.first_chunk_steps or ()))


@dataclass(frozen=True)
class Earlier:
    """Prompts under which streams begin, until they switch to their own before the clip.

    Attributes:
        prompts: one for each of the streams.
        chunk: the first chunk under their own.
        mode: how their context follows (`Switch`).
    """

    prompts: Sequence[str]
    chunk: int
    mode: SwitchMode


@dataclass(frozen=True)
class Before:
    """What streams hold where a clip of them begins.

    Attributes:
        held: per layer keys and values (`KVCache.snapshot`), on the host.
        lead_BFCHW: their last chunk before the clip.
    """

    held: list[LayerKV]
    lead_BFCHW: Tensor


@dataclass(frozen=True)
class Generated:
    """A batch of videos, or of clips of streams.

    Attributes:
        x0_BFCHW: in the student's space, float32 on its device.
        cache: their cache after the last chunk, whose context pass is left out; None: freed.
        last_inputs_BFCHW: input of the last denoising step of each chunk; None unless kept.
        before: of the streams, each of which serves as many clips; None for whole videos.
    """

    x0_BFCHW: Tensor
    text_BLE: Tensor
    cache: KVCache | None
    last_inputs_BFCHW: Tensor | None = None
    before: Before | None = None

    def contexts(self) -> list[list[list[LayerKV]]]:
        """The clean context of each video (`KVCache.parts`)."""
        assert self.cache is not None
        # The last chunk's slots hold a denoising step, not its context; nothing reads them.
        return [self.cache.parts(row) for row in range(len(self.x0_BFCHW))]

    def pasts(self) -> list[list[LayerKV]]:
        """What the stream of each clip held before it, views [1, tokens, h, d]."""
        if self.before is None:
            return []
        streams = len(self.before.lead_BFCHW)
        rows = [row * streams // len(self.x0_BFCHW) for row in range(len(self.x0_BFCHW))]
        return [[(k[i : i + 1], v[i : i + 1]) for k, v in self.before.held] for i in rows]

    def lead_BFCHW(self) -> Tensor | None:
        """The chunk before each clip; None for whole videos."""
        if self.before is None:
            return None
        lead = self.before.lead_BFCHW
        return lead.repeat_interleave(len(self.x0_BFCHW) // len(lead), 0)


def _before(
    streaming: Streaming,
    student: Student,
    text_BLE: Tensor,
    noise: NoiseSource,
    cache: KVCache,
    clip: int,
    earlier: Earlier | None,
) -> Before:
    """Roll streams on to chunk `clip`, in constant memory; a switch there is part of it."""
    how: dict[str, Any] = {"frames": clip * student.chunk, "remember_last": True}
    if earlier is not None:
        how["switches"] = {earlier.chunk: Switch(text_BLE, earlier.mode)}
    chunks = streaming.roll(student, text_BLE, noise, cache, **how)
    (lead,) = deque(chunks, maxlen=1)
    return Before([(k.cpu(), v.cpu()) for k, v in cache.snapshot()], lead.float())


def _first_text(
    student: Student, text_BLE: Tensor, earlier: Earlier | None, part: slice, clip: int
) -> Tensor:
    """The embeddings under which some of the streams begin; `text_BLE`: their own."""
    if earlier is None:
        return text_BLE
    inside = 0 < earlier.chunk <= clip
    require(inside, "earlier", earlier.chunk, f"a switch at a chunk from 1 to the clip's, {clip}")
    return student.encode(list(earlier.prompts[part]))


@torch.no_grad()
def generate(
    student: Student,
    prompts: Sequence[str],
    seed_B: Tensor,
    streaming: Streaming,
    *,
    keep_last_inputs: bool = False,
    clip: int = 0,
    earlier: Earlier | None = None,
) -> Iterator[Generated]:
    """Yield the videos of these prompts and seeds in order, of the training length.

    `clip`: the chunk at which a clip of that length begins, of a longer stream of a student with a
    window; 0: whole videos. `earlier`: the prompts of these streams before a switch.
    """
    held = None if clip else student.frames
    layout, end = stream_layout(student, held), clip * student.chunk + student.frames
    width = streaming.batch or len(prompts)
    for part in (slice(at, at + width) for at in range(0, len(prompts), width)):
        text_BLE = student.encode(list(prompts[part]))
        cache = student.new_cache(_first_text(student, text_BLE, earlier, part, clip), held)
        noise = student.noise_source(seed_B[part], layout, streaming.draws)
        given = student, text_BLE, noise, cache
        before = _before(streaming, *given, clip, earlier) if clip else None
        inputs: list[Tensor] | None = [] if keep_last_inputs else None
        how: dict[str, Any] = {"frames": end, "from_chunk": clip, "last_inputs": inputs}
        x0_BFCHW = torch.cat(list(streaming.roll(*given, **how)), 1).float()
        last = None if inputs is None else torch.cat(inputs, 1).float()
        yield Generated(x0_BFCHW, text_BLE, cache, last, before)


@torch.no_grad()
def generate_groups(
    student: Student,
    prompts: Sequence[str],
    seed_B: Tensor,
    streaming: Streaming,
    fork: int,
    *,
    clip: int = 0,
    earlier: Earlier | None = None,
) -> Iterator[Generated]:
    """Yield the videos of groups that share all chunks before `fork`, group by group.

    These chunks are generated once per prompt, with the noise of the seed of the group's first
    video; the later ones of a video have the noise of its own seed.

    Args:
        prompts: one per group.
        seed_B: of all videos, as many per prompt.
        fork: at least `clip`, counted from the beginning of the stream.
        clip, earlier: as in `generate`; one prompt per group.
    """
    held = None if clip else student.frames
    layout, begin = stream_layout(student, held), fork * student.chunk
    end = clip * student.chunk + student.frames
    seed_PG = seed_B.view(len(prompts), -1)
    group = seed_PG.shape[1]
    width = streaming.batch or len(seed_B)
    # Whole groups where they fit a batch, else one group in several.
    count, copies = max(1, width // group), min(width, group)
    for part in (slice(at, at + count) for at in range(0, len(prompts), count)):
        text_PLE = student.encode(list(prompts[part]))
        first_PLE = _first_text(student, text_PLE, earlier, part, clip)
        root = student.new_cache(first_PLE, None if clip else begin)
        noise = student.noise_source(seed_PG[part, 0], layout, streaming.draws)
        given = student, text_PLE, noise, root
        before = _before(streaming, *given, clip, earlier) if clip else None
        shared: list[Tensor] = []
        how: dict[str, Any]
        if fork > clip:
            how = {"frames": begin, "from_chunk": clip, "remember_last": True}
            shared = list(streaming.roll(*given, **how))
        for seeds in seed_PG[part].split(copies, 1):
            each = seeds.shape[1]
            cache = root.fork(each, held)
            own_noise = student.noise_source(seeds.flatten(), layout, streaming.draws)
            text_BLE = text_PLE.repeat_interleave(each, 0)
            how = {"frames": end, "from_chunk": fork}
            own = streaming.roll(student, text_BLE, own_noise, cache, **how)
            past = [chunk.repeat_interleave(each, 0) for chunk in shared]
            whole = torch.cat([*past, *own], 1).float()
            yield Generated(whole, text_BLE, cache, None, before)
