"""Metrics of a run over its updates, as a Markdown table.

    python -m afd.lab.curve RUN_DIR METRIC [METRIC ...]

has a column per evaluation. A metric of the evaluation (`phys`) is shown as it was measured there,
one of training (`student/grad_norm`) as its mean over the updates since the column before, or since
the start.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from afd.lab.quickstart import lines
from afd.lab.tables import markdown_table


def curve(
    name: str, evaluations: Sequence[Mapping[str, Any]], updates: Sequence[Mapping[str, Any]]
) -> list[float | None]:
    """A metric at every evaluation; None: not measured there, or in no update since the one before.

    `evaluations`, `updates`: the lines of evaluation.jsonl and metrics.jsonl.
    """
    if any(name in line["metrics"] for line in evaluations):
        return [line["metrics"].get(name) for line in evaluations]
    found: list[float | None] = []
    for before, after in pairwise([0, *(line["update"] for line in evaluations)]):
        since = [u[name] for u in updates if name in u and before < u["update"] <= after]
        found.append(sum(since) / len(since) if since else None)
    return found


def main(arguments: list[str]) -> None:
    if len(arguments) < 2:
        raise SystemExit("curve: needs a run folder and metrics")
    folder, *names = arguments
    evaluations = lines(Path(folder) / "evaluation.jsonl")
    updates = lines(Path(folder) / "metrics.jsonl")
    if not evaluations:
        raise SystemExit(f"curve: {folder} has no evaluation")
    values = {name: curve(name, evaluations, updates) for name in names}
    unknown = [name for name in names if all(value is None for value in values[name])]
    if unknown:
        raise SystemExit(f"curve: {folder} has no metric {', '.join(unknown)}")
    body = [
        [name, *("" if value is None else f"{value:.3g}" for value in values[name])]
        for name in names
    ]
    print(markdown_table(["updates", *(str(line["update"]) for line in evaluations)], body), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
