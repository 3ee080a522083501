"""gpu-check continues after a failure, reports what it skipped and fits ten minutes."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    attention,
    attention_parts,
    gpu_check,
    gpu_check_targets,
    report,
    row_ops,
    suite,
    train_step,
    videos,
)
from benchmarks.gpu_check import OP_TESTS, STUDENT_TESTS, main, sections
from benchmarks.sections import ROOT, Machine, Outcome, Section


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a test the process that asks torch what is here."""
    monkeypatch.setattr(gpu_check, "probe", lambda: Machine("here", "a machine", False))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def outcomes(out: Path) -> dict[str, dict[str, str]]:
    """The first table of the summary, by section."""
    lines = (out / "summary.md").read_text().split("## ")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]
    names = ("section", "status", "seconds", "note")
    return {row[0]: dict(zip(names, [*row, ""], strict=False)) for row in rows}


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
    names = "tests,bench-nft_loss,bench-forward_noise,sanitizer"
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
    note = outcomes(tmp_path)["step"]["note"]
    assert note == "nowhere cannot be imported; `make gpu-wheels` fetches what is missing"


@pytest.mark.usefixtures("machine")
def test_an_unknown_section_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--sections", "bench"])
    assert "got bench; needed: of build, tests, bench-nft_loss" in capsys.readouterr().err


def test_the_limits_add_up_to_less_than_ten_minutes(tmp_path: Path) -> None:
    unasked = [section for section in sections(tmp_path, tmp_path) if not section.asked_only]
    assert sum(section.limit_s for section in unasked) <= 585 < 600
    # What a session gets back is at most eight files: log, summary and a JSON per benchmark.
    assert 2 + sum(section.name.startswith("bench-") for section in unasked) <= 8


@pytest.mark.usefixtures("machine")
def test_a_section_is_not_started_when_no_time_is_left(tmp_path: Path) -> None:
    check = [Section("late", [python("print('ran')")], 60)]
    assert main(["--out", str(tmp_path), "--limit", "0"], check) == 0
    assert outcomes(tmp_path)["late"]["note"] == "no time is left"


@pytest.mark.usefixtures("machine")
def test_a_section_that_must_be_asked_for_runs_only_then(tmp_path: Path) -> None:
    check = [Section("one", [python("")], 60), Section("more", [python("")], 60, asked_only=True)]
    assert main(["--out", str(tmp_path)], check) == 0
    assert list(outcomes(tmp_path)) == ["one"]
    assert main(["--out", str(tmp_path), "--sections", "more"], check) == 0
    assert list(outcomes(tmp_path)) == ["more"]


def test_a_check_that_is_killed_leaves_what_it_printed_and_no_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    touch = f"pathlib.Path({str(alive)!r}).touch()"
    child = f"import time, pathlib; print('so far'); time.sleep(3); {touch}"
    code = (
        "import signal, sys; from benchmarks import gpu_check as g, sections; "
        "signal.signal(signal.SIGTERM, g._stop); "
        "g.probe = lambda: sections.Machine('here', 'a machine', False); "
        f"g.main(['--out', {str(tmp_path)!r}], "
        f"[sections.Section('first', [[sys.executable, '-c', 'print(1)']], 60), "
        f"sections.Section('long', [[sys.executable, '-c', {child!r}]], 60)])"
    )
    process = subprocess.Popen(python(code), cwd=ROOT, stdout=subprocess.DEVNULL)
    log = tmp_path / "gpu-check.log"
    while not log.exists() or "so far\n" not in log.read_text():
        time.sleep(0.1)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(5) != 0
    found = outcomes(tmp_path)
    assert found["first"]["status"] == "passed"
    assert found["long"] == {
        "section": "long", "status": "failed", "seconds": "0", "note": "was interrupted"
    }  # fmt: skip
    time.sleep(3)
    assert not alive.exists()


@pytest.mark.usefixtures("machine")
def test_carried_wheels_are_importable_in_sections_only(tmp_path: Path) -> None:
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "WORD = 'came along'")
        wheel.writestr(
            "carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0"
        )
        wheel.writestr(
            "carried-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any",
        )
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    code = python("import carried; print(carried.WORD)")
    check = [Section("uses", [code], 60, needs_modules=("carried",))]
    assert main(["--out", str(out), "--wheels", str(wheels)], check) == 0
    assert {name: o["status"] for name, o in outcomes(out).items()} == {
        "wheels": "passed",
        "uses": "passed",
    }
    assert "came along" in (out / "gpu-check.log").read_text()
    assert main(["--out", str(out)], check) == 0
    assert outcomes(out)["uses"]["status"] == "skipped"


def gpu_documents(folder: Path) -> dict[str, Any]:
    """What the benchmarks of the check would write on a GPU, every number 1."""
    found: dict[str, Any] = {}
    for section in sections(folder, folder):
        if not section.name.startswith("bench-") or section.asked_only:
            continue
        name = section.name.removeprefix("bench-")
        options = section.commands[0][2:]
        document = {"name": name, "machine": {"bandwidth": 1e9, "matmul": 1e12}}
        found[name] = document | {"environment": report.environment("cpu")}
        found[name]["rows"] = [
            dict.fromkeys(gpu_check.RESULTS[name], 1.0) | row for row in gpu_rows(name, options)
        ]
    return found


def gpu_rows(name: str, options: list[str]) -> Iterator[dict[str, Any]]:
    """What tells the rows of a benchmark apart, from its own cases on a GPU."""
    if name in ("nft_loss", "forward_noise"):
        module = importlib.import_module(f"benchmarks.{name}")
        parser = suite.arguments("", module.DTYPES)
        parser.add_argument("--weighting", nargs="+")
        parser.add_argument("--all", action="store_true")
        args = suite.parse(parser, options)
        for case, backend, noise in product(module.cases(args), suite.PROVIDERS, suite.SOURCES):
            yield {
                "case": case.name, "dtype": case.dtype, "B": case.batch, "backend": backend,
                "noise": noise,
            }  # fmt: skip
    elif name == "attention":
        args = report.parse(report.arguments("", attention.PROVIDERS), options)
        named = [(case, args.providers) for case in attention.cases(args)]
        named += [(case, list(case.steps())) for case in attention_parts.cases(args)]
        for case, providers in named:
            for provider in providers:
                yield {"case": case.name, "B": case.batch, "provider": provider}
    elif name == "row_ops":
        args = report.parse(report.arguments("", row_ops.BACKENDS), options)
        for case, backend in product(row_ops.cases(args), args.providers):
            yield {"case": case.op, "dtype": case.dtype, "B": case.batch, "backend": backend}
    elif name == "videos":
        args = report.parse(report.arguments("", videos.PROVIDERS), options)
        yield {"case": "autoencoder", "provider": "diffusers", "frames": 21, "B": 1}
        for run in videos.runs(args):
            for frames in videos.lengths(run.case):
                same = {"case": run.case.name, "frames": frames}
                yield same | {"provider": run.provider, "B": run.batch}
    else:
        args = report.parse(report.arguments("", ("eager", *train_step.MODES)), options)
        for case, mode in product(train_step.cases(args), args.providers):
            for phase in train_step.PHASES:
                yield {"case": case.name, "provider": mode, "phase": phase}


def test_every_target_finds_its_numbers_in_what_a_gpu_run_writes(tmp_path: Path) -> None:
    documents = gpu_documents(tmp_path)
    lines = gpu_check_targets.table(documents)
    assert [line for line in lines if "not measured" in line] == []
    # Ratios of equal numbers are 1: what asks for more is not met, what asks for at most 1.02 is.
    assert any("| ≥ 25 | 1 | **no** |" in line for line in lines)
    assert any("| ≤ 1.02 | 1 | yes |" in line for line in lines)
    # A benchmark that was cut short leaves its targets open and all others unchanged.
    del documents["videos"]
    short = gpu_check_targets.table(documents)
    assert len(short) == len(lines)
    assert "not measured" in next(line for line in short if "81 frames B=8" in line)


def test_the_summary_of_a_gpu_run_holds_every_table(tmp_path: Path) -> None:
    documents = gpu_documents(tmp_path)
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    (tmp_path / "cut.json").write_text('{"rows": [')
    ran = [Outcome(f"bench-{name}", "passed", 1.0) for name in documents]
    gpu_check.summarise(tmp_path, Machine("here", "a machine", True), ran)
    summary = (tmp_path / "summary.md").read_text()
    for name in documents:
        assert f"## {name}\n" in summary
    assert f"torch {torch.__version__}" in summary


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
