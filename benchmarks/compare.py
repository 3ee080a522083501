"""Sets a run of `python -m benchmarks.nft_loss --out` beside an earlier one or another machine's.

    python -m benchmarks.compare OLD NEW --threshold 1.1
    python -m benchmarks.compare OLD                      # NEW: measured now

Times are compared in units of each run's own floor (the passes' bytes over its machine's stream),
so that what is left is the code's. Exits with 1 where a row needs more than `--threshold` times the
units it needed, with 2 where the two are not of one shape.
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

from benchmarks import clock

Document = dict[str, Any]
Key = tuple[str, str, int]


class NotComparable(Exception):
    """Two documents of which no row has a counterpart, or one that is no such run."""


def read(path: Path) -> Document:
    """The JSON of a run.

    Raises:
        NotComparable: for a file that is not one.
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
        NotComparable: where the shapes differ or no row is in both.
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
    """Lines of Markdown."""
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


def measured(old: Document) -> Document:
    """A run of now, of the shape and batches of an old one."""
    root = Path(__file__).resolve().parents[1]
    batches = {str(row["B"]) for row in old["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.nft_loss", "--out", folder]
        command += ["--shape", *map(str, old["shape"]), "--batch", *sorted(batches)]
        done = subprocess.run(command, cwd=root)
        if done.returncode not in (0, clock.INCOMPLETE):
            raise NotComparable(f"{' '.join(command)}: exited with {done.returncode}")
        return read(Path(folder, "nft_loss_table.json"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", help="default: measure now")
    parser.add_argument("--threshold", type=float, default=1.1, help="most units, new over old")
    args = parser.parse_args(argv)
    try:
        old = read(args.old)
        new = measured(old) if args.new is None else read(args.new)
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
