"""`afd adapt SEQUENCE.yaml`: run one domain after another, and measure all columns after each.

The folder (runs/<name>, or `out=`) holds <number>_<domain>/ for every run, matrix/ and matrix.json,
the prompts that are replayed, and sequence.json. Every part is made once: the command continues
where it stopped, also if it was killed between two domains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from afd.adapt.matrix import measure, refuse_unknown_metrics, write_matrix
from afd.adapt.sequence import (
    FILE,
    Chain,
    load_chain,
    refuse_changed,
    replayable,
    write_replay,
)
from afd.distributed import join, refuse_parts
from afd.files import write_json
from afd.planning.parts import gib
from afd.planning.plan import make_plan, show
from afd.trainer.loop import Outcome, train
from afd.trainer.run_folder import refuse_another_run, refuse_idle_processes, with_commits

# What a sequence itself will make before the run that asks for it.
MADE = ("student.init", "replay.prompts")


def adapt(
    path: Path,
    overrides: Sequence[str],
    console: Console,
    finish: Callable[[Path], None] = lambda root: None,
) -> bool:
    """Run or resume every domain; False if Ctrl-C interrupted it (all progress saved).

    `finish`: called with the folder at the end, by the main process.
    """
    chain = load_chain(path, overrides)
    first = chain.domains[0].run
    with join(first.device, patience_s=2 * first.teacher.patience_s) as ranks:
        console = console if ranks.main else Console(quiet=True)
        for domain in chain.domains:
            refuse_parts(domain.run.parallel.sequence, ranks.processes)
            refuse_idle_processes(domain.run, ranks.processes // domain.run.parallel.sequence)
        if ranks.main:
            refuse_changed(chain)
            chain.root.mkdir(parents=True, exist_ok=True)
            write_json(chain.root / FILE, chain.description())
            for domain in chain.domains:
                if domain.settings.prompts is not None:
                    replayable(chain, domain, console)
        ranks.barrier()
        console.rule("base student")
        measure(chain, None, ranks)
        if ranks.main:
            refuse_unknown_metrics(chain)
        for domain in chain.domains:
            console.rule(f"{domain.number}: {domain.name}")
            if ranks.main:
                write_replay(chain, domain, console)
            ranks.barrier()
            if train(domain.run, console=console) is Outcome.STOPPED:
                console.print("stopped, everything is saved; the same command continues")
                return False
            measure(chain, domain, ranks)
            if ranks.main:
                matrix = write_matrix(chain)
        if ranks.main:
            console.print(table(matrix))
            finish(chain.root)
    return True


def table(matrix: dict[str, Any]) -> Table:
    """The matrix, gains and losses."""
    found = Table("after", title="held-out sets", title_justify="left")
    for name, column in matrix["columns"].items():
        arrow = "↓" if column["better"] == "lower" else "↑"
        found.add_column(f"{name}\n{column['metric']} {arrow}", justify="right")
    for name, values in zip(matrix["rows"], matrix["R"], strict=True):
        found.add_row(name, *map(_number, values))
    found.add_section()
    for key in ("gain", "forgetting"):
        balances = [matrix["domains"].get(name, {}).get(key) for name in matrix["columns"]]
        found.add_row(key, *map(_number, balances))
    return found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def dry_run(path: Path, overrides: Sequence[str], processes: int, console: Console) -> None:
    """Print every domain's plan (`afd train --dry-run`), then memory, hours and money of all."""
    chain = load_chain(path, overrides)
    total = Table("domain", title="the sequence (estimate)", title_justify="left")
    for name in ("updates", "memory of a process", "GPU-hours", "USD", "teacher's wait, h"):
        total.add_column(name, justify="right")
    sums = [0.0, 0.0, 0.0]
    peak = 0
    for domain in chain.domains:
        console.rule(f"{domain.number}: {domain.name}")
        refuse_another_run(domain.run.run_dir, with_commits(domain.run, ask=False))
        plan = make_plan(domain.run, processes)
        if domain.number > 1:
            plan.missing[:] = [line for line in plan.missing if not line.startswith(MADE)]
        show(plan, console)
        highest = max(plan.peaks().values())
        peak = max(peak, highest)
        numbers = [plan.gpu_seconds / 3600, plan.teacher.cost_usd, plan.teacher.wait_s / 3600]
        sums = [a + b for a, b in zip(sums, numbers, strict=True)]
        total.add_row(domain.name, str(domain.run.updates), gib(highest), *_costs(numbers))
    total.add_section()
    updates = sum(domain.run.updates for domain in chain.domains)
    total.add_row("in total", str(updates), gib(peak), *_costs(sums))
    console.print(total)
    _show_columns(chain, console)


def _costs(numbers: Sequence[float]) -> list[str]:
    hours, money, wait = numbers
    return [f"{hours:.2f}" if hours else "not counted", f"{money:.2f}", f"{wait:.1f}"]


def _show_columns(chain: Chain, console: Console) -> None:
    videos = chain.domains[0].run.evaluation.videos
    rows, names = len(chain.domains) + 1, ", ".join(chain.columns)
    line = (
        f"matrix: {rows} students x {len(chain.columns)} held-out sets ({names}) of {videos} "
        "videos; not in the hours above"
    )
    console.print(line, highlight=False, soft_wrap=True, markup=False)
