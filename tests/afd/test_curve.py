"""A run's metrics over its updates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from afd.lab.curve import curve, main

EVALUATIONS = [{"update": u, "metrics": {"phys": 1.0 - u / 100}} for u in (0, 2, 4)]
UPDATES = [
    {"update": 1, "norm": 1.0},
    {"update": 2, "norm": 2.0},
    {"update": 3, "norm": 5.0, "late": 7.0},
    {"update": 4, "norm": 7.0},
    {"update": 5, "norm": 100.0},
]


def test_a_metric_of_training_is_the_mean_since_the_evaluation_before() -> None:
    assert curve("norm", EVALUATIONS, UPDATES) == [None, 1.5, 6.0]
    assert curve("late", EVALUATIONS, UPDATES) == [None, None, 7.0]
    assert curve("norm", EVALUATIONS[2:], UPDATES) == [3.75]
    assert curve("phys", EVALUATIONS, UPDATES) == [1.0, 0.98, 0.96]


def test_a_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "evaluation.jsonl", EVALUATIONS)
    _write(tmp_path / "metrics.jsonl", UPDATES)
    main([str(tmp_path), "phys", "late"])
    assert capsys.readouterr().out.splitlines() == [
        "| updates | 0 | 2 | 4 |",
        "| --- | --- | --- | --- |",
        "| phys | 1 | 0.98 | 0.96 |",
        "| late |  |  | 7 |",
    ]
    with pytest.raises(SystemExit, match="has no metric nowhere"):
        main([str(tmp_path), "phys", "nowhere"])
    _write(tmp_path / "evaluation.jsonl", [])
    with pytest.raises(SystemExit, match="has no evaluation"):
        main([str(tmp_path), "phys"])
    with pytest.raises(SystemExit, match="needs a run folder and metrics"):
        main([str(tmp_path)])


def _write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
