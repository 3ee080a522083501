"""A folder of finished videos and a manifest that says which prompt each one answers.

Manifest formats, by file ending; video paths are relative to the folder and must stay inside it:

- `.jsonl`: one object a line, {"file": "000123.mp4", "prompt": "a red ball ..."}
- `.csv`: a header with the columns `file` and `prompt`; other columns are not read
- `.txt`: one video a line, file and prompt separated by a tab
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from afd.errors import TeacherError, VideoError
from afd.files import Rows, csv_rows, json_rows
from afd.teachers.base import Request
from afd.video import DEFAULT_LIMITS, Hdr, Limits, check_video

MANIFESTS = ("prompts.jsonl", "prompts.csv", "prompts.txt")
# Clips checked at the same time; a large one decodes in several threads of its own.
THREADS = min(8, os.cpu_count() or 1)


class FolderTeacher:
    """Answers from files. Everything is checked before the first answer; one error lists all."""

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
        """`frames` to `limits`: how each video will be read (see `video.read_video`), so that an
        unusable one is found now. `manifest` None looks for MANIFESTS in the folder."""
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
            listed = "\n".join(f"  {problem}" for problem in problems)
            raise TeacherError(
                f"teacher manifest {self.manifest}: {len(problems)} wrong:\n{listed}"
            )
        self._requests = list(self._files)

    @property
    def requests(self) -> Sequence[Request]:
        """One request per video, in the manifest's order."""
        return self._requests

    def answer(self, request: Request) -> Path:
        """The video's path; raises TeacherError for a prompt or draw the folder does not hold."""
        if request not in self._files:
            raise TeacherError(
                f"teacher folder {self.folder}: no video {request.draw} for {request.prompt!r}"
            )
        return self._files[request]


def read_manifest(
    folder: Path, manifest: Path | str | None = None
) -> tuple[Path, list[tuple[str, str, str]], list[str]]:
    """The manifest's path; where, file and prompt of its entries; and what is wrong with others.

    No video is looked at. Raises TeacherError where there is no folder, or no manifest to read.
    """
    if not folder.is_dir():
        raise TeacherError(f"teacher folder {folder}: no such folder")
    path = Path(manifest) if manifest is not None else _find(folder)
    readers = {".jsonl": json_rows, ".csv": _csv, ".txt": _txt}
    if path.suffix not in readers:
        raise TeacherError(f"teacher manifest {path}: needs the ending .jsonl, .csv or .txt")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"teacher manifest {path}: cannot be read ({error})") from None
    entries, problems = [], []
    for line, row in readers[path.suffix](text):
        if isinstance(row, str):
            problems.append(f"line {line}: {row}")
            continue
        file, prompt = row.get("file"), row.get("prompt")
        if isinstance(file, str) and file and isinstance(prompt, str):
            entries.append((f"line {line}", file, prompt))
        else:
            problems.append(f"line {line}: needs a file and a prompt")
    return path, entries, problems


def _find(folder: Path) -> Path:
    for name in MANIFESTS:
        if (folder / name).is_file():
            return folder / name
    raise TeacherError(f"teacher folder {folder}: holds none of {', '.join(MANIFESTS)}")


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
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, links in a ring
        return f"{str(path)[:200]!r}: is no path ({str(error)[:60]})"
    return None


def _csv(text: str) -> Rows:
    return csv_rows(text, ("file", "prompt"))


def _txt(text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        file, tab, prompt = line.partition("\t")
        if tab and file:
            yield number, {"file": file, "prompt": prompt}
        else:
            yield number, "needs file and prompt with a tab between them"
