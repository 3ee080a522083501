"""The report of a sequence of domains, from its sequence.json and matrix.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from afd.adapt.matrix import MATRIX
from afd.adapt.sequence import FILE
from afd.files import parse_json
from afd.lab.report.charts import BOTTOM, LEFT, RIGHT, STEPS, TOP, Chart
from afd.lab.report.inline_svg import COLORS, HEIGHT, WIDTH, inline_svg
from afd.lab.report.metrics import number
from afd.lab.report.run_files import numbers

ARROWS = {"lower": "lower is better", "higher": "higher is better"}


def is_sequence(folder: Path) -> bool:
    """Whether a folder holds a sequence of domains."""
    return (folder / FILE).is_file()


def sequence_page(folder: Path) -> dict[str, Any]:
    """The variables of sequence.html. Missing or damaged files become notices."""
    notices: list[str] = []
    plan, matrix = (_read(folder / name, notices) for name in (FILE, MATRIX))
    domains = [d for d in _list(plan.get("domains")) if isinstance(d.get("name"), str)]
    rows = [str(row) for row in matrix.get("rows", []) if isinstance(row, str)]
    columns = {
        str(name): column
        for name, column in _mapping(matrix.get("columns")).items()
        if isinstance(column, dict) and isinstance(column.get("values"), list)
    }
    done = [d["name"] for d in domains if d["name"] in rows]
    if matrix and len(done) < len(domains):
        left = ", ".join(d["name"] for d in domains if d["name"] not in rows)
        notices.append(f"Not finished yet: {left}.")
    table = [
        {
            "name": row,
            "cells": [
                {"value": _at(column, i), "own": row == name} for name, column in columns.items()
            ],
        }
        for i, row in enumerate(rows)
    ]
    balances = {k: numbers(v) for k, v in _mapping(matrix.get("domains")).items()}
    costs: list[dict[str, Any]] = [
        {**numbers(cost), "domain": str(cost.get("domain"))} for cost in _list(matrix.get("costs"))
    ]
    return {
        "name": str(plan.get("name") or folder.resolve().name),
        "date": _when(folder / MATRIX),
        "title": _title(done, balances),
        "notices": notices,
        "rows": table,
        "columns": [
            {
                "name": name,
                "metric": str(column.get("metric")),
                "better": ARROWS.get(str(column.get("better")), ""),
                "domain": name in balances,
                **{key: balances.get(name, {}).get(key) for key in ("gain", "forgetting", "lost")},
            }
            for name, column in columns.items()
        ],
        "charts": [_chart(name, column, rows) for name, column in columns.items() if rows],
        "costs": costs,
        "seconds": sum(cost.get("seconds", 0.0) for cost in costs),
        "usd": sum(cost.get("teacher_usd", 0.0) for cost in costs),
        "folders": [str(d.get("folder", "")) for d in domains],
    }


def _title(done: Sequence[str], balances: Mapping[str, Mapping[str, float]]) -> str:
    """What was learned and how much of it was lost again."""
    if not done:
        return "No domain is finished yet"
    known = [balances[name] for name in done if "gain" in balances.get(name, {})]
    gained = sum(one["gain"] > 0 for one in known)
    earlier = [one["lost"] for one in known[:-1] if "lost" in one]
    lost = f"; at most {max(earlier):.0%} of a gain was lost again" if earlier else ""
    return f"{gained} of {len(known)} domains gained{lost}"


def _chart(name: str, column: Mapping[str, Any], rows: Sequence[str]) -> Chart:
    """A column's value in the base student and after every domain."""
    points = [(i, value) for i in range(len(rows)) if (value := _at(column, i)) is not None]

    def draw(axes: Axes) -> None:
        size = (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT
        axes.set_position((LEFT / WIDTH, BOTTOM / HEIGHT, *size))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        axes.set_xticks(range(len(rows)), list(rows))
        axes.set_xlim(-0.3, len(rows) - 0.7)
        ys = [y for _, y in points] or [1.0]
        axes.set_ylim(min(0.0, *ys), 1.08 * max(0.0, *ys) or 1.0)
        axes.plot([x for x, _ in points], [y for _, y in points], color=COLORS["afd"], marker="o")
        own = [point for point in points if rows[point[0]] == name]
        for x, y in own:
            axes.plot(x, y, color=COLORS["teacher"], marker="o", markersize=12)

    words = " ".join(f"{rows[i]}: {number(value)}." for i, value in points)
    note = f"{column.get('metric')}, {ARROWS.get(str(column.get('better')), '')}; after each domain"
    legend = [("after its own domain", "teacher")] if name in rows else []
    return Chart(name, note, legend, inline_svg(draw, f"{name}, {note}", words))


def _at(column: Mapping[str, Any], row: int) -> float | None:
    values = column["values"]
    found = numbers({"x": values[row]}) if row < len(values) else {}
    return found.get("x")


def _read(path: Path, notices: list[str]) -> dict[str, Any]:
    try:
        held = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notices.append(f"{path.name} is not here yet: afd adapt writes it after each domain.")
        return {}
    except (OSError, ValueError) as error:
        notices.append(f"{path.name} cannot be read ({error}).")
        return {}
    if not isinstance(held, dict):
        notices.append(f"{path.name} is damaged.")
        return {}
    return held


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> Iterator[Mapping[str, Any]]:
    return (one for one in value if isinstance(one, dict)) if isinstance(value, list) else iter(())


def _when(path: Path) -> datetime | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime)
    except (OSError, ValueError, OverflowError):
        return None
