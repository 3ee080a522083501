"""The long tests: once what is marked `soak`, then property tests with new seeds until time is up.

`make soak MINUTES=30`, or `python -m tests.properties.soak --minutes 30`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time


def main() -> int:
    """The exit status of the first run that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for the property tests")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the first one")
    asked = parser.parse_args()
    if failed := _pytest("tests", "-m", "soak"):
        return failed
    until = time.monotonic() + 60 * asked.minutes
    rounds = 0
    while rounds == 0 or time.monotonic() < until:
        seed = asked.seed + rounds
        print(f"== property tests, seed {seed}", flush=True)
        if failed := _pytest(
            "tests/properties",
            f"--hypothesis-seed={seed}",
            "--hypothesis-profile=soak",
            "--timeout=7200",  # of one test: it runs five times the examples of `make test`
        ):
            return failed
        rounds += 1
    print(f"== {rounds} rounds of property tests passed")
    return 0


def _pytest(*arguments: str) -> int:
    status = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], check=False)
    return 0 if status.returncode == 5 else status.returncode  # 5: nothing was collected


if __name__ == "__main__":
    sys.exit(main())
