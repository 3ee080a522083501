"""The benchmark of the live server runs in small."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.test_benchmarks import run


def test_every_quantity_is_measured(tmp_path: Path) -> None:
    document, printed = run("live", tmp_path)
    found = {(row["case"], row["quantity"]): row["value"] for row in document["rows"]}
    assert {case for case, _ in found} == {
        "picture 16x16", "picture 480x832", "latency", "1 viewer"
    }  # fmt: skip
    assert all(value >= 0 for value in found.values())
    assert found["latency", "switch to its chunk"] > 0
    assert found["1 viewer", "fps, least of the viewers"] > 0
    assert "server CPU" in printed
