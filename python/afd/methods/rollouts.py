"""Videos that a student makes for an update, as a discriminator will see them.

Shape letters: B videos of this process, F frames, C channels, H x W latent size, N copies, L text
tokens, E text channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from afd.discriminators.base import Discriminator
from afd.methods.base import Batch
from afd.models.codec import Codec
from afd.models.student import Student
from afd.models.wan.types import LayerKV
from afd.rollout import stream, stream_layout
from afd.video.config import VideoConfig

# Parts of a rollout that are encoded at a time.
ENCODERS = 4


@dataclass(frozen=True)
class Streaming:
    """How a student's videos are made (see `afd.rollout.stream`); `batch` of them at a time."""

    denoising_steps: Sequence[float]
    first_chunk_steps: Sequence[float] | None = None
    context_noise: float = 0.0
    batch: int | None = None


@dataclass
class Rollouts:
    """This process's videos of one step, group by group.

    Attributes:
        x0_BFCHW: in the student's space, float32 on its device.
        input_BFCHW: what a discriminator looks at of them, on the CPU; None without one.
        contexts: the clean context of each video alone, as it was while the video was made.
        last_inputs_BFCHW: what the last denoising step of each chunk was given; None unless kept.
    """

    x0_BFCHW: Tensor
    prompts: list[str]
    text_BLE: Tensor
    input_BFCHW: Tensor | None
    contexts: list[list[LayerKV]]
    last_inputs_BFCHW: Tensor | None = None

    def context(self, video_N: Tensor) -> list[LayerKV]:
        """The kept contexts of some of the videos, together."""
        held = [self.contexts[video] for video in video_N.tolist()]
        layers = list(zip(*held, strict=True))
        return [
            (_joined([k for k, _ in layer]), _joined([v for _, v in layer])) for layer in layers
        ]


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class InputPipeline:
    """From the student's videos to what the discriminator looks at, like the teacher's.

    With `codec_match` they pass the codec that the teacher's went through; gradients pass it as if
    it were not there.
    """

    def __init__(
        self, discriminator: Discriminator, codec: Codec, video: VideoConfig | None
    ) -> None:
        self.discriminator, self.codec, self.video = discriminator, codec, video

    def __call__(self, x0_BFCHW: Tensor) -> Tensor:
        return self.finish(self.decode(x0_BFCHW))

    def decode(self, x0_BFCHW: Tensor) -> Tensor:
        """The accelerator's part: pixels, or latents where the discriminator sees those."""
        return (
            x0_BFCHW if self.discriminator.input_space == "latents" else self.codec.decode(x0_BFCHW)
        )

    def finish(self, decoded_BFCHW: Tensor) -> Tensor:
        """The rest; of pixels on the CPU it needs no accelerator."""
        video = self.video
        if self.discriminator.input_space == "pixels" and video is not None and video.codec_match:
            from afd.video import through_codec  # needs PyAV, which no other rollout does

            decoded_BFCHW = through_codec(decoded_BFCHW, fps=video.fps, crf=video.crf)
        return self.discriminator.prepare(decoded_BFCHW)


@torch.no_grad()
def roll_out(
    student: Student,
    batch: Batch,
    per_prompt: int,
    generator: Generator,
    streaming: Streaming,
    *,
    to_input: InputPipeline | None = None,
    keep_context: bool = False,
    keep_last_inputs: bool = False,
) -> Rollouts:
    """`per_prompt` videos of the training length for each prompt of this process.

    Encoding a video for `codec_match` takes about as long as making it: threads do so while the
    accelerator goes on with the next ones.
    """
    prompts = [prompt for prompt in batch.prompts for _ in range(per_prompt)]
    seed_B = torch.randint(2**62, (batch.count * per_prompt,), generator=generator)
    seed_B = seed_B[batch.own(per_prompt)]
    layout = stream_layout(student, student.frames)
    draws = max(len(streaming.denoising_steps), len(streaming.first_chunk_steps or ()))
    width = streaming.batch or len(prompts)
    videos, texts, contexts = [], [], []
    given: list[Tensor] = []
    seen: list[Future[Tensor]] = []
    with ThreadPoolExecutor(ENCODERS) as pool:
        for part in (slice(at, at + width) for at in range(0, len(prompts), width)):
            text_BLE = student.encode(prompts[part])
            cache = student.new_cache(text_BLE, student.frames)
            inputs: list[Tensor] | None = [] if keep_last_inputs else None
            chunks = stream(
                student,
                text_BLE,
                student.noise_source(seed_B[part], layout, draws),
                denoising_steps=streaming.denoising_steps,
                first_chunk_steps=streaming.first_chunk_steps,
                context_noise=streaming.context_noise,
                cache=cache,
                last_inputs=inputs,
            )
            x0_BFCHW = torch.cat(list(chunks), 1).float()
            if inputs is not None:
                given.append(torch.cat(inputs, 1).float())
            videos.append(x0_BFCHW)
            texts.append(text_BLE)
            if to_input is not None:
                if len(seen) >= ENCODERS:
                    # Whole videos wait to be encoded: no more of them than are being so.
                    seen[-ENCODERS].result()
                seen.append(pool.submit(to_input.finish, to_input.decode(x0_BFCHW).cpu()))
            if keep_context:
                # The last chunk's slots hold a denoising step, not its context; none looks at them.
                contexts += [
                    [(k[i : i + 1], v[i : i + 1]) for k, v in cache.self_kv]
                    for i in range(len(x0_BFCHW))
                ]
    return Rollouts(
        torch.cat(videos),
        prompts,
        torch.cat(texts),
        torch.cat([part.result() for part in seen]) if seen else None,
        contexts,
        torch.cat(given) if given else None,
    )
