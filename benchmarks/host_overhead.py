"""What a call of an op costs the host: tiny tensors, forward and forward with backward.

    python -m benchmarks.host_overhead
    python -m benchmarks.host_overhead --out folder
    python -m benchmarks.host_overhead --against folder/host_overhead.json

native: the compiled core on CPU tensors (attention: the CPU library). triton: the host code of the
Triton backend on CPU tensors, with a no-op driver: Triton specialises, binds and looks up kernels
as on a GPU, after compiling each once for sm_90. torch.add serves as a reference for the machine.
Medians over interleaved rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

# Kernels must be compiled, not interpreted.
os.environ.pop("TRITON_INTERPRET", None)

from afd import ops
from afd.ops import intervals
from afd_kernels import dispatch
from benchmarks import report
from benchmarks.nft_case import Nft
from benchmarks.row_ops import Case as RowCase

ROUNDS, CALLS = 30, 20  # rounds of interleaved runs, calls of each in a round
HOW = "median of rounds of calls on tiny tensors, interleaved; microseconds of the host"
PATHS = {
    "forward_noise": ("native", "triton"),
    "nft_loss": ("native", "triton"),
    "qk_norm_rope": ("native", "triton"),
    "qk_norm_rope_append_": ("native", "triton"),
    "adaln": ("native", "triton"),
    "block_attention": ("library", "triton"),
}
TRITON = ("forward_noise", "nft_loss", "qk_norm_rope", "adaln", "block_attention")
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One call on one path, in microseconds."""

    op: str
    path: str
    backward: bool
    median_us: float
    p20: float
    p80: float
    reps: int


def calls(op: str) -> tuple[Call, Call | None]:
    """Forward without gradients, and forward with backward if the op has one."""
    if op == "nft_loss":
        i = Nft("x0_adaptive", "fp32", 1, (4, 2, 4, 4)).inputs("cpu", 0)
        i.pop("seed")
        options = {"nft_beta": 0.1, "prior_weight": 1e-4}
        return _pair(lambda: ops.nft_loss(**i, **options).loss, [i["v_theta"]])
    if op == "forward_noise":
        x0, noise = torch.randn(2, 1, 4, 2, 4, 4)
        x0.requires_grad_()
        return _pair(lambda: ops.forward_noise(x0, torch.full((1,), 0.5), noise=noise), [x0])
    if op == "block_attention":
        rows = intervals.cache(2, 1, 4)
        q, k, v = (torch.randn(1, n, 2, 64).requires_grad_() for n in (4, 8, 8))
        return _pair(lambda: ops.block_attention(q, k, v, rows)[0], [q, k, v])
    case = RowCase(op, "fp32", 1, 2, 4, 2, 64)
    i = case.tensors("cpu", 0)
    if op == "qk_norm_rope_append_":
        return lambda: ops.qk_norm_rope_append_(**i, tokens_per_frame=4, sink_frames=0), None
    leaves = [x.requires_grad_() for name, x in i.items() if name in ("q", "k", "x")]
    function = getattr(ops, op)
    return _pair(lambda: function(**i), leaves)


def _pair(forward: Callable[[], Any], leaves: list[Tensor]) -> tuple[Call, Call]:
    def alone() -> object:
        with torch.no_grad():
            return forward()

    def both() -> object:
        out = forward()
        outs = [out] if isinstance(out, Tensor) else list(out)
        return torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])

    return alone, both


@contextlib.contextmanager
def no_launch() -> Iterator[None]:
    """Let the Triton backend accept CPU tensors, with launches that are no-ops in the driver."""
    import triton

    from tests.fake_cuda.compiling import Driver

    before = triton.runtime.driver._active
    with contextlib.ExitStack() as stack:
        for op in TRITON:
            module = importlib.import_module(f"afd_kernels.{op}.triton_impl")
            stack.enter_context(patch.object(module, "refuse", lambda *_: None))
        dispatch._refusal.cache_clear()
        triton.runtime.driver.set_active(Driver())
        stack.callback(dispatch._refusal.cache_clear)
        stack.callback(triton.runtime.driver.set_active, before)
        yield


def measure(rounds: int = ROUNDS) -> list[Row]:
    """Measure every call on every path, interleaved."""
    x = torch.ones(8)
    runs: dict[tuple[str, str, bool], Call] = {("torch.add", "cpu", False): lambda: torch.add(x, x)}
    for op, paths in PATHS.items():
        for path in paths:
            for backward, call in enumerate(calls(op)):
                if call is not None:
                    runs[op, path, bool(backward)] = _on(path, call)
    spent: dict[tuple[str, str, bool], list[float]] = {key: [] for key in runs}
    with no_launch():
        for call in runs.values():
            call()
        gc.disable()
        try:
            keys = list(runs)
            for i in range(rounds):
                shift = i % len(keys)
                for key in keys[shift:] + keys[:shift]:
                    start = perf_counter()
                    for _ in range(CALLS):
                        runs[key]()
                    spent[key].append((perf_counter() - start) / CALLS * 1e6)
        finally:
            gc.enable()
    rows: list[Row] = []
    for key, found in spent.items():
        tenths = quantiles(found, n=10, method="inclusive")
        rows.append(Row(*key, tenths[4], tenths[1], tenths[7], len(found)))
    return rows


def _on(path: str, call: Call) -> Call:
    def run() -> object:
        with ops.use_backend(path):
            return call()

    return run


def show(rows: list[Row], old: dict[tuple[str, str, bool], float]) -> None:
    report.table(
        "host time per call",
        ("op", "path", "what"),
        ("median us", "p20", "p80", *(["before us", "now / before"] if old else [])),
        [
            (
                *(row.op, row.path, "forward + backward" if row.backward else "forward"),
                *(row.median_us, row.p20, row.p80),
                *_beside(row, old.get((row.op, row.path, row.backward)), bool(old)),
            )
            for row in rows
        ],
    )


def _beside(row: Row, before: float | None, asked: bool) -> tuple[float | None, ...]:
    if not asked:
        return ()
    return before, None if before is None else row.median_us / before


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: none")
    parser.add_argument("--against", type=Path, help="a JSON of an earlier run, shown beside")
    args = parser.parse_args(argv)
    old = {}
    if args.against is not None:
        saved = json.loads(args.against.read_text())["rows"]
        old = {(row["op"], row["path"], row["backward"]): row["median_us"] for row in saved}
    rows = measure(args.rounds)
    show(rows, old)
    print(HOW)
    if args.out is not None:
        print(f"wrote {report.save(args.out, 'host_overhead', 'cpu', HOW, rows)}")


if __name__ == "__main__":
    main()
