"""VideoAlign's motion quality of video files, from the frozen released checkpoint.

Training against a discriminator initialised from this model optimises this number: report
VideoPhy-2 beside it.
Shape letters: B videos, F frames, C colours, H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from afd.benchmarks.config import VideoAlignMqConfig
from afd.benchmarks.suites import Clip, Prompt, Score, read_rows, read_text, write_csv, write_whole
from afd.distributed import Ranks
from afd.errors import ConfigError
from afd.hub import local_copy
from afd.models.config import DTYPES
from afd.video import read_video

RATINGS = ("VQ", "MQ", "TA", "Overall")
# Videos rated per process between two writes of the ratings.
BLOCK = 16
Rater = Callable[[Sequence[Path], Sequence[str]], list[list[float]]]


def read(config: VideoAlignMqConfig) -> list[Prompt]:
    """Read its own prompts, if any, and require the checkpoint before any video is made."""
    if config.checkpoint is None:
        raise ConfigError(
            "videoalign_mq.checkpoint: not given; needed: the released VideoReward (folder, "
            "model.pth or hub name), or suites without videoalign_mq"
        )
    if config.prompts is None:
        return []
    rows = read_rows(config.prompts, "videoalign_mq.prompts", ("prompt",))
    texts = dict.fromkeys(row["prompt"].strip() for row in rows)
    return [Prompt(index, text, text, config.samples) for index, text in enumerate(texts)]


def check_files(config: VideoAlignMqConfig) -> None:
    """Raises FileNotFoundError or ConfigError if a file needed for rating is missing."""
    from afd.discriminators.videoalign.model import BASE, Settings, find_files
    from afd.discriminators.videoalign.prompt import read_template

    assert config.checkpoint is not None
    try:
        settings = Settings.read(find_files(config.checkpoint)[1])
        local_copy(config.base or settings.base, ("config.json", "tokenizer*"), BASE)
        read_template(config.checkout, settings.template)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def write(path: Path, clips: Sequence[Clip], videos: Path, fps: float, frames: int) -> None:
    """Write path,prompt,fps,num_frames as VideoAlign's evaluation script reads them."""
    rows = [
        (str((videos / clip.file).resolve()), clip.prompt.text, f"{fps:g}", frames)
        for clip in clips
    ]
    write_csv(path, ("path", "prompt", "fps", "num_frames"), rows)


def make_rater(
    config: VideoAlignMqConfig,
    *,
    fps: float,
    frames: int,
    height: int,
    width: int,
    device: torch.device,
) -> Rater:
    """Load the frozen model, which maps files and prompts to normalised RATINGS.

    Raises ConfigError if the checkpoint is not the required one.
    """
    from afd.discriminators.videoalign.model import VideoAlign

    assert config.checkpoint is not None
    try:
        model = VideoAlign.load(
            config.checkpoint,
            base=config.base,
            videoalign=config.checkout,
            dtype=DTYPES[config.dtype],
            device=device,
            rotary=config.rotary,
        )
    except ValueError as error:  # a file does not match what is required
        raise ConfigError(str(error)) from error

    def rate(paths: Sequence[Path], prompts: Sequence[str]) -> list[list[float]]:
        chosen = []
        for path in paths:
            video_FCHW = read_video(path, frames=frames, height=height, width=width)
            chosen.append(model.settings.preprocessing.choose(video_FCHW[None], fps)[0])
        if not paths:
            return []
        rated = model.ratings_of(torch.stack(chosen), prompts, micro_batch=config.batch)
        return torch.stack([rated[name] for name in RATINGS], 1).tolist()

    return rate


class Ratings:
    """Stored ratings, a line of a file per video; a video that changed is rated again."""

    def __init__(self, path: Path, config: VideoAlignMqConfig) -> None:
        self._path = path
        self._by = config.model_dump(mode="json", exclude={"prompts", "samples", "batch"})
        self._lines: dict[str, dict[str, Any]] = {}
        for text in read_text(path, "ratings").splitlines() if path.is_file() else ():
            try:
                line = json.loads(text)
                self._lines[line["video"]] = {"by": line["by"]} | {n: line[n] for n in RATINGS}
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"{path}: it was modified ({error!r}); remove it") from error

    def rate(
        self, clips: Sequence[Clip], videos: Path, make: Callable[[], Rater], ranks: Ranks
    ) -> list[dict[str, float]]:
        """Ratings of every clip by name. Unknown ones are computed, split among the processes; only
        then is the model loaded. Must be called by every process."""
        keys = [_key(videos / clip.file) for clip in clips]
        missing = [i for i, key in enumerate(keys) if not self._knows(key)]
        rater = make() if missing else None
        step = BLOCK * ranks.world
        for block in (missing[i : i + step] for i in range(0, len(missing), step)):
            assert rater is not None
            mine = block[ranks.share(len(block))]
            rated = rater(
                [videos / clips[i].file for i in mine], [clips[i].prompt.text for i in mine]
            )
            held = torch.tensor(rated, dtype=torch.float64).view(-1, len(RATINGS)).to(ranks.device)
            for i, values in zip(block, ranks.gather(held).tolist(), strict=True):
                values = dict(zip(RATINGS, values, strict=True))
                self._lines[keys[i]] = {"by": self._by, **values}
            if ranks.main:
                lines = (json.dumps({"video": k, **line}) for k, line in self._lines.items())
                write_whole(self._path, "".join(f"{line}\n" for line in lines))
        return [{name: self._lines[key][name] for name in RATINGS} for key in keys]

    def _knows(self, key: str) -> bool:
        return key in self._lines and self._lines[key]["by"] == self._by


def scores(clips: Sequence[Clip], ratings: Sequence[dict[str, float]]) -> list[Score]:
    """Mean MQ of each benchmark's videos, and the other ratings for comparison."""
    found = []
    for suite in dict.fromkeys(clip.suite for clip in clips):
        mine = [r for clip, r in zip(clips, ratings, strict=True) if clip.suite == suite]
        for name in ("MQ", "VQ", "TA", "Overall"):
            value = sum(rating[name] for rating in mine) / len(mine)
            found.append(Score(suite, f"VideoAlign {name}", value, len(mine), len(mine)))
    return found


def _key(video: Path) -> str:
    """A key that identifies a video file and its version."""
    facts = video.stat()
    return f"{video.name} {facts.st_size} {facts.st_mtime_ns}"
