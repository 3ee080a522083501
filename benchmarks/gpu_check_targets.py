"""Performance targets of a GPU run, checked against the benchmarks' JSONs.

    python -m benchmarks.gpu_check_targets benchmarks/results/<device>

All numbers of a ratio are measured side by side in one run, as are the floors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Documents = dict[str, dict[str, Any]]  # a benchmark's name to its JSON
Row = dict[str, Any]

LIBRARIES = ("library", "sdpa per block", "flash-attn per block", "xformers per block")
MODES = ("recompute", "own_context", "shared_context", "shared_context, kept")


class Absent(Exception):
    """Raised for a number that the run has not measured."""


@dataclass(frozen=True)
class Target:
    """One target: `least` or `most` is the bound; with neither, the value is only reported."""

    what: str
    unit: str
    value: Callable[[Documents], float]
    least: float | None = None
    most: float | None = None

    def line(self, documents: Documents) -> str:
        """The target as a Markdown row; "not measured" if a number is missing."""
        bound = "" if self.least is None else f"≥ {self.least:g}"
        bound = bound if self.most is None else f"≤ {self.most:g}"
        try:
            found = self.value(documents)
        except Absent:
            return f"| {self.what}, {self.unit} | {bound} | not measured | |"
        met = (self.least is None or found >= self.least) and (
            self.most is None or found <= self.most
        )
        verdict = ("yes" if met else "**no**") if bound else ""
        return f"| {self.what}, {self.unit} | {bound} | {found:.4g} | {verdict} |"


def rows(documents: Documents, name: str, **wanted: Any) -> list[Row]:
    """Rows of a benchmark that match these values; a tuple matches any of its elements."""
    found = [
        row
        for row in documents.get(name, {}).get("rows", [])
        if all(
            row[key] in value if isinstance(value, tuple) else row[key] == value
            for key, value in wanted.items()
        )
    ]
    if not found:
        raise Absent
    return found


def least(documents: Documents, name: str, column: str = "median_ms", **wanted: Any) -> float:
    """The smallest value of a column among the rows."""
    return float(min(row[column] for row in rows(documents, name, **wanted)))


def ratio(name: str, above: Row, below: Row, column: str = "median_ms") -> Callable[..., float]:
    """Ratio of the smallest value among the rows `above` to that among `below`."""
    return lambda d: least(d, name, column, **above) / least(d, name, column, **below)


def value(name: str, column: str, **wanted: Any) -> Callable[[Documents], float]:
    """The largest value of a column."""
    return lambda d: max(float(row[column]) for row in rows(d, name, **wanted))


def _machine(key: str, scale: float) -> Callable[[Documents], float]:
    def found(documents: Documents) -> float:
        for name in ("videos", "train_step"):
            if name in documents:
                return float(documents[name]["machine"][key]) / scale
        raise Absent

    return found


def floors() -> Iterator[Target]:
    """Floors measured on the machine in this run."""
    yield Target("copy bandwidth", "GB/s", _machine("bandwidth", 1e9))
    yield Target("bf16 product 8192 x 8192 x 8192", "TFLOP/s", _machine("matmul", 1e12))


def losses() -> Iterator[Target]:
    """Targets of nft_loss and forward_noise; ours is the faster of the two compiled backends."""
    for batch in (8, 32):
        for noise in ("seed", "given"):
            same = {"case": "x0_adaptive", "dtype": "bf16", "B": batch, "noise": noise}
            ours = same | {"backend": ("native", "triton")}
            what = f"nft_loss bf16 B={batch}, noise {noise}"
            yield Target(
                what, "% of the two-pass floor", value("nft_loss", "pct_of_floor", **ours), 85
            )
            for other, times in (("eager", 25), ("compile", 2.5)):
                against = ratio("nft_loss", same | {"backend": other}, ours)
                yield Target(what, f"× {other}", against, times)
    for batch in (8, 32):
        for noise in ("seed", "given"):
            ours = {"dtype": "bf16", "B": batch, "noise": noise, "backend": ("native", "triton")}
            what = f"forward_noise bf16 B={batch}, noise {noise}"
            yield Target(
                what, "% of the stream", value("forward_noise", "pct_of_floor", **ours), 85
            )


def token_rows() -> Iterator[Target]:
    """Targets of the row ops; ours is the faster of the two compiled backends."""
    for op in ("qk_norm_rope", "qk_norm_rope_append_", "adaln"):
        ours = {"case": op, "dtype": "bf16", "B": 4, "backend": ("native", "triton")}
        yield Target(f"{op} bf16 B=4", "% of a copy", value("row_ops", "pct_of_copy", **ours), 85)


def attention() -> Iterator[Target]:
    for chunk in (1, 4, 7):
        for batch in (1, 2):
            same = {"case": f"rollout, chunk {chunk}", "B": batch}
            times = ratio("attention", same | {"provider": LIBRARIES}, same | {"provider": "ours"})
            # Ours calls that library: 2 % allows for noise and the op's overhead.
            yield Target(f"attention, chunk {chunk} B={batch}", "× best library", times, 0.98)
    apart = {"case": "context apart", "B": 1}
    merged = ratio(
        "attention",
        apart | {"provider": "library, merged"},
        apart | {"provider": "library, one call"},
    )
    yield Target("two intervals and their merge", "× one call", merged, most=1.02)
    triton = {"case": "rollout, chunk 7", "B": 1, "provider": "triton"}
    yield Target(
        "Triton attention, chunk 7 B=1", "TFLOP/s", value("attention", "tflops", **triton), 420
    )
    both = {"case": "teacher forcing", "B": 1}
    times = ratio("attention", both | {"provider": "flex"}, both | {"provider": "ours"})
    yield Target("teacher forcing, forward and backward", "× flex", times, 2)
    alone = {"case": "context, backward", "B": 1}
    times = ratio(
        "attention",
        alone | {"provider": ("cuDNN, full", "flash, full")},
        alone | {"provider": "triton, dq alone"},
    )
    yield Target("dq alone", "× best library's full backward", times, 1)


def rollouts() -> Iterator[Target]:
    for batch in (1, 4, 8):
        ours = {"case": "480x832", "B": batch, "provider": ("graph", "ours")}
        what = f"81 frames B={batch}, no decoding"
        yield Target(what, "frames per second", value("videos", "fps", **ours), 44)
        eager = ours | {"provider": "eager"}
        yield Target(what, "× eager", ratio("videos", eager, ours, "seconds"), 2.5)
        yield Target(what, "GiB above weights and cache", _gib("videos", **ours))
    decoding = value("videos", "seconds", case="autoencoder")
    yield Target("decoding 81 frames B=1", "s", decoding)

    def growth(documents: Documents) -> float:
        held = [
            row["cache_mib"] + row["peak_mib"]
            for frames in (21, 210)
            for row in rows(documents, "videos", case="480x832, window", frames=frames)[:1]
        ]
        return float(held[1] / held[0])

    yield Target("memory of a window at 10 × the length", "× at 21 frames", growth, most=1.02)


def _gib(name: str, **wanted: Any) -> Callable[[Documents], float]:
    return lambda d: least(d, name, "peak_mib", **wanted) / 1024


def iterations() -> Iterator[Target]:
    """Targets of an AFD iteration; the phases of both sides, rollout and update, are compared."""

    def seconds(documents: Documents, provider: str) -> float:
        phases = ("rollout", "update")
        return sum(
            least(documents, "train_step", case="480x832", provider=provider, phase=phase) / 1e3
            for phase in phases
        )

    for mode in MODES:

        def against(documents: Documents, mode: str = mode) -> float:
            return seconds(documents, "eager") / seconds(documents, mode)

        yield Target(f"iteration, {mode}", "× eager", against, 2.5)
        for phase in ("rollout", "update"):
            one = {"case": "480x832", "provider": mode, "phase": phase}

            def spent(documents: Documents, one: Row = one) -> float:
                return least(documents, "train_step", **one) / 1e3

            yield Target(f"iteration, {mode}, {phase}", "GPU-seconds a video", spent)
        update = {"case": "480x832", "provider": mode, "phase": "update"}
        yield Target(f"iteration, {mode}, update", "GiB at its peak", _gib("train_step", **update))
    for phase in ("discriminator", "score"):  # independent of the mode
        one = {"case": "480x832", "provider": "recompute", "phase": phase}
        milliseconds = value("train_step", "median_ms", **one)
        yield Target(f"iteration, small discriminator, {phase}", "GPU-ms a video", milliseconds)


def targets() -> list[Target]:
    """All targets, in the order of the benchmarks."""
    parts = (floors, losses, token_rows, attention, rollouts, iterations)
    return [target for part in parts for target in part()]


def read(folder: Path) -> Documents:
    """A folder's JSONs by benchmark name; truncated ones are skipped."""
    found: Documents = {}
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text())
        except json.JSONDecodeError:
            continue
        if "rows" in document:
            found[document["name"]] = document
    return found


def table(documents: Documents) -> list[str]:
    """The targets as lines of Markdown."""
    lines = ["| what | target | measured | met |", "| --- | --- | ---: | --- |"]
    return lines + [target.line(documents) for target in targets()]


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print("\n".join(table(read(Path(folder)))))
