"""The student to evaluate: a checkpoint file, or the student of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from afd.benchmarks.config import BenchmarkConfig
from afd.config.run import RunConfig
from afd.discriminators.config import VideoAlignConfig
from afd.errors import ConfigError
from afd.rewards.config import VideoAlignRewardConfig
from afd.sampling.config import SampleConfig, StreamConfig
from afd.trainer import checkpoint
from afd.trainer.run_folder import load_run

# Subfolder of the samples of weights that belong to no run.
START = "start"


class Stream(SampleConfig):
    """Streaming configuration that records the weights' origin independently of their path."""

    origin: str = Field(description="identity of the student's weights, instead of their path")

    def settings(self) -> dict[str, Any]:
        """As in `SampleConfig`."""
        settings = super().settings()
        student = settings["student"] | {"checkpoint": settings.pop("origin")}
        return settings | {"student": student}


@dataclass(frozen=True)
class Subject:
    """A student to evaluate.

    Attributes:
        name: first folder of its samples.
        checkpoint: name of its checkpoint, the second folder of its samples.
        origin: description of the student, recorded in the videos.
        settings: fields of StreamConfig.
        export: writes the weights into a folder, unless they already are a file.
    """

    name: str
    checkpoint: str
    origin: str
    settings: dict[str, Any]
    export: Callable[[Path], None]

    def stream(self, folder: Path, videos: Path, device: torch.device) -> Stream:
        """The `afd sample` configuration for its videos; `folder` holds the exported weights."""
        here = {"out": videos, "device": str(device), "origin": self.origin}
        student = self.settings["student"]
        if student.checkpoint is None:
            student = student.with_weights(_exported(folder))
        return Stream.model_validate(self.settings | here | {"student": student})


def find_subject(config: BenchmarkConfig) -> Subject:
    """Find the student that `run` or `checkpoint` names, without loading it.

    Raises ConfigError if there is none.
    """
    settings = {name: getattr(config, name) for name in StreamConfig.model_fields}
    if config.run is not None:
        return _of_run(config, config.run, settings)
    weights = config.student.checkpoint
    if weights is None:
        raise ConfigError("run, student.checkpoint: got neither; needed: a run folder, or weights")
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(weights).stem).lstrip("._-")
    name = config.name or stem or "student"
    config.student.require_weights()
    # Another file may lie at the same path later.
    origin = f"{weights} {config.student.fingerprint()}"
    return Subject(name, START, origin, settings, lambda folder: None)


def with_rater(config: BenchmarkConfig) -> BenchmarkConfig:
    """Fill in the VideoAlign of the run's discriminator or of a reward if the configuration names
    none."""
    rater = config.videoalign_mq
    if config.run is None or rater.checkpoint is not None:
        return config
    run = load_run(config.run, key="run")
    found = [
        section
        for section in (run.discriminator, *run.rewards.values())
        if isinstance(section, VideoAlignConfig | VideoAlignRewardConfig) and section.checkpoint
    ]
    if not found:
        return config
    scorer = found[0]
    theirs = {
        "checkpoint": str(scorer.checkpoint),
        "base": rater.base or scorer.base,
        "checkout": rater.checkout or scorer.checkout,
    }
    return config.model_copy(update={"videoalign_mq": rater.model_copy(update=theirs)})


# The exported weights are whole.
NO_START = {"init": None, "init_weights": None, "parents": "folded"}


def _of_run(config: BenchmarkConfig, folder: Path, settings: dict[str, Any]) -> Subject:
    run = load_run(folder, key="run")
    path = checkpoint.latest(folder / "checkpoints")
    if path is None:
        raise ConfigError(f"run: {folder} has no checkpoint")
    digest = json.loads((path / "meta.json").read_text(encoding="utf-8"))["sha256"]
    theirs = _settings_of(run)
    # This configuration's explicit settings take precedence; the weights are always the run's.
    settings |= {k: v for k, v in theirs.items() if k not in config.model_fields_set}
    given = config.student.model_fields_set & type(run.student).model_fields.keys()
    own = {key: getattr(config.student, key) for key in given - {"kind"}}
    settings["student"] = run.student.model_copy(update=own | {"checkpoint": None} | NO_START)
    version = config.weights or "evaluated"
    part = path.name if config.weights is None else f"{path.name}-{version}"
    origin = f"{run.name} {path.name} {version} {digest[:16]}"

    def export(samples: Path) -> None:
        _export(folder, samples, run, config, digest, settings["student"].dtype)

    return Subject(config.name or run.name, part, origin, settings, export)


def _settings_of(run: RunConfig) -> dict[str, Any]:
    """Fields of StreamConfig taken from the run."""
    video = run.video
    settings: dict[str, Any] = {"height": video.height, "width": video.width}
    settings["frames"] = video.frames
    if video.fps is not None:
        settings["fps"] = video.fps
    return settings


def _exported(samples: Path) -> Path:
    """The file or folder of weights written by `_export`."""
    (weights,) = (path for path in (samples / "student").iterdir() if path.name != "afd.json")
    return weights


def _export(
    folder: Path, samples: Path, run: RunConfig, config: BenchmarkConfig, digest: str, dtype: str
) -> None:
    """Export the run's weights in released form, unless already done."""
    from afd.export import ExportConfig, export

    out = samples / "student"
    if out.exists():
        there = json.loads((out / "afd.json").read_text(encoding="utf-8"))["checkpoint_sha256"]
        if there != digest:
            raise ConfigError(
                f"out: {samples} holds samples of another student of this name and checkpoint; "
                "choose another out= or name="
            )
        return
    what = {"out": out, "kind": "student", "weights": config.weights, "dtype": dtype}
    export(folder, ExportConfig.model_validate(what))
