"""The benchmark of an update's rollouts, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import streaming


def test_sharing_takes_the_counted_passes_and_streams_no_more_memory(tmp_path: Path) -> None:
    options = ["--quick", "--device", "cpu", "--group", "4", "--out", str(tmp_path)]
    streaming.main([*options, "--providers", "off", "1", "2", "last", "1x", "10x"])
    document = json.loads((tmp_path / "streaming.json").read_text())
    rows = {row["provider"]: row for row in document["rows"]}
    share = {name: row["share"] for name, row in rows.items()}
    wanted = {"off": 1, "1": 13 / 16, "2": 10 / 16, "last": 7 / 16, "1x": 1, "10x": 10}
    assert share == pytest.approx(wanted)
    assert all(row["median_ms"] > 0 < row["peak_mib"] for row in rows.values())
    # The copy of what the stream holds before the clip, and its last chunk.
    assert rows["10x"]["peak_mib"] < 2 * rows["1x"]["peak_mib"]
