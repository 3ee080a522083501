"""Common parts of all benchmarks: options, the loop over cases, tables and JSON.

python -m benchmarks.report benchmarks/results/<device>/nft_loss.json    # as Markdown
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from afd_kernels import native
from benchmarks import clock
from benchmarks.gpu_check import result_table

ROOT = Path(__file__).resolve().parents[1]

# Measures one case: its rows, and the reason for each provider that failed.
Measure = Callable[[], tuple[list[Any], dict[str, str]]]


def arguments(
    description: str, providers: Sequence[str], budget_s: float = 10.0
) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--providers", nargs="+", choices=providers, default=list(providers))
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument("--reps", type=int, default=30, help="most repetitions per case")
    parser.add_argument("--budget", type=float, default=budget_s, help="seconds of timing per case")
    parser.add_argument(
        "--deadline",
        type=float,
        default=float("inf"),
        help="starts no case so many seconds after the process started",
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, no compile (for CI)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the JSON; default benchmarks/results/<device>, and with --quick none",
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parses the options and fills in those that depend on others."""
    args = parser.parse_args(argv)
    if args.quick:
        args.reps, args.budget = min(args.reps, 3), min(args.budget, 1.0)
        args.providers = [name for name in args.providers if name != "compile"]
    elif args.out is None:
        args.out = ROOT / "benchmarks" / "results" / device_slug(args.device)
    return args


def run(
    name: str,
    how: str,
    cases: Iterable[tuple[str, Measure]],
    show: Callable[[list[Any]], None],
    args: argparse.Namespace,
    **about: Any,
) -> None:
    """Measures and shows every requested case; the JSON is written after each.

    `about` is stored in the JSON beside the rows. Exits with 1 if a provider failed or nothing was
    measured, after measuring the remaining ones.
    """
    rows: list[Any] = []
    failed: dict[str, str] = {}
    path = None
    late: list[str] = []
    for case, measure in cases:
        if args.case not in case:
            continue
        if clock.age_s() > args.deadline:
            late.append(case)
            continue
        new, broken = measure()
        failed |= broken
        rows += new
        if new:
            show(new)
        if args.out is not None and rows:
            path = save(args.out, name, args.device, how, rows, **about, failed=failed)
    print(how)
    if path is not None:
        print(f"wrote {path}")
    for what, where in about.get("absent", {}).items():
        print(f"absent {what} ({'; '.join(where)})")
    finish(rows, failed, late)


def finish(rows: Sequence[Any], failed: Mapping[str, str], late: Sequence[str] = ()) -> None:
    """Reports what failed and which cases were skipped at the deadline.

    Exits with 1 if something failed or nothing was measured, with clock.INCOMPLETE if only time ran
    out.
    """
    if not rows and not late:
        print("nothing was measured")
    for what, why in failed.items():
        print(f"FAILED {what}: {why}")
    if late:
        print(f"{clock.MISSING}{', '.join(late)}")
    if failed or not (rows or late):
        sys.exit(1)
    if late:
        sys.exit(clock.INCOMPLETE)


def save(folder: Path, name: str, device: str, how: str, rows: Sequence[Any], **about: Any) -> Path:
    """Writes <folder>/<name>.json and returns its path. Rows are dataclasses."""
    return write(folder, document(name, device, how, rows, **about))


def document(name: str, device: str, how: str, rows: Sequence[Any], **about: Any) -> dict[str, Any]:
    """The content of a benchmark's JSON."""
    found = {"name": name, "environment": environment(device), "how": how} | about
    return found | {"rows": [asdict(row) for row in rows]}


def write(folder: Path, document: dict[str, Any]) -> Path:
    """Writes a document to <folder>/<its name>.json and returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{document['name']}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def table(
    title: str,
    words: Sequence[str],
    numbers: Sequence[str],
    rows: Iterable[Sequence[str | float | None]],
) -> None:
    """Prints a table: text columns left-aligned, number columns right-aligned, blank for None."""
    printed = Table(title=title, title_justify="left")
    for name in words:
        printed.add_column(name, no_wrap=True)
    for name in numbers:
        printed.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        printed.add_row(*map(_cell, row))
    Console(width=None if Console().is_terminal else 200).print(printed)


def _cell(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def device_name(device: str) -> str:
    """The vendor's name of the device."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"CPU {found[1] if found else platform.processor() or platform.machine()}"


def device_slug(device: str) -> str:
    """The device's folder under benchmarks/results: "nvidia-h200", "cpu-amd-epyc"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def busy() -> str | None:
    """A sentence where other processes want more cores than there are."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores + 0.5:
        return None
    return f"load {load:.1f} on {cores} cores: other processes ran, so measure again"


def environment(device: str) -> dict[str, Any]:
    """Everything needed to interpret the numbers later."""
    names = ("torch", "triton", "numpy")
    return {
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "instruction_set": native.isa() if native.why_missing() is None else None,
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
    """HEAD of the checkout, with "+changes" if the tree is dirty; None outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


if __name__ == "__main__":
    for file in sys.argv[1:]:
        saved = json.loads(Path(file).read_text())
        print("\n".join(result_table(saved["name"], saved)))
