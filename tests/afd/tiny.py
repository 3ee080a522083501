"""A real but tiny method, and a program that trains with it, is killed, and continues.

The method fits one number per prompt and pixel to the teacher's videos with its own noise, so a
wrong weight, optimizer moment, random state or cursor after a resume changes every later number.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem

from afd.config.run import RunConfig, make_config
from afd.methods.base import Batch
from afd.models.codec import Pixels
from afd.trainer.loop import train
from afd.video import write_video

PROMPTS = ("up", "down", "left")


class TinyMethod:
    """Regression of the teacher's mean picture from noisy copies of it."""

    name, needs_rollout, needs_discriminator, input_space = "afd", True, True, "pixels"
    codec, shown = Pixels(), None

    def __init__(self, seed: int = 0) -> None:
        self.net = nn.Linear(3, 3)
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.net.weight.copy_(torch.randn(3, 3, generator=self.generator))
            self.net.bias.zero_()
        self.adam = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        self.rolled: Tensor | None = None

    def rollout(self, batch: Batch) -> None:
        self.rolled = torch.randn(len(batch.prompts), 3, generator=self.generator)

    def discriminator_step(self, batch: Batch) -> dict[str, float]:
        return {"discriminator/margin": float(self.rolled.mean())}

    def student_step(self, batch: Batch) -> dict[str, float]:
        wanted = batch.teacher_BFCHW.mean((1, 3, 4))
        # The global generator takes part so that its state must be saved as well.
        noise = self.rolled + torch.randn(self.rolled.shape)
        loss = (self.net(wanted + 0.1 * noise) - wanted).square().mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return {
            "student/loss": float(loss.detach()),
            "student/weight": float(self.net.weight.detach().sum()),
        }

    def evaluation_policy(self) -> Any:
        return nullcontext(self.net)

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        return video_BFCHW

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "adam": self.adam.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.adam.load_state_dict(state["adam"])
        self.generator.set_state(state["generator"])


def make_clips(folder: Path, count: int = 5, frames: int = 3) -> Path:
    """A folder teacher of small coloured clips; no two are alike."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        colour = torch.tensor([i / count, 0.2, -i / count]).view(1, 3, 1, 1)
        write_video(folder / f"{i}.mp4", colour.expand(frames, 3, 16, 16), fps=8)
        lines.append(f"{i}.mp4\t{PROMPTS[i % len(PROMPTS)]} {i}\n")
    (folder / "prompts.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def tiny_config(out: Path, clips: Path, *overrides: str) -> RunConfig:
    """A run of 6 updates on the clips, saved after every second one."""
    data = {
        "out": str(out),
        "updates": 6,
        "prompts_per_update": 2,
        "threads": 1,
        "video": {"frames": 3},
        "teacher": {"kind": "folder", "path": str(clips)},
        "discriminator": {"warmup_updates": 0},
        "evaluation": {"kind": "none"},
        "logging": {"tensorboard": False},
        "checkpoint": {"every": 2, "keep": 2},
    }
    return make_config(data, overrides)


class Interrupted(TinyMethod):
    """Sends the process a signal in the middle of its n-th update."""

    def __init__(self, after: int, number: int) -> None:
        super().__init__()
        self.after, self.number = after, number

    def discriminator_step(self, batch: Batch) -> dict[str, float]:
        if batch.update == self.after:
            os.kill(os.getpid(), self.number)
        return super().discriminator_step(batch)


def die_at(event: int) -> None:
    """SIGKILL this process at its n-th sync, rename or half-written shard."""
    seen = 0

    def here() -> None:
        nonlocal seen
        seen += 1
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            here()
            return function(*args, **kwargs)

        return wrapped

    class InHalves(io.FileIO):
        def write(self, data: Any) -> int:
            half = len(data) // 2
            written = super().write(data[:half])
            here()
            return written + super().write(data[half:])

    @contextmanager
    def create_stream(_: FileSystem, path: str, mode: str) -> Iterator[io.FileIO]:
        with InHalves(path, mode) as stream:
            yield stream

    FileSystem.create_stream = create_stream  # type: ignore[method-assign,assignment]
    os.fsync, os.rename, os.replace = before(os.fsync), before(os.rename), before(os.replace)


def main() -> None:
    """tiny.py OUT CLIPS EVENT...: for every event a run OUT/<event> that is killed there, then
    continued to its end. Every attempt is a separate process, forked from this one."""
    out, clips = Path(sys.argv[1]), Path(sys.argv[2])
    # Imports everything that a run imports on the way, and starts no thread that a fork would lose.
    torch.set_num_threads(1)
    train(tiny_config(out / "first", clips), method=TinyMethod())
    # A scaler of FFmpeg that a child frees would wait for threads that only its parent has.
    gc.collect()
    for event in map(int, sys.argv[3:]):
        ends = []
        for attempt in range(2):
            child = os.fork()
            if child == 0:
                if attempt == 0:
                    die_at(event)
                train(tiny_config(out / str(event), clips), method=TinyMethod())
                os._exit(0)
            ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(event, *ends)


if __name__ == "__main__":
    main()
