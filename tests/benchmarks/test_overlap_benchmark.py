"""The benchmark of what runs at the same time measures both sides of both cases."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import overlap


def test_the_benchmark_writes_a_row_for_each_side(tmp_path: Path) -> None:
    overlap.main(["--quick", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "overlap.json").read_text())["rows"]
    found = [(row["case"], row["provider"]) for row in rows]
    assert found == [(case, name) for case, names in overlap.CASES.items() for name in names]
    for row in rows:
        assert row["median_ms"] > 0
        if row["provider"] in ("serial", "async 0"):
            assert row["ratio"] == 1
