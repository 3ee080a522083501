"""Content hashes of a run's inputs other than its configuration and weights.

A checkpoint stores these hashes, so that a resumed run, or one whose teacher folder changes while
it runs, detects a file that was replaced under the same name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from afd.distributed import ALONE, Ranks
from afd.errors import ConfigError, TeacherError
from afd.listing import Some
from afd.methods.base import Method
from afd.teachers.base import Request

ACCEPT = "checkpoint.accept_changed_inputs"
_log = logging.getLogger("afd")


@dataclass(frozen=True)
class Content:
    """A file's hash, size and time. While size and time are unchanged, the hash is reused."""

    sha256: str
    bytes: int
    time_ns: int

    @classmethod
    def of(cls, path: Path, sha256: Callable[[Path], str]) -> Content:
        """Inspect and hash a file. Raises OSError if it cannot be read."""
        stat = path.stat()
        return cls(sha256(path), stat.st_size, stat.st_mtime_ns)

    def is_of(self, path: Path) -> bool:
        """Whether a file's size and time still match."""
        stat = path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (self.bytes, self.time_ns)


class Contents:
    """The teacher's videos that a run has read so far, each as it was when first read."""

    def __init__(self, requests: Sequence[Request], *, accept: bool = False) -> None:
        """`accept`: accept replaced videos with a warning, and remember the new content."""
        self._requests, self._accept = list(requests), accept
        self._known: dict[Request, Content] = {}
        self._replaced = Some(_log, logging.WARNING, "%s; continuing with the new one")

    def check(self, request: Request, path: Path, now: Content) -> None:
        """Remember a video, or compare it if known. Raises TeacherError if it was replaced."""
        then = self._known.get(request, now)
        if then.sha256 != now.sha256:
            changed = (
                f"teacher video {path}: is not the one that this run was trained on (SHA-256 "
                f"{then.sha256[:16]} then, {now.sha256[:16]} now)"
            )
            if not self._accept:
                raise TeacherError(f"{changed}; restore it, or continue with {ACCEPT}=true")
            self._replaced(changed)
        self._known[request] = now

    def close(self) -> None:
        """Log how many replaced videos were not named."""
        self._replaced.end()

    def state_dict(self, ranks: Ranks = ALONE) -> list[Any]:
        """Per request, None or the fields of its Content, merged over all processes. Every process
        must call this."""
        held = {n: self._known[r] for n, r in enumerate(self._requests) if r in self._known}
        rows: list[Any] = [None] * len(self._requests)
        for part in ranks.each([[n, *astuple(content)] for n, content in held.items()]):
            for n, *fields in part:
                if rows[n] is not None and rows[n][0] != fields[0]:
                    self.check(self._requests[n], Path(self._requests[n].prompt), Content(*fields))
                rows[n] = fields
        return rows

    def load_state_dict(
        self,
        rows: Sequence[Any],
        path: Callable[[Request], Path | None] = lambda request: None,
        sha256: Callable[[Path], str] | None = None,
    ) -> None:
        """Restore a `state_dict`. Videos whose `path` is known and whose size or time has changed
        are compared now, all other videos when they are decoded again."""
        for request, fields in zip(self._requests, rows, strict=True):
            if fields is None:
                continue
            self._known[request] = Content(*fields)
            file = path(request) if sha256 is not None else None
            # A missing file is reported when it is requested.
            if file is None or sha256 is None or not file.is_file():
                continue
            if not self._known[request].is_of(file):
                self.check(request, file, Content.of(file, sha256))


def inputs_of(
    method: Method, prompts: Sequence[str], replayed: Sequence[str] = ()
) -> dict[str, str]:
    """Content hashes, by configuration key, of input files that are not part of the saved weights.

    `prompts`: those of the held-out videos; `replayed`: those of earlier domains.
    """
    with method.evaluation_policy() as policy:
        found = {
            "student.vae": getattr(method.codec, "identity", None),
            "student.text_encoder": getattr(policy, "text_identity", None),
        }
    for term in getattr(method, "terms", ()):
        found[f"rewards.{term.name}"] = getattr(term.reward, "identity", None)
    for key, listed in (("evaluation.prompts", prompts), ("replay.prompts", replayed)):
        text = json.dumps(list(listed)).encode()
        found[key] = hashlib.sha256(text).hexdigest() if listed else None
    return {key: value for key, value in found.items() if value is not None}


def refuse_other_inputs(
    there: Mapping[str, str], now: Mapping[str, str], *, accept: bool = False
) -> None:
    """Raise ConfigError if inputs changed since a checkpoint; with `accept`, only warn."""
    for key in sorted(there.keys() | now.keys()):
        if there.get(key) == now.get(key):
            continue
        changed = (
            f"{key}: has changed since the run began ({there.get(key)} then, {now.get(key)} now)"
        )
        if not accept:
            raise ConfigError(f"{changed}; restore it, or continue with {ACCEPT}=true")
        _log.warning("%s; continuing with the new content", changed)
