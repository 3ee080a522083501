"""A folder of real clips with their prompts, made from the test data beside the checkout."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path


def make_clip_folder(shared: Path, folder: Path) -> Path:
    """Copies the six clips of shared/data/videos and writes their prompts.csv."""
    videos = shared / "data" / "videos"
    folder.mkdir()
    with (
        (videos / "pairs.csv").open(encoding="utf-8", newline="") as pairs,
        (folder / "prompts.csv").open("w", encoding="utf-8", newline="") as prompts,
    ):
        writer = csv.writer(prompts)
        writer.writerow(["file", "prompt"])
        for row in csv.DictReader(pairs):
            for clip in (row["path_A"], row["path_B"]):
                name = Path(clip).name
                shutil.copy(videos / name, folder / name)
                writer.writerow([name, row["prompt"]])
    return folder
