"""`afd train --dry-run`: what a run will need in memory, hours and money, before it starts.

Nothing large is loaded or allocated. Sizes of a Wan network come from the checkpoint where it is
there, else they are the released ones; everything else is `afd.cost_model`'s arithmetic, and every
number an estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from afd import cost_model as cost
from afd.config import ConfigError, RunConfig
from afd.cost_model import MACHINES, Net
from afd.discriminators.config import LatentConfig, VideoAlignConfig
from afd.discriminators.latent import LatentScorer
from afd.discriminators.videoalign_preprocess import PATCH, frame_indices, smart_resize
from afd.methods.config import StudentOptimizerConfig
from afd.models.causal_wan import CausalWan, WanConfig
from afd.models.checkpoints import infer_config, read_weights
from afd.models.config import DTYPES
from afd.models.toy import ToyStudent
from afd.plan_teacher import TeacherPlan, missing_files, teacher_plan

GIB = 2**30
READER = cost.Reader()
# When a part of the memory is in use; "always" adds to each of the others.
MOMENTS = ("rollout", "critic", "student")


@dataclass(frozen=True)
class Part:
    """Memory of one process: bytes, when (see MOMENTS, or "always", "kept", "start") and what."""

    name: str
    bytes: int
    when: str
    note: str


@dataclass(frozen=True)
class Phase:
    """Work of all processes in one update: FLOP of products and of convolutions; and how often it
    is done in the run."""

    name: str
    flop: float
    convolutions: float
    times: float
    note: str

    @property
    def seconds(self) -> float:
        """GPU-seconds of one time, at the assumed utilisation of an H100 or H200."""
        rate = MACHINES["H200"].flop
        products = self.flop / (rate * cost.UTILISATION)
        return products + self.convolutions / (rate * cost.CONVOLUTIONS)


@dataclass(frozen=True)
class Plan:
    """Everything that the dry run tells. `phases` is empty for the toy, whose time is not one of
    a GPU."""

    config: RunConfig
    processes: int
    net: Net
    memory: list[Part]
    phases: list[Phase]
    teacher: TeacherPlan
    checkpoint_bytes: int
    missing: list[str]

    def peaks(self) -> dict[str, int]:
        """Bytes held at most by one process, at each moment."""
        fixed = sum(part.bytes for part in self.memory if part.when == "always")
        kept = sum(part.bytes for part in self.memory if part.when == "kept")
        return {
            moment: fixed + kept + sum(part.bytes for part in self.memory if part.when == moment)
            for moment in MOMENTS
        }

    @property
    def gpu_seconds(self) -> float:
        """Of the whole run, all processes together."""
        return sum(phase.seconds * phase.times for phase in self.phases)


def make_plan(config: RunConfig, processes: int = 1) -> Plan:
    """The plan of a run on so many processes, one GPU each.

    Raises ConfigError where the student's checkpoint is there and is none.
    """
    if not 1 <= processes <= config.prompts_per_step:
        raise ConfigError(
            f"processes is {processes}; needed: 1 to prompts_per_step, {config.prompts_per_step}"
        )
    try:
        net = student_net(config)
    except ValueError as error:  # what the checkpoint holds is not what is needed
        raise ConfigError(str(error)) from error
    work = _Work(config, net, processes)
    teacher = teacher_plan(config)
    return Plan(
        config=config,
        processes=processes,
        net=net,
        memory=[part for part in work.memory() if part.bytes],
        phases=list(work.phases(teacher.distinct)) if config.student.kind == "wan" else [],
        teacher=teacher,
        checkpoint_bytes=work.checkpoint_bytes(),
        missing=list(missing_files(config)),
    )


def student_net(config: RunConfig) -> Net:
    """The student's sizes: the checkpoint's where it is there, else the released ones."""
    student = config.student
    rank = student.lora.rank if student.lora is not None else None
    if student.kind == "toy":
        toy = ToyStudent.load(student.checkpoint)
        wan, frames = toy.net.config, toy.frames
        grid = wan.grid(*toy.frame_shape[1:])
    else:
        wan = WanConfig(**student.network)
        if student.checkpoint is not None and student.checkpoint.exists():
            held, written = read_weights(student.checkpoint, ema=student.ema)
            found = infer_config(held, written, head_dim=student.head_dim)
            wan = replace(found, **student.network)
        frames = 1 + (config.video.frames - 1) // 4
        grid = wan.grid(config.video.height // 8, config.video.width // 8)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in CausalWan(wan).parameters())
    return Net(
        dim=wan.dim,
        ffn=wan.ffn_dim,
        layers=wan.num_layers,
        text_len=wan.text_len,
        parameters=parameters,
        frames=frames,
        chunk=wan.chunk,
        tokens=grid[0] * grid[1],
        lora=rank,
    )


class _Work:
    """One configuration's parts of memory and phases of work."""

    def __init__(self, config: RunConfig, net: Net, processes: int) -> None:
        self.config, self.net, self.processes = config, net, processes
        student = config.student
        self.wan = student.kind == "wan"
        self.item = DTYPES[student.dtype].itemsize if student.kind == "wan" else cost.FLOAT
        self.vae_item = DTYPES[student.vae_dtype].itemsize if student.kind == "wan" else 0
        self.method: StudentOptimizerConfig = getattr(config, config.method)
        self.group = getattr(self.method, "samples_per_prompt", 1)
        self.rolls = config.method != "sft"
        self.critic = config.discriminator if config.method in ("afd", "gan") else None
        # Of the process with the most prompts.
        self.prompts = -(-config.prompts_per_step // processes)
        self.videos = self.prompts * self.group
        draws = getattr(self.method, "draws", 1)
        self.micro = min(self.method.micro_batch or self.videos * draws, self.videos * draws)
        self.pixels = config.video.height * config.video.width
        self.sees_video = isinstance(self.critic, VideoAlignConfig)

    # --- memory ---

    def memory(self) -> Iterator[Part]:
        yield from self._weights()
        yield from self._codec()
        yield from self._critic()
        yield from self._rollout()
        yield from self._update()

    def versions(self) -> tuple[list[str], list[str]]:
        """Versions of the weights beside the reference, and those of them that are trained."""
        method, config = self.config.method, self.config
        if method == "afd":
            names = ["theta", "old"] if config.afd.old == "ema" else ["theta"]
            return names + (["ema"] if config.afd.ema_decay is not None else []), ["theta"]
        if method == "dmd":
            return ["theta", "ema", "real", "fake"], ["theta", "real", "fake"]
        return ["theta", "ema"], ["theta"]

    def _weights(self) -> Iterator[Part]:
        net, lora = self.net, self.net.lora is not None
        names, trained = self.versions()
        sharded = self.config.parallel == "fsdp" and self.processes > 1
        parts = self.processes if sharded else 1
        # FSDP's shares are fp32 and are the masters; elsewhere a narrower network has copies.
        held = cost.FLOAT if sharded else self.item
        master = 0 if held == cost.FLOAT else cost.FLOAT
        prior = getattr(self.method, "prior_weight", 0) > 0
        if lora:
            yield Part("network", net.parameters * held // parts, "always", "frozen weights")
            one = net.lora_parameters * (held + master) // parts
            size = f"{net.lora_parameters:,} numbers each"
            yield Part("adapters", len(names) * one, "always", f"{', '.join(names)}: {size}")
        else:
            one = net.parameters * (held + master) // parts
            size = f"{net.parameters:,} numbers each"
            yield Part("network", len(names) * one, "always", f"{', '.join(names)}: {size}")
            if prior:
                reference = net.parameters * held // parts
                yield Part("reference", reference, "always", "frozen copy for the prior")
        if sharded:
            note = "all shares, gathered for a pass"
            yield Part("gathered", net.parameters * self.item, "always", note)
        numbers = len(trained) * net.trained // parts
        yield Part("optimizer", 2 * cost.FLOAT * numbers, "always", "Adam's two moments, fp32")
        yield Part("gradients", cost.FLOAT * numbers, "always", "fp32")

    def _codec(self) -> Iterator[Part]:
        if not self.wan:
            return
        text = cost.TEXT_PARAMETERS * self.item
        yield Part("text encoder", text, "start", "embeds what the cache lacks, then it goes")
        weights = cost.VAE_PARAMETERS * self.vae_item
        yield Part("autoencoder", weights, "always", "frozen weights")
        if self.sees_video:
            moment = "student" if self.config.method == "gan" else "rollout"
            decode = cost.decode_bytes(1, self.pixels, self.vae_item)
            yield Part("decode", decode, moment, "one video, streamed")
        else:
            encode = cost.encode_bytes(self.pixels, self.vae_item)
            yield Part("encode", encode, "start", "one teacher video")

    def _critic(self) -> Iterator[Part]:
        critic = self.critic
        if isinstance(critic, VideoAlignConfig):
            item = DTYPES[critic.dtype].itemsize
            trained = READER.lora(critic.lora_rank)
            yield Part("VideoAlign", READER.parameters * item, "always", "frozen weights")
            state = 4 * cost.FLOAT * trained
            note = "LoRA, gradients and Adam, fp32"
            yield Part("VideoAlign training", state, "always", note)
            pairs = min(critic.micro_batch or self.videos, self.videos)
            patches, _ = self._patches()
            kept = READER.activation_bytes(
                patches, item, checkpointed=critic.gradient_checkpointing
            )
            moment = "student" if self.config.method == "gan" else "critic"
            note = f"{pairs} pair(s) at a time"
            yield Part("VideoAlign activations", 2 * pairs * kept, moment, note)
        elif isinstance(critic, LatentConfig):
            numbers = sum(p.numel() for p in self._scorer(critic).parameters())
            yield Part("discriminator", 4 * cost.FLOAT * numbers, "always", "weights and Adam")

    def _scorer(self, critic: LatentConfig) -> LatentScorer:
        with torch.device("meta"):
            return LatentScorer(16, 4096, critic.width)

    def _rollout(self) -> Iterator[Part]:
        if not self.rolls:
            return
        net, batch = self.net, min(self.config.student.rollout_batch or self.videos, self.videos)
        note = f"{batch} video(s) streamed together"
        yield Part("cache", cost.kv_bytes(net, batch, self.item), "rollout", note)
        numbers = 16 * net.frames * self.pixels // 64 if self.wan else net.frames * 3 * self.pixels
        yield Part("rollouts", self.videos * numbers * cost.FLOAT, "kept", "latents, fp32")
        if self.sees_video:
            looked = self._looked() * 3 * self.pixels * cost.FLOAT
            note = f"{self._looked()} frames of each, student's and teacher's"
            yield Part("frames looked at", (self.videos + self.prompts) * looked, "kept", note)
        if self._keeps_context():
            kept = cost.kv_bytes(net, self.videos, self.item)
            note = f"{self.videos} rollouts' caches (afd.keep_context)"
            yield Part("kept contexts", kept, "kept", note)

    def _keeps_context(self) -> bool:
        afd = self.config.afd
        kept = afd.context == "shared_context" and afd.keep_context
        return self.config.method == "afd" and kept

    def _update(self) -> Iterator[Part]:
        net, checkpointed = self.net, self.config.student.checkpoint_blocks
        context = getattr(self.method, "context", "recompute")
        # Where gradients go through the context it is half of the pass.
        halves = 2 if context == "recompute" else 1
        both = [
            halves * cost.activation_bytes(net, self.micro, self.item, checkpointed=c)
            for c in (True, False)
        ]
        held, other = both if checkpointed else reversed(both)
        told = f"{self.micro} video(s) a pass; {_size(other)} with checkpoint_blocks="
        yield Part("activations", held, "student", told + str(not checkpointed).lower())
        if halves == 1 and not self._keeps_context():
            one = cost.kv_bytes(net, self.micro, self.item)
            yield Part("context", one, "student", "keys and values of a pass's clean videos")

    def checkpoint_bytes(self) -> int:
        """One saved state: masters of all versions, moments of the trained, the critic's alike."""
        names, trained = self.versions()
        numbers = (len(names) + 2 * len(trained)) * self.net.trained
        if isinstance(self.critic, VideoAlignConfig):
            numbers += 3 * READER.lora(self.critic.lora_rank)
        elif isinstance(self.critic, LatentConfig):
            numbers += 3 * sum(p.numel() for p in self._scorer(self.critic).parameters())
        return cost.FLOAT * numbers

    # --- work ---

    def phases(self, distinct: int) -> Iterator[Phase]:
        """`distinct`: teacher videos that are different."""
        config, net = self.config, self.net
        assert config.student.kind == "wan"
        videos = config.prompts_per_step * self.group
        steps, first = config.student.steps, config.student.first_chunk_steps
        rollout = cost.rollout_flop(net, len(steps), None if first is None else len(first))
        decode = cost.decode_flop(net.frames, self.pixels)
        if not self.sees_video:
            encode = cost.encode_flop(net.frames, self.pixels)
            yield Phase("encode the teacher", 0.0, encode, distinct, "each video once")
        if self.rolls:
            passes = f"{len(steps)} steps and a context pass a chunk"
            yield Phase(
                "rollout", videos * rollout, 0.0, config.steps, f"{videos} videos, {passes}"
            )
        if self.sees_video and self.config.method == "afd":
            yield Phase("decode", 0.0, videos * decode, config.steps, f"{videos} videos")
        if self.critic is not None or config.method == "dmd":
            flop, note = self._critic_work(videos)
            yield Phase("critic", flop, 0.0, config.steps, note)
        flop, convolutions, note = self._student_work(videos, decode)
        updates = max(0, config.steps - self._warmup())
        yield Phase("student", flop, convolutions, updates, note)
        measured = self._evaluated()
        if measured:
            rate = self._score_flop() if self.sees_video else 0.0
            note = f"{measured} held-out videos in all, and their decode"
            yield Phase("evaluation", rollout + rate, decode, measured, note)

    def _critic_work(self, videos: int) -> tuple[float, str]:
        critic, config = self.critic, self.config
        if config.method == "dmd":
            fits, checkpointed = config.dmd.score_updates, config.student.checkpoint_blocks
            flop = cost.sft_flop(self.net, draws=1, checkpointed=checkpointed)
            return 2 * fits * videos * flop, f"{fits} update(s) of both fields on {videos} videos"
        if isinstance(critic, VideoAlignConfig):
            patches, pictures = self._patches()
            one = READER.train_flop(
                patches, pictures, critic.lora_rank, checkpointed=critic.gradient_checkpointing
            )
            total = 2 * videos * one * critic.steps_per_update + videos * self._score_flop()
            return total, f"{critic.steps_per_update} step(s) on {videos} pairs, and their scores"
        return 0.0, "small; not counted"

    def _score_flop(self) -> float:
        critic = self.critic
        assert isinstance(critic, VideoAlignConfig)
        patches, pictures = self._patches()
        return READER.score_flop(patches, pictures, critic.lora_rank)

    def _student_work(self, videos: int, decode: float) -> tuple[float, float, str]:
        config, net = self.config, self.net
        checkpointed = config.student.checkpoint_blocks
        told = "blocks computed again in the backward" if checkpointed else "all activations kept"
        chunks = getattr(self.method, "chunks_per_update", None)
        part = min(1.0, chunks / net.chunks) if chunks else 1.0
        if config.method == "afd":
            afd = config.afd
            flop = cost.nft_flop(
                net,
                afd.context,
                draws=afd.draws,
                part=part,
                kept=self._keeps_context(),
                prior=afd.prior_weight > 0,
                checkpointed=checkpointed,
            )
            return videos * flop, 0.0, f"{afd.context}, {afd.draws} draw(s); {told}"
        if config.method == "sft":
            sft = config.sft
            flop = cost.sft_flop(net, draws=sft.draws, part=part, checkpointed=checkpointed)
            return videos * flop, 0.0, f"{sft.draws} draw(s) of {videos} videos; {told}"
        last = config.gan if config.method == "gan" else config.dmd
        flop = cost.last_step_flop(
            net,
            recompute=last.context == "recompute",
            prior=last.prior_weight > 0,
            checkpointed=checkpointed,
        )
        if config.method == "dmd":
            flop += 2 * (cost.context_flop(net) + cost.noisy_flop(net))
            return videos * flop, 0.0, f"through the last step, with both fields' views; {told}"
        if not self.sees_video:
            return videos * flop, 0.0, f"through the last step; {told}"
        # Forward, the same again in the backward, and the backward; and so through the critic.
        flop += 3 * self._score_flop()
        return videos * flop, videos * 4 * decode, f"through the last step and the decode; {told}"

    def _warmup(self) -> int:
        if self.config.method == "dmd":
            return self.config.dmd.score_warmup_steps
        return self.critic.warmup_steps if self.critic is not None else 0

    def _evaluated(self) -> int:
        """Held-out videos of all evaluations of the run."""
        evaluation, steps = self.config.evaluation, self.config.steps
        if evaluation.kind == "none":
            return 0
        on_the_way = len(range(0, steps, evaluation.every)) if evaluation.every else 0
        return on_the_way * evaluation.curve_videos + evaluation.videos

    def _looked(self) -> int:
        """Frames of a video that VideoAlign looks at."""
        video = self.config.video
        return len(frame_indices(video.frames, video.fps or 16.0))

    def _patches(self) -> tuple[int, int]:
        """Patches of one video in VideoAlign's vision tower, and the pictures they come from."""
        video, pictures = self.config.video, self._looked() // 2
        rows, columns = smart_resize(video.height, video.width, 448 * 448)
        return pictures * (rows // PATCH) * (columns // PATCH), pictures


# --- for a reader ---


def show(plan: Plan, console: Console) -> None:
    """The plan as tables and sentences; estimates, with what they assume."""
    config, net = plan.config, plan.net
    source = "" if config.student.kind == "toy" else _source(config)
    for line in (
        f"{config.name}: {config.method}, {config.steps} updates of {config.prompts_per_step} "
        f"prompts, {plan.processes} process(es)",
        f"student: {net.parameters:,} parameters{source}; "
        f"{net.frames} latent frames in {net.chunks} chunks, {net.tokens} tokens a frame",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    _show_memory(plan, console)
    if plan.phases:
        _show_time(plan, console)
    for line in plan.teacher.lines(plan.gpu_seconds / plan.processes):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    keep = config.checkpoint.keep + 1
    disk = f"disk: {plan.checkpoint_bytes / 1e9:.2f} GB a checkpoint, up to {keep} at a time"
    console.print(disk, highlight=False, soft_wrap=True, markup=False)
    for line in plan.missing:
        console.print(f"not here: {line}", highlight=False, soft_wrap=True, markup=False)
    console.print("nothing was started; every number above is an estimate", highlight=False)


def _source(config: RunConfig) -> str:
    path = getattr(config.student, "checkpoint", None)
    there = path is not None and Path(path).exists()
    return f" ({path})" if there else " (the released sizes; the checkpoint is not there)"


def _show_memory(plan: Plan, console: Console) -> None:
    where = "CPU" if plan.config.student.kind == "toy" else "GPU"
    table = Table(title=f"memory of each {where} process (estimate)", title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    table.add_column("when")
    table.add_column("what")
    for part in plan.memory:
        table.add_row(part.name, _size(part.bytes), part.when, part.note)
    console.print(table)
    peaks = plan.peaks()
    highest = max(peaks, key=lambda moment: peaks[moment])
    told = ", ".join(f"{moment} {_size(held)}" for moment, held in peaks.items())
    line = f"at most {_size(peaks[highest])}, in {highest} ({told})"
    if plan.phases:
        line += "; " + ", ".join(_fits(plan, name) for name in MACHINES)
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.2f} MiB"


def _fits(plan: Plan, name: str) -> str:
    held, there = max(plan.peaks().values()), MACHINES[name].memory
    word = "fits" if held < 0.9 * there else "is tight on" if held < there else "is too much for"
    return f"{word} {'' if word != 'fits' else 'an '}{name} ({there / GIB:.0f} GiB)"


def _show_time(plan: Plan, console: Console) -> None:
    assumed = (
        f"{cost.UTILISATION:.0%} of an H100's or H200's {MACHINES['H200'].flop / 1e12:.0f} "
        f"TFLOP/s (bf16), {cost.CONVOLUTIONS:.0%} in the autoencoder"
    )
    title = f"GPU time (estimate, assuming {assumed})"
    table = Table(title=title, title_justify="left")
    table.add_column("phase")
    for name in ("PFLOP each", "GPU-s each", "times", "GPU-h in all"):
        table.add_column(name, justify="right")
    table.add_column("what")
    for phase in plan.phases:
        table.add_row(
            phase.name,
            f"{(phase.flop + phase.convolutions) / 1e15:.2f}",
            f"{phase.seconds:.1f}",
            f"{phase.times:g}",
            f"{phase.seconds * phase.times / 3600:.2f}",
            phase.note,
        )
    console.print(table)
    total = plan.gpu_seconds / 3600
    line = (
        f"together {total:.1f} GPU-hours, {total / plan.processes:.1f} hours on "
        f"{plan.processes} GPU(s)"
    )
    console.print(line, highlight=False, soft_wrap=True, markup=False)
