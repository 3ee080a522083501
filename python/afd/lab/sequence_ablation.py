"""An ablation whose base is a sequence of domains: its rows are sequences (`afd ablation`).

The folder holds <row>/seed<k>/, results.json, results.md and curves.png, as an ablation of runs
does. A row's overrides are those of `afd adapt`; `sequence=FILE` names another
sequence than the base.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from afd.adapt.matrix import MATRIX
from afd.adapt.run import adapt
from afd.adapt.sequence import load_chain
from afd.config.shipped import find_config
from afd.errors import ConfigError
from afd.files import parse_json, write_json, write_text
from afd.lab.grid import machines, mean_and_std, printed_mean
from afd.lab.tables import markdown_table, print_table

SEQUENCE = "sequence="


@dataclass(frozen=True)
class SequenceStudy:
    """A grid of sequences, one per row and seed.

    Attributes:
        root: folder of the study.
        rows: the overrides of each row; seeds: of every row.
        chosen: rows to run now.
        base: the file of the sequence; common: overrides of every row, before its own.
    """

    root: Path
    rows: dict[str, list[str]]
    seeds: Sequence[int]
    chosen: Sequence[str]
    base: Path
    common: Sequence[str] = ()

    def cell(self, row: str, seed: int) -> tuple[Path, list[str]]:
        """The file and the overrides of one cell."""
        own = self.rows[row]
        named = [x.removeprefix(SEQUENCE) for x in own if x.startswith(SEQUENCE)]
        path = find_config(named[-1], self.base) if named else self.base
        rest = [override for override in own if not override.startswith(SEQUENCE)]
        place = [f"seed={seed}", f"name={row}", f"out={self.folder(row, seed)}"]
        return path, [*self.common, *rest, *place]

    def folder(self, row: str, seed: int) -> Path:
        return self.root / row / f"seed{seed}"

    def run(self, console: Console) -> bool:
        """Run or resume every selected cell; False if Ctrl-C interrupted it (progress saved)."""
        cells = [(row, seed) for row in self.chosen for seed in self.seeds]
        for row, seed in cells:
            try:
                load_chain(*self.cell(row, seed))
            except ConfigError as error:
                raise ConfigError(f"row {row}: {error}") from None
        for row, seed in cells:
            console.rule(f"{row}, seed {seed}")
            if not adapt(*self.cell(row, seed), console):
                return False
        return True

    def collect(self) -> dict[str, Any]:
        """Final metrics, gains and forgetting of every finished cell, with means over seeds."""
        results: dict[str, Any] = {}
        for row in self.rows:
            found = {
                path.parent.name.removeprefix("seed"): _finals(path)
                for path in sorted((self.root / row).glob(f"seed*/{MATRIX}"))
            }
            cells = {seed: values for seed, values in found.items() if values is not None}
            if cells:
                results[row] = {"seeds": cells, **mean_and_std(list(cells.values()))}
        return results


def _finals(path: Path) -> dict[str, float] | None:
    """The numbers of a matrix by the names of the table's columns; None while it is unfinished."""
    matrix = parse_json(path.read_text(encoding="utf-8"))
    if len(matrix["rows"]) <= len(matrix["costs"]):
        return None
    found = {
        f"{name} {column['metric']}": column["values"][-1]
        for name, column in matrix["columns"].items()
    }
    for key in ("gain", "forgetting", "lost"):
        found |= {f"{name} {key}": one[key] for name, one in matrix["domains"].items()}
    found["s"] = sum(cost["seconds"] for cost in matrix["costs"])
    return {name: value for name, value in found.items() if value is not None}


def document(name: str, question: str, study: SequenceStudy, results: dict[str, Any]) -> str:
    """results.md: the question, the rows and the table."""
    rows = [
        f"- `{row}`: {', '.join(own) or 'as the base is'}"
        for row, own in study.rows.items()
        if row in results
    ]
    folders = [p.parent for row in results for p in (study.root / row).glob("seed*/*/doctor.json")]
    day = datetime.datetime.now(datetime.timezone.utc).date()
    return "\n".join(
        [
            f"## {name}",
            "",
            question.strip(),
            "",
            *rows,
            "",
            markdown_table(*_table(results)),
            "Held-out values at the end; forgetting: the best value from a domain's own run on "
            f"against the end; lost: its share of the gain. {machines(folders)}, {day}.",
            "",
        ]
    )


def _table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for row in results.values() for name in row["mean"]))
    body = []
    for row, found in results.items():
        values = [printed_mean(found, name) for name in names]
        body.append([row, str(len(found["seeds"])), *values])
    return ["run", "seeds", *names], body


def draw(study: SequenceStudy, path: Path) -> None:
    """Plot every column over the sequence, one line per finished cell."""
    cells = [
        (number, index, parse_json(file.read_text(encoding="utf-8")))
        for number, row in enumerate(study.rows)
        for index, file in enumerate(sorted((study.root / row).glob(f"seed*/{MATRIX}")))
    ]
    names = list(dict.fromkeys(name for *_, matrix in cells for name in matrix["columns"]))
    figure = Figure(figsize=(3.6 * len(names) + 1.5, 3.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for number, index, matrix in cells:
            column = matrix["columns"].get(name)
            if column is not None:
                label = list(study.rows)[number] if index == 0 else None
                points = [(i, y) for i, y in enumerate(column["values"]) if y is not None]
                x, y = [x for x, _ in points], [y for _, y in points]
                panel.plot(x, y, marker="o", color=f"C{number % 10}", label=label)
        panel.set_title(name)
        panel.set_xlabel("domains learned")
        panel.grid(alpha=0.3)
    named = panels[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=110)


def write_results(
    name: str, question: str, study: SequenceStudy, console: Console
) -> dict[str, Any]:
    """Write results.json, results.md and curves.png, and print the table."""
    results = study.collect()
    write_json(study.root / "results.json", results)
    draw(study, study.root / "curves.png")
    write_text(study.root / "results.md", document(name, question, study, results))
    print_table(*_table(results), console)
    return results
