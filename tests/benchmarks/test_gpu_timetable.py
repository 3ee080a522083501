"""gpu-check's timetable with an empty Triton cache: shares, deadlines, what is compiled ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from io import TextIOWrapper
from pathlib import Path

import pytest
import torch

from benchmarks import clock, gpu_rehearsal, report
from benchmarks.gpu_check import LIMITS, sections
from benchmarks.sections import ROOT, Machine, Section, environment, run

HERE = Machine("here", "a machine", False)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def log(tmp_path: Path) -> TextIOWrapper:
    return (tmp_path / "log").open("a")


def call(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as gpu-check does."""
    inherited = {k: v for k, v in environment().items() if k != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=inherited | env, capture_output=True, text=True)


def test_time_counts_from_the_start_of_the_process_not_from_after_its_imports() -> None:
    done = call(
        *python("import time; time.sleep(1.5); from benchmarks.clock import *; print(age_s())")
    )
    assert 1.5 <= float(done.stdout) < 60
    assert clock.age_s() > 0


def test_a_benchmark_without_time_names_the_cases_it_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ages = iter([1.0, 9.0, 9.0])
    monkeypatch.setattr(clock, "age_s", lambda: next(ages))
    args = report.arguments("", ["a"]).parse_args(["--deadline", "5"])
    cases = [(name, lambda: ([1], dict[str, str]())) for name in ("first", "second", "third")]
    with pytest.raises(SystemExit) as end:
        report.run("any", "how", cases, lambda rows: None, args)
    assert end.value.code == clock.INCOMPLETE
    assert f"{clock.MISSING}second, third\n" in capsys.readouterr().out


def test_a_section_without_time_is_incomplete_and_names_what_is_missing(log: TextIOWrapper) -> None:
    code = f"print({clock.MISSING!r} + 'the last case'); raise SystemExit({clock.INCOMPLETE})"
    outcome = run(Section("bench", [python(code)], 60), HERE, log)
    assert (outcome.status, outcome.note) == ("incomplete", "not enough time for: the last case")


def test_processes_beside_run_at_once_and_a_failure_of_one_is_the_sections(
    log: TextIOWrapper, tmp_path: Path
) -> None:
    # Each waits for the other: one after the other they would never end.
    meet = "import pathlib, time; a, b = {0!r}, {1!r}; pathlib.Path(a).touch()\n"
    meet += "while not pathlib.Path(b).exists(): time.sleep(0.05)\nprint('met', a)"
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    both = [python(meet.format(one, two)), python(meet.format(two, one))]
    assert run(Section("pair", [], 60, beside=both), HERE, log).status == "passed"
    broken = Section("broken", [python("")], 60, beside=[python("raise SystemExit(4)")])
    outcome = run(broken, HERE, log)
    assert outcome.status == "failed"
    assert "exited with 4" in outcome.note
    log.flush()
    assert Path(log.name).read_text().count("\nmet /") == 2


def test_processes_beside_are_stopped_at_the_limit_with_what_they_printed(
    log: TextIOWrapper,
) -> None:
    started = time.monotonic()
    slow = python("import time; print('so far', flush=True); time.sleep(60)")
    outcome = run(Section("slow", [python("")], 4, beside=[slow, slow]), HERE, log)
    assert time.monotonic() - started < 30
    assert outcome.status == "failed"
    assert outcome.note.count("was stopped at the limit") == 2
    assert outcome.tail.count("so far") == 2


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Seven tests that pass."""
    lines = "import pytest\n@pytest.mark.parametrize('i', range(7))\ndef test_one(i): ...\n"
    (tmp_path / "test_suite.py").write_text(lines)
    return tmp_path


def shard(suite: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    return call(*command, "-p", "benchmarks.shard", *options, "--rootdir", str(suite), str(suite))


def test_shards_run_every_test_once(suite: Path) -> None:
    ran = []
    for index in range(3):
        done = shard(suite, "--shard", f"{index}/3")
        assert done.returncode == 0, done.stdout + done.stderr
        ran += [line.split("::")[1][:11] for line in done.stdout.splitlines() if "PASSED" in line]
    assert sorted(ran) == [f"test_one[{i}]" for i in range(7)]


def test_a_shard_without_tests_passes_and_one_without_time_counts_them(suite: Path) -> None:
    assert shard(suite, "--shard", "9/10").returncode == 0
    late = shard(suite, "--shard", "0/1", "--until", "0")
    assert late.returncode == clock.INCOMPLETE
    assert f"{clock.MISSING}7 tests" in late.stdout
    wrong = shard(suite, "--shard", "3/3")
    assert "--shard: got 3/3; needed: as 0/8" in wrong.stdout + wrong.stderr


def test_every_test_of_the_check_is_in_one_share_and_compiled_ahead(tmp_path: Path) -> None:
    build, tests = sections(tmp_path, tmp_path, cores=16)[:2]
    shares = [command[command.index("--shard") + 1] for command in tests.beside]
    assert shares == [f"{i}/12" for i in range(12)]
    # What is compiled ahead is what the shares run: the same selection of the same files.
    ahead = [command for command in build.beside if "pytest" in command]
    cut = [command[3 : command.index("--until")] for command in ahead]
    assert cut == [command[2 : command.index("--until")] for command in tests.beside]
    # Another GPU than the simulated one compiles when its tests come.
    assert sections(tmp_path, tmp_path, arch=100)[0].beside == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")
def test_what_is_compiled_ahead_is_found_by_another_process(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "launches.py").write_text(
        "import sys, torch; from afd import ops\n"
        "x = torch.ones(int(sys.argv[1]), 8, device='cuda')\n"
        "with ops.use_backend('triton'):\n"
        "    ops.forward_noise(x, torch.ones(len(x), device='cuda'), noise=x)\n"
        "sys.exit(3)\n"
    )
    env = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    command = [sys.executable, "-m", "benchmarks.compile_ahead"]
    command += ["--record", str(tmp_path / "kernels"), "launches"]
    for batch, compiled in (("3", 1), ("5", 0)):
        done = call(*command, batch, **env)
        assert done.returncode == 0, done.stderr
        assert f"compiled {compiled} kernels" in done.stdout
        assert done.stdout.endswith("launches ended with 3\n")
    kernels = [json.loads(line) for line in (tmp_path / "kernels").read_text().splitlines()]
    assert [(kernel["kernel"], kernel["cached"]) for kernel in kernels] == [
        ("_forward_noise_fwd_kernel", False),
        ("_forward_noise_fwd_kernel", True),
    ]


def test_a_rehearsal_runs_every_command_on_the_simulated_gpu(tmp_path: Path) -> None:
    record = tmp_path / "kernels"
    for section in sections(tmp_path, tmp_path, cores=16):
        for command in (*section.commands, *section.beside):
            changed = gpu_rehearsal.rehearsed(command, record)
            if command[0] != "cmake":
                assert changed[1:3] == ["-m", "benchmarks.compile_ahead"]
                assert changed.count("benchmarks.compile_ahead") == 1
                assert "--until" not in changed
                assert str(tmp_path) not in changed[5:]


def test_a_rehearsal_expects_of_sixteen_cores_what_its_arithmetic_states() -> None:
    assert gpu_rehearsal.expected([3.0, 4.0], [], 0.0) == 7.0
    assert gpu_rehearsal.expected([3.0], [5.0] * 4, 0.0) == 5.0
    assert gpu_rehearsal.expected([0.0], [10.0] * 32, 0.0) == 20.0
    assert gpu_rehearsal.expected([12.0], [], 40.0) == 40.0


def test_every_section_has_a_limit(tmp_path: Path) -> None:
    check = sections(tmp_path, tmp_path)
    assert {section.name: section.limit_s for section in check} == LIMITS
