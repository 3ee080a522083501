"""What each domain gained and what it cost the others: every column after every domain.

Row i of the matrix is the student after domain i (row 0: the base), column j the held-out set j.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afd.adapt.sequence import Chain, Domain
from afd.config.run import RunConfig
from afd.distributed import Ranks
from afd.errors import ConfigError
from afd.files import parse_json, read_json_lines, write_json
from afd.trainer import checkpoint
from afd.trainer.again import evaluate_with

MATRIX, ROWS = "matrix.json", "matrix"
Row = dict[str, dict[str, Any]]


def measure(chain: Chain, domain: Domain | None, ranks: Ranks) -> None:
    """Measure the columns of a row that are not measured yet; None: the base student's.

    Every process must call this. A row's file is written at once, so that a killed measurement is
    repeated.
    """
    run = chain.domains[0].run if domain is None else domain.run
    path, held, of = _row_file(chain, domain), Row(), dict[str, str]()
    if ranks.main:
        held = _read(path)
        state = "" if domain is None else _state(run)
        of = {
            name: _identity(chain.measured(run, {name: column}), name, state)
            for name, column in chain.columns.items()
        }
    names = ranks.same([name for name in of if held.get(name, {}).get("of") != of[name]])
    missing = {name: chain.columns[name] for name in names}
    if not missing:
        return
    result = evaluate_with(chain.measured(run, missing), start=domain is None)
    if not ranks.main:
        return
    for name in missing:
        start = f"{name}/"
        found = {k.removeprefix(start): x for k, x in result.metrics.items() if k.startswith(start)}
        count = result.count // len(missing)
        held[name] = {"of": of[name], "videos": count, "metrics": found}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {name: held[name] for name in chain.columns})


def refuse_unknown_metrics(chain: Chain) -> None:
    """Raise ConfigError for a column of a metric that the base student's row, which is measured
    before anything is learned, does not have."""
    row = _read(_row_file(chain, None))
    for name, column in chain.columns.items():
        has = row.get(name, {}).get("metrics", {})
        if column.metric is not None and column.metric not in has:
            raise ConfigError(
                f"{name}: evaluation.metric: got {column.metric}; needed: one that is measured "
                f"there: {', '.join(has) or 'none is'}"
            )


def _row_file(chain: Chain, domain: Domain | None) -> Path:
    name = "0_base" if domain is None else domain.folder.name
    return chain.root / ROWS / f"{name}.json"


def _read(path: Path) -> Row:
    """A row's file; empty if it is absent or damaged, and then measured again."""
    try:
        held = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    good = isinstance(held, dict) and all(isinstance(cell, dict) for cell in held.values())
    return held if good else {}


def _state(run: RunConfig) -> str:
    """SHA-256 of a run's newest checkpoint; empty without one."""
    newest = checkpoint.latest(run.run_dir / "checkpoints")
    if newest is None:
        return ""
    return str(checkpoint.read_meta(newest)["sha256"])


def _identity(run: RunConfig, name: str, state: str) -> str:
    """Hash of what a cell depends on: the held-out set and the state of the student."""
    evaluation = run.evaluation.each()[name]
    settings = [evaluation.model_dump(mode="json", exclude={"every", "samples"}), state]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write_matrix(chain: Chain) -> dict[str, Any]:
    """Write matrix.json from the rows that are measured; returns it."""
    rows = [("base", _read(_row_file(chain, None)))]
    rows += [(d.name, _read(_row_file(chain, d))) for d in chain.domains]
    rows = [(name, row) for name, row in rows if row]
    columns: dict[str, dict[str, Any]] = {}
    for name, column in chain.columns.items():
        first = next(iter(rows[0][1].get(name, {}).get("metrics", {})), None) if rows else None
        metric = column.metric or first
        columns[name] = {
            "metric": metric,
            "better": column.better,
            "values": [row.get(name, {}).get("metrics", {}).get(metric) for _, row in rows],
        }
    order = [name for name, _ in rows]
    summary: dict[str, Any] = {
        "name": chain.config.name,
        "rows": order,
        "columns": columns,
        "R": [[one["values"][i] for one in columns.values()] for i in range(len(order))],
        "domains": {
            d.name: balance(columns[d.name]["values"], columns[d.name]["better"], order, d.name)
            for d in chain.domains
            if d.name in columns
        },
        "costs": [cost(domain) for domain in chain.domains],
        "metrics": {name: {n: cell["metrics"] for n, cell in row.items()} for name, row in rows},
    }
    write_json(chain.root / MATRIX, summary)
    return summary


def balance(
    values: Sequence[float | None], better: str, rows: Sequence[str], name: str
) -> dict[str, float | None]:
    """What a domain gained and lost again.

    Positive is better for `gain` (of its own run, against the base) and worse for `forgetting` (the
    best value from then on against the last). `lost`: forgetting over gain. None: not known.
    """
    nothing: dict[str, float | None] = {"gain": None, "forgetting": None, "lost": None}
    if name not in rows:
        return nothing
    own = rows.index(name)
    sign = -1.0 if better == "lower" else 1.0
    known = [sign * value for value in values[own:] if value is not None]
    base, after = values[0], values[own]
    if base is None or after is None:
        return nothing
    gain = sign * (after - base)
    forgetting = max(known) - known[-1]
    return {"gain": gain, "forgetting": forgetting, "lost": forgetting / gain if gain > 0 else None}


def cost(domain: Domain) -> dict[str, Any]:
    """GPU-seconds of a domain's run (of CPU processes on a laptop), and money of its teacher."""
    lines = [line.value for line in read_json_lines(domain.folder / "metrics.jsonl")]
    seconds = [line["time_s"] for line in lines if isinstance(line, dict) and "time_s" in line]
    processes = 1
    newest = checkpoint.latest(domain.folder / "checkpoints")
    if newest is not None:
        processes = int(checkpoint.read_meta(newest)["written_by"].get("processes", 1))
    forecast = domain.run.teacher.forecast(domain.run.teacher_dir, 0)
    return {
        "domain": domain.name,
        "updates": len(lines),
        "seconds": (seconds[-1] if seconds else 0.0) * processes,
        "teacher_usd": forecast.spent_usd,
    }
