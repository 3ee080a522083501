"""The simulator as a teacher: a subprocess writes its videos into the teacher's folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console

from afd.errors import TeacherError
from afd.files import parse_json, write_json
from afd.lab.config import SimulatorConfig
from afd.teachers.folder import FolderTeacher, open_folder
from afd.video.config import VideoConfig


def open_teacher(
    config: SimulatorConfig, video: VideoConfig, folder: Path, console: Console
) -> FolderTeacher:
    """Open the simulator's videos in `folder`, written first if absent (`TeacherConfig.open`)."""
    _simulate(config, folder, console)
    return open_folder(folder, config.manifest, video)


def _simulate(config: SimulatorConfig, folder: Path, console: Console) -> None:
    """Run the simulator in a subprocess to write the teacher's folder (atomically).

    The requested settings are recorded beside the folder, never in it, so that a folder made with
    other settings is rejected.
    """
    asked = config.asked
    note = folder.with_name(folder.name + ".request.json")
    if folder.exists():
        try:
            text = note.read_text(encoding="utf-8") if note.exists() else '"something else"'
            made = parse_json(text)
        except (OSError, ValueError) as error:
            raise TeacherError(
                f"teacher folder {folder}: its note {note} is damaged ({error})"
            ) from None
        if made != asked:
            raise TeacherError(
                f"teacher folder {folder}: was made for {made}, this run asks for {asked}; "
                "choose another teacher.path= or out=, or teacher.kind=folder to use it unchanged"
            )
        return
    write_json(note, asked)
    command = [sys.executable, "-m", "afd.lab.simulator", "--out", str(folder)]
    for key, value in asked.items():
        command += [f"--{key}", str(value)]
    with console.status(f"teacher process writes {asked['count']} videos"):
        process = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if process.returncode != 0:
        reason = process.stderr.strip()
        raise TeacherError(f"the teacher's process ended with {process.returncode}: {reason}")
