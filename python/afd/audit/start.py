"""The checks that every run makes of its teacher's clips before the first update."""

from __future__ import annotations

import logging

from afd.audit.audit import audit
from afd.audit.collect import answered, read_all
from afd.teachers.base import Teacher
from afd.video.config import VideoConfig

# Clips that are looked at, evenly spaced; `afd teacher audit` looks at all.
MOST = 64
_log = logging.getLogger("afd")


def warn_of_clips(teacher: Teacher, video: VideoConfig) -> None:
    """Log a warning per kind of finding among MOST of the clips that are there. All are used
    nevertheless: what leaves the training is decided by `teacher.robust` alone."""
    files = answered(teacher)
    some = files[:: -(-len(files) // MOST) or 1]
    needed = None if video.fps is None else video.frames / video.fps
    for sentence in audit(read_all(some), needed_s=needed).sentences():
        _log.warning(
            "teacher: %s (%d of %d clips checked; afd teacher audit shows them)",
            sentence,
            len(some),
            len(files),
        )
