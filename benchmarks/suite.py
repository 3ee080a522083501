"""The loop every op's benchmark shares: check, time interleaved, print, save, plot."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from afd import ops
from benchmarks import harness, report
from benchmarks.floors import floors

OURS = ("reference", "native", "triton")
PROVIDERS = ("eager", "compile", *OURS)
SOURCES = ("given", "seed")  # of the noise; eager's "seed" is a fresh draw in the call

Inputs = dict[str, Tensor]
Step = Callable[[Inputs], Any]
Key = tuple[str, str]  # provider, source of the noise


@dataclass(frozen=True)
class Case:
    """One shape and dtype of one op: what to run, on what, and what is right."""

    op: str
    name: str
    dtype: str
    dtypes: set[torch.dtype]
    batch: int
    numel: int
    eager_bytes: int  # an upper bound of what a provider holds at once, to skip what cannot fit
    inputs: Callable[[str, int], Inputs]  # device, seed
    step: Callable[[str, str], Step]  # provider, source
    # Relative errors of a step's output against float64 and their bound, by provider and source.
    errors: Callable[[Inputs, dict[Key, Step]], dict[Key, tuple[dict[str, float], float]]]
    # Bytes of one pass and of the algorithm.
    bytes: Callable[[str], tuple[int, int]]

    def __str__(self) -> str:
        return f"{self.op} {self.name} {self.dtype} B={self.batch}"


@dataclass
class Results:
    rows: list[report.Row] = field(default_factory=list)
    floors: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def run(name: str, cases: Iterable[Case], args: Namespace) -> Results:
    """Checks, times and prints every case; saves JSON and plot where `args` says so."""
    results = Results()
    for case in cases:
        free = harness.free_bytes(args.device)
        if case.eager_bytes > 0.8 * free:
            needs = f"needs about {case.eager_bytes / 2**30:.0f} GiB of {free / 2**30:.0f} free"
            results.skipped[str(case)] = needs
            print(f"skipped {case}: {needs}", flush=True)
            continue
        rows = _measure(case, args, results)
        report.show(str(case), rows)
        torch._dynamo.reset()  # a compiled function keeps at most eight specialisations
        results.rows += rows
    if not results.rows:
        raise SystemExit("nothing was measured: every case was skipped")
    _print_regeneration(results.rows)
    print(f"\n{report.COUNTING}")
    _keep(name, results, args)
    return results


def _measure(case: Case, args: Namespace, results: Results) -> list[report.Row]:
    one_pass, _ = case.bytes("given")
    count = harness.input_sets(one_pass, args.device)
    sets = [case.inputs(args.device, seed) for seed in range(count)]
    steps: dict[Key, Step] = {}
    for provider in args.providers:
        refusal = None
        if provider in OURS:
            refusal = ops.explain(case.op, args.device, case.dtypes)[provider]
        if refusal is not None:
            results.skipped[f"{case} {provider}"] = refusal
            continue
        steps |= {(provider, source): case.step(provider, source) for source in SOURCES}
    found = _checked(case, sets[0], steps)
    stream, copy = floors(one_pass, args.device, count)
    runs = {key: lambda i, step=step: step(sets[i]) for key, step in steps.items()}
    timings = harness.timed(
        {" ".join(key): run for key, run in runs.items()}
        | {"stream": stream.run, "copy": copy.run},
        args.device,
        count,
        args.reps,
        args.budget,
    )
    rates = {
        floor.name: floor.bytes / timings[key].median_ms / 1e6
        for key, floor in (("stream", stream), ("copy", copy))
    }
    results.floors.append(
        {"op": case.op, "case": case.name, "dtype": case.dtype, "B": case.batch, "GB/s": rates}
    )
    print("floors: " + ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items()))
    rows = []
    for provider, source in steps:
        run = runs[provider, source]
        eager = timings.get(f"eager {source}")
        one, moved = case.bytes(source)
        rows.append(
            report.Row.measured(
                timings[f"{provider} {source}"],
                floor_gb_per_s=rates[stream.name],
                one_pass_bytes=one,
                eager_ms=None if eager is None else eager.median_ms,
                op=case.op,
                backend=provider,
                case=case.name,
                dtype=case.dtype,
                B=case.batch,
                noise=source,
                bytes=moved,
                traffic_bytes=harness.traffic(run)[0] if provider == "eager" else None,
                peak_mib=harness.peak_mib(run, args.device),
                error=found.get((provider, source), {}),
            )
        )
    return rows


def _checked(case: Case, inputs: Inputs, steps: dict[Key, Step]) -> dict[Key, dict[str, float]]:
    """Every step's errors against float64; a step beyond its bound ends the run, untimed."""
    found = {}
    for (provider, source), (error, bound) in case.errors(inputs, steps).items():
        if not max(error.values()) <= bound:  # NaN fails too
            sys.exit(
                f"{case} {provider}, noise {source}: relative error {error} is above {bound:g}; "
                f"nothing is timed until it agrees with the float64 formula"
            )
        found[provider, source] = error
    return found


def _print_regeneration(rows: list[report.Row]) -> None:
    """What regenerating the noise costs against reading it."""
    by_key = {(r.case, r.dtype, r.B, r.backend, r.noise): r for r in rows}
    print("\nregenerating the noise from seeds, against reading it:")
    for row in rows:
        if row.noise == "given" and row.backend in OURS:
            given = row.median_ms
            seed = by_key[row.case, row.dtype, row.B, row.backend, "seed"].median_ms
            print(
                f"  {row.case} {row.dtype} B={row.B} {row.backend}: {given:.3g} -> {seed:.3g} ms "
                f"({seed - given:+.3g} ms, x {seed / given:.2f})"
            )


def _keep(name: str, results: Results, args: Namespace) -> None:
    folder = args.out
    if folder is None and not args.quick:
        folder = report.ROOT / "benchmarks" / "results" / report.device_slug(args.device)
    if folder is None:
        return
    path = report.save(
        folder, name, args.device, results.rows, floors=results.floors, skipped=results.skipped
    )
    print(f"wrote {path}")
    if args.plot:
        picture = path.with_suffix(".png")
        report.plot(picture, f"{name} on {report.device_name(args.device)}", results.rows)
        print(f"wrote {picture}")
