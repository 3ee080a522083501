"""Where the native loss's time goes on a CPU: memory, arithmetic, host, fresh pages.

    python -m benchmarks.loss_parts
    python -m benchmarks.loss_parts --batch 8 --dtype bf16 --out folder

Per instruction set, with the noise given and adaptive weights, interleaved with the stream over
memory in one run:

- loss: the two passes, into a gradient that is there already, and their share of the stream's rate;
- arithmetic: the rate at which the same loops run on operands that lie in the second-level cache,
  times the threads: where it is near the stream's, memory is no longer what bounds;
- op: `afd.ops.nft_loss` and its backward; the difference is the host's, and that of a new gradient;
- faults, system: page faults and milliseconds of the kernel in a call of the op, which are those of
  a gradient that the allocator did not have at hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch

from afd_kernels import contracts, native
from afd_kernels.nft_loss import native_impl
from afd_kernels.plans import Kept
from benchmarks import floors, harness, report
from benchmarks.nft_case import DTYPES, NFT_BETA, PRIOR_WEIGHT, Nft
from benchmarks.suite import Inputs
from tests.cases import WAN_480

HOW = (
    "quantile: of each provider's calls in the interleaved run; GB/s and % of the stream: bytes of "
    "the two passes over the time; arithmetic: the same loops on cached operands, times threads."
)
_CACHED = (16384,)  # elements of a sample that lies in the second-level cache
_CALLS = 32  # of it, timed together


@dataclass(frozen=True)
class Row:
    """One instruction set on one case, at one quantile. Milliseconds, and GB/s."""

    dtype: str
    B: int
    isa: str
    quantile: str
    stream_gb_per_s: float
    loss_ms: float
    pct_of_stream: float
    arithmetic_gb_per_s: float
    op_ms: float
    faults: float
    system_ms: float


def direct(inputs: Inputs) -> harness.Run:
    """The compiled core's call alone, with results that stay."""
    names = ("v_theta", "v_old", "v_ref", "x0", "t", "r")
    tensors: Any = (*(inputs[name].detach() for name in names), None, inputs["noise"], None)
    options = (NFT_BETA, PRIOR_WEIGHT, 5.0, "x0_adaptive", "video", False)
    schedule = ("rectified_flow", [], "BCFHW", True)
    kept = Kept()
    plan = contracts.plan_nft_loss(*tensors, *options, *schedule)
    results = native_impl.nft_loss(*tensors, plan, kept)
    (problem,) = kept.problems
    threads = native.threads(inputs["x0"])

    def run(_: int, alive: Any = (tensors, results)) -> None:
        native.core().nft_loss_cpu(problem, threads)

    return run


def kernel_share(run: harness.Run, calls: int = 5) -> tuple[float, float]:
    """Page faults and milliseconds of the kernel per call."""
    run(0)
    before = getrusage(RUSAGE_SELF)
    for index in range(calls):
        run(index % 2)
    after = getrusage(RUSAGE_SELF)
    faults = (after.ru_minflt - before.ru_minflt) / calls
    return faults, 1e3 * (after.ru_stime - before.ru_stime) / calls


def measure(dtype: str, batch: int, shape: tuple[int, ...], reps: int, budget: float) -> list[Row]:
    case = Nft("x0_adaptive", dtype, batch, shape)
    one_pass, two_passes = case.case().bytes("given")
    sets = [case.inputs("cpu", seed) for seed in range(2)]
    small = Nft("x0_adaptive", dtype, 1, _CACHED)
    cached_bytes = small.case().bytes("given")[1] * _CALLS * torch.get_num_threads()
    losses, step = [direct(i) for i in sets], case.step("native", "given")
    warm = direct(small.inputs("cpu", 0))

    def on(isa: str, run: harness.Run, calls: int = 1) -> harness.Run:
        def forced(index: int) -> None:
            with native.use_isa(isa):
                for _ in range(calls):
                    run(index)

        return forced

    streams = floors.streams(one_pass, "cpu", len(sets))
    runs = {name: stream.run for name, stream in streams.items()}
    isas = [isa for isa in native.isas() if isa != "baseline"] or native.isas()
    for isa in isas:
        runs[f"loss {isa}"] = on(isa, lambda index: losses[index](0))
        runs[f"op {isa}"] = on(isa, lambda index: step(sets[index]))
        runs[f"arithmetic {isa}"] = on(isa, warm, _CALLS)
    timings = harness.timed(runs, "cpu", len(sets), reps, budget)

    def rows() -> Iterator[Row]:
        for isa in isas:
            faults, system_ms = kernel_share(runs[f"op {isa}"])
            for name, field in (("p20", "p20"), ("median", "median_ms")):
                ms = {what: getattr(timing, field) for what, timing in timings.items()}
                rate = max(stream.bytes / ms[what] for what, stream in streams.items()) / 1e6
                loss_rate = two_passes / ms[f"loss {isa}"] / 1e6
                arithmetic = cached_bytes / ms[f"arithmetic {isa}"] / 1e6
                yield Row(
                    *(dtype, batch, isa, name, rate, ms[f"loss {isa}"], 100 * loss_rate / rate),
                    *(arithmetic, ms[f"op {isa}"], faults, system_ms),
                )

    return list(rows())


def show(rows: list[Row]) -> None:
    columns = ("stream GB/s", "loss ms", "% stream", "arithmetic GB/s", "op ms", "faults")
    report.table(
        "Parts of the native loss's time",
        ("dtype", "B", "isa", "quantile"),
        (*columns, "system ms"),
        [
            (
                *(row.dtype, str(row.B), row.isa, row.quantile, row.stream_gb_per_s, row.loss_ms),
                *(row.pct_of_stream, row.arithmetic_gb_per_s, row.op_ms, row.faults),
                row.system_ms,
            )
            for row in rows
        ],
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--shape", type=int, nargs="+", default=WAN_480, help="of one sample")
    parser.add_argument("--reps", type=int, default=200, help="most repetitions per case")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing per case")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    args = parser.parse_args(argv)
    if native.why_missing() is not None:
        parser.error(str(native.why_missing()))
    rows: list[Row] = []
    for dtype in args.dtype:
        for batch in args.batch:
            rows += measure(dtype, batch, tuple(args.shape), args.reps, args.budget)
    show(rows)
    print(HOW)
    if (busy := report.busy()) is not None:
        print(busy)
    if args.out is not None:
        print(f"wrote {report.save(args.out, 'loss_parts', 'cpu', HOW, rows)}")


if __name__ == "__main__":
    main()
