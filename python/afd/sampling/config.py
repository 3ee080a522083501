"""What the student streams and how, and the configuration of `afd sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from afd.config.base import Count, Natural, Positive, Threads
from afd.errors import ConfigError
from afd.hub import fingerprint
from afd.lab.student import checkpoint_path
from afd.models.config import DTYPES, WanParts
from afd.schedules import ShiftedFlow, check_steps

# Video frames per latent frame after the first, and pixels per latent row and column.
WAN_SCALE = (4, 8)
# What a video does not depend on: it may differ when `afd sample` goes on in the same folder.
FREE = ("prompts", "out", "samples", "batch", "device", "compile", "cuda_graphs", "threads")


class StreamConfig(WanParts):
    """The student, its files, and how it streams: what `afd sample` and `afd eval` both need."""

    student: Literal["wan", "toy"] = Field(
        default="wan", description="wan: a released student's layout; toy: the laptop-size one"
    )
    checkpoint: str | None = Field(
        default=None,
        description="wan: .pt file, diffusers folder or .safetensors; toy: 'base' or a file",
    )

    out: Path | None = Field(default=None, description="folder of the mp4 files")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="seed of the first video; the next ones count on"
    )
    batch: Count = Field(default=1, description="videos streamed together")

    height: Count = Field(default=480, description="rows of the video in pixels")
    width: Count = Field(default=832, description="columns of the video in pixels")
    frames: Count = Field(
        default=81, description="frames of the video, prefix included; may exceed the training's"
    )
    fps: Positive = Field(default=16.0, description="frames per second of the file")
    crf: Annotated[int, Field(ge=0, le=51)] = Field(
        default=18, description="constant rate factor of h264, 0 to 51; lower is better"
    )

    independent_first_frame: bool = Field(
        default=False, description="the first latent frame is a chunk of its own"
    )
    window: Count | None = Field(
        default=None, description="latent frames a chunk sees, sink and itself included; null: all"
    )
    sink: Natural = Field(default=0, description="first latent frames that the window never loses")

    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="what the network and the text encoder compute in"
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        default="auto", description="auto: cuda where there is one"
    )
    compile: bool = Field(default=False, description="compile what lies around attention")
    cuda_graphs: bool = Field(default=False, description="replay passes as CUDA graphs")
    threads: Threads = Field(default=0, description="CPU threads; 0 leaves torch's choice")

    @model_validator(mode="after")
    def _consistent(self) -> StreamConfig:
        time, space = self.scale
        if (self.frames - 1) % time:
            raise ValueError(f"frames: got {self.frames}; needed: 1 + a multiple of {time}")
        if self.height % (2 * space) or self.width % (2 * space):
            # Two latent pixels make a token; h264 needs even sizes in any case.
            got = f"{self.height}x{self.width}"
            raise ValueError(f"height, width: got {got}; needed: multiples of {2 * space}")
        for steps in (self.steps, self.first_chunk_steps):
            if steps is not None and self.student == "wan":
                check_steps(steps, first=1000)
                ShiftedFlow(self.shift).warp(steps)
            elif steps is not None:
                check_steps(steps)
        if self.window is None and self.sink:
            raise ValueError(f"sink: got {self.sink}; needed: 0, as there is no window")
        if self.window is not None and not self.sink + self.chunk <= self.window:
            raise ValueError(
                f"window: got {self.window}; needed: at least sink + chunk = "
                f"{self.sink + self.chunk}"
            )
        return self

    @property
    def scale(self) -> tuple[int, int]:
        """Video frames per later latent frame, pixels per latent pixel."""
        return WAN_SCALE if self.student == "wan" else (1, 1)

    @property
    def latent_frames(self) -> int:
        return 1 + (self.frames - 1) // self.scale[0]

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.height // self.scale[1], self.width // self.scale[1]

    @property
    def network(self) -> dict[str, Any]:
        """The fields of WanConfig that no checkpoint holds."""
        return {
            "chunk": self.chunk,
            "window": self.window,
            "sink": self.sink,
            "independent_first_frame": self.independent_first_frame,
            "text_len": self.text_len,
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

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


class SampleConfig(StreamConfig):
    """One run of `afd sample`."""

    prompts: str | list[str] | None = Field(
        default=None,
        description=".txt (one a line), .jsonl (an object a line), a prompt itself, or a list",
    )
    samples: Count = Field(default=1, description="videos per prompt, with seeds of their own")

    image: Path | None = Field(default=None, description="the video begins with this picture")
    video: Path | None = Field(default=None, description="the video continues this one")
    prefix_frames: Count | None = Field(
        default=None, description="frames taken of `video`; null: those of one chunk"
    )

    @model_validator(mode="after")
    def _given(self) -> SampleConfig:
        time, _ = self.scale
        if self.image is not None and self.video is not None:
            raise ValueError("image, video: got both; needed: at most one of them")
        if self.prefix_frames is not None and (self.prefix_frames - 1) % time:
            raise ValueError(
                f"prefix_frames: got {self.prefix_frames}; needed: 1 + a multiple of {time}"
            )
        return self

    def settings(self) -> dict[str, Any]:
        """What a video depends on besides its prompt and seed, as plain data."""
        settings = self.model_dump(mode="json", exclude=set(FREE))
        if self.checkpoint is None:
            return settings
        toy = self.student == "toy"
        path = checkpoint_path(self.checkpoint) if toy else Path(self.checkpoint)
        # Another file under the same name makes other videos.
        return settings | {"checkpoint": f"{self.checkpoint} {fingerprint(path)}"}
