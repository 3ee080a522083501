"""Recordings of a take: mp4, and the files with which `afd sample` makes its latents again."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from afd.config.yaml import yaml_text
from afd.files import write_bytes, write_text
from afd.lab.shipped import SHIPPED
from afd.live.take import Compared, Take
from afd.sampling.config import SampleConfig
from afd.sampling.jobs import Job
from afd.trainer.checkpoint import written_by
from afd.video import VideoWriter

# The student's keys that may name a file.
FILES = ("checkpoint", "adapter", "tiny_vae", "vae", "pretrained", "text_encoder", "tokenizer")


class Recording:
    """A recording in progress, from one chunk of a take on.

    The mp4 files hold the chunks that were recorded. NAME.jsonl and NAME.yaml describe the take
    from its beginning to the last of them: `afd sample NAME.yaml out=DIR` makes the same latents,
    bit for bit.

    Attributes:
        name: the files' common name.
        videos: the mp4 files, by student.
        last_png: the newest frame of the first student.
    """

    def __init__(self, folder: Path, number: int, take: Take, students: Sequence[Compared]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.number, self.last_png = number, b""
        self._folder, self._take, self._students = folder, take, students
        self._first, self._frames = take.chunk, 0
        self.name = name = _free(folder, time.strftime("%Y%m%d-%H%M%S"))
        self._names = [name]
        if len(students) > 1:
            self._names = [f"{name}-{_slug(i, one.label)}" for i, one in enumerate(students)]
        self.videos = [folder / f"{named}.mp4" for named in self._names]
        self._writers = [
            VideoWriter(path, fps=one.config.fps, crf=one.config.crf)
            for path, one in zip(self.videos, students, strict=True)
        ]

    def append(self, frames_FHWC: Sequence[Tensor]) -> None:
        """Add a chunk's frames, uint8, by student."""
        for writer, one_FHWC in zip(self._writers, frames_FHWC, strict=True):
            writer.append(one_FHWC)
        self._frames += len(frames_FHWC[0])
        self._last = frames_FHWC[0][-1]

    def close(self, chunks: int, frames: int) -> None:
        """Finish the files; the take has made this many chunks of so many latent frames so far.

        Raises ValueError if no chunk was recorded.
        """
        if not self._frames:
            raise ValueError("record: no chunk was recorded")
        take, folder = self._take, self._folder
        self.last_png = png_of(self._last)
        switches = tuple(s for s in take.switches if s.chunk < chunks)
        image = None
        if take.picture is not None:
            image = folder / f"{self.name}-start.png"
            write_bytes(image, take.picture)
        listed = folder / f"{self.name}.jsonl"
        line = {"prompt": take.first_prompt, "name": self.name, "seed": take.seed}
        line |= {"switches": [switch.record() for switch in switches]}
        line |= {} if image is None else {"image": image.name}
        write_text(listed, json.dumps(line, ensure_ascii=False) + "\n")
        job = Job(self.name, take.first_prompt, take.seed, image, None, switches)
        for named, one, writer in zip(self._names, self._students, self._writers, strict=True):
            config = _reproduced(one.config, frames, listed)
            write_text(folder / f"{named}.yaml", yaml_text(config.model_dump(mode="json")))
            live = {"first_chunk": self._first, "chunks": chunks - self._first} | written_by()
            comment = job.record(config) | {"live": live}
            writer.comment = json.dumps(comment, ensure_ascii=False)
            writer.close()

    def abort(self) -> None:
        """Leave no videos."""
        for writer in self._writers:
            # A container without a frame, or one that is closed, cannot be closed again.
            with suppress(Exception):
                writer.abort()


def png_of(frame_HWC: Tensor) -> bytes:
    """A uint8 picture as PNG."""
    held = io.BytesIO()
    Image.fromarray(frame_HWC.numpy()).save(held, "PNG")
    return held.getvalue()


def _reproduced(config: SampleConfig, latent_frames: int, listed: Path) -> SampleConfig:
    """The configuration of `afd sample` for a take of so many latent frames."""
    data: dict[str, Any] = config.model_dump(mode="json")
    data |= {"prompts": str(listed.resolve()), "image": None, "out": None, "samples": 1}
    data["frames"] = 1 + (latent_frames - 1) * config.student.scale[0]
    for key in FILES:
        named = data["student"].get(key)
        if isinstance(named, str) and named not in SHIPPED and Path(named).exists():
            data["student"][key] = str(Path(named).resolve())
    return SampleConfig.model_validate(data)


def _free(folder: Path, name: str) -> str:
    """The name, or with a number behind it if files have it already."""
    number, free = 1, name
    while any(folder.glob(f"{free}*")):
        number += 1
        free = f"{name}-{number}"
    return free


def _slug(index: int, label: str) -> str:
    words = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")[:40]
    return f"{index + 1}-{words}".rstrip("-")
