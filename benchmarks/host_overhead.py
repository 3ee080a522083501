"""What a call of an op costs the host: tiny tensors, forward and forward with backward.

    python benchmarks/host_overhead.py
    python benchmarks/host_overhead.py --out folder
    python benchmarks/host_overhead.py --against checkout    # of an earlier commit, its core built

native: the compiled core on CPU tensors (attention: the CPU library). triton: the host code of the
Triton backend on CPU tensors, with a no-op driver: Triton specialises, binds and looks up kernels
as on a GPU, after compiling each once for sm_90. torch.add serves as a reference for the machine.

Each checkout is measured in its own process, in one thread and in that thread's CPU time, so
other processes do not count. Rounds of calls are interleaved, within and across the processes.
Both processes run this file; only `afd` and `afd_kernels` come from the checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from time import thread_time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

# Allows running from a checkout without installation; PYTHONPATH takes precedence.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

# Kernels must be compiled, not interpreted.
os.environ.pop("TRITON_INTERPRET", None)

from afd import ops
from afd.ops import intervals
from afd_kernels import dispatch

# The benchmark's own code is this checkout's, whichever checkout is measured.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import report
from benchmarks.row_ops import Case as RowCase

ROOT = Path(__file__).resolve().parents[1]
ROUNDS, CALLS = 30, 20  # rounds of interleaved runs, calls of each in a round
HOW = (
    "median of interleaved rounds of calls on tiny tensors; microseconds of one thread's CPU "
    "time; before: the other checkout, its rounds interleaved with these"
)
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
Key = tuple[str, str, bool]


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
    before_us: float | None


def calls(op: str) -> tuple[Call, Call | None]:
    """Forward without gradients, and forward with backward if the op has one."""
    if op == "nft_loss":
        names = ("v_theta", "v_old", "v_ref", "x0", "noise")
        i = dict(zip(names, torch.randn(5, 1, 4, 2, 4, 4).unbind(), strict=True))
        i |= {"t": torch.full((1,), 0.5), "r": torch.full((1,), 0.5)}
        i["v_theta"].requires_grad_()
        options = {"nft_beta": 0.1, "prior_weight": 1e-4}
        return _pair(lambda: ops.nft_loss(**i, **options).loss, [i["v_theta"]])
    if op == "forward_noise":
        x0, noise = torch.randn(2, 1, 4, 2, 4, 4)
        x0.requires_grad_()
        t = torch.full((1,), 0.5)
        return _pair(lambda: ops.forward_noise(x0, t, noise=noise), [x0])
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
    def both() -> object:
        out = forward()
        outs = [out] if isinstance(out, Tensor) else list(out)
        return torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])

    return forward, both


@contextlib.contextmanager
def no_launch() -> Iterator[None]:
    """Let the Triton backend accept CPU tensors, with launches that are no-ops in the driver."""
    import triton

    from tests.triton_driver import Driver

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


def runs() -> dict[Key, Call]:
    """Every call on every path."""
    x = torch.ones(8)
    found: dict[Key, Call] = {("torch.add", "cpu", False): lambda: torch.add(x, x)}
    for op, paths in PATHS.items():
        for path in paths:
            for backward, call in enumerate(calls(op)):
                if call is not None:
                    found[op, path, bool(backward)] = call
    return found


@contextlib.contextmanager
def _as_asked(key: Key) -> Iterator[None]:
    _, path, backward = key
    with contextlib.ExitStack() as stack:
        if path in dispatch.BACKENDS:
            stack.enter_context(ops.use_backend(path))
        stack.enter_context(torch.set_grad_enabled(backward))
        yield


def serve() -> None:
    """Runs one round per line of input and prints it: a JSON list of microseconds by call."""
    torch.set_num_threads(1)
    with no_launch():
        todo = list(runs().items())
        for key, run in todo:
            with _as_asked(key):
                run()
        gc.disable()
        for i, _ in enumerate(sys.stdin):
            spent = [0.0] * len(todo)
            for at in range(len(todo)):
                place = (at + i) % len(todo)
                key, run = todo[place]
                with _as_asked(key):
                    start = thread_time()
                    for _ in range(CALLS):
                        run()
                    spent[place] = (thread_time() - start) / CALLS * 1e6
            gc.collect()
            print(json.dumps(spent), flush=True)


class Side:
    """A process that measures the packages of one checkout, one round at a time."""

    def __init__(self, checkout: Path) -> None:
        paths = [str(checkout.resolve() / part) for part in ("", "python")]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def round(self) -> list[float]:
        """Microseconds of each call, in the order of `runs`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the measuring process ended with exit code {self._process.wait()}")
        found: list[float] = json.loads(line)
        return found

    def close(self) -> None:
        self._process.communicate()


def measure(rounds: int, against: Path | None) -> list[Row]:
    """Measure every call on every path, of this checkout and of `against`, interleaved."""
    with contextlib.ExitStack() as stack:
        sides = [Side(where) for where in (ROOT, against) if where is not None]
        for side in sides:
            stack.callback(side.close)
        spent = [[side.round() for side in sides] for _ in range(rounds)]
    rows: list[Row] = []
    for i, key in enumerate(runs()):
        tenths, *before = (
            quantiles([found[side][i] for found in spent], n=10, method="inclusive")
            for side in range(len(sides))
        )
        earlier = before[0][4] if before else None
        rows.append(Row(*key, tenths[4], tenths[1], tenths[7], rounds, earlier))
    return rows


def show(rows: list[Row]) -> None:
    report.table(
        "host time per call",
        ("op", "path", "what"),
        ("median us", "p20", "p80", "before us", "now / before"),
        [
            (
                *(row.op, row.path, "forward + backward" if row.backward else "forward"),
                *(row.median_us, row.p20, row.p80, row.before_us),
                None if row.before_us is None else row.median_us / row.before_us,
            )
            for row in rows
        ],
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: none")
    parser.add_argument("--against", type=Path, help="another checkout to measure alongside")
    parser.add_argument(
        "--serve", action="store_true", help="measure one round per line of input (internal)"
    )
    args = parser.parse_args(argv)
    if args.serve:
        serve()
        return
    rows = measure(args.rounds, args.against)
    show(rows)
    print(HOW)
    if args.out is not None:
        print(f"wrote {report.save(args.out, 'host_overhead', 'cpu', HOW, rows)}")


if __name__ == "__main__":
    main()
