"""A one-minute table of the loss: time and accuracy per provider at 480x832.

Printed by `python -m benchmarks.nft_loss`. Providers are timed interleaved, each with its share of
the remaining time; the gradient's error is against the provider's own formula in float64. What does
not fit into the minute is skipped and listed at the end.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from afd import ops
from benchmarks import clock, compare, floors, harness, official, report
from benchmarks.nft_case import NFT_BETA, PRIOR_WEIGHT, Nft, differentiate, official_loss
from benchmarks.suite import WIDE, Inputs, Step

LIMIT_S = {"cpu": 60.0, "cuda": 30.0}
BATCHES = {"cpu": (8, 4, 2, 1), "cuda": (32, 8, 4, 2, 1)}
HOW = (
    "noise given; floor: the bytes of the passes that the formula needs, over the 5R1W stream's "
    "rate in the same run; error: of the gradient, ||g - g64|| / ||g64||; x0 in bf16: the "
    "unweighted x0 loss with every operation in bf16; *: p80 / p20 above 1.3, so measure again."
)
# Calls of eager per dtype besides the timing: first, warm-up, memory, and the oracle's.
_CALLS_OF_EAGER = 12
_COMPILE_S = 12.0
_LEAST_S = 8.0  # minimum time for the rows of a dtype


@dataclass(frozen=True)
class Row:
    """One provider. Milliseconds; ratios are other over this."""

    provider: str
    dtype: str
    B: int
    median_ms: float
    p20: float
    p80: float
    reps: int
    x_eager: float | None
    x_compile: float | None
    pct_of_floor: float
    peak_mib: float
    error: float


def x0_loss(i: Inputs) -> Tensor:
    """The unweighted x0 loss in the latents' own dtype throughout."""
    x0, v_old = i["x0"], i["v_old"].detach()
    t = official.per_sample(i["t"].to(x0.dtype), x0)
    r = i["r"].to(x0.dtype)
    x_t = (1 - t) * x0 + t * i["noise"]
    dims = tuple(range(1, x0.ndim))

    def branch(velocity: Tensor) -> Tensor:
        return ((x_t - t * velocity - x0) ** 2).mean(dims)

    positive = branch(NFT_BETA * i["v_theta"] + (1 - NFT_BETA) * v_old)
    negative = branch((1 + NFT_BETA) * v_old - NFT_BETA * i["v_theta"])
    prior = ((i["v_theta"] - i["v_ref"]) ** 2).mean()
    return (r * positive + (1 - r) * negative).mean() / NFT_BETA + PRIOR_WEIGHT * prior


def exact_gradient(loss: Callable[[Inputs], Tensor], i: Inputs) -> Tensor:
    """Gradient of a formula in float64, sample by sample to bound memory."""
    grads = []
    for b in range(len(i["x0"])):
        one = {name: x[b : b + 1].detach().double() for name, x in i.items() if name != "seed"}
        one["v_theta"].requires_grad_()
        grads.append(differentiate(loss(one), one)[1] / len(i["x0"]))
    return torch.cat(grads)


def providers(case: Nft, device: str, wanted: list[str]) -> dict[str, Step]:
    """The suite's available providers, and the loss without float32 arithmetic."""
    refusals = ops.explain("nft_loss", device, case.case().dtypes)
    names = [
        name
        for name in wanted
        if name in ("eager", "compile") or (name != "reference" and refusals[name] is None)
    ]
    steps = {name: case.step(name, "given") for name in names}
    if case.dtype == "bf16" and "eager" in wanted:
        steps["x0 in bf16"] = lambda i: differentiate(x0_loss(i), i)
    return steps


def progress(what: str) -> None:
    print(f"{clock.age_s():5.1f} s  {what}", file=sys.stderr, flush=True)


def batch_that_fits(args: Namespace, dtype: str, left_s: float) -> int:
    """The largest batch that fits memory and remaining time, estimated from a call at batch 1."""
    shape = tuple(args.shape)
    one = Nft("x0_adaptive", dtype, 1, shape)
    inputs = one.inputs(args.device, 0)
    run = one.step("eager", "given")
    run(inputs)
    timing = harness.timed({"eager": lambda _: run(inputs)}, args.device, 1, 3, 1.0)["eager"]
    spare_s = left_s - (_COMPILE_S if "compile" in args.providers else 0.0)
    for batch in args.batch or BATCHES[args.device]:
        case = Nft("x0_adaptive", dtype, batch, shape).case()
        fits = case.eager_bytes < 0.8 * harness.free_bytes(args.device)
        if fits and _CALLS_OF_EAGER * batch * timing.median_ms / 1e3 < spare_s:
            return batch
    return 1


def measure(args: Namespace, dtype: str, until_s: float, late: list[str]) -> Iterator[Row]:
    """The rows of a dtype; ends at about `until_s` of process age. Skipped ones go to `late`."""
    progress(f"{dtype}: how large a batch fits")
    batch = batch_that_fits(args, dtype, until_s - clock.age_s())
    case = Nft("x0_adaptive", dtype, batch, tuple(args.shape))
    one_pass, two_passes = case.case().bytes("given")
    sets = [case.inputs(args.device, seed) for seed in range(2)]
    steps = providers(case, args.device, args.providers)
    progress(f"{dtype} B={batch}: the gradient in float64")
    exact = exact_gradient(official_loss("x0_adaptive"), sets[0])
    errors, runs, peaks = dict[str, float](), dict[str, harness.Run](), dict[str, float]()
    for name, step in list(steps.items()):
        if name == "compile" and until_s - clock.age_s() < _COMPILE_S:
            late.append(f"compile {dtype}")
            continue
        progress(f"{dtype} B={batch}: {name}")
        right = exact_gradient(x0_loss, sets[0]) if name.startswith("x0") else exact
        _, grad = step(sets[0])
        errors[name] = ((grad.double() - right).norm() / right.norm()).item()
        runs[name] = lambda index, step=step: step(sets[index])
        peaks[name] = harness.peak_mib(runs[name], args.device)
        del grad, right
    del exact
    streams = floors.streams(one_pass, args.device, len(sets))
    progress(f"{dtype} B={batch}: timing")
    budget = min(args.budget, max(until_s - clock.age_s(), 1.0))
    everything = runs | {name: stream.run for name, stream in streams.items()}
    timings = harness.timed(everything, args.device, len(sets), args.reps, budget)
    floor = min(timings[name].median_ms / stream.bytes for name, stream in streams.items())
    for name in runs:
        found = timings[name]
        moved = one_pass if name.startswith("x0") else two_passes
        eager, compiled = timings.get("eager"), timings.get("compile")
        yield Row(
            name,
            dtype,
            batch,
            found.median_ms,
            found.p20,
            found.p80,
            found.reps,
            eager and eager.median_ms / found.median_ms,
            compiled and compiled.median_ms / found.median_ms,
            100 * floor * moved / found.median_ms,
            peaks[name],
            errors[name],
        )
    torch._dynamo.reset()


def table(rows: list[Row], title: str) -> None:
    """Prints the rows within 100 columns."""
    printed = Table(title=title, title_justify="left", box=SIMPLE, padding=0)
    for column in ("provider", "dtype"):
        printed.add_column(column, no_wrap=True)
    for column in ("B", "ms", "x eager", "x compile", "% floor", "peak MiB", "grad. error"):
        printed.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        ratios = (f"{x:.3g}" if x is not None else "" for x in (row.x_eager, row.x_compile))
        wide = "*" if row.p80 > WIDE * row.p20 else " "
        printed.add_row(
            *(row.provider, row.dtype, str(row.B), f"{row.median_ms:.3g}{wide}", *ratios),
            *(f"{row.pct_of_floor:.3g}", f"{row.peak_mib:.0f}", f"{row.error:.1e}"),
        )
    Console(width=100).print(printed)


def run(args: Namespace) -> None:
    """Measures every requested dtype, prints the table, and saves and compares on request."""
    rows: list[Row] = []
    dtypes = [dtype for dtype in ("bf16", "fp32") if dtype in args.dtype]
    limit_s = min(args.deadline, LIMIT_S[args.device]) - 4
    late: list[str] = []
    for index, dtype in enumerate(dtypes):
        age = clock.age_s()
        if age > limit_s - _LEAST_S:
            late.append(dtype)
            continue
        rows += measure(args, dtype, age + (limit_s - age) / (len(dtypes) - index), late)
    shape = "x".join(map(str, args.shape))
    table(rows, f"nft_loss, samples of {shape}, {report.device_name(args.device)}")
    print(HOW)
    about = {"shape": list(args.shape), "arguments": {k: str(v) for k, v in vars(args).items()}}
    document = report.document("nft_loss_table", args.device, HOW, rows, **about)
    if args.out is not None:
        print(f"wrote {report.write(args.out, document)}")
    if args.compare is not None:
        print("\n".join(compare.table(compare.read(args.compare), document)))
    report.finish(rows, {}, late)
