"""VideoPhy-2: read its prompts, write the CSV for its inference script, and read the output.

Its script adds a column `score`, 1 to 5, to the rows: physical commonsense with --task pc, semantic
adherence with --task sa. Reported are the means, and the share of videos with at least 4 in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from afd.benchmarks.config import VideoPhyConfig
from afd.benchmarks.suites import Clip, Prompt, Score, need, read_rows, write_csv
from afd.errors import ConfigError

GOOD = 4


def read(config: VideoPhyConfig) -> list[Prompt]:
    """The distinct prompts in file order; rows may repeat a prompt for several models."""
    path = need(config.prompts, "videophy2.prompts", "the test prompts as .csv, .jsonl or .txt")
    columns = [config.column] + ([] if config.generate is None else [config.generate])
    prompts: dict[str, Prompt] = {}
    for row in read_rows(path, "videophy2.prompts", columns):
        text = row[config.column].strip()
        prompts.setdefault(
            text, Prompt(len(prompts), text, row[columns[-1]].strip(), config.samples)
        )
    return list(prompts.values())


def write(path: Path, clips: Sequence[Clip], videos: Path) -> None:
    """Write videopath,caption with absolute paths, since the script runs in another folder."""
    rows = [(str((videos / clip.file).resolve()), clip.prompt.text) for clip in clips]
    write_csv(path, ("videopath", "caption"), rows)


def read_results(pc: Path, sa: Path, clips: Sequence[Clip]) -> list[Score]:
    """Read the script's output, as far as it exists."""
    pcs, sas = (_ratings(path, clips) if path.is_file() else {} for path in (pc, sa))
    both = [float(min(pcs[name], sas[name]) >= GOOD) for name in pcs if name in sas]
    found = {"PC": [*pcs.values()], "SA": [*sas.values()], f"SA and PC >= {GOOD}": both}
    return [
        Score("videophy2", metric, sum(values) / len(values), len(values), len(clips))
        for metric, values in found.items()
        if values
    ]


def _ratings(path: Path, clips: Sequence[Clip]) -> dict[str, float]:
    """Score per video. Rows are matched by file name, regardless of the folder."""
    key, known = "videophy2", {clip.file for clip in clips}
    ratings: dict[str, float] = {}
    for row in read_rows(path, key, ("videopath", "score")):
        name = PurePath(row["videopath"]).name
        if name not in known:
            raise ConfigError(f"{key} {path}: {row['videopath']} is not a video of this evaluation")
        try:
            ratings[name] = float(row["score"])
        except ValueError:
            raise ConfigError(f"{key} {path}: score of {name} is {row['score']!r}") from None
        if not 1 <= ratings[name] <= 5:
            # The script writes 0 if it could not parse the model's answer.
            del ratings[name]
    return ratings
