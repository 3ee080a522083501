"""The updates at which a metric of some runs came down to a value.

    python -m afd.lab.crossing phys 0.35 RUN_DIR [RUN_DIR ...]

prints a line per run, interpolated linearly between its evaluations; "-" for one that did not.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from afd.lab.quickstart import lines


def crossing(values: Mapping[int, float], target: float) -> float | None:
    """The update at which values by update first come down to `target`; None: never."""
    for (before, high), (after, low) in pairwise(sorted(values.items())):
        if low <= target < high:
            return before + (after - before) * (high - target) / (high - low)
    return None


def main(arguments: list[str]) -> None:
    if len(arguments) < 3:
        raise SystemExit("crossing: needs a metric, a value and run folders")
    metric, target, *folders = arguments
    for folder in folders:
        found = lines(Path(folder) / "evaluation.jsonl")
        values = {line["update"]: line["metrics"][metric] for line in found}
        at = crossing(values, float(target))
        print(f"{folder}: {'-' if at is None else round(at)}")


if __name__ == "__main__":
    main(sys.argv[1:])
