"""Process age for time limits, counted from the start of the process, not of main."""

from __future__ import annotations

import os
import time
from pathlib import Path

# Exit code of a process that ran out of time, after printing a line that begins with MISSING.
INCOMPLETE = 75
MISSING = "not enough time for: "
_IMPORTED = time.monotonic()


def age_s() -> float:
    """Seconds since this process started, or outside Linux, since this module was imported."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return time.monotonic() - _IMPORTED
    # Field 22 of the line; the first two (pid and name) have been removed.
    return up_s - int(fields[19]) / os.sysconf("SC_CLK_TCK")
