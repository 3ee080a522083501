"""Does this installation compute what the released code computed?

`python -m afd.testing.parity DIR` runs every golden file of a folder, or of a folder of folders:
one line per file with the worst relative error and the tensor it was seen in. Exits with 1 where
an error is above float32's 1e-5 (values) or 1e-4 (gradients), where a file is of no known kind, or
where weights do not fit; with 2 where there is nothing to run.

A folder holds config.json, weights.safetensors and golden files, of Self-Forcing or (config.json
with the parts network, stream and files) of LongLive; or keys.json and golden files of the tiny
autoencoder. units.safetensors holds values of single functions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from afd.ops import use_backend
from afd.testing.golden import Folder, compare
from afd.testing.longlive import PARTS, LongLiveFolder
from afd.testing.measure import Report
from afd.testing.tiny_vae import compare_tiny
from afd.testing.units import compare_units
from afd_kernels.dispatch import BACKENDS, OPS

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# Single-pass files, for which the released code's own bfloat16 error is known.
ONE_PASS = ("train_causal", "teacher_forcing")


def run_folder(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[Report]:
    """A report for every golden file below `path`, one after another.

    In bfloat16 only single-pass files and their values are compared, against the released code's
    own bfloat16 error, recorded in the folder's config.json.
    """
    device = torch.device(device)
    for file in sorted(path.rglob("config.json")):
        config = json.loads(file.read_text())
        # Other models have a config.json, too.
        if {"num_heads", "chunk", "text_len"} <= config.keys():
            yield from _student_folder(file.parent, path, config, device, dtype)
        elif config.keys() >= PARTS and dtype != torch.bfloat16:
            folder = LongLiveFolder(file.parent, config, device, dtype)
            yield from folder.reports(_prefix(file.parent, path))
    for keys in sorted(path.rglob("keys.json")):
        if dtype != torch.bfloat16:
            yield from compare_tiny(keys.parent, _prefix(keys.parent, path), device, dtype)
    for units in sorted(path.rglob("units.safetensors")):
        report = Report(units.relative_to(path).as_posix().removesuffix(".safetensors"))
        compare_units(report, load_file(units), device)
        yield report


def _prefix(where: Path, root: Path) -> str:
    return "" if where == root else f"{where.relative_to(root).as_posix()}/"


def _student_folder(
    where: Path, root: Path, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Iterator[Report]:
    prefix = _prefix(where, root)
    if not (where / "weights.safetensors").is_file():
        yield Report(f"{prefix}weights", wrong=["no weights.safetensors beside config.json"])
        return
    folder = Folder(config, load_file(where / "weights.safetensors"), device, dtype)
    for path in sorted(where.iterdir()):
        if path.name in ("config.json", "weights.safetensors", "units.safetensors"):
            continue
        report = Report(prefix + path.stem)
        if path.suffix != ".safetensors":
            if path.is_file():
                report.wrong.append(f"unknown: {path.name} is no .safetensors file")
                yield report
            continue
        golden = load_file(path)
        if dtype == torch.bfloat16:
            if not path.stem.startswith(ONE_PASS):
                continue
            report.values.limit = config["bf16_rel_err_train_causal"]
            golden = {k: golden[k] for k in golden if not k.startswith(("grad", "tap.", "R"))}
            golden.pop("x0", None)
        try:
            compare(report, golden, folder)
        except (KeyError, RuntimeError, ValueError, StopIteration) as error:
            report.wrong.append(f"{type(error).__name__}: {error}")
        yield report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m afd.testing.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="a golden folder, or a folder of them")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        action="append",
        default=[],
        help="required of every op that has it (may be repeated); default: each op's own choice",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    given = parser.parse_args(arguments)
    reports = []
    with ExitStack() as stack:
        for backend in given.backend:
            ops = [op for op, backends in OPS.items() if backend in backends]
            stack.enter_context(use_backend(backend, *ops))
        for report in run_folder(given.folder, given.device, DTYPES[given.dtype]):
            print(report.line(), flush=True)
            reports.append(report)
    if not reports:
        print(f"{given.folder}: neither a golden folder nor units.safetensors", file=sys.stderr)
        return 2
    failed = sum(not report.ok for report in reports)
    print(f"{len(reports)} files, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
