"""The report's table of several teachers: what each gave, and how its head does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

from afd.lab.report.run_files import Part, numbers

# Heading of a column, and the logged value that it is the late mean of.
COLUMNS = {
    "weight": "teacher/{}/weight",
    "accuracy": "discriminator/accuracy/{}",
    "margin": "discriminator/margin/{}",
    "spread of scores": "teacher/{}/score_std",
}
FIRST, LAST = "teacher/", "/videos"
PAIR, CORRELATION = "teachers/", "/correlation"


def teacher_rows(runs: Iterable[Part]) -> list[dict[str, Any]]:
    """A row per run and teacher, with the videos of all updates and means over the last eighth."""
    return [row for run in runs for row in _of(run)]


def _of(run: Part) -> Iterator[dict[str, Any]]:
    lines = [numbers(line) for line in run.updates]
    keys = dict.fromkeys(key for line in lines for key in line)
    late = lines[-max(1, len(lines) // 8) :]

    def mean(key: str) -> float | None:
        values = [line[key] for line in late if key in line]
        return fmean(values) if values else None

    for key in keys:
        if key.startswith(FIRST) and key.endswith(LAST):
            name = key.removeprefix(FIRST).removesuffix(LAST)
            yield {
                "run": run.label,
                "name": name,
                "videos": sum(line.get(key, 0.0) for line in lines),
                "values": [mean(pattern.format(name)) for pattern in COLUMNS.values()],
                "correlations": [
                    (other, value)
                    for other, pair in _pairs(keys, name)
                    if (value := mean(pair)) is not None
                ],
            }


def _pairs(keys: Iterable[str], name: str) -> Iterator[tuple[str, str]]:
    """Each other teacher, and the logged correlation with it."""
    for key in keys:
        if key.startswith(PAIR) and key.endswith(CORRELATION):
            pair = key.removeprefix(PAIR).removesuffix(CORRELATION).split("~")
            if name in pair:
                yield next((other for other in pair if other != name), name), key
