"""One take: endless streams of all compared students from one prompt, seed and start.

Shape letters: F frames, c frames of one chunk, H x W pixels. Every stream has a batch of one.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.models.noise import NoiseSource
from afd.models.wan.kv_cache import cache_bytes
from afd.rollout import Switch, SwitchMode, counted_noise, stream, stream_layout
from afd.sampling.config import SampleConfig
from afd.sampling.jobs import PromptSwitch
from afd.sampling.sample import Pipeline, load
from afd.video import read_clip, to_uint8

# A take's switches are kept for its recording.
MAX_SWITCHES = 10_000


@dataclass(frozen=True)
class Compared:
    """A loaded student.

    Attributes:
        label: its name on the page.
        config: what `afd sample` needs to make the same latents.
    """

    label: str
    config: SampleConfig
    pipeline: Pipeline


def load_students(
    configs: Sequence[SampleConfig], labels: Sequence[str], prompts: Sequence[str]
) -> list[Compared]:
    """Load every student, with these prompts embedded. Raises ConfigError or ValueError."""
    wanted = sorted(set(prompts))
    return [Compared(n, c, load(c, wanted)) for n, c in zip(labels, configs, strict=True)]


@dataclass
class Seconds:
    """Seconds of a chunk by part, summed over the students."""

    context: float = 0.0
    switch: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Chunk:
    """A finished chunk of every student.

    Attributes:
        start: its first video frame.
        frames_FHWC: uint8, by student.
        latents: [1, c, C, H, W] on the device, by student.
        cache: bytes of the caches as allocated, and as the formula has them.
    """

    index: int
    start: int
    prompt: str
    switched: bool
    frames_FHWC: list[Tensor]
    latents: list[Tensor]
    seconds: Seconds
    cache: tuple[int, int]


class Take:
    """The streams of all students; `next` makes one chunk of each.

    Attributes:
        switches: those made so far.
        prompt: the present prompt.
        chunk: index of the next chunk.
        frames, shown: latent frames and video frames made so far.
    """

    def __init__(
        self,
        students: Sequence[Compared],
        prompt: str,
        seed: int,
        picture: bytes | None = None,
    ) -> None:
        """`picture`: PNG of the first frame, its own chunk; None: the stream begins with noise."""
        self.first_prompt = self.prompt = prompt
        self.seed, self.picture = seed, picture
        self.switches: list[PromptSwitch] = []
        self.chunk = self.frames = self.shown = 0
        self._streams = [_Stream(student, prompt, seed, picture) for student in students]
        self._given: list[Switch | None] = [None] * len(students)

    def switch(self, prompt: str, mode: SwitchMode) -> PromptSwitch:
        """Change the prompt at the next chunk, which must be made before another switch.

        Raises ValueError if a text encoder does not accept it; nothing has changed then.
        """
        if len(self.switches) >= MAX_SWITCHES:
            raise ValueError(f"switch: the take has {MAX_SWITCHES} already; needed: a restart")
        texts = [one.student.pipeline.text([prompt]) for one in self._streams]
        self._given = [Switch(text_BLE, mode) for text_BLE in texts]
        made = PromptSwitch(self.chunk, prompt, mode)
        self.switches.append(made)
        self.prompt = prompt
        return made

    def next(self) -> Chunk:
        """Make the next chunk. After an exception the take cannot go on."""
        switched, self._given = self._given, [None] * len(self._streams)
        seconds = Seconds()
        latents, frames = [], []
        for one, given in zip(self._streams, switched, strict=True):
            latent, pixels = one.next(given, seconds)
            latents.append(latent)
            frames.append(pixels)
        caches = [one.cache_bytes() for one in self._streams]
        made = Chunk(
            self.chunk,
            self.shown,
            self.prompt,
            switched[0] is not None,
            frames,
            latents,
            seconds,
            (sum(held for held, _ in caches), sum(formula for _, formula in caches)),
        )
        self.chunk += 1
        self.frames += latents[0].shape[1]
        self.shown += len(frames[0])
        return made

    def close(self) -> None:
        """End the streams. Their caches stay with the students, for the next take."""
        for one in self._streams:
            one.chunks = iter(())


class _Stream:
    """The stream of one student, with a clock in its gaps."""

    def __init__(self, student: Compared, prompt: str, seed: int, picture: bytes | None) -> None:
        self.student = student
        pipeline, config = student.pipeline, student.config.student
        self._model = pipeline.student
        self._device = self._model.device
        prefix = None if picture is None else _latent(student, picture)
        layout = stream_layout(self._model, None, 0 if prefix is None else 1)
        draws = max(len(config.denoising_steps), len(config.first_chunk_steps or ()))
        shape = self._model.frame_shape
        noise = counted_noise(
            [seed], layout, draws, shape, device=self._device, dtype=self._model.dtype
        )
        text_BLE = pipeline.text([prompt])
        self._cache = pipeline.cache(text_BLE, None)
        self._decode, reencode = pipeline.decoder(student.config)
        self._switch: Switch | None = None
        self._marks: dict[str, float] = {}
        chunks: Iterator[Tensor] = stream(
            self._model,
            text_BLE,
            self._timed(noise),
            frames=None,
            denoising_steps=config.denoising_steps,
            first_chunk_steps=config.first_chunk_steps,
            prefix_BFCHW=prefix,
            switches=self._asked,
            context_noise=config.context_noise,
            cache=self._cache,
            recache=student.config.recache,
            reencode=reencode,
        )
        self.chunks = chunks

    def next(self, switch: Switch | None, seconds: Seconds) -> tuple[Tensor, Tensor]:
        """The next chunk's latents, and its frames as uint8 [F, H, W, 3]."""
        self._switch = switch
        begun = self._now()
        self._marks.clear()
        latent = next(self.chunks)
        done = self._now()
        with torch.no_grad():
            frames_FHWC = to_uint8(self._decode(latent)[0])
        decoded = self._now()
        asked = self._marks["asked"]
        ready = self._marks.get("ready", done)
        seconds.context += asked - begun
        seconds.switch += ready - asked
        seconds.denoise += done - ready
        seconds.decode += decoded - done
        return latent, frames_FHWC

    def cache_bytes(self) -> tuple[int, int]:
        """Bytes of the cache as allocated, and as the formula has them."""
        wan, cache = self._model.net.config, self._cache
        slots = cache.frames * cache.tokens_per_frame
        dtype = cache.self_kv[0][0].dtype
        formula = cache_bytes(wan.num_layers, 1, slots, wan.text_len, wan.dim, dtype)
        return cache.bytes, formula

    def _asked(self, chunk: int) -> Switch | None:
        # Called after the context pass of the chunk before.
        self._marks["asked"] = self._now()
        return self._switch

    def _timed(self, noise: NoiseSource) -> NoiseSource:
        def draw(chunk: int, step: int) -> Tensor:
            # The first draw follows the switch and its recache.
            if "ready" not in self._marks:
                self._marks["ready"] = self._now()
            return noise(chunk, step)

        return draw

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _latent(student: Compared, picture: bytes) -> Tensor:
    """The latent frame of a picture, [1, 1, C, H, W], as `afd sample image=` encodes it."""
    config, model = student.config, student.pipeline.student
    clip = read_clip(io.BytesIO(picture), frames=1, height=config.height, width=config.width)
    with torch.no_grad():
        video_BFCHW = clip.video_FCHW[None].to(model.device)
        return student.pipeline.codec.encode(video_BFCHW).to(model.dtype)
