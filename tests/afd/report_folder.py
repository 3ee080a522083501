"""A run folder like the quickstart's, made up: input of the report's tests."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from afd.config.run import make_config, to_yaml
from afd.lab import simulator
from afd.video import to_uint8

TEACHER = {"phys": 0.073, "g_mae": 0.005, "motion": 1.32, "fit_res": 0.116, "rend": 0.171}
TEACHER |= {"adh": 1.0, "div": 1.42, "nn": 0.31, "traj_fd": 0.03}
BASE = {"phys": 0.72, "g_mae": 0.177, "motion": 1.02, "fit_res": 0.166, "rend": 0.030}
BASE |= {"adh": 1.0, "div": 1.71, "nn": 0.92, "traj_fd": 6.0}
AFD = {"phys": 0.31, "g_mae": 0.051, "motion": 1.24, "fit_res": 0.21, "rend": 0.033}
AFD |= {"adh": 0.99, "div": 1.31, "nn": 0.44, "traj_fd": 0.31}
SFT = {"phys": 0.42, "g_mae": 0.065, "motion": 1.21, "fit_res": 0.19, "rend": 0.153}
SFT |= {"adh": 0.95, "div": 1.12, "nn": 0.36, "traj_fd": 0.55}
STEPS = 400


def make_folder(out: Path, afd: dict[str, float] = AFD, sft: dict[str, float] = SFT) -> Path:
    """A finished quickstart: real mp4s and videos of the simulator, plausible curves."""
    simulator.write_folder(out / "teacher", "nuis", 36, seed=0)
    make_base(out / "base")
    make_run(out / "afd", "afd", afd, "target", "clean")
    make_run(out / "sft", "sft", sft, "target", "nuis")
    return out


def make_base(folder: Path) -> None:
    folder.mkdir(parents=True)
    lines = [
        {"update": 0, "seed": 0, "method": name, "videos": 576, "metrics": metrics}
        for name, metrics in (("teacher", TEACHER), ("base", BASE))
    ]
    write_lines(folder / "evaluation.jsonl", lines)
    write_samples(folder, "source", "clean")
    (folder / "DONE").touch()


def make_run(folder: Path, method: str, end: dict[str, float], domain: str, style: str) -> None:
    folder.mkdir(parents=True)
    config = make_config({"method": method, "name": method, "updates": STEPS})
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "doctor.json").write_text(json.dumps(DOCTOR), encoding="utf-8")
    write_lines(folder / "evaluation.jsonl", list(curve(method, end)))
    write_lines(folder / "metrics.jsonl", [update(method, step) for step in range(1, STEPS + 1)])
    (folder / "train.log").write_text(LOG if method == "afd" else "", encoding="utf-8")
    write_samples(folder, domain, style)
    (folder / "DONE").write_text("400 updates\n", encoding="utf-8")


DOCTOR = {
    "afd": "0.1.0",
    "python": "3.11.2",
    "platform": "Linux",
    "cpu": {"model": "Some CPU", "threads": 2, "capability": "AVX2"},
    "packages": {"torch": "2.13.0", "triton": None},
    "ops": {
        "forward_noise": {"chosen": "native", "native": "available"},
        "nft_loss": {"chosen": "native", "native": "available"},
    },
}
LOG = """2026-01-01 12:00:00,000 INFO afd: 400 updates
2026-01-01 12:00:05,000 WARNING update 12: discriminator accuracy is 1: its scores carry little
2026-01-01 12:00:09,000 WARNING update 31: discriminator accuracy is 1: its scores carry little
2026-01-01 12:00:10,000 WARNING update 40: r is near 0: the discriminator may be too strong
"""


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def curve(method: str, end: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Evaluations every 50 updates on an exponential way from the base to `end`."""
    wobble = np.random.default_rng(7)
    for step in range(0, STEPS + 1, 50):
        part = 1 - math.exp(-step / (130 if method == "afd" else 60))
        part = part * (1 + 0.06 * wobble.normal()) if step < STEPS else 1.0
        metrics = {key: BASE[key] + part * (end[key] - BASE[key]) for key in end}
        videos = 576 if step == STEPS else 144
        yield {"update": step, "seed": 0, "method": method, "videos": videos, "metrics": metrics}


def update(method: str, step: int) -> dict[str, Any]:
    noise = np.random.default_rng(step)
    way = math.exp(-step / 150)
    phases = {
        "teacher": 0.002,
        "rollout": 0.12,
        "discriminator": 0.09,
        "student": 0.2,
        "evaluate": 0.0,
    }
    if method == "sft":
        phases = {
            "teacher": 0.002,
            "rollout": 0.0,
            "discriminator": 0.0,
            "student": 0.08,
            "evaluate": 0.0,
        }
    if step % 50 == 0:
        phases["evaluate"] = 1.2
    line: dict[str, Any] = {
        "update": step,
        "time_s": step * 0.42 if method == "afd" else step * 0.09,
    }
    line |= {"phase_s": phases, "student/grad_norm": 0.4 + 0.1 * noise.random()}
    line |= {"student/loss": 0.4 + 0.3 * way + 0.05 * noise.normal(), "student/lr": 1e-4}
    if method == "sft":
        return line
    return line | {
        "discriminator/loss": 0.35 + 0.3 * way + 0.05 * noise.normal(),
        "discriminator/accuracy": min(1.0, 0.86 - 0.3 * way + 0.06 * noise.normal()),
        "discriminator/margin": 2.4 - 2.2 * way + 0.25 * noise.normal(),
        "student/r_mean": 0.5 + 0.03 * noise.normal(),
        "student/r_at_0": 0.04 * noise.random(),
        "student/r_at_1": 0.05 * noise.random(),
        "agreement/phys": 0.52 + 0.2 * way + 0.1 * noise.normal(),
        "agreement/rend": 0.1 + 0.12 * noise.normal(),
    }


def write_samples(folder: Path, domain: str, style: str) -> None:
    table = simulator.attribute_table(list(simulator.PROMPTS))
    generator = torch.Generator().manual_seed(5)
    videos, _ = simulator.sample_videos(table, domain, style, generator)
    prompts, seeds = list(simulator.PROMPTS), list(range(1000, 1036))
    metadata = {"prompts": json.dumps(prompts), "seeds": json.dumps(seeds)}
    save_file({"videos": to_uint8(videos).numpy()}, folder / "samples.safetensors", metadata)
