"""Rows of a benchmark: what a row holds, the table on screen, the JSON and the plot.

python -m benchmarks.report benchmarks/results/<device>/nft_loss.json    # as Markdown
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_check import result_table
from benchmarks.harness import Timing

ROOT = Path(__file__).resolve().parents[1]

COUNTING = (
    "bytes: the fewest the algorithm can move (every operand read once per pass, two passes where "
    "the adaptive weights force a second, one write), the same for every provider; GB/s = bytes / "
    "median; % floor = GB/s over the 5R1W stream's GB/s in the same run; x 1-pass = median over "
    "the time in which the stream moves one pass (each operand once and the write). traffic: what "
    "eager's unfused ops read and write, counted. peak: allocated during the call above what was "
    "alive before; ours includes the gradient. speedup: eager's median over this one's."
)


@dataclass(frozen=True)
class Row:
    """One provider on one case. Times in milliseconds."""

    op: str
    backend: str
    case: str
    dtype: str
    B: int
    noise: str  # "seed" (drawn or regenerated in the call) or "given"
    median_ms: float
    p20: float
    p80: float
    host_ms: float | None
    reps: int
    bytes: int
    gb_per_s: float
    pct_of_floor: float
    x_one_pass: float
    traffic_bytes: int | None
    peak_mib: float
    speedup: float | None
    error: dict[str, float]  # against float64, measured before the timing

    @classmethod
    def measured(
        cls,
        timing: Timing,
        *,
        floor_gb_per_s: float,
        one_pass_bytes: int,
        eager_ms: float | None,
        **fields: Any,
    ) -> Row:
        """A row from its timing and the floor of the same run."""
        rate = fields["bytes"] / timing.median_ms / 1e6
        return cls(
            median_ms=timing.median_ms,
            p20=timing.p20,
            p80=timing.p80,
            host_ms=timing.host_ms,
            reps=timing.reps,
            gb_per_s=rate,
            pct_of_floor=100 * rate / floor_gb_per_s,
            x_one_pass=timing.median_ms / (one_pass_bytes / floor_gb_per_s / 1e6),
            speedup=None if eager_ms is None else eager_ms / timing.median_ms,
            **fields,
        )


def arguments(description: str, providers: tuple[str, ...]) -> argparse.ArgumentParser:
    """The options every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--batch", type=int, nargs="+", help="default 1 2 4 8, and on CUDA 32, as memory allows"
    )
    parser.add_argument("--providers", nargs="+", choices=providers, default=list(providers))
    parser.add_argument("--reps", type=int, default=30, help="most repetitions per case")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing per case")
    parser.add_argument(
        "--deadline", type=float, default=float("inf"), help="starts no case after so many seconds"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, no compile (for CI)")
    parser.add_argument("--plot", action="store_true", help="also writes a PNG")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the JSON; default benchmarks/results/<device>, and with --quick none",
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parses, and fills in what depends on other options.

    --quick means two samples of a tiny odd shape, few repetitions, nothing compiled.
    """
    args = parser.parse_args(argv)
    if args.batch is None:
        args.batch = [1, 2, 4, 8, 32] if args.device == "cuda" else [1, 2, 4, 8]
    if args.quick:
        args.batch, args.shape = [2], (4, 3, 10, 13)
        args.reps, args.budget = min(args.reps, 3), min(args.budget, 1.0)
        args.providers = [name for name in args.providers if name != "compile"]
    return args


def device_name(device: str) -> str:
    """The name the vendor gave the device."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"CPU {found[1] if found else platform.processor() or platform.machine()}"


def device_slug(device: str) -> str:
    """The device's folder under benchmarks/results: "nvidia-h200", "cpu-amd-epyc"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def environment(device: str) -> dict[str, Any]:
    """Everything needed to read the numbers later."""
    names = ("torch", "triton", "numpy")
    return {
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: _version(name) for name in names},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """HEAD of the checkout, with "+changes" where the tree differs; None outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def show(title: str, rows: Iterable[Row]) -> None:
    """Prints the rows as a table."""
    table = Table(title=title, title_justify="left")
    for name in ("op", "backend", "case", "dtype", "B", "noise"):
        table.add_column(name, no_wrap=True)
    numbers = ("median ms", "p20", "p80", "host ms", "MB", "GB/s", "% floor", "x 1-pass")
    for name in (*numbers, "traffic MB", "peak MiB", "speedup"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(row.op, row.backend, row.case, row.dtype, str(row.B), row.noise),
            *map(_number, (row.median_ms, row.p20, row.p80, row.host_ms, row.bytes / 1e6)),
            *map(_number, (row.gb_per_s, row.pct_of_floor, row.x_one_pass)),
            _number(None if row.traffic_bytes is None else row.traffic_bytes / 1e6),
            *map(_number, (row.peak_mib, row.speedup)),
        )
    width = None if Console().is_terminal else 200
    Console(width=width).print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def save(folder: Path, name: str, device: str, rows: list[Row], **more: Any) -> Path:
    """Writes <folder>/<name>.json and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    document = {"name": name, "environment": environment(device), "how": COUNTING} | more
    document["rows"] = [asdict(row) for row in rows]
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def _panels(rows: Iterable[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.case, row.dtype) for row in rows))


def plot(path: Path, title: str, rows: list[Row]) -> Path:
    """A PNG: median time over batch size, one panel per case and dtype, noise given."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    given = [row for row in rows if row.noise == "given"]
    names, dtypes = (list(dict.fromkeys(column)) for column in zip(*_panels(given), strict=True))
    figure, axes = pyplot.subplots(
        len(names),
        len(dtypes),
        figsize=(4 * len(dtypes), 3.5 * len(names)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    batches = sorted({row.B for row in given})
    for i, name in enumerate(names):
        for j, dtype in enumerate(dtypes):
            axis = axes[i][j]
            mine = [row for row in given if (row.case, row.dtype) == (name, dtype)]
            for backend in dict.fromkeys(row.backend for row in mine):
                line = sorted((row.B, row.median_ms) for row in mine if row.backend == backend)
                axis.plot(*zip(*line, strict=True), marker="o", label=backend)
            axis.set(title=f"{name} {dtype}", xscale="log", yscale="log")
            axis.set_xticks(batches, [str(b) for b in batches])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[i][0].set_ylabel("median ms")
    for axis in axes[-1]:
        axis.set_xlabel("B")
    axes[0][0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    for file in sys.argv[1:]:
        saved = json.loads(Path(file).read_text())
        print("\n".join(result_table(saved["name"], saved)))
