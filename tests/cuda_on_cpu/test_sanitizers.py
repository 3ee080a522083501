"""The kernels under the compiler's sanitizers (`make soak`): a process of its own runs the tests
of the values on a build with AddressSanitizer and UBSan, and one with ThreadSanitizer, in which
the threads of a block are threads of the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_on_cpu import build, faults
from tests.cuda_on_cpu.sanitized import RACES, SETTINGS

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


def _run(variant: str, module: Path, fault: int, cases: str) -> subprocess.CompletedProcess[str]:
    """tests.cuda_on_cpu.sanitized in a process that has the sanitizer's runtime from the start."""
    runtime = {"address": "libasan.so", "threads": "libtsan.so"}[variant]
    program = build.compiler()
    assert program is not None
    found = subprocess.run(
        [program, f"-print-file-name={runtime}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{program} has no {runtime}")
    # Without random addresses: ThreadSanitizer takes only some.
    command = [
        "setarch",
        "--addr-no-randomize",
        sys.executable,
        "-m",
        "tests.cuda_on_cpu.sanitized",
    ]
    return subprocess.run(
        [*command, str(module), str(fault), cases],
        env={"PATH": "/usr/bin:/bin", "LD_PRELOAD": found, **SETTINGS},
        cwd=build.ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("variant", ["address", "threads"])
def test_the_kernels_are_clean(built: Path, variant: str) -> None:
    done = _run(variant, build.build(built, variant), 0, "all" if variant == "address" else "few")
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", RACES)
def test_a_race_is_found(built: Path, name: str) -> None:
    module = build.build(built, "threads", faults.changes())
    number = next(i for i, fault in enumerate(faults.FAULTS, start=1) if fault.name == name)
    # A block and its caller are more threads than ThreadSanitizer tells apart (255), so it misses a
    # race in one run of five or so; one that it finds in none of eight runs is not found.
    for _ in range(8):
        done = _run("threads", module, number, "few")
        if "ThreadSanitizer: data race" in done.stderr:
            return
    pytest.fail(done.stderr[-4000:])
