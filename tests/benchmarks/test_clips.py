"""The benchmark of clips runs, and its rows say what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import clips


def test_it_measures_check_and_read(tmp_path: Path) -> None:
    clips.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "clips.json").read_text())["rows"]
    assert [row["work"] for row in rows] == ["check", "read"]
    assert all(row["median_ms"] > 0 and row["MB"] > 0 for row in rows)
