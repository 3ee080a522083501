"""The update at which a metric came down to a value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afd.lab.crossing import crossing, main


def test_it_is_interpolated_between_evaluations() -> None:
    values = {0: 1.0, 20: 0.5, 40: 0.3, 60: 0.4, 80: 0.2}
    assert crossing(values, 0.35) == pytest.approx(35)
    assert crossing(values, 0.5) == 20
    assert crossing(values, 0.1) is None


def test_it_is_printed_by_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"update": u, "metrics": {"phys": v}} for u, v in ((0, 1.0), (20, 0.2))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "evaluation.jsonl").write_text(text, encoding="utf-8")
    main(["phys", "0.6", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path}: 10\n"
    with pytest.raises(SystemExit, match="needs a metric"):
        main(["phys"])
