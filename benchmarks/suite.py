"""Common parts of the single-op benchmarks: check, interleaved timing, print, save, plot."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd import ops
from afd_kernels.forward_noise.reference import normal
from benchmarks import clock, floors, harness, report
from benchmarks.harness import Timing
from tests.cases import WAN_480

OURS = ("reference", "native", "triton")
PROVIDERS = ("eager", "compile", *OURS)
WIDE = 1.3  # p80 / p20 above which a timing is unreliable
SOURCES = ("given", "seed")  # of the noise; eager's "seed" is a fresh draw in the call

Inputs = dict[str, Tensor]
Step = Callable[[Inputs], Any]
Key = tuple[str, str]  # provider, source of the noise

COUNTING = (
    "bytes: the fewest the algorithm can move (every operand read once per pass, two passes where "
    "the adaptive weights force a second, one write), the same for every provider; GB/s = bytes / "
    "median; % floor = GB/s over the 5R1W stream's GB/s in the same run; x 1-pass = median over "
    "the time in which the stream moves one pass (each operand once and the write). traffic: what "
    "eager's unfused ops read and write, counted. peak: allocated during the call above what was "
    "alive before; ours includes the gradient. speedup: eager's median over this one's."
)


@dataclass(frozen=True)
class Case:
    """One shape and dtype of one op: the steps, inputs and expected results."""

    op: str
    name: str
    dtype: str
    dtypes: set[torch.dtype]
    batch: int
    numel: int
    eager_bytes: int  # upper bound on a provider's peak memory, to skip what cannot fit
    inputs: Callable[[str, int], Inputs]  # device, seed
    step: Callable[[str, str], Step]  # provider, source
    exact: Callable[[Inputs], dict[str, Any]]  # the float64 answer, by source
    # Relative errors of a step's output against exact[source], and their bound.
    errors: Callable[[Any, Any], dict[str, float]]
    bound: Callable[[str], float]  # provider
    # Bytes of one pass and of the algorithm.
    bytes: Callable[[str], tuple[int, int]]

    def __str__(self) -> str:
        return f"{self.op} {self.name} {self.dtype} B={self.batch}"


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
        """Make a row from a timing and the floor of the same run."""
        rate = fields["bytes"] / timing.median_ms / 1e6
        return cls(
            **asdict(timing),
            gb_per_s=rate,
            pct_of_floor=100 * rate / floor_gb_per_s,
            x_one_pass=timing.median_ms / (one_pass_bytes / floor_gb_per_s / 1e6),
            speedup=None if eager_ms is None else eager_ms / timing.median_ms,
            **fields,
        )


@dataclass
class Results:
    """Results of a run. `failed`: what raised or disagreed with float64, and was not timed."""

    rows: list[Row] = field(default_factory=list)
    floors: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def arguments(description: str, dtypes: Iterable[str]) -> ArgumentParser:
    """The options of an op's benchmark."""
    parser = report.arguments(description, PROVIDERS)
    parser.add_argument(
        "--batch", type=int, nargs="+", help="default 1 2 4 8, and on CUDA 32, as memory allows"
    )
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=list(dtypes))
    parser.add_argument("--shape", type=int, nargs="+", default=WAN_480, help="of one sample")
    parser.add_argument("--plot", action="store_true", help="also writes a PNG")
    return parser


def parse(parser: ArgumentParser, argv: list[str] | None) -> Namespace:
    """Parses the options; --quick means two samples of a tiny odd shape."""
    args = report.parse(parser, argv)
    if args.batch is None:
        args.batch = [1, 2, 4, 8, 32] if args.device == "cuda" else [1, 2, 4, 8]
    if args.quick:
        args.batch, args.shape = [2], (4, 3, 10, 13)
    return args


def seeded_noise(inputs: Inputs) -> Tensor:
    """The noise of inputs["seed"], float32 of the shape of inputs["x0"]."""
    count = inputs["x0"][0].numel()
    noise = torch.cat([normal(seed, count) for seed in inputs["seed"].split(1)])
    return noise.reshape(inputs["x0"].shape)


def drawing(step: Step) -> Step:
    """`step` with noise drawn in the call, in float32 for any latent dtype, as in trainers."""

    def drawn(i: Inputs) -> Any:
        return step(i | {"noise": torch.randn(i["x0"].shape, device=i["x0"].device)})

    return drawn


def run(name: str, cases: Iterable[Case], args: Namespace) -> None:
    """Checks, times and prints every case; saves JSON (after each case) and a plot on request.

    Exits with 1 if a provider failed, after measuring the remaining ones.
    """
    results = Results()
    late = []
    for case in cases:
        if args.case not in str(case):
            continue
        refusal = _no_room(case, args.device)
        if clock.age_s() > args.deadline:
            late.append(str(case))
            continue
        if refusal is not None:
            results.skipped[str(case)] = refusal
            continue
        rows = _measure(case, args, results)
        show(str(case), rows)
        torch._dynamo.reset()  # a compiled function keeps at most eight specialisations
        results.rows += rows
        if args.out is not None:
            path = report.save(args.out, name, args.device, COUNTING, **vars(results))
    _print_regeneration(results.rows)
    print(f"\n{COUNTING}")
    if args.out is not None and results.rows:
        print(f"wrote {path}")
        if args.plot:
            title = f"{name} on {report.device_name(args.device)}"
            print(f"wrote {plot(path.with_suffix('.png'), title, results.rows)}")
    for what, why in results.skipped.items():
        print(f"skipped {what}: {why}")
    report.finish(results.rows, results.failed, late)


def _no_room(case: Case, device: str) -> str | None:
    free = harness.free_bytes(device)
    if case.eager_bytes < 0.8 * free:
        return None
    return f"needs about {case.eager_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} are free"


def _measure(case: Case, args: Namespace, results: Results) -> list[Row]:
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
    for what, timing in timings.items():
        if timing.p80 > WIDE * timing.p20:
            print(f"wide: {what}, p80 / p20 = {timing.p80 / timing.p20:.2f}; measure again")
    print("floors: " + ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items()))
    rows = []
    for (provider, source), run in runs.items():
        eager = timings.get(f"eager {source}")
        one, moved = case.bytes(source)
        rows.append(
            Row.measured(
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
    """The steps of every available provider; refusals of the rest go to `results`."""
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

    Eager and compile with drawn noise have no oracle, so they are checked with given noise.
    """
    found: dict[Key, dict[str, float]] = {}
    exact = case.exact(inputs)
    for (provider, source), step in steps.items():
        what, bound = f"{case} {provider}, noise {source}", case.bound(provider)
        try:
            output = step(inputs)
        except Exception as error:  # a failure must not lose the other backends' numbers
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


def _print_regeneration(rows: list[Row]) -> None:
    """Prints the cost of regenerating the noise compared with reading it."""
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


def show(title: str, rows: Iterable[Row]) -> None:
    """Prints the rows as a table."""
    report.table(
        title,
        ("op", "backend", "case", "dtype", "B", "noise"),
        (
            *("median ms", "p20", "p80", "host ms", "MB", "GB/s", "% floor", "x 1-pass"),
            *("traffic MB", "peak MiB", "speedup"),
        ),
        [
            (
                *(row.op, row.backend, row.case, row.dtype, row.B, row.noise),
                *(row.median_ms, row.p20, row.p80, row.host_ms, row.bytes / 1e6, row.gb_per_s),
                *(row.pct_of_floor, row.x_one_pass),
                None if row.traffic_bytes is None else row.traffic_bytes / 1e6,
                *(row.peak_mib, row.speedup),
            )
            for row in rows
        ],
    )


def _panels(rows: Iterable[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.case, row.dtype) for row in rows))


def plot(path: Path, title: str, rows: list[Row]) -> Path:
    """Save a PNG of median time over batch size, a panel per case and dtype, with given noise."""
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
