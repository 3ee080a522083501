"""The loop every op's benchmark shares: check, time interleaved, print, save, plot."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from afd import ops
from benchmarks import floors, harness, report

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
    exact: Callable[[Inputs], dict[str, Any]]  # the float64 answer, by source
    # Relative errors of a step's output against exact[source], and what they may be.
    errors: Callable[[Any, Any], dict[str, float]]
    bound: Callable[[str], float]  # provider
    # Bytes of one pass and of the algorithm.
    bytes: Callable[[str], tuple[int, int]]

    def __str__(self) -> str:
        return f"{self.op} {self.name} {self.dtype} B={self.batch}"


@dataclass
class Results:
    """What a run found. `failed` is what raised or disagreed with float64: it is not timed."""

    rows: list[report.Row] = field(default_factory=list)
    floors: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run(name: str, cases: Iterable[Case], args: Namespace) -> None:
    """Checks, times and prints every case; saves JSON (after each case) and plot where asked.

    Exits with 1 where a provider failed, after having measured the others.
    """
    results = Results()
    folder = args.out
    if folder is None and not args.quick:
        folder = report.ROOT / "benchmarks" / "results" / report.device_slug(args.device)
    start = time.monotonic()
    for case in cases:
        refusal = _no_room(case, args.device)
        if time.monotonic() - start > args.deadline:
            refusal = f"the deadline of {args.deadline:g} s has passed"
        if refusal is not None:
            results.skipped[str(case)] = refusal
            continue
        rows = _measure(case, args, results)
        report.show(str(case), rows)
        torch._dynamo.reset()  # a compiled function keeps at most eight specialisations
        results.rows += rows
        if folder is not None:
            path = report.save(folder, name, args.device, **vars(results))
    _print_regeneration(results.rows)
    print(f"\n{report.COUNTING}")
    if folder is not None and results.rows:
        print(f"wrote {path}")
        if args.plot:
            title = f"{name} on {report.device_name(args.device)}"
            print(f"wrote {report.plot(path.with_suffix('.png'), title, results.rows)}")
    for what, why in results.skipped.items():
        print(f"skipped {what}: {why}")
    for what, why in results.failed.items():
        print(f"FAILED {what}: {why}")
    if results.failed or not results.rows:
        sys.exit(1)


def _no_room(case: Case, device: str) -> str | None:
    free = harness.free_bytes(device)
    if case.eager_bytes < 0.8 * free:
        return None
    return f"needs about {case.eager_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} are free"


def _measure(case: Case, args: Namespace, results: Results) -> list[report.Row]:
    one_pass, _ = case.bytes("given")
    count = harness.input_sets(one_pass, args.device)
    sets = [case.inputs(args.device, seed) for seed in range(count)]
    steps = _steps(case, args, results)
    found = _checked(case, sets[0], steps, results)
    streams = floors.streams(one_pass, args.device, count)
    floor_runs = streams | {"copy": floors.copy(one_pass, args.device)}
    runs: dict[Key, harness.Run] = {key: _on(steps[key], sets) for key in found}
    timings = harness.timed(
        {" ".join(key): run for key, run in runs.items()}
        | {name: floor.run for name, floor in floor_runs.items()},
        args.device,
        count,
        args.reps,
        args.budget,
    )
    rates = {
        name: floor.bytes / timings[name].median_ms / 1e6 for name, floor in floor_runs.items()
    }
    results.floors.append(
        {"op": case.op, "case": case.name, "dtype": case.dtype, "B": case.batch, "GB/s": rates}
    )
    print("floors: " + ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items()))
    rows = []
    for (provider, source), run in runs.items():
        eager = timings.get(f"eager {source}")
        one, moved = case.bytes(source)
        rows.append(
            report.Row.measured(
                timings[f"{provider} {source}"],
                floor_gb_per_s=max(rates[name] for name in streams),
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
                error=found[provider, source],
            )
        )
    return rows


def _on(step: Step, sets: list[Inputs]) -> harness.Run:
    return lambda index: step(sets[index])


def _steps(case: Case, args: Namespace, results: Results) -> dict[Key, Step]:
    """The steps of every provider that runs here; the others' refusals go to `results`."""
    steps = {}
    for provider in args.providers:
        refusal = None
        if provider in OURS:
            refusal = ops.explain(case.op, args.device, case.dtypes)[provider]
        if refusal is not None:
            results.skipped[f"{case.op} {provider}"] = refusal
            continue
        for source in SOURCES:
            steps[provider, source] = case.step(provider, source)
    return steps


def _checked(
    case: Case, inputs: Inputs, steps: dict[Key, Step], results: Results
) -> dict[Key, dict[str, float]]:
    """Errors against float64 of the steps that run and agree; only these are timed.

    What eager and compile draw themselves has no oracle: they answer for it with the noise given.
    """
    found: dict[Key, dict[str, float]] = {}
    exact = case.exact(inputs)
    for (provider, source), step in steps.items():
        what, bound = f"{case} {provider}, noise {source}", case.bound(provider)
        try:
            output = step(inputs)
        except Exception as error:  # a backend that breaks must not take the others' numbers along
            results.failed[what] = f"{type(error).__name__}: {error}"
            continue
        if provider not in OURS and source == "seed":
            if (provider, "given") in found:
                found[provider, source] = {}
            continue
        errors = case.errors(output, exact[source])
        if max(errors.values()) <= bound:
            found[provider, source] = errors
        else:  # NaN comes here too
            results.failed[what] = f"relative error {errors} is above {bound:g}"
    return found


def _print_regeneration(rows: list[report.Row]) -> None:
    """What regenerating the noise costs against reading it."""
    by_key = {(r.case, r.dtype, r.B, r.backend, r.noise): r.median_ms for r in rows}
    print("\nregenerating the noise from seeds, against reading it:")
    for row in rows:
        seed = by_key.get((row.case, row.dtype, row.B, row.backend, "seed"))
        if row.noise == "given" and row.backend in OURS and seed is not None:
            given = row.median_ms
            print(
                f"  {row.case} {row.dtype} B={row.B} {row.backend}: {given:.3g} -> {seed:.3g} ms "
                f"({seed - given:+.3g} ms, x {seed / given:.2f})"
            )
