"""A paid teacher on the loopback service: its configuration, its video, its patience in tests."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from afd.config.run import RunConfig, make_config
from afd.teachers.paid.teacher import ApiTeacher
from afd.video import write_video
from tests.afd.service import Service

MODELS = {"ark": "seedance-toy", "openai": "sora-toy", "fal": "lab/toy/text-to-video"}


def video_bytes(frames: int = 4) -> bytes:
    """A small mp4."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        ramp = torch.linspace(-1, 1, frames).view(frames, 1, 1, 1)
        write_video(path, ramp.expand(frames, 3, 32, 32), fps=8)
        return path.read_bytes()


def paid_config(
    wire: str, service: Service, folder: Path, *overrides: str, prompts: int = 1, **fetch: Any
) -> RunConfig:
    """A run with a teacher that buys `prompts` videos at 1 USD each. Times are hundredths of what
    they would be."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "asked.txt"
    file.write_text("".join(f"prompt {n}\n" for n in range(prompts)), encoding="utf-8")
    patience: dict[str, Any] = {
        "budget_usd": 100.0,
        "price_usd": 1.0,
        "backoff_s": 0.01,
        "backoff_max_s": 0.05,
        "poll_s": 0.01,
        "request_s": 2.0,
        "download_s": 2.0,
        "deadline_s": 4.0,
        "settle_s": 0.1,
        "schemes": ["http"],
        "private_hosts": ["127.0.0.1"],
    }
    data = {
        "out": str(folder / "run"),
        "video": {"frames": 4},
        "teacher": {
            "kind": wire,
            "path": str(folder / "videos"),
            "api": {
                "model": MODELS[wire],
                "prompts": str(file),
                "base_url": service.base_url(wire),
            },
            "fetch": patience | fetch,
        },
    }
    return make_config(data, overrides)


def teacher_of(config: RunConfig) -> ApiTeacher:
    return config.open_teacher()
