"""`afd ablation CONFIG.yaml`: run the cells of an ablation, tabulate and plot them.

The folder (runs/ablations/<name>, or `out=`) holds <row>/seed<k>/, results.json, results.md and
curves.png. Every cell runs once; rerunning the command resumes where it stopped.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field
from rich.console import Console

from afd.adapt.config import split
from afd.config.base import Natural, Section
from afd.config.run import load_config, make_config, read_yaml
from afd.files import write_text
from afd.lab.grid import SIGNS, Study, choice, machines
from afd.lab.quickstart import COLUMNS, lines
from afd.lab.report.charts import running_mean, window
from afd.lab.sequence_ablation import SequenceStudy, write_results

# Key of metrics.jsonl and title of its panel.
CURVES = {
    "student/r_mean": "mean r",
    "student/r_at_0": "share of r at 0",
    "student/r_at_1": "share of r at 1",
}


class AblationConfig(Section):
    """Settings of an ablation: its question and the runs that answer it."""

    name: str = Field(description="name of the folder and of the table")
    question: str = Field(description="what the rows are compared for; printed above the table")
    base: Path = Field(
        description="base configuration of every run, or a sequence of domains; relative to this "
        "file"
    )
    rows: dict[str, list[str]] = Field(min_length=1, description="per row its overrides")
    columns: list[str] = Field(
        default=[], description="metrics of the evaluation that the table shows beside the usual"
    )
    seeds: list[Natural] = Field(default=[0], min_length=1, description="seeds of every row")


def ablation(path: Path, overrides: Sequence[str], console: Console) -> bool:
    """Run or resume every selected cell; False if Ctrl-C interrupted it (all progress saved)."""
    config = load_config(path, [], AblationConfig)
    if of_sequences(path, config):
        sequences = sequence_study(path, config, overrides)
        if not sequences.run(console):
            return False
        write_results(config.name, config.question, sequences, console)
        return True
    table = study(path, config, overrides)
    if not table.run(console):
        return False
    results = table.write(console)
    draw(table, table.root / "curves.png")
    text = document(config, table, results)
    write_text(table.root / "results.md", text)
    files = (str(table.root / name) for name in ("results.json", "results.md", "curves.png"))
    console.print(*files, soft_wrap=True)
    return True


def of_sequences(path: Path, config: AblationConfig) -> bool:
    """Whether the rows of an ablation file are sequences of domains."""
    return "domains" in read_yaml(path.parent / config.base)


def sequence_study(path: Path, config: AblationConfig, overrides: Sequence[str]) -> SequenceStudy:
    """Build the study described by an ablation file whose base is a sequence."""
    chosen, seeds, common = choice(overrides, list(config.rows), config.seeds)
    own, common = split(common)
    root = Path(own.get("out", Path("runs") / "ablations" / config.name))
    base = path.parent / config.base
    return SequenceStudy(root, config.rows, seeds, chosen, base, common)


def study(path: Path, config: AblationConfig, overrides: Sequence[str]) -> Study:
    """Build the study described by an ablation file."""
    chosen, seeds, common = choice(overrides, list(config.rows), config.seeds)
    start = read_yaml(path.parent / config.base)
    where = {"name": config.name, "out": str(Path("runs") / "ablations" / config.name)}
    root = make_config({**start, **where}, common, str(path)).run_dir
    signs = (*SIGNS, *CURVES)
    columns = (*COLUMNS, *config.columns)
    return Study(root, config.rows, seeds, chosen, start, common, signs, columns, str(path))


def document(config: AblationConfig, table: Study, results: dict[str, Any]) -> str:
    """Format the results: the question, the table, and where and when it was measured."""
    folders = [folder for row in table.rows for folder in table.finished(row)]
    made = max((folder / "DONE").stat().st_mtime for folder in folders)
    day = datetime.datetime.fromtimestamp(made, datetime.timezone.utc).date()
    updates = sorted({found["updates"] for row in results.values() for found in _updates(row)})
    rows = [
        f"- `{row}`: {', '.join(own) or 'the base'}"
        for row, own in table.rows.items()
        if row in results
    ]
    return "\n".join(
        [
            f"## {config.name}",
            "",
            config.question.strip(),
            "",
            *rows,
            "",
            table.markdown(results),
            f"{' and '.join(map(str, updates))} updates of `{config.base.name}`; discriminator, "
            f"agreement and r: means over the last eighth. {machines(folders)}, {day}.",
            "",
        ]
    )


def _updates(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [found for found in row["seeds"].values() if "updates" in found]


def draw(table: Study, path: Path) -> None:
    """Plot r per update and physics error per evaluation, one line per finished run."""
    figure = Figure(figsize=(4 * (len(CURVES) + 1) + 1.5, 3.4), layout="constrained")
    panels = figure.subplots(1, len(CURVES) + 1)
    for number, row in enumerate(table.rows):
        for index, folder in enumerate(table.finished(row)):
            style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
            label = row if index == 0 else None
            for panel, key in zip(panels, CURVES, strict=False):
                updates = [
                    (line["update"], line[key])
                    for line in lines(folder / "metrics.jsonl")
                    if key in line
                ]
                _line(panel, updates, label, style, smooth=True)
            points = lines(folder / "evaluation.jsonl")
            errors = [(p["update"], p["metrics"]["phys"]) for p in points if "phys" in p["metrics"]]
            _line(panels[-1], errors, label, style)
    for panel, title in zip(panels, [*CURVES.values(), "physics error, px"], strict=True):
        panel.set_title(title)
        panel.set_xlabel("update")
        panel.grid(alpha=0.3)
    for panel in panels[:-1]:
        panel.set_ylim(-0.03, 1.03)
    named = panels[-1].get_legend_handles_labels()
    figure.legend(*named, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=110)


def _line(
    panel: Axes,
    points: list[tuple[int, float]],
    label: str | None,
    style: dict[str, Any],
    smooth: bool = False,
) -> None:
    if points:
        x, y = [x for x, _ in points], [y for _, y in points]
        panel.plot(x, running_mean(y, window(len(y))) if smooth else y, label=label, **style)
