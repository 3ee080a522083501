"""The dry run's teacher: videos to buy, their price and wait; and files that are not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from afd.config.run import RunConfig
from afd.discriminators.config import VideoAlignConfig
from afd.errors import TeacherError
from afd.teachers.config import API_KINDS
from afd.teachers.folder import read_manifest

# Assumed of a service that has made no video for this folder yet.
SECONDS_PER_VIDEO = 120.0


@dataclass(frozen=True)
class TeacherPlan:
    """What the teacher still has to make.

    Attributes:
        wanted: videos that the run can ask for; 0 where that is not known.
        there, rejected: of these, finished, and refused by the service.
        distinct: different videos that the run will see.
        price_usd: expected for one video; None where nothing is bought.
        spent_usd, budget_usd: of the folder.
        seconds: of one video, by the ledger or by assumption.
        measured: whether by the ledger.
        concurrency: videos made at once.
    """

    kind: str
    wanted: int
    there: int
    rejected: int
    distinct: int
    price_usd: float | None = None
    spent_usd: float = 0.0
    budget_usd: float = 0.0
    seconds: float = SECONDS_PER_VIDEO
    measured: bool = False
    concurrency: int = 1

    @property
    def to_buy(self) -> int:
        """Videos that have still to be made for money."""
        if self.price_usd is None:
            return 0
        return max(0, min(self.distinct, self.wanted) - self.there - self.rejected)

    @property
    def cost_usd(self) -> float:
        return self.to_buy * (self.price_usd or 0.0)

    @property
    def wait_s(self) -> float:
        """Until the last video is there, if nothing fails."""
        return -(-self.to_buy // self.concurrency) * self.seconds

    def lines(self, training_s: float) -> Iterator[str]:
        """Money and wall-clock for a reader; `training_s`: seconds of the updates, 0 unknown."""
        if self.price_usd is None:
            number = f"{self.wanted} videos" if self.wanted else "videos not counted"
            yield f"teacher: {self.kind}, {number}; nothing is bought"
        elif not self.wanted:
            yield (
                f"teacher: {self.kind}, about {self.price_usd:.2f} USD a video; how many is not "
                "known without the prompts"
            )
        else:
            yield (
                f"teacher: {self.kind}, {self.there} of {self.wanted} videos are there, "
                f"{self.rejected} were rejected; {self.to_buy} to buy at about "
                f"{self.price_usd:.2f} USD: {self.cost_usd:.2f} USD, without repeats"
            )
            left = self.budget_usd - self.spent_usd
            word = "which is enough" if self.cost_usd <= left else "which is NOT enough"
            yield (
                f"money: {self.spent_usd:.2f} of the budget of {self.budget_usd:.2f} USD spent or "
                f"reserved, {left:.2f} left, {word}"
            )
            source = "as the ledger has it" if self.measured else "assumed"
            yield (
                f"teacher wait: about {self.wait_s / 60:.0f} min at {self.seconds:.0f} s a video "
                f"({source}), {self.concurrency} at once; training goes on meanwhile, if it can"
            )
        if training_s:
            low, high = max(training_s, self.wait_s), training_s + self.wait_s
            span = f"{low / 3600:.1f}" + (f" to {high / 3600:.1f}" if self.wait_s else "")
            yield f"wall-clock: about {span} hours (estimate; reading files is not counted)"


def teacher_plan(config: RunConfig) -> TeacherPlan:
    """What is there and what is to be bought; nothing is contacted, nothing written."""
    teacher = config.teacher
    drawn = config.steps * config.prompts_per_step
    if teacher.kind in API_KINDS:
        return _bought(config, drawn)
    if teacher.kind == "simulator":
        return TeacherPlan("simulator", teacher.count, 0, 0, min(drawn, teacher.count))
    try:
        listed = len(read_manifest(config.teacher_dir, teacher.manifest)[1])
    except TeacherError:  # named among the missing files
        listed = 0
    return TeacherPlan("folder", listed, listed, 0, min(drawn, listed or drawn))


def _bought(config: RunConfig, drawn: int) -> TeacherPlan:
    # Only who buys needs the HTTP client.
    from afd.teachers.paid.ledger import NAME, Ledger
    from afd.teachers.paid.teacher import PROVIDERS, price_of, read_prompts

    teacher = config.teacher
    provider = PROVIDERS[teacher.kind](teacher.api.base_url)
    parameters = {**provider.defaults(), **teacher.api.options}
    price = price_of(teacher, provider, parameters)
    assert teacher.api.prompts is not None
    try:
        wanted = len(read_prompts(teacher.api.prompts)) * teacher.api.draws
    except TeacherError:  # named among the missing files
        wanted = 0
    there = rejected = 0
    spent, seconds = 0.0, None
    if (config.teacher_dir / NAME).is_file():
        ledger = Ledger.snapshot(config.teacher_dir)
        try:
            counts, spent, seconds = ledger.counts(), ledger.spent_usd(), ledger.typical_seconds()
        finally:
            ledger.close()
        there, rejected = counts.get("done", 0), counts.get("content", 0)
    return TeacherPlan(
        teacher.kind,
        wanted,
        min(there, wanted),
        rejected,
        min(drawn, wanted),
        price_usd=price,
        spent_usd=spent,
        budget_usd=teacher.fetch.budget_usd,
        seconds=SECONDS_PER_VIDEO if seconds is None else seconds,
        measured=seconds is not None,
        concurrency=teacher.fetch.concurrency,
    )


# --- what is not there ---


def missing_files(config: RunConfig) -> Iterator[str]:
    """What the run would not find, or would have to download, one sentence each."""
    student, teacher = config.student, config.teacher
    if student.kind == "wan":
        yield from _path("student.checkpoint", student.checkpoint, "the student's weights")
        for key, source in (
            ("student.text_encoder", student.text_encoder or student.pretrained),
            ("student.vae", student.vae or student.pretrained),
        ):
            yield from _source(key, source)
    critic = config.discriminator
    if isinstance(critic, VideoAlignConfig) and config.method in ("afd", "gan"):
        told = "the released VideoReward checkpoint"
        yield from _path("discriminator.checkpoint", critic.checkpoint, told)
        yield from _source("discriminator.base", critic.base)
        if critic.checkout is None:
            yield "discriminator.checkout is null: our own prompt template, not the released one"
        else:
            yield from _path("discriminator.checkout", critic.checkout, "VideoAlign's code")
    if teacher.kind == "folder":
        yield from _folder(config)
    elif teacher.kind in API_KINDS:
        from afd.teachers.paid.teacher import PROVIDERS, read_prompts

        assert teacher.api.prompts is not None
        try:
            read_prompts(teacher.api.prompts)
        except TeacherError as error:
            yield f"the prompts to ask: {error}"
        variable = PROVIDERS[teacher.kind](teacher.api.base_url).key_variable
        if not os.environ.get(variable, "").strip():
            yield f"the environment variable {variable} with the API key is not set"
    if config.evaluation.prompts is not None:
        yield from _path("evaluation.prompts", config.evaluation.prompts, "held-out prompts")


def _folder(config: RunConfig) -> Iterator[str]:
    """The videos themselves are read when the run starts."""
    folder = config.teacher_dir
    yield from _path("teacher.path", folder, "the folder of the teacher's videos")
    if not folder.exists():
        return
    try:
        manifest, entries, problems = read_manifest(folder, config.teacher.manifest)
    except TeacherError as error:
        yield str(error)
        return
    gone = [f"{file}: no such file" for _, file, _ in entries if not _is_file(folder, file)]
    for told in (problems, gone):
        if told:
            yield f"teacher manifest {manifest}: {len(told)} wrong, such as {told[0]}"
    if not entries and not problems:
        yield f"teacher manifest {manifest}: lists no video"


def _is_file(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except (OSError, ValueError):  # too long, a zero byte
        return False


def _path(key: str, path: Path | None, what: str) -> Iterator[str]:
    if path is None:
        yield f"{key} is not given: {what}"
    elif not path.exists():
        yield f"{key}: {path} is not there: {what}"


def _source(key: str, source: str) -> Iterator[str]:
    if not Path(source).exists():
        yield f"{key}: {source} is no local folder; the hub is asked when the run starts"
