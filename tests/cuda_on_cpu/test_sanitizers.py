"""The kernels under the compiler's sanitizers (`make soak`): a separate process runs the tests
of the values on a build with AddressSanitizer and UBSan, and one with ThreadSanitizer, in which
the threads of a block are threads of the CPU."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.cuda_on_cpu import build, faults
from tests.cuda_on_cpu.sanitized import RACES, SETTINGS

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

# Of one process: ten times what it needs on two idle cores.
_LONGEST_S = 400.0


def _run(variant: str, module: Path, fault: int, cases: str) -> tuple[int | None, str]:
    """Status (None: it did not end) and errors of tests.cuda_on_cpu.sanitized.

    Its process has the sanitizer's runtime from the start.
    """
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
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        # A planted race may leave threads waiting for each other: each reads another sum and takes
        # another branch. What the sanitizer had found until then counts.
        try:
            status = subprocess.run(
                [*command, str(module), str(fault), cases],
                env={"PATH": "/usr/bin:/bin", "LD_PRELOAD": found, **SETTINGS},
                cwd=build.ROOT,
                stderr=errors,
                timeout=_LONGEST_S,
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        errors.seek(0)
        return status, errors.read()


@pytest.mark.parametrize("variant", ["address", "threads"])
def test_the_kernels_are_clean(built: Path, variant: str) -> None:
    cases = "all" if variant == "address" else "few"
    status, errors = _run(variant, build.build(built, variant), 0, cases)
    assert status == 0, errors[-4000:]


@pytest.mark.parametrize("name", RACES)
def test_a_race_is_found(built: Path, name: str) -> None:
    module = build.build(built, "threads", faults.changes())
    number = next(i for i, fault in enumerate(faults.FAULTS, start=1) if fault.name == name)
    # A block and its caller are more threads than ThreadSanitizer tells apart (255), so it misses a
    # race in one run of five or so; one that it finds in none of eight runs is not found.
    for _ in range(8):
        _, errors = _run("threads", module, number, "few")
        if "ThreadSanitizer: data race" in errors:
            return
    pytest.fail(errors[-4000:])
