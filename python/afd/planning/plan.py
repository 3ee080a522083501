"""`afd train --dry-run`: estimate the memory, hours and money that a run needs.

Nothing large is loaded or allocated. The sizes of a Wan network come from the checkpoint if it
exists, else they are the released ones; everything else comes from `afd.planning.cost_model`. All
numbers are estimates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from afd.config.run import RunConfig
from afd.distributed import refuse_parts
from afd.errors import ConfigError
from afd.hub import missing_path
from afd.listing import counted
from afd.methods.config import TimesConfig
from afd.methods.copies import check_chunks
from afd.planning import cost_model as cost
from afd.planning.communication import Traffic, traffic
from afd.planning.cost_model import MACHINES, Net
from afd.planning.parts import GIB, Part, Phase, gib
from afd.planning.work import Work
from afd.teachers.forecast import Forecast
from afd.trainer.build import check_size, not_training, refuse_shared_videos
from afd.trainer.origin import parent_ranks
from afd.trainer.run_folder import refuse_another_run, refuse_idle_processes, with_commits

# Part of a GPU's memory that a plan may use; the rest is for the allocator and the libraries.
MARGIN = 0.9
# When a part of the memory is in use; "always" counts towards each of these.
MOMENTS = ("rollout", "discriminator", "student")
# Phases that are not part of every update.
BESIDE = ("encode the teacher", "evaluation")


@dataclass(frozen=True)
class Plan:
    """The result of a dry run. `phases` is empty for the toy, which does not run on a GPU."""

    config: RunConfig
    processes: int
    net: Net
    memory: list[Part]
    phases: list[Phase]
    teacher: Forecast
    checkpoint_bytes: int
    missing: list[str]
    traffic: list[Traffic]

    def peaks(self) -> dict[str, int]:
        """Peak bytes of one process at each moment."""
        return peaks(self.memory)

    def overlapped(self) -> tuple[float, float] | None:
        """GPU-seconds of an update's rollout with decode, and of the rest, which run at the same
        time with `afd.async=1`; None without."""
        if self.config.method != "afd" or not self.config.afd.delay or not self.phases:
            return None
        ahead = sum(x.seconds for x in self.phases if x.name in ("rollout", "decode"))
        return ahead, self.update_seconds - ahead

    def fits(self, machine: str) -> str:
        """How the peak of a process fits one of MACHINES: fits, barely fits or exceeds."""
        held, there = max(self.peaks().values()), MACHINES[machine].memory
        return "fits" if held < MARGIN * there else "barely fits" if held < there else "exceeds"

    @property
    def gpu_seconds(self) -> float:
        """GPU-seconds of the whole run, over all processes."""
        return sum(phase.seconds * phase.times for phase in self.phases)

    @property
    def update_seconds(self) -> float:
        """GPU-seconds of one update in which the student learns, over all processes."""
        return sum(phase.seconds for phase in self.phases if phase.name not in BESIDE)


def peaks(memory: list[Part]) -> dict[str, int]:
    """Peak bytes of one process at each moment."""
    held = {when: 0 for when in ("always", "kept", "start", *MOMENTS)}
    for part in memory:
        held[part.when] += part.bytes
    return {moment: held["always"] + held["kept"] + held[moment] for moment in MOMENTS}


@dataclass(frozen=True)
class Setup:
    """Processes with one GPU each, and the peak bytes of one, at a moment."""

    parallel: str
    processes: int
    peak: int
    moment: str


def setups(plan: Plan) -> list[Setup]:
    """One process, then 2, 4, 8 and so on as `prompts_per_update` allows, without and with FSDP."""
    config, found = plan.config, []
    parts, groups = config.parallel.sequence, 1
    while groups <= config.prompts_per_update:
        processes = groups * parts
        alone = processes == 1 or (config.method == "afd" and config.afd.delay)
        for weights in ("ddp",) if alone else ("ddp", "fsdp"):
            parallel = config.parallel.model_copy(update={"weights": weights})
            one = config.model_copy(update={"parallel": parallel})
            try:
                refuse_idle_processes(one, groups)
            except ConfigError:
                continue
            held = peaks(list(Work(one, plan.net, processes).memory()))
            moment = max(held, key=lambda moment: held[moment])
            found.append(Setup(weights, processes, held[moment], moment))
        groups *= 2
    return found


def make_plan(config: RunConfig, processes: int = 1) -> Plan:
    """Plan a run on `processes` processes with one GPU each.

    Raises ConfigError if the run would, as far as can be determined without its large files.
    """
    prompts = config.prompts_per_update
    parts = config.parallel.sequence
    refuse_parts(parts, processes)
    most = prompts * parts
    if not 1 <= processes <= most:
        times = f", times parallel.sequence, {parts}" if parts > 1 else ""
        raise ConfigError(
            f"processes is {processes}; needed: 1 to prompts_per_update, {prompts}{times}"
        )
    refuse_idle_processes(config, processes // parts)
    method = getattr(config, config.method)
    try:
        check_size(config)
        net = student_net(config)
        if isinstance(method, TimesConfig):
            check_chunks(method, net.chunks)
        if parts > 1:
            refuse_shared_videos(config, config.student.skeleton())
    except ValueError as error:  # the checkpoint does not fit the configuration
        raise ConfigError(str(error)) from error
    work = Work(config, net, processes)
    drawn = config.updates * config.taught
    teacher = config.teacher.forecast(config.teacher_dir, drawn)
    return Plan(
        config=config,
        processes=processes,
        net=net,
        memory=[part for part in work.memory() if part.bytes],
        phases=list(work.phases(teacher.distinct)) if config.student.kind == "wan" else [],
        teacher=teacher,
        checkpoint_bytes=work.checkpoint_bytes(),
        missing=list(_missing(config)),
        traffic=traffic(work),
    )


def _missing(config: RunConfig) -> Iterator[str]:
    """Files that are missing or would have to be downloaded, one sentence each."""
    yield from config.student.missing()
    if config.method in ("afd", "gan") and config.discriminator is not None:
        yield from config.discriminator.missing()
    for name, reward in config.rewards.items():
        yield from reward.missing(f"rewards.{name}")
    yield from config.teacher.missing(config.teacher_dir)
    for name, one in config.evaluation.each().items():
        if one.prompts is not None:
            key = f"evaluation.sets.{name}.prompts" if name else "evaluation.prompts"
            yield from missing_path(key, one.prompts, "held-out prompts")
    if config.replay.fraction:
        yield from missing_path("replay.prompts", config.replay.prompts, "the replayed prompts")


def student_net(config: RunConfig) -> Net:
    """The student's sizes: from the checkpoint if it exists, else the released ones."""
    student = config.student
    rank = student.lora.rank if student.lora is not None else None
    wan, video = student.sizes(), config.video
    frames = student.latent_frames(video.frames)
    grid = wan.grid(*student.latent_size(video.height, video.width))
    network = student.skeleton()
    parameters, *groups = (
        sum(p.numel() for p in module.parameters()) for module in (network, *network.groups)
    )
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
        parents=sum(parent_ranks(student) or []) if student.parents == "stacked" else 0,
        window=wan.window,
        sink=wan.sink,
        channels=wan.in_dim,
        block=max(groups, default=0),
    )


# --- display ---


def dry_run(config: RunConfig, processes: int, console: Console) -> None:
    """Print the plan of a run. Raises ConfigError if the run would, also for its folder."""
    refuse_another_run(config.run_dir, with_commits(config, ask=False))
    show(make_plan(config, processes), console)


def show(plan: Plan, console: Console) -> None:
    """Print the plan as tables and sentences, with the assumptions of its estimates."""
    config, net = plan.config, plan.net
    source = "" if config.student.kind == "toy" else _source(config)
    for line in (
        f"{config.name}: {config.method}, {counted(config.updates, 'update')} of "
        f"{counted(config.prompts_per_update, 'prompt')}, {counted(plan.processes, 'process')}",
        f"student: {net.parameters:,} parameters{source}; "
        f"{counted(net.frames, 'latent frame')} in {counted(net.chunks, 'chunk')}, "
        f"{counted(net.tokens, 'token')} a frame",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if (sentence := not_training(config)) is not None:
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    _show_memory(plan, console)
    if plan.phases:
        _show_time(plan, console)
        for line in where_it_fits(plan):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    if plan.traffic:
        _show_traffic(plan, console)
    for line in plan.teacher.lines(plan.gpu_seconds / plan.processes):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    keep = config.checkpoint.keep + 1
    disk = f"disk: {plan.checkpoint_bytes / 1e9:.2f} GB a checkpoint, up to {keep} at a time"
    console.print(disk, highlight=False, soft_wrap=True, markup=False)
    for line in plan.missing:
        console.print(f"not here: {line}", highlight=False, soft_wrap=True, markup=False)
    console.print("nothing was run; all numbers above are estimates", highlight=False)


def _source(config: RunConfig) -> str:
    path = getattr(config.student, "checkpoint", None)
    there = path is not None and Path(path).exists()
    size = getattr(config.student, "size", None)
    sizes = "the released sizes" if size is None else f"the sizes of {size}"
    return f" ({path})" if there else f" ({sizes}; the checkpoint is not there)"


def _show_memory(plan: Plan, console: Console) -> None:
    where = "CPU" if plan.config.student.kind == "toy" else "GPU"
    table = Table(title=f"memory of each {where} process (estimate)", title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    table.add_column("when")
    table.add_column("what")
    for part in plan.memory:
        table.add_row(part.name, gib(part.bytes), part.when, part.note)
    console.print(table)
    peaks = plan.peaks()
    highest = max(peaks, key=lambda moment: peaks[moment])
    others = ", ".join(f"{moment} {gib(held)}" for moment, held in peaks.items())
    line = f"at most {gib(peaks[highest])}, in {highest} ({others})"
    if plan.phases:
        line += "; " + ", ".join(_fits(plan, name) for name in MACHINES)
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def _show_traffic(plan: Plan, console: Console) -> None:
    title = "sent by each process in an update of the student (estimate)"
    table = Table(title=title, title_justify="left")
    table.add_column("collective")
    table.add_column("size", justify="right")
    table.add_column("what")
    for one in plan.traffic:
        table.add_row(one.name, gib(round(one.bytes)), one.note)
    console.print(table)
    total = sum(one.bytes for one in plan.traffic)
    line = f"in total {gib(round(total))} by each of {plan.processes} processes"
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def _fits(plan: Plan, name: str) -> str:
    return f"{plan.fits(name)} {_named(name)}"


def _named(name: str) -> str:
    article = "an" if name[0] in "HLR" else "a"
    return f"{article} {name} ({MACHINES[name].memory / GIB:.0f} GiB)"


def where_it_fits(plan: Plan) -> Iterator[str]:
    """For each kind of GPU one sentence: the fewest processes that fit it, and the GPU-hours."""
    all_of_them = setups(plan)
    for name, machine in MACHINES.items():
        fitting = [one for one in all_of_them if one.peak < MARGIN * machine.memory]
        if not fitting:
            least = min(all_of_them, key=lambda one: one.peak)
            yield (
                f"on {_named(name)}: does not fit; the least is {gib(least.peak)} a process, in "
                f"{least.moment}, with {_processes(least)}"
            )
            continue
        hours = plan.gpu_seconds / 3600 * MACHINES["H200"].flop / machine.flop
        yield f"on {_named(name)}: fits with {_processes(fitting[0])}; {hours:,.0f} GPU-hours"


def _processes(setup: Setup) -> str:
    if setup.processes == 1:
        return "1 process"
    return f"{setup.processes} processes and parallel={setup.parallel}"


def _show_time(plan: Plan, console: Console) -> None:
    assumed = (
        f"{cost.UTILISATION:.0%} of an H100's or H200's {MACHINES['H200'].flop / 1e12:.0f} "
        f"TFLOP/s (bf16), {cost.CONVOLUTIONS:.0%} in the autoencoder"
    )
    title = f"GPU time (estimate, assuming {assumed})"
    table = Table(title=title, title_justify="left")
    table.add_column("phase")
    for name in ("PFLOP each", "GPU-s each", "times", "GPU-h total"):
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
        f"in total {total:.1f} GPU-hours, {total / plan.processes:.1f} hours on "
        f"{counted(plan.processes, 'GPU')}"
    )
    console.print(line, highlight=False, soft_wrap=True, markup=False)
    line = f"an update in which the student learns: {plan.update_seconds:.1f} GPU-seconds"
    console.print(line, highlight=False, soft_wrap=True, markup=False)
    both = plan.overlapped()
    if both is not None:
        least, most = (f"{x / plan.processes:.1f}" for x in (max(both), sum(both)))
        line = (
            f"afd.async=1: rollout and decode ({both[0]:.1f}) beside training ({both[1]:.1f}): an "
            f"update takes {least} s on {counted(plan.processes, 'GPU')} if neither slows the "
            f"other, and {most} s, as without, if both need the same units"
        )
        console.print(line, highlight=False, soft_wrap=True, markup=False)
