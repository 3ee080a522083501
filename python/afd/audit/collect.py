"""The files that an audit reads: those of a manifest, or of a run's teacher."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from afd.audit.clip import Clip, read
from afd.config.run import RunConfig
from afd.teachers.base import Teacher
from afd.teachers.manifest import MANIFESTS, read_manifest, wrong_manifest

# A clip's name, its prompt and its file.
Listed = tuple[str, str, Path]


def listed(folder: Path, manifest: Path | None = None) -> list[Listed] | None:
    """The entries of a folder's manifest; None without one. Raises TeacherError if its lines are
    wrong."""
    if manifest is None and not any((folder / name).is_file() for name in MANIFESTS):
        return None
    path, entries, problems = read_manifest(folder, manifest)
    if problems:
        raise wrong_manifest(path, problems)
    return [(file, prompt, folder / file) for _, file, prompt in entries]


def of_config(config: RunConfig, console: Console) -> list[Listed]:
    """The finished videos of a run's teacher; a simulator writes them first."""
    folder, manifest = config.teacher_dir, getattr(config.teacher, "manifest", None)
    found = listed(folder, manifest) if folder.is_dir() else None
    if found is None:
        found = answered(config.open_teacher(console))
    return found


def answered(teacher: Teacher) -> list[Listed]:
    """The finished videos of an open teacher; none is waited for or bought."""
    ready = getattr(teacher, "ready", lambda request: True)
    asked = [request for request in teacher.requests if ready(request)]
    found = [(teacher.answer(request), request) for request in asked]
    return [(path.name, request.prompt, path) for path, request in found]


def read_all(files: Iterable[Listed]) -> list[Clip]:
    """Read clips, several at a time."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "afd audit") as pool:
        return list(pool.map(lambda one: read(one[2], one[1], one[0]), files))
