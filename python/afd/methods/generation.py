"""Videos of an update, generated a batch at a time; those of a prompt may share their beginning.

Shape letters: B videos of a batch, F frames, C channels, H x W latent size, L text tokens, E text
channels; P prompts of a batch, G videos of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.models.student import Student
from afd.models.wan.kv_cache import KVCache
from afd.models.wan.types import LayerKV
from afd.rollout import NoiseSource, stream, stream_layout


@dataclass(frozen=True)
class Streaming:
    """Generation settings of the student (see `afd.rollout.stream`), `batch` videos at a time."""

    denoising_steps: Sequence[float]
    first_chunk_steps: Sequence[float] | None = None
    context_noise: float = 0.0
    batch: int | None = None

    def chunks(
        self, student: Student, text_BLE: Tensor, noise: NoiseSource, cache: KVCache, **how: object
    ) -> Tensor:
        """The chunks of a stream, joined."""
        chunks = stream(
            student,
            text_BLE,
            noise,
            denoising_steps=self.denoising_steps,
            first_chunk_steps=self.first_chunk_steps,
            context_noise=self.context_noise,
            cache=cache,
            **how,  # type: ignore[arg-type]
        )
        return torch.cat(list(chunks), 1)


@dataclass(frozen=True)
class Generated:
    """A batch of videos.

    Attributes:
        x0_BFCHW: in the student's space, float32 on its device.
        cache: their cache after the last chunk, whose context pass is left out; None: freed.
        last_inputs_BFCHW: input of the last denoising step of each chunk; None unless kept.
    """

    x0_BFCHW: Tensor
    text_BLE: Tensor
    cache: KVCache | None
    last_inputs_BFCHW: Tensor | None

    def contexts(self) -> list[list[list[LayerKV]]]:
        """The clean context of each video (`KVCache.parts`)."""
        assert self.cache is not None
        # The last chunk's slots hold a denoising step, not its context; nothing reads them.
        return [self.cache.parts(row) for row in range(len(self.x0_BFCHW))]


@torch.no_grad()
def generate(
    student: Student,
    prompts: Sequence[str],
    seed_B: Tensor,
    streaming: Streaming,
    *,
    keep_last_inputs: bool = False,
) -> Iterator[Generated]:
    """Yield the videos of these prompts and seeds in order, of the training length."""
    layout, draws = stream_layout(student, student.frames), _draws(streaming)
    width = streaming.batch or len(prompts)
    for part in (slice(at, at + width) for at in range(0, len(prompts), width)):
        text_BLE = student.encode(list(prompts[part]))
        cache = student.new_cache(text_BLE, student.frames)
        noise = student.noise_source(seed_B[part], layout, draws)
        inputs: list[Tensor] | None = [] if keep_last_inputs else None
        x0_BFCHW = streaming.chunks(student, text_BLE, noise, cache, last_inputs=inputs)
        given = None if inputs is None else torch.cat(inputs, 1).float()
        yield Generated(x0_BFCHW.float(), text_BLE, cache, given)


@torch.no_grad()
def generate_groups(
    student: Student,
    prompts: Sequence[str],
    seed_B: Tensor,
    streaming: Streaming,
    from_chunk: int,
) -> Iterator[Generated]:
    """Yield the videos of groups that share all chunks before `from_chunk`, group by group.

    These chunks are generated once per prompt, with the noise of the seed of the group's first
    video; the later ones of a video have the noise of its own seed.

    Args:
        prompts: one per group.
        seed_B: of all videos, as many per prompt.
    """
    layout, draws = stream_layout(student, student.frames), _draws(streaming)
    seed_PG = seed_B.view(len(prompts), -1)
    group, past = seed_PG.shape[1], layout[from_chunk][0]
    width = streaming.batch or len(seed_B)
    # Whole groups where they fit a batch, else one group in several.
    count, copies = max(1, width // group), min(width, group)
    for part in (slice(at, at + count) for at in range(0, len(prompts), count)):
        text_PLE = student.encode(list(prompts[part]))
        root = student.new_cache(text_PLE, past)
        noise = student.noise_source(seed_PG[part, 0], layout, draws)
        shared_PFCHW = streaming.chunks(
            student, text_PLE, noise, root, frames=past, remember_last=True
        )
        for seeds in seed_PG[part].split(copies, 1):
            each = seeds.shape[1]
            cache = root.fork(each, student.frames)
            noise = student.noise_source(seeds.flatten(), layout, draws)
            text_BLE = text_PLE.repeat_interleave(each, 0)
            own = streaming.chunks(student, text_BLE, noise, cache, from_chunk=from_chunk)
            whole = torch.cat([shared_PFCHW.repeat_interleave(each, 0), own], 1)
            yield Generated(whole.float(), text_BLE, cache, None)


def _draws(streaming: Streaming) -> int:
    """Most draws of noise in a chunk."""
    return max(len(streaming.denoising_steps), len(streaming.first_chunk_steps or ()))
