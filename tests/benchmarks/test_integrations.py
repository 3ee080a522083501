"""The eager sides of benchmarks/integrations.py are the trainers' formulas, and its pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import integrations
from tests.integrations.formulas import CASES, Case

# A case of the tests' own formulas for every kind of eager side, with the benchmark's constants.
_BETA, _PRIOR, _CLIP = integrations.BETA, integrations.PRIOR, integrations.CLIP
_OFFICIAL = {"beta": _BETA, "kl": _PRIOR, "clip": (-_CLIP, _CLIP)}
CONSTANTS = {
    "diffusionnft": _OFFICIAL,
    "fastvideo": _OFFICIAL,
    "flow_factory": _OFFICIAL,
    "verl_omni": _OFFICIAL | {"floor": 1e-3},
    "unirl": {"beta": _BETA, "kl": _PRIOR, "sat": _CLIP, "adaptive": True},
    "astrolabe": {"beta": _BETA, "kl": _PRIOR, "clip": _CLIP},
    "worldcompass": {"clip": _CLIP, "frames": 3, "accumulation": 2},
}


@pytest.mark.parametrize("name", integrations.TRAINERS)
def test_the_eager_side_is_the_trainers_formula(name: str) -> None:
    i = integrations.inputs(integrations.QUICK, "cpu")
    found = integrations.exact(integrations.TRAINERS[name].eager, i)
    formula = next(case.formula for case in CASES.values() if case.page == name)
    x = {key: value.detach() for key, value in i.items() if key != "r"}
    # The advantage that r came from.
    x["advantage"] = (i["r"].double() - 0.5) * 2 * _CLIP
    _, right = Case(name, formula, CONSTANTS[name]).value(x)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-15)


def test_a_quick_run_measures_every_page(tmp_path: Path) -> None:
    integrations.main(["--quick", "--out", str(tmp_path)])
    saved = json.loads((tmp_path / "integrations.json").read_text())
    assert [row["trainer"] for row in saved["rows"]] == list(integrations.TRAINERS)
    for row in saved["rows"]:
        assert row["afd_error"] < row["eager_error"]
        assert row["afd_mib"] < row["eager_mib"]
    with pytest.raises(SystemExit):
        integrations.main(["--quick", "--pages"])


def test_pages_are_filled_between_their_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, end = integrations.MARKERS
    for page in [*integrations.TRAINERS, "README"]:
        (tmp_path / f"{page}.md").write_text(f"before\n{begin}old\n{end}after\n")
    monkeypatch.setattr(integrations, "PAGES", tmp_path)
    rows = [integrations.Row(n, 30, 4, 1e-2, 2e-3) for n in integrations.TRAINERS]
    integrations.write_pages(rows, "cpu")
    page = (tmp_path / "unirl.md").read_text()
    assert page.startswith(f"before\n{begin}Loss and backward: 30 → 4.0 MiB")
    assert page.endswith(f"{end}after\n")
    assert (tmp_path / "README.md").read_text().count("](") == len(rows)
    (tmp_path / "unirl.md").write_text("no markers")
    with pytest.raises(SystemExit, match="measured:begin"):
        integrations.write_pages(rows, "cpu")
