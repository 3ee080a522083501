"""The teacher backed by a folder of finished videos."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rich.console import Console

from afd.errors import TeacherError, VideoError
from afd.listing import counted
from afd.teachers.base import Request
from afd.teachers.config import FolderConfig
from afd.teachers.manifest import read_manifest, wrong_manifest
from afd.video import DEFAULT_LIMITS, Hdr, Limits, check_video
from afd.video.config import VideoConfig

# Clips checked concurrently; the decoder uses several threads of its own for a large clip.
THREADS = min(8, os.cpu_count() or 1)
_log = logging.getLogger("afd")


class FolderTeacher:
    """A teacher that answers from existing files. All files are checked on construction, and one
    error lists the problems (`afd.listing`)."""

    def __init__(
        self,
        folder: Path | str,
        manifest: Path | str | None = None,
        *,
        frames: int = 1,
        fps: float | None = None,
        hdr: Hdr = "tonemap",
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """`frames` to `limits`: how each video will be read (see `video.read_video`), so that
        unusable ones are found now. `manifest` None searches the folder for MANIFESTS."""
        self.folder = Path(folder)
        self.manifest, entries, problems = read_manifest(self.folder, manifest)
        self._files: dict[Request, Path] = {}
        seen: dict[Path, str] = {}
        draws: dict[str, int] = {}

        def check(path: Path) -> None:
            check_video(path, frames=frames, fps=fps, hdr=hdr, limits=limits)

        paths = [self.folder / file for _, file, _ in entries]
        with ThreadPoolExecutor(THREADS, "afd check") as pool:
            prompts = [prompt for _, _, prompt in entries]
            found = list(pool.map(partial(_problem, self.folder, check), paths, prompts))
        for (where, _, prompt), path, problem in zip(entries, paths, found, strict=True):
            if problem is None and path.resolve() in seen:
                problem = f"{path}: is listed twice (also {seen[path.resolve()]})"
            if problem is not None:
                problems.append(f"{where}: {problem}")
                continue
            seen[path.resolve()] = where
            draw = draws.get(prompt, 0)
            draws[prompt] = draw + 1
            self._files[Request(prompt, draw)] = path
        if not problems and not self._files:
            problems.append("lists no video")
        if problems:
            raise wrong_manifest(self.manifest, problems)
        self._requests = list(self._files)

    @property
    def requests(self) -> Sequence[Request]:
        """One request per video, in the manifest's order."""
        return self._requests

    def answer(self, request: Request) -> Path:
        """The video's path. Raises TeacherError for a prompt or draw not in the folder."""
        if request not in self._files:
            raise TeacherError(
                f"teacher folder {self.folder}: no video {request.draw} for {request.prompt!r}"
            )
        return self._files[request]


def _problem(folder: Path, check: Callable[[Path], None], path: Path, prompt: str) -> str | None:
    """Why an entry cannot be used, or None."""
    if not prompt.strip():
        return f"{path}: has an empty prompt"
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{path}: lies outside {folder}"
        check(path)
    except VideoError as error:
        return str(error)
    except (OSError, ValueError, RuntimeError) as error:  # too long, NUL, symlink loop
        return f"{str(path)[:200]!r}: is no path ({str(error)[:60]})"
    return None


def open_folder(folder: Path, manifest: Path | None, video: VideoConfig) -> FolderTeacher:
    """Open a folder teacher, checking its clips against the video configuration."""
    teacher = FolderTeacher(
        folder,
        manifest,
        frames=video.frames if video.short == "error" else 1,
        fps=video.fps,
        hdr=video.hdr,
        limits=video.limits,
    )
    _log.info("teacher %s: %s", teacher.folder, counted(len(teacher.requests), "video"))
    return teacher


def open_teacher(
    config: FolderConfig, video: VideoConfig, folder: Path, console: Console
) -> FolderTeacher:
    """Open the folder teacher of a configuration (`TeacherConfig.open`)."""
    return open_folder(folder, config.manifest, video)
