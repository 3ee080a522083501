"""examples/adapt_watch_export.ipynb runs from top to bottom, and is committed without outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel")

FILE = Path(__file__).parents[2] / "examples" / "adapt_watch_export.ipynb"
# A run that shows every output and teaches nothing.
SMALL = {"UPDATES": 6, "CLIPS": 16, "VIDEOS": 36}


def notebook() -> Any:
    return nbformat.read(FILE, as_version=4)


def test_it_is_committed_without_outputs_and_every_step_has_its_text() -> None:
    cells = notebook().cells
    nbformat.validate(notebook())
    for before, cell in zip([None, *cells], cells, strict=False):
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            assert before is not None
            assert before.cell_type == "markdown"


@pytest.mark.slow
def test_it_runs_and_shows_videos_curves_and_the_exported_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = notebook()
    (parameters,) = (c for c in run.cells if "parameters" in c.metadata.get("tags", ()))
    for name, value in SMALL.items():
        parameters.source, count = re.subn(
            rf"^{name} = \d+", f"{name} = {value}", parameters.source, flags=re.M
        )
        assert count == 1
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(run, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [out for cell in run.cells if cell.cell_type == "code" for out in cell.outputs]
    shown = [kind for out in outputs for kind in out.get("data", ())]
    assert shown.count("image/gif") == 3
    assert shown.count("image/png") >= 1
    printed = "".join(out.get("text", "") for out in outputs)
    difference = re.search(r"mean difference of a pixel: ([\d.]+)", printed)
    assert difference is not None
    assert float(difference[1]) > 0
    (home,) = tmp_path.glob("afd_notebook_*")
    assert (home / "run" / "report.html").is_file()
    assert list((home / "videos").glob("*.mp4"))
