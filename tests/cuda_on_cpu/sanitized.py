"""python -m tests.cuda_on_cpu.sanitized MODULE FAULT all|few: kernels under a sanitizer's runtime.

Ends with a status other than 0 where values differ from the CPU core's or the sanitizer objects.
With a planted fault the values may be wrong: there only the sanitizer's word counts.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext, suppress
from pathlib import Path

from tests.cuda_on_cpu.cases import LOSSES, NOISES
from tests.cuda_on_cpu.device import Device
from tests.cuda_on_cpu.row_cases import ADALNS, APPENDS, ROPES
from tests.cuda_on_cpu.test_kernels import assert_same_loss, assert_same_noise
from tests.cuda_on_cpu.test_rows import assert_same_rows

SETTINGS = {
    # Python and torch are not built for a sanitizer: what they keep is no leak of ours.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:handle_segv=0:allow_user_segv_handler=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # Races are reported only while both accesses are remembered: as many as there can be.
    "TSAN_OPTIONS": "history_size=7:exitcode=66:report_signal_unsafe=0",
    "OMP_NUM_THREADS": "1",
}
# Planted faults that are races: two threads at one place, and no barrier between.
RACES = (
    "no barrier before the warps' sums are read",
    "no barrier after the coefficients",
    "no barrier before the sums of a row are read",
    "two sums of a row after each other in the same memory",
    "no barrier before the sums of rows are read",
)
# Of several warps, runs of tokens and frames.
_FEW_ROWS = (ADALNS[1], ADALNS[3], ROPES[1], APPENDS[2])


def main() -> None:
    module, fault, cases = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    device = Device.load(module)
    few = cases == "few"
    for noise in NOISES[1:3] if few else NOISES:
        with suppress(AssertionError) if fault else nullcontext():
            assert_same_noise(noise, device, fault=fault)
    for loss in LOSSES:
        if not few or loss.name in ("row", "row_fp16_velocity"):
            with suppress(AssertionError) if fault else nullcontext():
                assert_same_loss(loss, device, fault=fault)
    for rows in _FEW_ROWS if few else (*ADALNS, *ROPES, *APPENDS):
        with suppress(AssertionError) if fault else nullcontext():
            assert_same_rows(rows, device, fault=fault)
    print("clean")


if __name__ == "__main__":
    main()
