"""GPU-seconds of an AFD update at 480x832 with each setting that makes it cheaper, and with all.

    python -m benchmarks.levers

The rows are dry runs (`afd train afd_self_forcing_480x832 SETTINGS --dry-run`): estimates of the
cost model, 32 videos in an update, the student learning. Memory is that of one process on one GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd.config.run import load_config
from afd.lab.tables import markdown_table
from afd.planning.parts import GIB
from afd.planning.plan import Plan, make_plan

BASE = "afd_self_forcing_480x832"
PHASES = ("rollout", "decode", "discriminator", "student")
# The shipped file has the window; it is turned off to show what it saves.
PLAIN = ("discriminator.window=null",)
WINDOW = ("discriminator.window=2.0",)
TINY = ("video.decoder=tiny", "student.tiny_vae=taew2_1.safetensors")
KEPT = ("afd.keep_context=true",)
TWO_CHUNKS = ("afd.chunks_per_update=2",)


def _from(chunk: int | str) -> tuple[str, ...]:
    return (f"afd.group_from_chunk={chunk}",)


LEVERS: dict[str, Sequence[str]] = {
    "none": PLAIN,
    "windowed discriminator (shipped)": WINDOW,
    "tiny decoder": (*PLAIN, *TINY),
    "kept contexts": (*PLAIN, *KEPT),
    "shared prefix, random": (*PLAIN, *_from("random")),
    "shared prefix of 4 of 7 chunks": (*PLAIN, *_from(4)),
    "shared prefix of 5": (*PLAIN, *_from(5)),
    "shared prefix, last": (*PLAIN, *_from("last")),
    "2 drawn chunks in the loss": (*PLAIN, *TWO_CHUNKS),
    "the first three and prefix, random": (*WINDOW, *TINY, *KEPT, *_from("random")),
    "the first three and prefix of 4": (*WINDOW, *TINY, *KEPT, *_from(4)),
    "the first three and prefix of 5": (*WINDOW, *TINY, *KEPT, *_from(5)),
    "the first three and prefix, last": (*WINDOW, *TINY, *KEPT, *_from("last")),
    "without kept contexts, prefix of 5": (*WINDOW, *TINY, *_from(5)),
    "without kept contexts, prefix, random, 2 drawn chunks": (
        *WINDOW,
        *TINY,
        *_from("random"),
        *TWO_CHUNKS,
    ),
}


@dataclass(frozen=True)
class Row:
    """GPU-seconds of an update by phase, and the peak memory of one process in bytes and on an
    H200 (`Plan.fits`)."""

    lever: str
    seconds: dict[str, float]
    update: float
    peak: int
    fits: str

    @classmethod
    def of(cls, lever: str, plan: Plan) -> Row:
        seconds = {phase.name: phase.seconds for phase in plan.phases if phase.name in PHASES}
        peak = max(plan.peaks().values())
        return cls(lever, seconds, plan.update_seconds, peak, plan.fits("H200"))

    def cells(self, plain: float) -> list[str]:
        parts = [f"{self.seconds[name]:.1f}" for name in PHASES]
        total = [f"{self.update:.1f}", f"{self.update / plain:.2f}"]
        return [self.lever, *parts, *total, f"{self.peak / GIB:.0f}", self.fits]


HEADER = ("settings", *PHASES, "an update", "× none", "peak GiB", "an H200")


def rows() -> list[Row]:
    return [
        Row.of(lever, make_plan(load_config(BASE, list(settings))))
        for lever, settings in LEVERS.items()
    ]


def table(found: list[Row]) -> list[list[str]]:
    return [row.cells(found[0].update) for row in found]


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    print(markdown_table(HEADER, table(rows())))
    print(f"GPU-seconds, estimates of `afd train {BASE} --dry-run`; nothing was run")


if __name__ == "__main__":
    main()
