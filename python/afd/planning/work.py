"""A run's memory parts and work phases, derived from its configuration.

`afd.planning.cost_model` has the sizes and formulas; this module applies them to a method, a
discriminator and a number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from afd.config.run import RunConfig
from afd.discriminators.config import LatentConfig, VideoAlignConfig
from afd.discriminators.latent import LatentScorer
from afd.discriminators.videoalign.preprocess import (
    PATCH,
    TEMPORAL,
    frame_indices,
    smart_resize,
)
from afd.discriminators.windows import window_starts
from afd.listing import counted
from afd.methods.config import StudentOptimizerConfig
from afd.models.config import DTYPES
from afd.models.wan.config import WanStudentConfig
from afd.models.wan.sizes import LATENTS
from afd.planning import cost_model as cost
from afd.planning.autoencoders import AUTOENCODERS, TINY
from afd.planning.cost_model import Net
from afd.planning.parts import Part, Phase, gib
from afd.planning.places import Places
from afd.planning.rewards import frozen, networks, shared_passes
from afd.planning.weights import weights_of
from afd.trainer.build import student_waits

SIZES = cost.VideoAlignSizes()


class Work:
    """Memory parts and work phases of one configuration."""

    def __init__(self, config: RunConfig, net: Net, processes: int) -> None:
        self.config, self.net, self.processes = config, net, processes
        # Processes that compute each video together, and what one of them holds of it.
        self.parts = config.parallel.sequence
        self.own = replace(net, tokens=-(-net.tokens // self.parts))
        self.sharded = config.parallel.weights == "fsdp" and processes > 1
        student = config.student
        self.wan = student.kind == "wan"
        self.item = DTYPES[student.dtype].itemsize if student.kind == "wan" else cost.FLOAT
        self.vae_item = DTYPES[getattr(student, "vae_dtype", "float32")].itemsize if self.wan else 0
        self.method: StudentOptimizerConfig = getattr(config, config.method)
        self.group = getattr(self.method, "samples_per_prompt", 1)
        self.rolls = config.method != "sft"
        self.delay = config.afd.delay if config.method == "afd" else 0
        self.discriminator = config.discriminator if config.method in ("afd", "gan") else None
        self.places = Places(config, net)
        self.weights = weights_of(config, net, self.item, processes if self.sharded else 1)
        # With cached videos of earlier teachers at most: the files are not known yet.
        cached = config.replay.teacher == "cached"
        self.taught = config.prompts_per_update if cached else config.taught
        # Prompts of the process that has the most.
        self.prompts = -(-config.prompts_per_update // (processes // self.parts))
        self.videos = self.prompts * self.group
        # Videos of a prompt that the student learns from.
        self.learnt = getattr(self.method, "learnt_per_prompt", self.group)
        # Of replayed prompts it learns from all.
        largest = self.group if config.replayed else self.learnt
        copies = self.prompts * largest * getattr(self.method, "draws", 1)
        self.micro = min(self.method.micro_batch or copies, copies)
        self.pixels = config.video.height * config.video.width
        self.reads_pixels = isinstance(self.discriminator, VideoAlignConfig)
        self.rewards = frozen(config.rewards) if config.method == "afd" else {}
        self.decodes = self.reads_pixels or bool(self.rewards)
        self.tiny_encodes = self.wan and getattr(student, "vae", None) == "tiny"
        self.tiny_decodes = self.tiny_encodes or config.video.decoder == "tiny"
        wan21 = LATENTS["wan2.1"]
        latents = student.latents_of if isinstance(student, WanStudentConfig) else wan21
        self.encoder = (TINY if self.tiny_encodes else AUTOENCODERS)[latents]
        self.decoder = (TINY if self.tiny_decodes else AUTOENCODERS)[latents]
        # The tiny decoder makes the teacher's pixels, too (`afd.models.codec`).
        self.redecodes = self.reads_pixels and self.tiny_decodes
        # Rewards alone need no teacher's videos.
        self.encodes = (self.redecodes or not self.reads_pixels) and not (
            config.method == "afd" and self.discriminator is None
        )

    # --- memory ---

    def memory(self) -> Iterator[Part]:
        """All parts; where rollouts are made ahead, theirs count towards every moment."""
        for part in self._memory():
            if self.delay and part.when in ("rollout", "kept"):
                copies = 1 if part.when == "rollout" else 2
                note = part.note + ("; of two updates" if copies == 2 else "")
                part = Part(part.name, copies * part.bytes, "always", note)
            yield part

    def _memory(self) -> Iterator[Part]:
        yield from self.weights.memory()
        yield from self._codec()
        yield from self._discriminator()
        yield from self._rewards()
        yield from self._rollout()
        yield from self._update()

    def _codec(self) -> Iterator[Part]:
        if not self.wan:
            return
        text = cost.TEXT_PARAMETERS * self.item
        yield Part(
            "text encoder", text, "start", "embeds prompts missing from the cache, then freed"
        )
        numbers = sum(one.parameters for one in {self.encoder, self.decoder})
        yield Part("autoencoder", numbers * self.vae_item, "always", "frozen weights")
        if self.decodes:
            decode = self.decoder.decode_bytes(1, self.pixels, self.vae_item)
            yield Part("decode", decode, "rollout", "one video, streamed")
            if self.config.method == "gan":
                sizes = self.net.frames, self.micro, self.pixels, self.vae_item
                kept = self.decoder.decode_gradient_bytes(*sizes)
                note = f"{counted(self.micro, 'video')} a pass, latent frames recomputed one by one"
                yield Part("decode with gradients", kept, "student", note)
        if self.encodes:
            encode = self.encoder.encode_bytes(self.pixels, self.vae_item)
            yield Part("encode", encode, "start", "one teacher video")

    def _discriminator(self) -> Iterator[Part]:
        discriminator = self.discriminator
        if isinstance(discriminator, VideoAlignConfig):
            item = DTYPES[discriminator.dtype].itemsize
            trained = SIZES.lora(discriminator.lora_rank)
            yield Part("VideoAlign", SIZES.parameters * item, "always", "frozen weights")
            state = 4 * cost.FLOAT * trained
            note = "LoRA, gradients and Adam, fp32"
            yield Part("VideoAlign training", state, "always", note)
            pairs = min(discriminator.micro_batch or self.videos, self.videos)
            patches, _ = self._patches(self._window(discriminator))
            kept = SIZES.activation_bytes(
                patches, item, checkpointed=discriminator.gradient_checkpointing
            )
            moment = "student" if self.config.method == "gan" else "discriminator"
            note = f"{counted(pairs, 'pair')} at a time"
            if self.config.method == "gan":  # the student's gradient goes through every window
                kept *= len(window_starts(self._looked(), self._window(discriminator)))
            yield Part("VideoAlign activations", 2 * pairs * kept, moment, note)
        elif isinstance(discriminator, LatentConfig):
            numbers = sum(p.numel() for p in self._scorer(discriminator).parameters())
            yield Part("discriminator", 4 * cost.FLOAT * numbers, "always", "weights and Adam")
        elif self.config.method == "dmd":
            checkpointed = self.config.student.checkpoint_blocks
            sizes = self.own, self.micro, self.item
            kept = 2 * cost.activation_bytes(*sizes, checkpointed=checkpointed)
            note = f"real or fake, {counted(self.micro, 'video')} a pass, and through their context"
            yield Part("fields' activations", kept, "discriminator", note)

    def _rewards(self) -> Iterator[Part]:
        for dtype, names in networks(self.rewards, self.discriminator):
            size = SIZES.parameters * DTYPES[dtype].itemsize
            note = f"frozen weights of rewards {', '.join(names)}"
            yield Part("VideoAlign of rewards", size, "always", note)

    def _scorer(self, discriminator: LatentConfig) -> LatentScorer:
        with torch.device("meta"):
            return LatentScorer(self.net.channels, 4096, discriminator.width)

    def _rollout(self) -> Iterator[Part]:
        if not self.rolls:
            return
        net, own = self.net, self.own
        batch = min(self.config.student.rollout_batch or self.videos, self.videos)
        note = f"{counted(batch, 'video')} streamed together"
        groups, least = -(-batch // self.group), self.places.least_shared
        cache = cost.kv_bytes(own, batch, self.item, self.places.held)
        if least and net.window is None:
            cache = cost.shared_kv_bytes(own, groups, batch, self.item, least)
        if self.places.stream is not None:
            streams = self.videos if self.places.shared is None else self.prompts
            before = gib(cost.kv_bytes(own, streams, self.item, self.places.held))
            note += f"; on the host at most {before} of keys before the clips"
        yield Part("cache", cache, "rollout", note)
        numbers = net.channels * net.frames * self.pixels // self.config.student.scale[1] ** 2
        yield Part("rollouts", self.videos * numbers * cost.FLOAT, "kept", "latents, fp32")
        if self.keeps_context():
            kept = cost.kv_bytes(own, self.videos, self.item)
            if least:
                kept = cost.shared_kv_bytes(own, self.prompts, self.videos, self.item, least)
            note = f"{self.videos} rollouts' caches (afd.keep_context)"
            yield Part("kept contexts", kept, "kept", note)

    def keeps_context(self) -> bool:
        afd = self.config.afd
        kept = afd.context == "shared_context" and afd.keep_context
        return self.config.method == "afd" and kept

    def _update(self) -> Iterator[Part]:
        net, checkpointed = self.own, self.config.student.checkpoint_blocks
        context = getattr(self.method, "context", "recompute")
        # With gradients through the context, the context is half of the pass.
        halves = 2 if context == "recompute" else 1
        both = [
            halves * cost.activation_bytes(net, self.micro, self.item, checkpointed=c)
            for c in (True, False)
        ]
        held, other = both if checkpointed else reversed(both)
        note = f"{counted(self.micro, 'video')} a pass; {gib(other)} with checkpoint_blocks="
        yield Part("activations", held, "student", note + str(not checkpointed).lower())
        kept = self.keeps_context() and self.places.shared is None
        if context not in ("recompute", "noisy") and not kept:
            past = 0 if self.places.stream is None else self.places.held
            one = cost.kv_bytes(net, self.micro, self.item, net.frames + past)
            yield Part("context", one, "student", "keys and values of a pass's clean videos")

    def checkpoint_bytes(self) -> int:
        """Bytes of one saved state: masters and moments of the student and the discriminator."""
        versions = len(self.weights.own) + 2 * len(self.weights.trained)
        numbers = versions * self.net.trained
        if isinstance(self.discriminator, VideoAlignConfig):
            numbers += 3 * SIZES.lora(self.discriminator.lora_rank)
        elif isinstance(self.discriminator, LatentConfig):
            numbers += 3 * sum(p.numel() for p in self._scorer(self.discriminator).parameters())
        return cost.FLOAT * numbers

    # --- work ---

    def phases(self, distinct: int) -> Iterator[Phase]:
        """The phases of one update. `distinct`: number of distinct teacher videos."""
        config, net = self.config, self.net
        assert config.student.kind == "wan"
        videos = self.taught * self.group
        steps, first = config.student.denoising_steps, config.student.first_chunk_steps
        sizes = len(steps), None if first is None else len(first)
        rollout = cost.rollout_flop(net, *sizes)
        rolled = self.places.rollout_flop(self.taught, self.group, *sizes)
        # Only the student's passes are shared by the processes that have a video together.
        again = self.parts
        decode = again * self.decoder.decode_flop(net.frames, self.pixels)
        if self.encodes:
            encode = self.encoder.encode_flop(net.frames, self.pixels)
            note = "each video once" if again == 1 else f"each video by {again} processes"
            yield Phase("encode the teacher", 0.0, again * encode, distinct, note)
        if self.rolls:
            denoising = counted(len(steps), "step")
            note = f"{counted(videos, 'video')}, {denoising} and a context pass a chunk"
            if len(self.places.all) > 1 or self.places.shared is not None:
                times = rolled / (videos * rollout)
                note += f"; in the mean {times:.3g} times {counted(videos, 'video')}"
            yield Phase("rollout", rolled, 0.0, config.updates, note)
        if self.decodes:
            note = counted(videos, "video")
            count = videos + config.prompts_per_update * self.redecodes
            if self.redecodes:
                note += f" and {config.prompts_per_update} of the teacher"
            yield Phase("decode", 0.0, count * decode, config.updates, note)
        if self.discriminator is not None or config.method == "dmd":
            flop, note = self._critic_work(videos)
            yield Phase("discriminator", flop, 0.0, config.updates, note)
        if self.rewards:
            each = shared_passes(self.rewards)
            flop = again * len(each) * videos * self._rate_flop()
            names = "; ".join(", ".join(names) for names in each)
            passes = f"{counted(len(each), 'pass')} on {counted(videos, 'video')}"
            note = f"{passes}: {names}" if each else "not counted"
            yield Phase("rewards", flop, 0.0, config.updates, note)
        flop, convolutions, note = self._student_work(self.taught * self.learnt, decode)
        updates = max(0, config.updates - student_waits(self.config))
        yield Phase("student", flop, convolutions, updates, note)
        if config.replayed:
            replayed = config.replayed * self.group
            one = rollout + self._replay_flop()
            note = f"{counted(replayed, 'video')} of earlier prompts: rollout, start and student"
            yield Phase("replay", replayed * one, 0.0, updates, note)
        measured = self._evaluated()
        if measured:
            # The discriminator, and its frozen original model on the whole video.
            rate = self._score_flop() + self._rate_flop() if self.reads_pixels else 0.0
            rate += len(shared_passes(self.rewards)) * self._rate_flop()
            note = f"{counted(measured, 'held-out video')} in all, and their decode"
            yield Phase("evaluation", rollout + again * rate, decode, measured, note)

    def _critic_work(self, videos: int) -> tuple[float, str]:
        discriminator, config = self.discriminator, self.config
        if config.method == "dmd":
            fits, checkpointed = config.dmd.score_updates, config.student.checkpoint_blocks
            flop = cost.sft_flop(self.net, draws=1, checkpointed=checkpointed)
            teachers = self.taught
            real = f"{counted(fits, 'update')} of real on {counted(teachers, 'video')}"
            note = f"{real}, of fake on {videos}"
            return fits * (teachers + videos) * flop, note
        if isinstance(discriminator, VideoAlignConfig):
            patches, pictures = self._patches(self._window(discriminator))
            one = SIZES.train_flop(
                patches,
                pictures,
                discriminator.lora_rank,
                checkpointed=discriminator.gradient_checkpointing,
            )
            scored = videos
            if config.method == "gan":
                scored = 0  # scored in the student's update
            elif config.afd.baseline == "teacher":
                scored += self.taught
            # The mean over the run: updates of the discriminator alone may have more.
            steps = sum(map(discriminator.steps_in, range(config.updates))) / config.updates
            total = 2 * videos * one * steps + scored * self._score_flop()
            note = f"{counted(steps, 'step')} on {counted(videos, 'pair')}"
            return self.parts * total, note + (f", and {scored} scores" if scored else "")
        return 0.0, "small; not counted"

    def _rate_flop(self) -> float:
        """Rating one whole video by the released VideoAlign."""
        return SIZES.score_flop(*self._patches(self._looked()), rank=0)

    def _score_flop(self) -> float:
        discriminator = self.discriminator
        assert isinstance(discriminator, VideoAlignConfig)
        window, count = self._window(discriminator), self._looked()
        patches, pictures = self._patches(window)
        one = SIZES.score_flop(patches, pictures, discriminator.lora_rank)
        return len(window_starts(count, window)) * one

    def _student_work(self, videos: int, decode: float) -> tuple[float, float, str]:
        config, net = self.config, self.net
        checkpointed = config.student.checkpoint_blocks
        blocks = "blocks recomputed in the backward" if checkpointed else "all activations kept"
        chunks = getattr(self.method, "chunks_per_update", None)
        part = min(1.0, chunks / net.chunks) if chunks else 1.0
        if config.method == "afd":
            afd = config.afd
            flop = self.places.mean_of(
                lambda clip, first: cost.nft_flop(
                    clip,
                    afd.context,
                    draws=afd.draws,
                    part=min(1.0, chunks / (net.chunks - first)) if chunks else 1.0,
                    kept=self.keeps_context(),
                    prior=len(self.priors()),
                    checkpointed=checkpointed,
                    first=first,
                )
            )
            prior = f", prior to {' and '.join(self.priors())}" if self.priors() else ""
            draws = counted(afd.draws, "draw")
            if self.learnt < self.group:
                draws += f" of {counted(videos, 'video')}"
            return videos * flop, 0.0, f"{afd.context}, {draws}{prior}; {blocks}"
        if config.method == "sft":
            sft = config.sft
            flop = cost.sft_flop(net, draws=sft.draws, part=part, checkpointed=checkpointed)
            note = f"{counted(sft.draws, 'draw')} of {counted(videos, 'video')}"
            return videos * flop, 0.0, f"{note}; {blocks}"
        last = config.gan if config.method == "gan" else config.dmd
        flop = cost.last_step_flop(
            net,
            recompute=last.context == "recompute",
            prior=len(self.priors()),
            checkpointed=checkpointed,
        )
        if config.method == "dmd":
            flop += 2 * (cost.context_flop(net) + cost.noisy_flop(net))
            return videos * flop, 0.0, f"through the last step, with both fields' views; {blocks}"
        if not self.reads_pixels:
            return videos * flop, 0.0, f"through the last step; {blocks}"
        # Forward, recomputation and input gradients, of the discriminator and the decode.
        flop += 3 * self.parts * self._score_flop()
        return videos * flop, videos * 3 * decode, f"through the last step and the decode; {blocks}"

    def priors(self) -> list[str]:
        """The references of the prior that cost a pass each."""
        names: list[str] = [*self.method.references]
        return names if self.config.student.init is not None else names[:1]

    def _replay_flop(self) -> float:
        """The update of one replayed video, without its rollout."""
        config, net = self.config, self.net
        if config.method == "gan":
            recompute = config.gan.context == "recompute"
            checkpointed = config.student.checkpoint_blocks
            return cost.last_step_flop(net, recompute=recompute, prior=1, checkpointed=checkpointed)
        method = config.afd if config.method == "afd" else config.sft
        chunks = method.chunks_per_update
        return cost.replay_flop(
            net,
            config.afd.context if config.method == "afd" else "recompute",
            draws=method.draws,
            part=min(1.0, chunks / net.chunks) if chunks else 1.0,
            kept=self.keeps_context(),
            checkpointed=config.student.checkpoint_blocks,
        )

    def _evaluated(self) -> int:
        """Number of held-out videos over all evaluations of the run."""
        evaluation, steps = self.config.evaluation, self.config.updates
        on_the_way = len(range(0, steps, evaluation.every)) if evaluation.every else 0
        each = on_the_way * evaluation.curve_videos + evaluation.videos
        return each * sum(one.kind != "none" for one in evaluation.each().values())

    def _looked(self) -> int:
        """Number of frames of a video that VideoAlign reads."""
        video = self.config.video
        return len(frame_indices(video.frames, video.fps or 16.0))

    def _window(self, discriminator: VideoAlignConfig) -> int:
        """Number of those frames in a window of the score; of the video without windows."""
        count = self._looked()
        return discriminator.window_frames(self.config.video, count, TEMPORAL) or count

    def _patches(self, frames: int) -> tuple[int, int]:
        """Patches of `frames` frames in VideoAlign's vision tower, and its images of two frames."""
        video, pictures = self.config.video, frames // TEMPORAL
        rows, columns = smart_resize(video.height, video.width, 448 * 448)
        return pictures * (rows // PATCH) * (columns // PATCH), pictures
