"""Configuration of streaming and of `afd sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from afd.config.base import ByKind, Count, Natural, Positive, Section, Threads, of_default_kind
from afd.context import Recache
from afd.errors import ConfigError
from afd.models.config import StudentConfig

# Settings that do not affect a video; they may differ when `afd sample` resumes in a folder.
FREE = ("prompts", "out", "samples", "batch", "device", "compile", "cuda_graphs", "threads")
# The same for the student's section.
FREE_STUDENT = (
    "lora",
    "checkpoint_blocks",
    "rollout_batch",
    "rollout_overlap",
    "init",
    "init_weights",
    "parents",
    "window",
    "sink",
)


class StreamConfig(Section):
    """Settings of the student and its streaming, shared by `afd sample` and `afd benchmark`."""

    student: Annotated[StudentConfig, ByKind("students", "wan")] = of_default_kind()

    out: Path | None = Field(default=None, description="folder of the mp4 files")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="seed of the first video; each further video adds 1"
    )
    batch: Count = Field(default=1, description="videos streamed together")

    height: Count = Field(default=480, description="height of the video in pixels")
    width: Count = Field(default=832, description="width of the video in pixels")
    frames: Count = Field(
        default=81,
        description="frames of the video, including the prefix; may exceed the training length",
    )
    fps: Positive = Field(default=16.0, description="frames per second of the file")
    crf: Annotated[int, Field(ge=0, le=51)] = Field(
        default=18, description="constant rate factor of h264, 0 to 51; lower is better"
    )

    independent_first_frame: bool = Field(
        default=False, description="the first latent frame is a separate chunk"
    )
    window: Count | None = Field(
        default=None,
        description="latent frames a chunk attends to, including the sink and itself; null: all",
    )
    sink: Natural = Field(
        default=0, description="first latent frames that always stay in the window"
    )

    recache: Recache = Field(
        default="switch",
        description="when keys and values of the frames in the window are computed again. switch: "
        "at prompt switches that say so; chunk: before every chunk, from clean latents, of which "
        "the first is encoded again as an image if there is no sink (Krea Realtime)",
    )

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        default="auto", description="auto: cuda if available"
    )
    compile: bool = Field(default=False, description="compile the code around attention")
    cuda_graphs: bool = Field(default=False, description="replay passes as CUDA graphs")
    threads: Threads = Field(default=0, description="CPU threads; 0: torch's default")

    @model_validator(mode="after")
    def _consistent(self) -> StreamConfig:
        if self.student.init is not None:
            raise ValueError(
                f"student.init: got {self.student.init}, for training runs alone; needed: "
                "student.checkpoint, such as afd export kind=student writes"
            )
        if self.student.window is not None:
            raise ValueError(
                f"student.window: got {self.student.window}, for training runs alone; needed: "
                "window and sink beside student"
            )
        time, space = self.student.scale
        if (self.frames - 1) % time:
            raise ValueError(f"frames: got {self.frames}; needed: 1 + a multiple of {time}")
        if self.height % (2 * space) or self.width % (2 * space):
            # A token is two latent pixels high and wide; h264 always needs even sizes.
            got = f"{self.height}x{self.width}"
            raise ValueError(f"height, width: got {got}; needed: multiples of {2 * space}")
        if self.window is None and self.sink:
            raise ValueError(f"sink: got {self.sink}; needed: 0, as there is no window")
        if self.window is None and self.recache == "chunk":
            raise ValueError(
                "recache: got chunk without a window; needed: a window, whose frames are encoded "
                "again, or switch"
            )
        if self.window is not None:
            least = self.sink + self.student.chunk_frames
            if self.window < least:
                raise ValueError(
                    f"window: got {self.window}; needed: at least sink + chunk = {least}"
                )
        return self

    @property
    def latent_frames(self) -> int:
        return self.student.latent_frames(self.frames)

    @property
    def memory(self) -> dict[str, Any]:
        """The fields of WanConfig that control the cache; checkpoints do not store them."""
        return {
            "window": self.window,
            "sink": self.sink,
            "independent_first_frame": self.independent_first_frame,
        }

    @property
    def torch_device(self) -> torch.device:
        there = torch.cuda.device_count()
        if self.device == "auto":
            return torch.device("cuda" if there else "cpu")
        device = torch.device(self.device)
        if device.type == "cuda" and (device.index or 0) >= there:
            has = (
                f"needed: one of the {there} from cuda:0 on" if there else "there is no CUDA device"
            )
            raise ConfigError(f"device: got {self.device}; {has} here")
        return device


class SampleConfig(StreamConfig):
    """Configuration of `afd sample`."""

    prompts: str | list[str] | None = Field(
        default=None,
        description=".txt (one a line), .jsonl (an object a line), a prompt itself, or a list",
    )
    samples: Count = Field(default=1, description="videos per prompt, each with its own seed")

    image: Path | None = Field(default=None, description="start the video from this image")
    video: Path | None = Field(default=None, description="continue this video")
    prefix_frames: Count | None = Field(
        default=None, description="frames taken from `video`; null: one chunk"
    )

    @model_validator(mode="after")
    def _given(self) -> SampleConfig:
        time, _ = self.student.scale
        if self.image is not None and self.video is not None:
            raise ValueError("image, video: got both; needed: at most one of them")
        if self.prefix_frames is not None and (self.prefix_frames - 1) % time:
            raise ValueError(
                f"prefix_frames: got {self.prefix_frames}; needed: 1 + a multiple of {time}"
            )
        return self

    def settings(self) -> dict[str, Any]:
        """Settings that determine a video besides its prompt and seed, as plain data."""
        settings = self.model_dump(mode="json", exclude=set(FREE))
        student = {k: v for k, v in settings["student"].items() if k not in FREE_STUDENT}
        if self.student.checkpoint is not None:
            # Include the fingerprint, since another file may have the same name.
            student["checkpoint"] = f"{self.student.checkpoint} {self.student.fingerprint()}"
        if self.recache == "switch":
            # Videos of earlier versions do not have the key.
            del settings["recache"]
        return settings | {"student": student}
