"""The loss in a minute: one row per provider at 480x832, time and accuracy side by side.

What `python -m benchmarks.nft_loss` prints. Providers are timed interleaved, each with its own
share of the time that is left; the gradient's error is against the provider's own formula in
float64. What the minute has no room for is left out, and named at the end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

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
IN_BF16 = "x0 in bf16"
BATCHES = {"cpu": (8, 4, 2, 1), "cuda": (32, 8, 4, 2, 1)}
HOW = (
    "noise given; floor: the bytes of the passes that the formula needs, over the 5R1W stream's "
    "rate in the same run; error: of the gradient, ||g - g64|| / ||g64||; x0 in bf16: the "
    "unweighted x0 loss with every operation in bf16; *: p80 / p20 above 1.3, so measure again."
)
# What a dtype takes in calls of eager: checked and timed, the oracle, the loss in bf16.
_CALLS_OF_EAGER = 14
_CALLS_TIMED = 4  # of every provider at least, the first of which does not count
_COMPILE_S = 4.0  # of one dtype's loss, once the compiler has its headers
_LEAST_S = 8.0  # that the rows of a dtype take
# Precompiles what every C++ kernel of torch.compile includes, where its cache is empty.
_WARM_COMPILER = "import torch; torch.compile(lambda x: x.sin().sum())(torch.ones(64))"


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
    """Of a formula in float64, sample by sample to bound memory."""
    grads = []
    for b in range(len(i["x0"])):
        one = {name: x[b : b + 1].detach().double() for name, x in i.items() if name != "seed"}
        one["v_theta"].requires_grad_()
        grads.append(differentiate(loss(one), one)[1] / len(i["x0"]))
    return torch.cat(grads)


def providers(case: Nft, device: str, wanted: list[str]) -> dict[str, Step]:
    """Those of the suite that run here, and the loss without float32 arithmetic."""
    refusals = ops.explain("nft_loss", device, case.case().dtypes)
    names = [
        name
        for name in wanted
        if name in ("eager", "compile") or (name != "reference" and refusals[name] is None)
    ]
    steps = {name: case.step(name, "given") for name in names}
    if case.dtype == "bf16" and "eager" in wanted:
        steps[IN_BF16] = lambda i: differentiate(x0_loss(i), i)
    return steps


def progress(what: str) -> None:
    print(f"{clock.age_s():5.1f} s  {what}", file=sys.stderr, flush=True)


@dataclass
class Clock:
    """The minute: when it ends, by the age of the process, and what there was no time for."""

    end_s: float
    late: list[str] = field(default_factory=list)
    compiler: subprocess.Popen[bytes] | None = None

    def left_s(self) -> float:
        return self.end_s - clock.age_s()

    def may_compile(self, until_s: float) -> bool:
        """Waits for the compiler's headers; whether there is time to compile a loss then."""
        if self.compiler is not None:
            try:
                self.compiler.wait(max(until_s - clock.age_s(), 0.1))
            except subprocess.TimeoutExpired:
                end(self.compiler)  # what is timed next has the cores for itself
            if self.compiler.returncode < 0:
                return False
        return until_s - clock.age_s() > _COMPILE_S


@contextmanager
def warm_compiler(args: Namespace) -> Iterator[subprocess.Popen[bytes] | None]:
    """A process that prepares torch.compile's C++ while eager runs; a third of a cold start."""
    if args.device != "cpu" or "compile" not in args.providers:
        yield None
        return
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, "-c", _WARM_COMPILER], stdout=quiet, stderr=quiet, start_new_session=True
    )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a session's processes; a C++ compiler then removes what it has half written."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@contextmanager
def one_core_left(compiler: subprocess.Popen[bytes] | None) -> Iterator[None]:
    """Torch with a thread less while the compiler is prepared: its threads wait by spinning."""
    threads = torch.get_num_threads()
    if compiler is not None:
        torch.set_num_threads(max(threads - 1, 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def batches_that_fit(args: Namespace, dtype: str, left_s: float) -> list[int]:
    """Those for which memory and the time left suffice, by a call at batch 1; largest first."""
    shape = tuple(args.shape)
    one = Nft("x0_adaptive", dtype, 1, shape)
    inputs = one.inputs(args.device, 0)
    run = one.step("eager", "given")
    run(inputs)
    call_s = seconds(lambda: run(inputs), args.device)
    spare_s = left_s - (_COMPILE_S if "compile" in args.providers else 0.0)
    asked = args.batch if args.batch is not None else BATCHES[args.device]
    fitting = []
    for batch in sorted(asked, reverse=True):
        case = Nft("x0_adaptive", dtype, batch, shape).case()
        room = case.eager_bytes < 0.8 * harness.free_bytes(args.device)
        if room and _CALLS_OF_EAGER * batch * call_s < spare_s:
            fitting.append(batch)
    return fitting or [min(asked)]


def seconds(call: Callable[[], object], device: str) -> float:
    """Of one call."""
    start = perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


@dataclass
class Checked:
    """A provider that ran: its gradient's error, its memory, the seconds of that call."""

    run: harness.Run
    error: float
    peak_mib: float
    call_s: float


def check(step: Step, sets: list[Inputs], right: Tensor, device: str) -> Checked:
    """Runs a provider once, for its memory and its gradient."""
    grads: list[Tensor] = []

    def first(_: int) -> None:
        grads[:] = [step(sets[0])[1]]

    start = perf_counter()
    peak = harness.peak_mib(first, device)
    call_s = perf_counter() - start
    error = ((grads[0].double() - right).norm() / right.norm()).item()
    return Checked(lambda index: step(sets[index]), error, peak, call_s)


@dataclass
class Prepared:
    """A dtype whose providers ran, but for torch.compile's; nothing is timed yet."""

    dtype: str
    batch: int
    sets: list[Inputs]
    bytes: tuple[int, int]  # of one pass, and of two
    steps: dict[str, Step]
    exact: Tensor
    found: dict[str, Checked]

    def rest_s(self) -> float:
        """What compiling and timing will take at least, about."""
        return (_COMPILE_S if "compile" in self.steps else 0.0) + self.timing_s()

    def timing_s(self) -> float:
        return _CALLS_TIMED * sum(one.call_s for one in self.found.values())


def prepare(args: Namespace, dtype: str, until_s: float, minute: Clock) -> Prepared:
    """Chooses the batch such that its rows are there by `until_s` seconds of the process."""
    progress(f"{dtype}: how large a batch fits")
    candidates = batches_that_fit(args, dtype, until_s - clock.age_s())
    # Large temporaries cost more than in proportion: only a call shows it.
    while True:
        batch = candidates.pop(0)
        case = Nft("x0_adaptive", dtype, batch, tuple(args.shape))
        sets = [case.inputs(args.device, seed) for seed in range(2)]
        if not candidates or "eager" not in args.providers:
            break
        progress(f"{dtype} B={batch}: a call of eager")
        eager = case.step("eager", "given")
        call_s = seconds(lambda step=eager, inputs=sets[0]: step(inputs), args.device)
        most_s = (until_s - clock.age_s()) / (_CALLS_OF_EAGER - 1)
        if call_s < most_s:
            break
        smaller = [other for other in candidates if other * call_s < most_s * batch]
        candidates = smaller or candidates[-1:]
    steps = providers(case, args.device, args.providers)
    progress(f"{dtype} B={batch}: the gradient in float64")
    exact = exact_gradient(official_loss("x0_adaptive"), sets[0])
    ready = Prepared(dtype, batch, sets, case.case().bytes("given"), steps, exact, {})
    for name in (name for name in steps if name != "compile"):
        right = exact
        if name == IN_BF16:
            if until_s - clock.age_s() < ready.rest_s():
                minute.late.append(name)
                continue
            right = exact_gradient(x0_loss, sets[0])
        progress(f"{dtype} B={batch}: {name}")
        ready.found[name] = check(steps[name], sets, right, args.device)
    return ready


def measure(args: Namespace, ready: Prepared, until_s: float, minute: Clock) -> Iterator[Row]:
    """The rows of a dtype, near `until_s` seconds of the process."""
    dtype, batch, sets, found = ready.dtype, ready.batch, ready.sets, ready.found
    one_pass, two_passes = ready.bytes
    if "compile" in ready.steps:
        progress(f"{dtype} B={batch}: compile")
        if minute.may_compile(until_s - ready.timing_s()):
            ready.steps["compile"](sets[0])
            found["compile"] = check(ready.steps["compile"], sets, ready.exact, args.device)
        else:
            minute.late.append(f"compile {dtype}")
    streams = floors.streams(one_pass, args.device, len(sets))
    progress(f"{dtype} B={batch}: timing")
    left_s = max(until_s - clock.age_s(), 1.0)
    budget = min(args.budget, left_s)
    everything = {name: one.run for name, one in found.items()}
    everything |= {name: stream.run for name, stream in streams.items()}
    timings = harness.timed(everything, args.device, len(sets), args.reps, budget, left_s)
    floor = min(timings[name].median_ms / stream.bytes for name, stream in streams.items())
    for name in (name for name in ready.steps if name in found):
        one, timing = found[name], timings[name]
        moved = one_pass if name == IN_BF16 else two_passes
        yield Row(
            name,
            dtype,
            batch,
            timing.median_ms,
            timing.p20,
            timing.p80,
            timing.reps,
            ratio(timings, "eager", name),
            ratio(timings, "compile", name),
            100 * floor * moved / timing.median_ms,
            one.peak_mib,
            one.error,
        )
    torch._dynamo.reset()


def ratio(timings: dict[str, harness.Timing], other: str, name: str) -> float | None:
    if other not in timings:
        return None
    return timings[other].median_ms / timings[name].median_ms


def table(rows: list[Row], title: str) -> None:
    """Prints the rows within a hundred columns."""
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
    """Measures every dtype asked for, prints the table, saves and compares where asked."""
    rows: list[Row] = []
    dtypes = [dtype for dtype in ("bf16", "fp32") if dtype in args.dtype]
    minute = Clock(min(args.deadline, LIMIT_S[args.device]) - 8)
    with warm_compiler(args) as minute.compiler:
        # All are prepared before one is compiled: meanwhile the compiler's headers get ready.
        prepared: list[Prepared] = []
        for index, dtype in enumerate(dtypes):
            spare_s = minute.left_s() - sum(one.rest_s() for one in prepared)
            if spare_s < _LEAST_S:
                minute.late.append(dtype)
                continue
            share_s = spare_s / (len(dtypes) - index)
            with one_core_left(minute.compiler):
                prepared.append(prepare(args, dtype, clock.age_s() + share_s, minute))
        while prepared:
            ready = prepared.pop(0)
            until_s = minute.end_s - sum(one.rest_s() for one in prepared)
            rows += measure(args, ready, until_s, minute)
    shape = "x".join(map(str, args.shape))
    table(rows, f"nft_loss, samples of {shape}, {report.device_name(args.device)}")
    print(HOW)
    if (busy := report.busy()) is not None:
        print(busy)
    about = {"shape": list(args.shape), "arguments": {k: str(v) for k, v in vars(args).items()}}
    document = report.document("nft_loss_table", args.device, HOW, rows, **about)
    if args.out is not None:
        print(f"wrote {report.write(args.out, document)}")
    if args.compare is not None:
        print("\n".join(compare.table(compare.read(args.compare), document)))
    report.finish(rows, {}, minute.late)
