"""The commands `afd teacher fetch` and `afd teacher status`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from afd.config.run import RunConfig
from afd.errors import TeacherError, Unanswered
from afd.listing import Some, counted
from afd.teachers.mix import used_prompts
from afd.teachers.mix_config import MixConfig
from afd.teachers.paid.config import PaidConfig
from afd.teachers.paid.ledger import NAME, Ledger, Row
from afd.teachers.paid.teacher import open_teacher
from afd.trainer.build import check_files

_log = logging.getLogger("afd")


@dataclass(frozen=True)
class Buyer:
    """A paid teacher: its name among several, its configuration, and the prompts that are used;
    None: all."""

    name: str
    config: RunConfig
    prompts: list[str] | None = None


def buyers(config: RunConfig) -> list[Buyer]:
    """The paid teachers of a configuration: its own, or those among several."""
    mix = config.teacher
    if not isinstance(mix, MixConfig):
        return [Buyer("", config)]
    paid = [one for one in mix.teachers if isinstance(one.source, PaidConfig)]
    if not paid:
        raise TeacherError("teacher.teachers: holds no paid teacher; nothing is bought")
    folders = {one.name: mix.folder_of(one, config.teacher_dir) for one in paid}
    found = []
    for one in paid:
        source = one.source.model_copy(update={"path": folders[one.name]})
        own = config.model_copy(update={"teacher": source})
        found.append(Buyer(one.name, own, used_prompts(one)))
    return found


def fetch(buyer: Buyer, console: Console) -> bool | None:
    """Buy the missing videos. Returns True if every video is present or rejected, False if some are
    not, None if stopped by Ctrl-C. Raises ConfigError if files of the student that they are for are
    missing or damaged, and TeacherError if nothing more can be bought."""
    config = buyer.config
    section = _paid(config)
    check_files(config)
    teacher = open_teacher(section, config.video, config.teacher_dir)
    used = buyer.prompts
    requests = [r for r in teacher.requests if used is None or r.prompt in used]
    missing, skipped, there = 0, 0, 0
    failure: TeacherError | None = None
    unanswered = Some(_log, logging.WARNING, "%s")
    screen = RichHandler(console=console, show_path=False, markup=False, highlighter=None)
    level = _log.level
    _log.addHandler(screen)
    _log.setLevel(logging.INFO)
    try:
        with _bar(console) as bar:
            line = bar.add_task("videos", total=len(requests), cost="")
            pending: set[Future[Path]] = set()
            for request in requests:
                pending.add(teacher.start(request))
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    error = future.exception()
                    if error is None:
                        there += 1
                    elif isinstance(error, Unanswered):
                        rejected = error.rejected
                        skipped, missing = skipped + rejected, missing + (not rejected)
                        if not rejected:
                            unanswered(str(error))
                    elif isinstance(error, TeacherError):
                        failure = failure or error
                        missing += 1
                    else:
                        raise error
                now = teacher.progress()
                cost = f"{now.spent_usd:.2f} of {now.budget_usd:.2f} USD"
                shown = f"{cost}, {now.under_way} of {now.limit} in progress, {skipped} rejected"
                bar.update(line, completed=there + skipped + missing, cost=shown)
    except KeyboardInterrupt:
        spent = teacher.progress().spent_usd
        console.print(
            f"stopped with {counted(there, 'video')}; those in progress continue at the provider, "
            f"and the next fetch collects them; {spent:.2f} USD spent or reserved",
            highlight=False,
        )
        return None
    finally:
        teacher.close()
        unanswered.end()
        _log.removeHandler(screen)
        _log.setLevel(level)
    books = Ledger.snapshot(teacher.folder)
    spent = books.spent_usd()
    books.close()
    console.print(
        f"{teacher.folder}: {counted(there, 'video')}, {skipped} rejected, {missing} missing; "
        f"{spent:.2f} of {section.fetch.budget_usd:.2f} USD spent",
        highlight=False,
        soft_wrap=True,
    )
    if failure is not None:
        raise failure
    return missing == 0


def status(teachers: Sequence[Buyer], console: Console, *, as_json: bool = False) -> int:
    """Print the state of the ledgers; works offline and without a key. The JSON of several teachers
    is an object by name.

    Raises TeacherError for a folder without a ledger, after those that have one were printed.
    """
    found: dict[str, dict[str, Any]] = {}
    failure: TeacherError | None = None
    for one in teachers:
        try:
            found[one.name] = _facts(one.config)
        except TeacherError as error:
            failure = failure or error
    if as_json and found:
        print(json.dumps(found.get("", found), indent=1, ensure_ascii=False))
    else:
        for facts in found.values():
            _show(facts, console)
    if failure is not None:
        raise failure
    return 0


def _facts(config: RunConfig) -> dict[str, Any]:
    section = _paid(config)
    folder = config.teacher_dir
    if not (folder / NAME).is_file():
        raise TeacherError(f"teacher folder {folder}: has no ledger; afd teacher fetch makes one")
    ledger = Ledger.snapshot(folder)
    try:
        return {
            "folder": str(folder),
            "about": ledger.about(),
            "videos": ledger.counts(),
            "spent_usd": round(ledger.spent_usd(), 6),
            "budget_usd": section.fetch.budget_usd,
            "open": [_open(prompt, row) for prompt, row in ledger.open_rows()],
        }
    finally:
        ledger.close()


def _open(prompt: str, row: Row) -> dict[str, object]:
    stands = "in doubt" if row.state == "asked" else "in progress or stuck"
    return {
        "prompt": prompt,
        "stands": stands,
        "task": (row.task or {}).get("id"),
        "age_s": round(time.time() - row.asked_at),
        "price_usd": row.price_usd,
    }


def _show(facts: dict, console: Console) -> None:
    about = facts["about"]
    console.print(
        f"{facts['folder']}: {about.get('provider')} {about.get('model')}; "
        f"{facts['spent_usd']:.2f} of {facts['budget_usd']:.2f} USD spent or reserved",
        highlight=False,
        soft_wrap=True,
    )
    counts = facts["videos"]
    for stands in sorted(counts):
        console.print(f"  {counts[stands]:6d} {stands}", highlight=False)
    decided = counts.get("done", 0) + counts.get("content", 0)
    if decided:
        share = 100 * counts.get("content", 0) / decided
        console.print(f"  {share:.0f} % of the decided videos were rejected", highlight=False)
    if facts["open"]:
        table = Table("prompt", "stands", "task", "hours", "USD")
        for row in facts["open"]:
            hours, price = f"{row['age_s'] / 3600:.1f}", f"{row['price_usd']:.2f}"
            prompt = escape(row["prompt"][:60])
            table.add_row(prompt, row["stands"], escape(row["task"] or ""), hours, price)
        console.print(table)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[cost]}"),
        console=console,
    )


def _paid(config: RunConfig) -> PaidConfig:
    if not isinstance(config.teacher, PaidConfig):
        raise TeacherError(
            f"teacher.kind={config.teacher.kind} is not a paid service; needed: ark, openai or fal"
        )
    return config.teacher
