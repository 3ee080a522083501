"""Sets a run of `python -m benchmarks.nft_loss --out` beside an earlier one or another machine's.

    python -m benchmarks.compare OLD NEW --threshold 1.1
    python -m benchmarks.compare OLD                      # NEW: measured now

Times are compared in units of each run's own floor (the passes' bytes over its machine's stream),
so that differences are due to the code. Exits with 1 if a row takes more than `--threshold` times
its old units, with 2 if the shapes differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.append(str(Path(__file__).resolve().parents[1]))

Document = dict[str, Any]
Key = tuple[str, str, int]


class NotComparable(Exception):
    """Two documents without common rows, or one that is not such a run."""


def read(path: Path) -> Document:
    """The JSON of a run.

    Raises:
        NotComparable: if the file is not such a run.
    """
    try:
        document: Document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NotComparable(f"{path}: got {error}; needed: a JSON of nft_loss --out") from None
    if not isinstance(document, dict) or "shape" not in document or "rows" not in document:
        raise NotComparable(
            f"{path}: got a JSON without shape and rows; needed: one of nft_loss --out"
        )
    return document


def keyed(document: Document) -> dict[Key, dict[str, Any]]:
    return {(row["provider"], row["dtype"], row["B"]): row for row in document["rows"]}


def ratios(old: Document, new: Document) -> dict[Key, float]:
    """New time over old time in units of each run's floor, for the rows of both.

    Raises:
        NotComparable: if the shapes differ or there are no common rows.
    """
    if old["shape"] != new["shape"]:
        raise NotComparable(f"shape: got {old['shape']} and {new['shape']}; needed: the same")
    before, after = keyed(old), keyed(new)
    both = [key for key in after if key in before]
    if not both:
        raise NotComparable(
            f"rows: got {sorted(before)} and {sorted(after)}; needed: a provider, dtype and batch "
            "that stand in both"
        )
    return {key: before[key]["pct_of_floor"] / after[key]["pct_of_floor"] for key in both}


def table(old: Document, new: Document) -> list[str]:
    """The comparison as lines of Markdown."""
    before, after = keyed(old), keyed(new)
    lines = [
        "| provider | dtype | B | old ms | new ms | old error | new error | units, new / old |"
    ]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for key, ratio in ratios(old, new).items():
        was, now = before[key], after[key]
        cells = [*map(str, key), f"{was['median_ms']:.3g}", f"{now['median_ms']:.3g}"]
        cells += [f"{was['error']:.1e}", f"{now['error']:.1e}", f"{ratio:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measured() -> Document:
    """Measure a new run."""
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.nft_loss", "--out", folder]
        subprocess.run(command, cwd=root, check=True)
        return read(Path(folder, "nft_loss_table.json"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", help="default: measure now")
    parser.add_argument("--threshold", type=float, default=1.1, help="most units, new over old")
    args = parser.parse_args(argv)
    try:
        old = read(args.old)
        new = measured() if args.new is None else read(args.new)
        print("\n".join(table(old, new)))
    except NotComparable as error:
        print(error, file=sys.stderr)
        return 2
    slower = {key: x for key, x in ratios(old, new).items() if not x <= args.threshold}
    for key, x in slower.items():
        print(f"slower: {' '.join(map(str, key))}, {x:.2f} times its units")
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
