"""A folder of finished videos and a manifest that says which prompt each one answers.

Manifest formats, by file ending; video paths are relative to the folder and must stay inside it:

- `.jsonl`: one object a line, {"file": "000123.mp4", "prompt": "a red ball ..."}
- `.csv`: a header with the columns `file` and `prompt`; other columns are not read
- `.txt`: one video a line, file and prompt separated by a tab
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from afd.teachers.base import Request, TeacherError
from afd.video import VideoError, check_video

MANIFESTS = ("prompts.jsonl", "prompts.csv", "prompts.txt")


class FolderTeacher:
    """Answers from files. Everything is checked before the first answer; one error lists all."""

    def __init__(
        self,
        folder: Path | str,
        manifest: Path | str | None = None,
        *,
        frames: int = 1,
        fps: float | None = None,
    ) -> None:
        """`frames` and `fps`: what will be read of each video (see `video.read_video`), so that a
        clip too short for it is found now. `manifest` None looks for MANIFESTS in the folder."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise TeacherError(f"teacher folder {self.folder}: no such folder")
        self.manifest = Path(manifest) if manifest is not None else _find(self.folder)
        problems: list[str] = []
        self._files: dict[Request, Path] = {}
        seen: dict[Path, str] = {}
        draws: dict[str, int] = {}
        for where, file, prompt in _entries(self.manifest, problems):
            path = self.folder / file
            problem = _problem(self.folder, path, prompt, frames, fps)
            resolved = path.resolve()
            if problem is None and resolved in seen:
                problem = f"{path}: is listed twice (also {seen[resolved]})"
            if problem is not None:
                problems.append(f"{where}: {problem}")
                continue
            seen[resolved] = where
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


def _find(folder: Path) -> Path:
    for name in MANIFESTS:
        if (folder / name).is_file():
            return folder / name
    raise TeacherError(f"teacher folder {folder}: holds none of {', '.join(MANIFESTS)}")


def _problem(folder: Path, path: Path, prompt: str, frames: int, fps: float | None) -> str | None:
    """Why an entry cannot be used, or None."""
    if not prompt.strip():
        return f"{path}: has an empty prompt"
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{path}: lies outside {folder}"
    try:
        check_video(path, frames=frames, fps=fps)
    except VideoError as error:
        return str(error)
    return None


def _entries(manifest: Path, problems: list[str]) -> Iterator[tuple[str, str, str]]:
    """(where, file, prompt) of every readable entry; what cannot be read goes to `problems`."""
    readers = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt}
    if manifest.suffix not in readers:
        raise TeacherError(f"teacher manifest {manifest}: needs the ending .jsonl, .csv or .txt")
    try:
        text = manifest.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"teacher manifest {manifest}: cannot be read ({error})") from None
    for line, entry in readers[manifest.suffix](text):
        where = f"line {line}"
        if isinstance(entry, str):
            problems.append(f"{where}: {entry}")
        else:
            yield where, *entry


_Entries = Iterator[tuple[int, "tuple[str, str] | str"]]


def _jsonl(text: str) -> _Entries:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"not JSON ({error})"
            continue
        file = entry.get("file") if isinstance(entry, dict) else None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if isinstance(file, str) and isinstance(prompt, str) and file:
            yield number, (file, prompt)
        else:
            yield number, 'needs {"file": "...", "prompt": "..."}'


def _csv(text: str) -> _Entries:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if not {"file", "prompt"} <= set(rows.fieldnames or ()):
        yield 1, f"the header is {rows.fieldnames}, needs the columns file and prompt"
        return
    for row in rows:
        if row["file"] and row["prompt"] is not None:
            yield rows.line_num, (row["file"], row["prompt"])
        else:
            yield rows.line_num, "needs a value in the columns file and prompt"


def _txt(text: str) -> _Entries:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        file, tab, prompt = line.partition("\t")
        if tab and file:
            yield number, (file, prompt)
        else:
            yield number, "needs file and prompt with a tab between them"
