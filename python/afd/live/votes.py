"""Votes between students, saved as preference pairs (JSON lines)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from afd.files import JsonAppender
from afd.live.take import Compared, Take


def save_vote(
    path: Path,
    take: Take,
    columns: Sequence[Compared],
    choice: int | None,
    *,
    blind: bool,
) -> None:
    """Append a line per pair of students: `chosen` and `rejected`, or `equal` without a choice.

    The take so far is in the line: first prompt, seed, switches and number of chunks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "prompt": take.first_prompt,
        "seed": take.seed,
        "switches": [switch.record() for switch in take.switches],
        "chunks": take.chunk,
        "from_picture": take.picture is not None,
        "blind": blind,
    }
    with JsonAppender(path) as file:
        for one, other in combinations(range(len(columns)), 2):
            if choice is not None and choice not in (one, other):
                continue
            pair = [_named(columns[one]), _named(columns[other])]
            if choice is None:
                file.write(seen | {"equal": pair})
            else:
                chosen, rejected = pair if choice == one else pair[::-1]
                file.write(seen | {"chosen": chosen, "rejected": rejected})


def _named(student: Compared) -> dict[str, Any]:
    config = student.config.student
    return {
        "label": student.label,
        "checkpoint": str(config.checkpoint),
        "fingerprint": config.fingerprint(),
    }
