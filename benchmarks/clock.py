"""Time as a limit on a process counts it: from the start of the process, not of its main."""

from __future__ import annotations

import os
import time
from pathlib import Path

# What a process that ran out of time exits with, after a line that begins with MISSING.
INCOMPLETE = 75
MISSING = "not enough time for: "
_IMPORTED = time.monotonic()


def age_s() -> float:
    """Seconds since this process started; since this module was imported where Linux is not."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return time.monotonic() - _IMPORTED
    # Field 22 of the line, of which the first two (number and name) are cut off.
    return up_s - int(fields[19]) / os.sysconf("SC_CLK_TCK")
