"""Build, load and save the toy student from its configuration (`StudentConfig`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from afd.cache import Store
from afd.distributed import ALONE, Ranks
from afd.errors import ConfigError
from afd.hub import named_errors
from afd.lab.config import ToyStudentConfig
from afd.lab.shipped import checkpoint_path
from afd.lab.student import ToyStudent
from afd.models.codec import Pixels
from afd.models.network import CausalNetwork
from afd.models.wan.network import CausalWan
from afd.models.wan.types import WanConfig
from afd.video.config import VideoConfig

T = TypeVar("T")


def build(
    config: ToyStudentConfig,
    video: VideoConfig,
    prompts: Sequence[str] = (),
    *,
    device: torch.device | str = "cpu",
    store: Store | None = None,
    ranks: Ranks = ALONE,
) -> tuple[ToyStudent, Pixels]:
    """Load the toy from its checkpoint, with an identity codec (`StudentConfig.build`)."""
    return _load(config).to(device, config.torch_dtype), Pixels()


def video_size(config: ToyStudentConfig) -> tuple[int, int, int]:
    """Frames, height and width of the student's videos."""
    toy = _read(config, ToyStudent.read_config)
    return toy.frames, toy.height, toy.width


def sizes(config: ToyStudentConfig) -> WanConfig:
    """Network sizes, from the header of the checkpoint, and the configuration's window."""
    return _windowed(config, _read(config, ToyStudent.read_config).wan)


def load_network(config: ToyStudentConfig) -> CausalWan:
    """Load the network with its initial weights, in float32."""
    return _load(config).net


def _load(config: ToyStudentConfig) -> ToyStudent:
    student = _read(config, ToyStudent.load)
    student.net.config = _windowed(config, student.net.config)
    return student


def _windowed(config: ToyStudentConfig, wan: WanConfig) -> WanConfig:
    return replace(wan, window=config.window, sink=config.sink)


def _read(config: ToyStudentConfig, read: Callable[[str], T]) -> T:
    """Read the checkpoint; an unreadable one is a ConfigError that names the file."""
    path = checkpoint_path(config.checkpoint)
    try:
        with named_errors("student.checkpoint", path):
            return read(config.checkpoint)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def save_network(
    config: ToyStudentConfig, network: CausalNetwork, folder: Path, dtype: torch.dtype, note: str
) -> Path:
    """Write a network as folder/student.safetensors."""
    student = _load(config)
    student.net.load_state_dict(network.state_dict())
    path = folder / "student.safetensors"
    student.save(path, dtype)
    return path
