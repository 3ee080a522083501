"""How soon a stream of the laptop student shows what a new prompt asks for, by kind of switch.

    python -m afd.lab.switches [--student base] [--seeds 3]

Once the window is full, every prompt is switched to the same one in each other colour, and those of
balls that go left or right to the other direction, in each mode of `afd.rollout.Switch`. "none" is
the stream without a switch: colour lasts in it, while a direction turns at the walls.

Shape letters: B streams, K chunks, F frames, C colour channels, H x W pixels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from afd.lab.physics import track_ball
from afd.lab.simulator import PROMPTS, attribute_table
from afd.lab.student import ToyConfig, ToyStudent
from afd.lab.tables import markdown_table
from afd.rollout import STEPS, Switch, SwitchMode, stream, stream_layout

# Frames that a chunk attends to, as in `afd live`, and sinks that are compared.
WINDOW, SINKS = 9, (0, 3)
# The first chunk under the new prompt, and the number of chunks that are watched from it on.
SWITCH_AT, WATCHED = 6, 12
SHARES = ("in the 1st chunk", "by the 4th", f"not in {WATCHED}")
HEADER = ("attribute", "sink", "switch", "streams", "mean chunks", "median", *SHARES)
ALTERED = ("colour", "direction")
# Of `attribute_table`.
COLUMNS = ("colour", "side", "direction", "start")
# Pixels a frame from which on a ball goes left or right, as in `physics.measure_each`.
MOVES = 0.25


@dataclass(frozen=True)
class Row:
    """Streams switched in one way.

    Attributes:
        mode: None: no switch.
        chunks_B: number of the first chunk under the new prompt that shows it, from 1; WATCHED + 1:
            none.
    """

    attribute: str
    sink: int
    mode: SwitchMode | None
    chunks_B: Tensor

    def cells(self) -> list[str]:
        chunks_B = self.chunks_B.float()
        shares = (chunks_B == 1, chunks_B <= 4, chunks_B > WATCHED)
        mean, median = f"{float(chunks_B.mean()):.2f}", f"{float(chunks_B.median()):.0f}"
        if bool(shares[-1].all()):
            mean = median = "–"
        shown = [f"{float(share.float().mean()):.2f}" for share in shares]
        first = [self.attribute, str(self.sink), self.mode or "none", str(len(chunks_B))]
        return [*first, mean, median, *shown]


def switched_prompts(attribute: str) -> tuple[list[str], list[str]]:
    """Prompts before and after a switch of one attribute."""
    before, after = [], []
    for prompt, given in PROMPTS.items():
        value = getattr(given, attribute)
        others = [x for x in range(3) if x != value]
        if attribute == "direction":  # left and right alone
            others = [2 - value] if value != 1 else []
        for other in others:
            before.append(prompt)
            after.append(replace(given, **{attribute: other}).prompt)
    return before, after


def first_shown(
    video_BFCHW: Tensor, wanted_B: Tensor, attribute: str, chunk: int, last_BFCHW: Tensor
) -> Tensor:
    """Number of the first chunk that shows the attribute's value, from 1, int64 [B]; K + 1: none.

    `last_BFCHW`: the last frame before it.
    """
    chunks = video_BFCHW.split(chunk, 1)
    if attribute == "colour":
        seen_BK = torch.stack([track_ball(x)[1] == wanted_B for x in chunks], 1)
    else:
        x_BF = track_ball(torch.cat([last_BFCHW, video_BFCHW], 1))[0][..., 0]
        speed_BK = x_BF[:, ::chunk].diff(dim=1) / chunk
        way_BK = 1 + (speed_BK > MOVES).long() - (speed_BK < -MOVES).long()
        seen_BK = way_BK == wanted_B[:, None]
    numbers_K = torch.arange(1, len(chunks) + 1)
    return torch.where(seen_BK, numbers_K, len(chunks) + 1).amin(1)


@torch.no_grad()
def measure(
    student: ToyStudent, attribute: str, mode: SwitchMode | None, seeds: Sequence[int]
) -> Tensor:
    """`first_shown` of the streams of all switched prompts and seeds, from the switch on.

    `student`: one with a window; `mode` None: the streams are not switched.
    """
    before, after = switched_prompts(attribute)
    each = [seed for seed in seeds for _ in before]
    before, after = before * len(seeds), after * len(seeds)
    chunks = stream(
        student,
        student.encode(before),
        student.noise_source(each, stream_layout(student, None), len(STEPS)),
        frames=(SWITCH_AT + WATCHED) * student.chunk,
        switches=mode and {SWITCH_AT: Switch(student.encode(after), mode)},
    )
    video_BFCHW, at = torch.cat(list(chunks), 1), SWITCH_AT * student.chunk
    wanted_B = attribute_table(after)[:, list(COLUMNS).index(attribute)]
    later_BFCHW, last_BFCHW = video_BFCHW[:, at:], video_BFCHW[:, at - 1 : at]
    return first_shown(later_BFCHW, wanted_B, attribute, student.chunk, last_BFCHW)


def windowed(name: str, sink: int) -> ToyStudent:
    """The student of a file, or the shipped one, with a window."""
    whole = ToyStudent.load(name)
    config = whole.config
    wan = replace(config.wan, window=WINDOW, sink=sink)
    student = ToyStudent(ToyConfig(**{**config.__dict__, "wan": wan}))
    student.load_state_dict(whole.state_dict())
    return student.requires_grad_(False)


def rows(name: str, seeds: Sequence[int]) -> list[Row]:
    found = []
    for attribute in ALTERED:
        for sink in SINKS:
            student = windowed(name, sink)
            # Without a sink there is none to replace.
            modes = [None, *(m for m in get_args(SwitchMode) if sink or m != "new_sink")]
            for mode in modes:
                chunks_B = measure(student, attribute, mode, seeds)
                found.append(Row(attribute, sink, mode, chunks_B))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", default="base", help="safetensors file, or the shipped one")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every switch, from 0")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = rows(args.student, range(args.seeds))
    print(markdown_table(HEADER, [row.cells() for row in found]), end="")
    print(f"window {WINDOW}, switched at chunk {SWITCH_AT}")


if __name__ == "__main__":
    main(sys.argv[1:])
