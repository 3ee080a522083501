"""gpu-check tells the truth: it goes on after a failure, says what it skipped, fits ten minutes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import OP_TESTS, ROOT, STUDENT_TESTS, Machine, Section, main, sections


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a test the process that asks torch what is here."""
    monkeypatch.setattr(gpu_check, "probe", lambda: Machine("here", "a machine", False))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def outcomes(out: Path) -> dict[str, dict[str, str]]:
    listed = json.loads((out / "summary.json").read_text())["sections"]
    return {outcome["section"]: outcome for outcome in listed}


@pytest.mark.usefixtures("machine")
def test_a_failing_section_is_reported_and_the_others_still_run(tmp_path: Path) -> None:
    check = [
        Section("good", [python("print('fine')")], 60),
        Section("bad", [python("print('why it broke'); raise SystemExit(3)")], 60),
        Section("absent", [["no-such-program"]], 60),
        Section("after", [python("import benchmarks, afd")], 60),
    ]
    assert main(["--out", str(tmp_path)], check) == 1
    found = outcomes(tmp_path)
    assert {name: o["status"] for name, o in found.items()} == {
        "good": "passed",
        "bad": "failed",
        "absent": "failed",
        "after": "passed",
    }
    assert "exited with 3" in found["bad"]["note"]
    assert "could not start" in found["absent"]["note"]
    summary = (tmp_path / "summary.md").read_text()
    assert "| bad | failed |" in summary
    assert "why it broke" in summary
    log = (tmp_path / "gpu-check.log").read_text()
    assert log.index("fine") < log.index("why it broke")


@pytest.mark.usefixtures("machine")
def test_every_command_of_a_section_runs_even_if_the_first_fails(tmp_path: Path) -> None:
    commands = [python("raise SystemExit(1)"), python("print('second ran')")]
    assert main(["--out", str(tmp_path)], [Section("both", commands, 60)]) == 1
    assert "second ran" in (tmp_path / "gpu-check.log").read_text()


@pytest.mark.usefixtures("machine")
def test_a_section_is_stopped_at_its_limit_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(8); pathlib.Path({str(alive)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert main(["--out", str(tmp_path / "out")], [Section("slow", [python(code)], 2)]) == 1
    outcome = outcomes(tmp_path / "out")["slow"]
    assert "stopped at the limit of 2 s" in outcome["note"]
    assert float(outcome["seconds"]) < 7
    assert not alive.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_sections_that_need_a_gpu_are_skipped_with_the_reason(tmp_path: Path) -> None:
    names = "tests,sanitizer,bench-nft_loss,bench-forward_noise"
    assert main(["--out", str(tmp_path), "--sections", names]) == 0
    found = outcomes(tmp_path)
    assert list(found) == names.split(",")
    assert {(o["status"], o["note"]) for o in found.values()} == {("skipped", "no CUDA device")}
    assert "| sanitizer | skipped | 0 | no CUDA device |" in (tmp_path / "summary.md").read_text()


@pytest.mark.usefixtures("machine")
def test_a_missing_tool_skips_the_section_that_needs_it(tmp_path: Path) -> None:
    check = [Section("sanitizer", [["no-such-tool"]], 5, needs_tool="no-such-tool")]
    assert main(["--out", str(tmp_path)], check) == 0
    assert outcomes(tmp_path)["sanitizer"]["note"] == "no-such-tool is not on the PATH"


@pytest.mark.usefixtures("machine")
def test_a_missing_package_skips_the_section_in_one_line(tmp_path: Path) -> None:
    check = [Section("step", [python("import nowhere")], 5, needs_modules=("json", "nowhere"))]
    assert main(["--out", str(tmp_path)], check) == 0
    assert outcomes(tmp_path)["step"]["note"] == "nowhere cannot be imported"


@pytest.mark.usefixtures("machine")
def test_an_unknown_section_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--sections", "bench"])
    assert "got bench; needed: of build, tests, parity, sanitizer" in capsys.readouterr().err


def test_the_limits_add_up_to_less_than_ten_minutes(tmp_path: Path) -> None:
    assert sum(section.limit_s for section in sections(tmp_path, tmp_path)) < 600


@pytest.mark.usefixtures("machine")
def test_results_of_the_benchmarks_are_in_the_summary(tmp_path: Path) -> None:
    code = (
        "import sys; from benchmarks import forward_noise; forward_noise.main(['--device', 'cpu', "
        f"'--quick', '--providers', 'eager', '--dtype', 'fp32', '--out', {str(tmp_path)!r}])"
    )
    assert (
        main(["--out", str(tmp_path)], [Section("bench-forward_noise", [python(code)], 500)]) == 0
    )
    summary = (tmp_path / "summary.md").read_text()
    assert re.search(r"\| rectified_flow \| fp32 \| 2 \| given \| eager \| [\d.]+ \|", summary)
    assert len(list(tmp_path.iterdir())) <= 8


def test_every_test_that_needs_a_gpu_is_in_a_folder_that_gpu_check_runs() -> None:
    marked = [p for p in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in p.read_text()]
    assert marked
    folders = (*(f"{folder}/" for folder in OP_TESTS), *STUDENT_TESTS)
    here = Path(__file__)
    for path in marked:
        assert path == here or str(path.relative_to(ROOT)).startswith(folders)
