"""`afd quickstart-full`: the whole table, teachers x runs x seeds, with its controls.

Every cell is a run folder runs/quickstart-full/<row>/seed<k>/ that is skipped once finished;
`rows=` and `seeds=` choose a part; every other override goes to every run. At the end results.json
and results.md hold what is finished so far.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from afd.config import ConfigError, RunConfig, make_config
from afd.quickstart import COLUMNS, base, final_evaluation
from afd.training.loop import Outcome, train

MOTION, RANDOM = "discriminator.backbone=motion", "discriminator.backbone=random"
# The plain discriminator: whole clips as they look, no help from outside.
SCRATCH = [
    "discriminator.backbone=scratch",
    "discriminator.random_looks=false",
    "discriminator.beginnings=false",
]
# Row name: overrides. Its first word is the teacher's look.
ROWS: dict[str, list[str]] = {
    "nuis-sft": ["method=sft"],
    "nuis-afd-scratch": SCRATCH,
    "nuis-afd-motion": [MOTION],
    "mark-sft": ["method=sft"],
    "mark-afd-scratch": SCRATCH,
    "mark-afd-motion": [MOTION],
    "outline-sft": ["method=sft"],
    "outline-afd-motion": [MOTION],
    "noise-sft": ["method=sft"],
    "noise-afd-motion": [MOTION],
    "clean-sft": ["method=sft"],
    "clean-afd-scratch": SCRATCH,
    "clean-afd-motion": [MOTION],
    # Controls: no signal, and a frozen backbone that was never trained.
    "nuis-control-random-advantage": [MOTION, "afd.advantage=random"],
    "clean-control-random-advantage": [*SCRATCH, "afd.advantage=random"],
    "nuis-control-random-backbone": [RANDOM],
}
SIGNS = ("critic/margin", "critic/accuracy", "agreement/phys")


def quickstart_full(overrides: Sequence[str], console: Console) -> bool:
    """Run or continue every chosen cell; False where Ctrl-C stopped it (all saved)."""
    rows, seeds, common = _choice(overrides)
    root = make_config({"name": "quickstart-full"}, common, "afd quickstart-full").run_dir
    for row in rows:
        for seed in seeds:
            config = cell(root, row, seed, common)
            base(base_cell(root, config.teacher.style, common), console)
            console.rule(f"{row}, seed {seed}")
            if train(config, console=console) is Outcome.STOPPED:
                console.print("stopped, everything is saved; the same command continues")
                return False
    results = collect(root)
    (root / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (root / "results.md").write_text(markdown(results), encoding="utf-8")
    console.print(show(results))
    console.print(f"{root / 'results.json'} and {root / 'results.md'}", soft_wrap=True)
    return True


def cell(root: Path, row: str, seed: int, common: Sequence[str]) -> RunConfig:
    """The configuration of one run. Runs on one look share its teacher's folder."""
    style = row.split("-")[0]
    out, teacher = root / row / f"seed{seed}", root / "teachers" / style
    own = [f"name={row}", f"seed={seed}", f"teacher.style={style}", *ROWS[row]]
    paths = [f"out={json.dumps(str(out))}", f"teacher.path={json.dumps(str(teacher))}"]
    return make_config({}, [*common, *own, *paths], origin="afd quickstart-full")


def base_cell(root: Path, style: str, common: Sequence[str]) -> RunConfig:
    """Where a look's teacher and the base student are measured, once."""
    paths = {"out": root / "base" / style, "teacher.path": root / "teachers" / style}
    own = [f"{key}={json.dumps(str(path))}" for key, path in paths.items()]
    return make_config({"name": "base"}, [*common, f"teacher.style={style}", *own])


def collect(root: Path) -> dict[str, Any]:
    """Per row the final metrics of every finished seed, with mean and standard deviation."""
    results: dict[str, Any] = {}
    for folder in sorted((root / "base").glob("*")):
        for method in ("teacher", "base"):
            line = final_evaluation(folder, method)
            if line is not None and (method == "teacher" or "base" not in results):
                name = f"{folder.name}-teacher" if method == "teacher" else "base"
                results[name] = _row({"0": {"metrics": line["metrics"]}})
    for row in ROWS:
        finished = sorted(path.parent for path in (root / row).glob("seed*/DONE"))
        cells = {folder.name.removeprefix("seed"): _cell(folder) for folder in finished}
        if cells:
            results[row] = _row(cells)
    return results


def _cell(folder: Path) -> dict[str, Any]:
    text = (folder / "evaluation.jsonl").read_text(encoding="utf-8")
    evaluations = [json.loads(line) for line in text.splitlines()]
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    updates = [json.loads(line) for line in text.splitlines()]
    best = min(evaluations, key=lambda line: line["metrics"]["phys"])
    late = updates[-max(1, len(updates) // 8) :]
    signs = {
        sign: statistics.mean(values)
        for sign in SIGNS
        if (values := [line[sign] for line in late if sign in line])
    }
    return {
        "metrics": evaluations[-1]["metrics"] | signs,
        "updates": updates[-1]["step"],
        "seconds": updates[-1]["time_s"],
        "best": {"update": best["step"], "phys": best["metrics"]["phys"]},
    }


def _row(cells: dict[str, Any]) -> dict[str, Any]:
    names = dict.fromkeys(name for found in cells.values() for name in found["metrics"])
    values = {
        name: [found["metrics"][name] for found in cells.values() if name in found["metrics"]]
        for name in names
    }
    return {
        "seeds": cells,
        "mean": {name: statistics.fmean(v) for name, v in values.items()},
        "std": {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in values.items()},
    }


def _cells(row: dict[str, Any]) -> list[str]:
    """A row's printed values: mean ± standard deviation over seeds."""
    several = len(row["seeds"]) > 1
    seconds = [found["seconds"] for found in row["seeds"].values() if "seconds" in found]
    printed = [str(len(row["seeds"])), f"{statistics.fmean(seconds):.0f}" if seconds else ""]
    for column in (*COLUMNS, *SIGNS):
        if column not in row["mean"]:
            printed.append("")
        else:
            spread = f" ± {row['std'][column]:.3f}" if several else ""
            printed.append(f"{row['mean'][column]:.3f}{spread}")
    return printed


def _header() -> list[str]:
    return ["run", "seeds", "s", *COLUMNS, *(sign.replace("/", " ") for sign in SIGNS)]


def markdown(results: dict[str, Any]) -> str:
    """The table for a document."""
    lines = [_header(), ["---"] * len(_header())]
    lines += [[name, *_cells(row)] for name, row in results.items()]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def show(results: dict[str, Any]) -> Table:
    """The table for the screen."""
    table = Table(*_header())
    for name, row in results.items():
        table.add_row(name, *_cells(row))
    return table


def _choice(overrides: Sequence[str]) -> tuple[list[str], list[int], list[str]]:
    """`rows=` and `seeds=` taken out of the overrides."""
    chosen: dict[str, Any] = {"rows": list(ROWS), "seeds": [0, 1, 2]}
    common = []
    for override in overrides:
        key, _, text = override.partition("=")
        if key in chosen:
            chosen[key] = yaml.safe_load(text)
        else:
            common.append(override)
    rows, seeds = chosen["rows"], chosen["seeds"]
    if not isinstance(rows, list) or not set(rows) <= set(ROWS):
        raise ConfigError(f"rows: got {rows!r}, needs a list of {', '.join(ROWS)}")
    if not isinstance(seeds, list) or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise ConfigError(f"seeds: got {seeds!r}, needs a list of whole numbers such as [0,1,2]")
    return rows, seeds, common
