"""The table of what makes an update cheaper: the dry run's numbers, and shown on the page."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from afd.config.run import load_config
from afd.planning.plan import make_plan, show
from benchmarks import levers, report


@pytest.fixture(scope="module")
def rows() -> list[levers.Row]:
    return levers.rows()


def test_the_rows_are_what_the_dry_run_prints(rows: list[levers.Row]) -> None:
    for row in rows[::3]:
        plan = make_plan(load_config(levers.BASE, list(levers.LEVERS[row.lever])))
        screen = io.StringIO()
        show(plan, Console(file=screen, width=240))
        printed = screen.getvalue()
        assert f"student learns: {row.update:.1f} GPU-seconds" in printed
        assert row.update == pytest.approx(sum(row.seconds.values()))
        assert f"{row.fits} an H200" in printed
        _, _, times = printed.partition("GPU time")
        lines = [[cell.strip() for cell in line.split("│")] for line in times.splitlines()]
        phases = {cells[1]: cells[3] for cells in lines if len(cells) > 3}
        for name, seconds in row.seconds.items():
            assert phases[name] == f"{seconds:.1f}", name


def test_the_named_settings_together_come_to_130_gpu_seconds_on_one_h200(
    rows: list[levers.Row],
) -> None:
    found = {row.lever: row for row in rows}
    plain = found["none"].update
    assert plain == pytest.approx(266.6, abs=0.1)
    for name in ("windowed discriminator (shipped)", "tiny decoder", "kept contexts"):
        assert found[name].update < plain
    together = found["the first three and prefix of 5"]
    assert together.update <= 130
    assert together.fits != "exceeds"
    # A shorter prefix does not fit with kept contexts, and a random one takes longer.
    assert found["the first three and prefix of 4"].fits == "exceeds"
    assert found["the first three and prefix, random"].update > 130


def test_the_page_shows_the_table(rows: list[levers.Row]) -> None:
    page = (report.ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8").splitlines()
    shown = [line.strip("| ").split(" | ") for line in page if line.startswith("| ")]
    for row in levers.table(rows):
        assert row in shown, row[0]
