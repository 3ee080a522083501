"""`afd teacher audit FOLDER|CONFIG.yaml`: which of a teacher's clips not to trust."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor

from afd.audit.audit import Audit, audit
from afd.audit.clip import Clip, of_tensor, read
from afd.audit.collect import listed, of_config, read_all
from afd.audit.scored import Score, prompt_mismatch, worse_than_student
from afd.config.base import Count, Natural, Section
from afd.config.run import RunConfig, load_config, make_config
from afd.config.shipped import find_config
from afd.discriminators.base import DifferentiableDiscriminator
from afd.discriminators.pairs import matched_pieces
from afd.distributed import Ranks, join
from afd.errors import ConfigError
from afd.lab.report.audit_page import write_audit
from afd.listing import shown
from afd.teachers.base import Request
from afd.trainer import checkpoint
from afd.trainer.build import build_method, build_student
from afd.trainer.evaluate import rolled
from afd.trainer.parts import open_videos, restore
from afd.trainer.run_folder import load_run

ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


class AuditOptions(Section):
    """Settings of an audit."""

    out: Path | None = Field(default=None, description="folder of the page; null: beside the clips")
    run: Path | None = Field(
        default=None, description="run folder whose discriminator and student score the clips"
    )
    student: Path | None = Field(default=None, description="folder of the student's videos")
    videos: Count = Field(default=72, description="rollouts of a student for the comparison")
    attempts: Count = Field(default=4, description="rollouts per prompt that a clip has to beat")
    first_seed: Natural = Field(default=2_000_000, description="seed of the first rollout")


def command(source: Path, overrides: Sequence[str], console: Console) -> Path:
    """Audit a folder of clips or a configuration's teacher; returns the page's path.

    Overrides of AuditOptions are the audit's own; all others belong to the configuration.
    """
    own, others = split(overrides)
    options = make_config({}, own, "afd teacher audit", AuditOptions)
    config = None
    if not source.is_dir():
        try:
            find_config(source)
        except ConfigError:
            raise ConfigError(
                f"FOLDER|CONFIG.yaml: {shown(str(source), 400)} does not exist; needed: a folder "
                "of clips, a configuration, or a name that afd configs lists"
            ) from None
        config = load_config(source, others)
    elif others:
        raise ConfigError(
            f"override {others[0]!r}: got a folder; needed: a CONFIG.yaml to override, or one of "
            f"{', '.join(AuditOptions.model_fields)}"
        )
    run = None if options.run is None else load_run(options.run, key="run")
    with console.status("clips are read"):
        if config is None:
            clips, needed = read_all(_in_folder(source)), None
        else:
            clips, needed = read_all(of_config(config, console)), needed_seconds(config)
    if not clips:
        raise ConfigError(f"{source}: holds no clip; needed: videos, with or without a manifest")
    with console.status("clips are checked"):
        found = _checked(clips, needed, options, config, run)
    name = source.resolve().name if config is None else config.name
    default = source if config is None else config.run_dir
    page = write_audit(found, options.out or default / "audit", name)
    for sentence in found.sentences():
        console.print(sentence, soft_wrap=True, highlight=False)
    console.print(str(page), soft_wrap=True, highlight=False)
    return page


def split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The audit's own overrides, and those of the configuration."""
    own = [o for o in overrides if o.partition("=")[0] in AuditOptions.model_fields]
    return own, [o for o in overrides if o not in own]


def needed_seconds(config: RunConfig) -> float | None:
    """The seconds of a clip that a run uses; None where it takes frames at the clip's own rate."""
    video = config.video
    return None if video.fps is None else video.frames / video.fps


def _in_folder(folder: Path) -> list[tuple[str, str, Path]]:
    found = listed(folder)
    if found is not None:
        return found
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS)
    return [(path.name, "", path) for path in files]


def _checked(
    clips: list[Clip],
    needed: float | None,
    options: AuditOptions,
    config: RunConfig | None,
    run: RunConfig | None,
) -> Audit:
    if run is not None and options.run is not None:
        with join(run.device) as ranks:
            return _by_run(clips, needed, options, run, ranks)
    student: list[Clip] = []
    if options.student is not None:
        there = _in_folder(options.student) if options.student.is_dir() else []
        paths = [path for _, _, path in there]
        if not paths:
            raise ConfigError(
                f"student: {options.student} holds no clip; needed: a folder of the student's "
                "videos"
            )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            student = list(pool.map(lambda path: read(path, ""), paths))
        student = [clip for clip in student if clip.problem is None]
    elif config is not None and config.student.kind == "toy":
        prompts = list(dict.fromkeys(clip.prompt for clip in clips))
        policy, codec = build_student(config, prompts=prompts)
        asked = [prompts[i % len(prompts)] for i in range(options.videos)]
        seeds = [options.first_seed + i for i in range(options.videos)]
        made = torch.cat(list(rolled(policy, config, asked, seeds, list(range(len(asked))))))
        student = _as_clips(codec.decode(made), asked, config.video.rate)
    return audit(clips, needed_s=needed, student=student)


def _as_clips(videos_NFCHW: Tensor, prompts: Sequence[str], fps: float) -> list[Clip]:
    each = zip(videos_NFCHW, prompts, strict=True)
    return [of_tensor(video, prompt, str(i), fps) for i, (video, prompt) in enumerate(each)]


class _Files:
    """The readable clips as a teacher, for reading them as a run does."""

    def __init__(self, paths: dict[Request, Path]) -> None:
        self._paths, self.requests = paths, list(paths)

    def answer(self, request: Request) -> Path:
        return self._paths[request]


def _by_run(
    clips: list[Clip],
    needed: float | None,
    options: AuditOptions,
    run: RunConfig,
    ranks: Ranks,
) -> Audit:
    """Also score the clips with a run's discriminator against its student's rollouts."""
    assert options.run is not None
    paths = {
        Request(clip.prompt, i): clip.path
        for i, clip in enumerate(clips)
        if clip.problem is None and clip.path is not None
    }
    if not paths:
        return audit(clips, needed_s=needed)
    prompts = list(dict.fromkeys(request.prompt for request in paths))
    method = build_method(run, ranks, prompts)
    discriminator: DifferentiableDiscriminator | None = getattr(method, "discriminator", None)
    newest = checkpoint.latest(options.run / "checkpoints")
    if newest is None or discriminator is None:
        what = "a checkpoint" if newest is None else "a discriminator"
        raise ConfigError(f"run: {options.run} has no {what.removeprefix('a ')}; needed: one")
    restore(newest, method, run, ranks)
    with closing(open_videos(run, method, _Files(paths), ranks)) as held:
        inputs = held.fetch(list(paths))
    asked = [request.prompt for request in paths]
    to_input = getattr(method, "to_input", None)
    assert to_input is not None
    rollouts: list[Tensor] = []

    def student(prompts: Sequence[str]) -> list[Tensor]:
        made = []
        with method.evaluation_policy() as policy:
            for attempt in range(options.attempts):
                first = options.first_seed + attempt * len(prompts)
                seeds = [first + i for i in range(len(prompts))]
                every = list(range(len(prompts)))
                x0 = torch.cat(list(rolled(policy, run, list(prompts), seeds, every)))
                if len(rollouts) * len(prompts) < options.videos:
                    rollouts.append(method.codec.decode(x0).cpu())
                made.append(to_input(x0))
        return made

    with torch.no_grad():
        score = _steady(discriminator)
        mismatch = prompt_mismatch(score, inputs, asked)
        worse = worse_than_student(score, inputs, asked, student)
    shown = torch.cat(rollouts)[: options.videos]
    names = (asked * len(rollouts))[: len(shown)]
    found = audit(clips, needed_s=needed, student=_as_clips(shown, names, run.video.rate))
    index = [request.draw for request in paths]
    for name, values in (("prompt", mismatch), ("worse", worse)):
        row = [-1.0] * len(clips)
        for place, value in zip(index, values, strict=True):
            row[place] = value
        found.values[name] = row
    return found


def _steady(discriminator: DifferentiableDiscriminator) -> Score:
    """Scores that can be compared between calls: `score` may draw random looks in each."""
    size: int | None = getattr(discriminator.config, "micro_batch", None)

    def score(input_NFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        pieces = matched_pieces(input_NFCHW, prompts, size)
        found = [discriminator.differentiable_score(input_NFCHW[p], prompts[p]) for p in pieces]
        return torch.cat(found).float().cpu()

    return score
