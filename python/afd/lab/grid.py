"""A grid of settings x seeds: run the missing cells, collect the finished ones, tabulate them.

Every cell is a run folder <root>/<row>/seed<k>/ that is skipped once finished, so the same command
resumes where it stopped. `afd.lab.ablation` reads the rows from a file.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from afd.config.run import RunConfig, make_config, parse_value
from afd.errors import ConfigError
from afd.files import write_json
from afd.lab.config import SimulatorConfig
from afd.lab.quickstart import COLUMNS, base, final_evaluation, lines
from afd.trainer.loop import Outcome, train

SIGNS = ("discriminator/margin", "discriminator/accuracy", "agreement/phys")


@dataclass(frozen=True)
class Study:
    """A grid of runs, one per row and seed.

    Attributes:
        root: folder of the study.
        rows: the overrides of each row.
        seeds: seeds of every row.
        chosen: rows to run now; None: all.
        start: base settings of every run, as parsed from YAML.
        common: overrides of every run; a row's own take precedence.
        columns: final metrics of the table.
        signs: keys of metrics.jsonl; the mean of each over the last eighth of a run is a column.
        origin: source of the settings, named in errors.
    """

    root: Path
    rows: dict[str, list[str]]
    seeds: Sequence[int]
    chosen: Sequence[str] | None = None
    start: dict[str, Any] = field(default_factory=dict)
    common: Sequence[str] = ()
    signs: Sequence[str] = SIGNS
    columns: Sequence[str] = COLUMNS
    origin: str = "configuration"

    def run(self, console: Console) -> bool:
        """Run or resume every selected cell; False if Ctrl-C interrupted it (progress saved)."""
        cells = [(row, seed) for row in self.chosen or self.rows for seed in self.seeds]
        # Build every configuration first, so that an invalid row fails before anything runs.
        configs = [self.cell(row, seed) for row, seed in cells]
        for (row, seed), config in zip(cells, configs, strict=True):
            if isinstance(config.teacher, SimulatorConfig) and config.student.kind == "toy":
                base(self.base_cell(config.teacher.style), console)
            console.rule(f"{row}, seed {seed}")
            if train(config, console=console) is Outcome.STOPPED:
                console.print("stopped, everything is saved; the same command continues")
                return False
        return True

    def cell(self, row: str, seed: int) -> RunConfig:
        """The configuration of one run. Runs with the same look share the simulator's folder."""
        own = [*self.rows[row], f"name={row}", f"seed={seed}"]
        return self._placed([*self.common, *own], self.root / row / f"seed{seed}")

    def base_cell(self, style: str) -> RunConfig:
        """The configuration that evaluates a look's teacher and the base student, once."""
        # Nothing is trained there, so a study may be resumed with another number of updates.
        own = ["name=base", f"teacher.style={style}", "updates=1"]
        return self._placed([*self.common, *own], self.root / "base" / style)

    def _placed(self, overrides: Sequence[str], out: Path) -> RunConfig:
        config = make_config(self.start, overrides, self.origin)
        changes: dict[str, Any] = {"out": out}
        if isinstance(config.teacher, SimulatorConfig):
            path = self.root / "teachers" / config.teacher.style
            changes["teacher"] = config.teacher.model_copy(update={"path": path})
        return config.model_copy(update=changes)

    # --- finished runs ---

    def collect(self) -> dict[str, Any]:
        """Final metrics of every finished seed per row, with mean and standard deviation."""
        results: dict[str, Any] = {}
        for folder in sorted((self.root / "base").glob("*")):
            for method in ("teacher", "base"):
                line = final_evaluation(folder, method)
                if line is not None and (method == "teacher" or "base" not in results):
                    name = f"{folder.name}-teacher" if method == "teacher" else "base"
                    results[name] = _row({"0": {"metrics": line["metrics"]}})
        for row in self.rows:
            cells = {
                folder.name.removeprefix("seed"): self._cell(folder)
                for folder in self.finished(row)
            }
            if cells:
                results[row] = _row(cells)
        return results

    def finished(self, row: str) -> list[Path]:
        """Folders of a row's finished runs."""
        return sorted(path.parent for path in (self.root / row).glob("seed*/DONE"))

    def _cell(self, folder: Path) -> dict[str, Any]:
        evaluations, updates = lines(folder / "evaluation.jsonl"), lines(folder / "metrics.jsonl")
        if not updates:
            raise ConfigError(f"{folder}: is finished and has no metrics.jsonl; remove it")
        late = updates[-max(1, len(updates) // 8) :]
        found = {
            "metrics": {
                sign: statistics.mean(values)
                for sign in self.signs
                if (values := [line[sign] for line in late if sign in line])
            },
            "updates": updates[-1]["update"],
            "seconds": updates[-1]["time_s"],
        }
        if evaluations:
            found["metrics"] = evaluations[-1]["metrics"] | found["metrics"]
        if any("phys" in line["metrics"] for line in evaluations):
            best = min(evaluations, key=lambda line: line["metrics"]["phys"])
            found["best"] = {"update": best["update"], "phys": best["metrics"]["phys"]}
        return found

    # --- tables ---

    def write(self, console: Console) -> dict[str, Any]:
        """Write results.json and print the table; returns the result of `collect`."""
        results = self.collect()
        write_json(self.root / "results.json", results)
        table = Table(*self._header())
        for name, row in results.items():
            table.add_row(name, *self._printed(row))
        console.print(table)
        return results

    def markdown(self, results: dict[str, Any]) -> str:
        """The results as a Markdown table."""
        return markdown_table(
            self._header(), [[n, *self._printed(row)] for n, row in results.items()]
        )

    def _header(self) -> list[str]:
        return [
            "run",
            "seeds",
            "s",
            *self.columns,
            *(sign.replace("/", " ") for sign in self.signs),
        ]

    def _printed(self, row: dict[str, Any]) -> list[str]:
        """A row's formatted values: mean ± standard deviation over seeds."""
        seconds = [found["seconds"] for found in row["seeds"].values() if "seconds" in found]
        printed = [str(len(row["seeds"])), f"{statistics.fmean(seconds):.0f}" if seconds else ""]
        return printed + [printed_mean(row, column) for column in (*self.columns, *self.signs)]


def _row(cells: dict[str, Any]) -> dict[str, Any]:
    return {"seeds": cells, **mean_and_std([found["metrics"] for found in cells.values()])}


def mean_and_std(seeds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """`mean` and `std` over seeds by metric, of the seeds that have it."""
    names = dict.fromkeys(name for found in seeds for name in found)
    values = {name: [found[name] for found in seeds if name in found] for name in names}
    return {
        "mean": {name: statistics.fmean(v) for name, v in values.items()},
        "std": {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in values.items()},
    }


def printed_mean(row: Mapping[str, Any], name: str) -> str:
    """A row's metric: mean ± standard deviation over seeds; empty if it has none."""
    if name not in row["mean"]:
        return ""
    spread = f" ± {row['std'][name]:.3f}" if len(row["seeds"]) > 1 else ""
    return f"{row['mean'][name]:.3f}{spread}"


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *body]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def machines(folders: Sequence[Path]) -> str:
    """Where the runs in these folders were made: CPUs and versions, each once."""
    facts = [json.loads((folder / "doctor.json").read_text("utf-8")) for folder in folders]
    return "; ".join(
        dict.fromkeys(
            f"{fact['cpu']['model']}, Python {fact['python']}, torch {fact['packages']['torch']}"
            for fact in facts
        )
    )


def choice(
    overrides: Sequence[str], rows: Sequence[str], seeds: Sequence[int]
) -> tuple[list[str], list[int], list[str]]:
    """Split `rows=` and `seeds=` from the other overrides; the defaults are all `rows` and `seeds`.

    Raises ConfigError for unknown rows and for seeds that are not whole numbers.
    """
    chosen: dict[str, Any] = {"rows": list(rows), "seeds": list(seeds)}
    common = []
    for override in overrides:
        key, _, text = override.partition("=")
        if key in chosen:
            chosen[key] = parse_value(text, f"override {override!r}")
        else:
            common.append(override)
    named = chosen["rows"]
    if not isinstance(named, list) or not all(row in rows for row in named):
        raise ConfigError(f"rows: got {named!r}, needs a list of {', '.join(rows)}")
    wanted = chosen["seeds"]
    if not isinstance(wanted, list) or not all(type(s) is int and s >= 0 for s in wanted):
        raise ConfigError(f"seeds: got {wanted!r}, needs a list of whole numbers such as [0,1,2]")
    return chosen["rows"], wanted, common
