"""The benchmark of an update's rollouts, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import streaming


def test_sharing_takes_the_counted_passes(tmp_path: Path) -> None:
    streaming.main(["--quick", "--device", "cpu", "--group", "4", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "streaming.json").read_text())
    share = {row["provider"]: row["share"] for row in document["rows"]}
    assert share == pytest.approx({"off": 1, "1": 13 / 16, "2": 10 / 16, "last": 7 / 16})
    assert all(row["median_ms"] > 0 < row["peak_mib"] for row in document["rows"])
