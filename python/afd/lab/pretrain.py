"""Train the small checkpoints shipped with the package.

    python -m afd.lab.pretrain base
    python -m afd.lab.pretrain endless-base
    python -m afd.lab.pretrain motion-backbone

They replace the shipped files in afd/lab/assets, or are written to `--out`; a JSON file with the
settings and the hash is written beside each.
The base students learn the simulator's source domains (weak gravity). The motion backbone learns to
read motion under random looks; no clip it sees has a gravity near the teacher's.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from afd.files import sha256_of, write_json
from afd.lab.augmentation import random_look
from afd.lab.discriminator import MotionBackbone
from afd.lab.shipped import checkpoint_path
from afd.lab.simulator import (
    ATTRIBUTES,
    BOUNCE,
    HIGH,
    LOW,
    attribute_table,
    colour_table,
    drift,
    fall,
    render,
    source_gravity,
    trajectories,
    uniform,
)
from afd.lab.student import ToyConfig, ToyStudent
from afd.methods.config import SftConfig
from afd.methods.copies import draw_copies
from afd.methods.sft import denoising_loss


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Learning-rate factor: a linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_base(
    out: Path, steps: int, seed: int, batch: int, rate: float, *, lengths: int = 1
) -> dict[str, Any]:
    """Train a base student on the source domain and save it in float16.

    `lengths`: of its videos, in those of the task; with more than 1 their balls lose no speed, and
    the student attends to a window of one.
    """
    torch.manual_seed(seed)
    generator = Generator().manual_seed(seed)
    student = ToyStudent(ToyConfig())
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.01)
    table = attribute_table([a.prompt for a in ATTRIBUTES])
    text = student.encode([a.prompt for a in ATTRIBUTES])
    bounce, frames = BOUNCE if lengths == 1 else 1.0, lengths * student.frames
    if lengths > 1:
        student.net.config = replace(student.net.config, window=student.frames)
    law = SftConfig(draws=1)
    started, running = time.time(), 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * cosine(step, steps)
        pick = torch.randint(len(ATTRIBUTES), (batch,), generator=generator)
        gravity = source_gravity(batch, generator)
        track = trajectories(table[pick], gravity, generator, bounce, frames)
        videos = render(track, colour_table(table[pick, 0]))
        copies = draw_copies(law, batch, frames // student.chunk, (), generator, context_noise=0.1)
        loss = denoising_loss(student, videos, text[pick], copies)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            print(
                f"{step + 1:5d}/{steps} loss {running:.5f} {time.time() - started:.0f} s",
                flush=True,
            )
    student.save(out)
    return {"loss": running}


# --- the motion backbone ---

EXCLUDED_GRAVITY = (0.30, 0.42)  # the target, 0.36, is never seen


def any_motion(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Tracks [n, F, 2] with broad random physics, and the same tracks with jitter in half of them.

    Any gravity but the target's, any bounce and throw. The labels are the smooth tracks: with
    features that are robust to jitter, a discriminator judges the fall, where it would otherwise
    latch on to the student's small frame-to-frame errors.
    """
    low, high = EXCLUDED_GRAVITY
    gravity = uniform(n, 0.0, 0.6 - (high - low), generator)
    gravity = torch.where(gravity < low, gravity, gravity + high - low)
    bounce = uniform(n, 0.3, 1.0, generator)
    x0, vx = uniform(n, LOW, HIGH, generator), uniform(n, -1.0, 1.0, generator)
    y0, vy = uniform(n, LOW + 0.5, HIGH, generator), uniform(n, -1.2, 0.8, generator)
    vy = torch.maximum(vy, -(2 * gravity * (y0 - LOW)).sqrt().clamp_min(0.3))
    track = torch.stack([drift(x0, vx, bounce), fall(y0, vy, gravity, bounce)], -1)
    shaken = (torch.rand(n, generator=generator) < 0.5).view(n, 1, 1)
    amount = uniform(n, 0.05, 0.6, generator).view(n, 1, 1)
    shake = amount * torch.randn(track.shape, generator=generator)
    return track, (track + shaken * shake).clamp(LOW, HIGH)


def motion_labels(track_NF2: Tensor) -> Tensor:
    """Position, velocity and acceleration of the inner frames, [N, F-2, 6], of about unit size."""
    velocity = track_NF2[:, 1:] - track_NF2[:, :-1]
    acceleration = velocity[:, 1:] - velocity[:, :-1]
    centre = (LOW + HIGH) / 2
    return torch.cat([(track_NF2[:, 1:-1] - centre) / 4, velocity[:, :-1], 2 * acceleration], -1)


def train_motion_backbone(
    out: Path, steps: int, seed: int, batch: int, rate: float
) -> dict[str, Any]:
    """Regress motion and colour from two looks of each clip; save the backbone in float16."""
    torch.manual_seed(seed)
    generator = Generator().manual_seed(seed)
    backbone = MotionBackbone()
    readout = nn.Linear(backbone.features, 9)
    parameters = [*backbone.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    started, running = time.time(), 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * cosine(step, steps)
        track, shown = any_motion(batch, generator)
        colour = torch.rand(batch, 3, generator=generator) * 1.8 - 0.9
        clean = render(shown, colour)
        twice = torch.cat([random_look(clean, generator), random_look(clean, generator)])
        features = backbone.raw(twice)
        predicted = readout(features)[:, 1:-1]
        motion = (predicted[..., :6] - motion_labels(track).repeat(2, 1, 1)).square().mean()
        shade = (predicted[..., 6:] - colour.repeat(2, 1)[:, None]).square().mean()
        first, second = features.chunk(2)
        scale = features.detach().flatten(0, 1).var(0) + 1e-3
        apart = ((first - second).square() / scale).mean()
        # An invariance loss from the start would favour constant features.
        ramp = min(1.0, max(0.0, (step - steps / 6) / (steps / 4)))
        loss = motion + 0.1 * shade + 0.1 * ramp * apart
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running = motion.item() if step == 0 else 0.98 * running + 0.02 * motion.item()
        if (step + 1) % 100 == 0:
            seconds = time.time() - started
            print(
                f"{step + 1:5d}/{steps} motion {running:.4f} apart {apart.item():.4f} "
                f"colour {shade.item():.3f} {seconds:.0f} s",
                flush=True,
            )
    with torch.no_grad():
        looks = [
            random_look(
                render(
                    any_motion(64, generator)[1], torch.rand(64, 3, generator=generator) * 1.8 - 0.9
                ),
                generator,
            )
            for _ in range(16)
        ]
        features = torch.cat([backbone.raw(look) for look in looks]).flatten(0, 1)
        backbone.mean.copy_(features.mean(0))
        backbone.std.copy_(features.std(0))
    backbone.save(out)
    return {"motion_loss": running}


def record(path: Path, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Write a checkpoint's settings, results and hash beside it."""
    about = {"settings": settings, "results": results, "sha256": sha256_of(path)}
    write_json(path.with_suffix(".json"), about | {"torch": torch.__version__}, indent=2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a shipped checkpoint.")
    commands = parser.add_subparsers(dest="what", required=True)
    base = commands.add_parser("base", help="the base student, on the source domain")
    endless = commands.add_parser("endless-base", help="the base student of long streams")
    for command, videos in ((base, 48), (endless, 16)):
        command.add_argument("--steps", type=int, default=4000)
        command.add_argument("--batch", type=int, default=videos)
        command.add_argument("--rate", type=float, default=2e-3)
    motion = commands.add_parser("motion-backbone", help="the discriminator's frozen features")
    motion.add_argument("--steps", type=int, default=2400)
    motion.add_argument("--batch", type=int, default=40)
    motion.add_argument("--rate", type=float, default=2e-3)
    for command in (base, endless, motion):
        command.add_argument("--out", type=Path, help="default: the shipped file")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    trainings: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
        "base": (train_base, "base"),
        "endless-base": (partial(train_base, lengths=3), "endless"),
        "motion-backbone": (train_motion_backbone, "motion"),
    }
    train, shipped = trainings[options.what]
    out = options.out or checkpoint_path(shipped)
    results = train(out, options.steps, options.seed, options.batch, options.rate)
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    record(out, settings, results)


if __name__ == "__main__":
    main()
