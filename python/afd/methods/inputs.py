"""Inputs of the scorers, made of the student's videos while it generates the next ones.

Shape letters: B videos, F frames, C channels, H x W latent size.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afd.discriminators.base import Discriminator
from afd.models.codec import Codec
from afd.rewards.base import Reward
from afd.video.config import VideoConfig

# Parts of a rollout that are encoded concurrently.
ENCODERS = 4
# The student's videos by input space, "latents" and "pixels", as far as a scorer takes them.
Spaces = dict[str, Tensor]


class InputPipeline:
    """Turns the student's videos into inputs of the discriminator and of frozen rewards.

    They match the teacher's: with `codec_match` pixels are passed through the video codec of its
    files, which is straight-through for gradients.
    """

    def __init__(
        self,
        discriminator: Discriminator | None,
        codec: Codec,
        video: VideoConfig | None,
        rewards: Sequence[Reward] = (),
    ) -> None:
        self.codec, self.video = codec, video
        self.rewards = list(rewards)
        scorers: list[Discriminator | Reward] = [*rewards]
        if discriminator is not None:
            scorers.insert(0, discriminator)
        # Scorers with one preparation share one input.
        self._scorers: dict[Hashable, Discriminator | Reward] = {}
        for scorer in scorers:
            self._scorers.setdefault(_preparation(scorer), scorer)
        self.spaces = {scorer.input_space for scorer in scorers}

    def place(self, scorer: Discriminator | Reward) -> int:
        """Index of a scorer's input in the result of `finish`."""
        return list(self._scorers).index(_preparation(scorer))

    def __call__(self, x0_BFCHW: Tensor) -> Tensor:
        """The first scorer's input, with gradients."""
        return self.finish(self.decode(x0_BFCHW))[0]

    def decode(self, x0_BFCHW: Tensor, lead_BFCHW: Tensor | None = None) -> Spaces:
        """The part on the accelerator: decode to pixels if a scorer takes pixels.

        `lead_BFCHW`: the chunk before clips of streams. The autoencoder treats the first latent
        frame of a video unlike the others, so a clip is cut from the decoded frames, and encoded
        again for scorers of latents, as the teacher's clips are.
        """
        if lead_BFCHW is not None:
            return self._cut(x0_BFCHW, lead_BFCHW)
        return {
            space: x0_BFCHW if space == "latents" else self.codec.decode(x0_BFCHW)
            for space in self.spaces
        }

    def _cut(self, x0_BFCHW: Tensor, lead_BFCHW: Tensor) -> Spaces:
        whole_BFCHW = torch.cat([lead_BFCHW, x0_BFCHW], 1)
        decoded_BFCHW = self.codec.decode(whole_BFCHW)
        # One video frame for the first latent frame, as many for each of the others.
        each = (decoded_BFCHW.shape[1] - 1) // (whole_BFCHW.shape[1] - 1)
        clip_BFCHW = decoded_BFCHW[:, -(1 + each * (x0_BFCHW.shape[1] - 1)) :]
        found = {"pixels": clip_BFCHW} if "pixels" in self.spaces else {}
        if "latents" in self.spaces:
            found["latents"] = self.codec.encode(clip_BFCHW).float()
        return found

    def finish(self, decoded: Spaces) -> list[Tensor]:
        """The remaining steps; for pixels on the CPU they do not use the accelerator."""
        video = self.video
        if "pixels" in decoded and video is not None and video.codec_match:
            from afd.video import through_codec  # needs PyAV, which other rollouts do not

            matched = through_codec(decoded["pixels"], fps=video.fps, crf=video.crf)
            decoded = {**decoded, "pixels": matched}
        return [scorer.prepare(decoded[scorer.input_space]) for scorer in self._scorers.values()]


def _preparation(scorer: Discriminator | Reward) -> Hashable:
    """What makes a scorer's input: equal for scorers that share it."""
    return (scorer.input_space, getattr(scorer, "prepared_by", scorer))


class Prepared(NamedTuple):
    """What the scorers need of some videos.

    Attributes:
        inputs: one for each preparation (`InputPipeline.place`), on the CPU.
        ratings: scores of the frozen rewards, float32 [B] on the CPU; empty without.
    """

    inputs: list[Tensor]
    ratings: list[Tensor]


class Preparation:
    """Prepares an update's videos for their scorers and rates them by the frozen rewards, a part at
    a time.

    With `beside`, threads decode and rate the parts while the caller generates the next one: on a
    GPU in a stream of their own, for which the caller never waits. Otherwise the caller decodes
    and, in the end, rates. Both give the same bits. Encoding a video for `codec_match` takes about
    as long as generating it, and is left to threads in any case.

    Leaving the block waits for the threads. An error in one is raised by the next call.

    Args:
        rate: whether the frozen rewards are scored.
    """

    def __init__(
        self, pipeline: InputPipeline, device: torch.device, *, beside: bool, rate: bool = True
    ) -> None:
        self._pipeline, self._device = pipeline, device
        self._beside, self._rate = beside, rate
        self._stream = torch.cuda.Stream(device) if beside and device.type == "cuda" else None
        # Networks are used by one thread at a time.
        self._on_device = Lock()
        self._prompts: list[list[str]] = []
        self._parts: list[Future[Prepared]] = []
        self._pool = ThreadPoolExecutor(ENCODERS, "afd prepare")

    def __enter__(self) -> Preparation:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def put(self, x0_BFCHW: Tensor, lead_BFCHW: Tensor | None, prompts: list[str]) -> None:
        """Add a part (see `InputPipeline.decode`)."""
        for part in self._parts:
            if part.done():
                part.result()
        if len(self._parts) >= ENCODERS:
            # Queued videos take memory: no more may wait than are being encoded.
            self._parts[-ENCODERS].result()
        self._prompts.append(prompts)
        if not self._beside:
            decoded = self._decoded(x0_BFCHW, lead_BFCHW)
            self._parts.append(self._pool.submit(self._finished, decoded))
            return
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self._device).record_event()
            for x in (x0_BFCHW, lead_BFCHW):
                if x is not None:
                    # Its memory goes to no other tensor before the decoder has read it.
                    x.record_stream(self._stream)
        given = x0_BFCHW, lead_BFCHW, prompts, ready
        self._parts.append(self._pool.submit(self._prepared, *given))

    def results(self) -> Prepared:
        """All parts as one."""
        parts = [part.result() for part in self._parts]
        if not self._beside:
            parts = [
                Prepared(part.inputs, self._rated(part.inputs, prompts))
                for part, prompts in zip(parts, self._prompts, strict=True)
            ]
        return Prepared(
            [torch.cat(of) for of in zip(*(part.inputs for part in parts), strict=True)],
            [torch.cat(of) for of in zip(*(part.ratings for part in parts), strict=True)],
        )

    # --- in a thread ---

    @torch.no_grad()
    def _prepared(
        self, x0_BFCHW: Tensor, lead_BFCHW: Tensor | None, prompts: list[str], ready: Any
    ) -> Prepared:
        with self._in_turn():
            if self._stream is not None:
                self._stream.wait_event(ready)
            decoded = self._decoded(x0_BFCHW, lead_BFCHW)
        inputs = self._pipeline.finish(decoded)
        with self._in_turn():
            return Prepared(inputs, self._rated(inputs, prompts))

    def _finished(self, decoded: Spaces) -> Prepared:
        return Prepared(self._pipeline.finish(decoded), [])

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with self._on_device, stream:
            yield

    # --- of a part ---

    def _decoded(self, x0_BFCHW: Tensor, lead_BFCHW: Tensor | None) -> Spaces:
        decoded = self._pipeline.decode(x0_BFCHW, lead_BFCHW)
        # Tensors of a plan, on the meta device, have no values to move.
        return {space: x if x.is_meta else x.cpu() for space, x in decoded.items()}

    def _rated(self, inputs: list[Tensor], prompts: list[str]) -> list[Tensor]:
        pipeline = self._pipeline
        return [
            reward.score(inputs[pipeline.place(reward)], prompts).float().cpu()
            for reward in (pipeline.rewards if self._rate else ())
        ]
