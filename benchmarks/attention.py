"""Attention over intervals of keys: afd.ops.block_attention against masks, flex and libraries.

    python benchmarks/attention.py                  # CPU: small shapes, float32
    python benchmarks/attention.py --device cuda    # the shapes of 480x832 in bfloat16

Cases: a rollout's chunk over its cache, a window with a sink, block-causal training, teacher
forcing, and the noisy half alone after a context without gradient. Providers are interleaved in one
run with a matrix product, which sets the floor. Each is first compared with a float64 softmax on
one head; one that disagrees is not timed and fails the run. Unavailable providers are listed with
the reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd import ops
from afd.ops import intervals
from benchmarks import attention_parts, harness, report
from benchmarks.attention_case import DTYPES, Case, Step, Tensors

PROVIDERS = (
    "dense mask",
    "flex",
    "sdpa per block",
    "flash-attn per block",
    "xformers per block",
    "ours",
    "library",
    "triton",
)
OURS = {"ours": None, "library": "library", "triton": "triton"}
# Relative L2 error against float64; bfloat16 rounds probabilities, outputs and their gradients.
BOUND = {"fp32": 1e-5, "bf16": 2e-2}
HOW = (
    "ms: median of one call (forward and backward for cases marked so), p20 and p80; TFLOP/s: "
    "2 d flop per head for every pair of a query and a key that the intervals name and every "
    "product of the pass (forward 2, backward 5, or 3 where only dq is needed), the same count for "
    "every provider; % floor: of the rate of a matrix product timed in the same run; peak: "
    "allocated during the call above what was alive before, mask and inputs not counted; speedup: "
    "over the dense mask."
)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The shapes of 480x832 on a GPU; else shapes feasible on a CPU."""
    if args.quick:
        yield Case("rollout, chunk 2", intervals.cache(2, 1, 8), 2, 16, "fp32")
        yield Case("causal training", intervals.causal(4, 2, 8), 2, 16, "fp32", True)
        noisy = intervals.noisy_half(4, 2, 8)
        yield Case("noisy half", noisy, 2, 16, "fp32", True, context=32)
        return
    cuda = args.device == "cuda"
    heads, dtype = 12, "bf16" if cuda else "fp32"
    width = 128 if cuda else 64
    chunk, chunks, tokens = (3, 7, 1560) if cuda else (1, 6, 256)
    frames = chunk * chunks
    half = frames if cuda else 3
    forcing = intervals.teacher_forcing(half, chunk, tokens)
    noisy = intervals.noisy_half(half, chunk, tokens)
    window = intervals.windowed(frames, chunk, tokens, window=3 * chunk, sink=chunk)
    causal = intervals.causal(frames, chunk, tokens)

    def rollout(batch: int) -> Iterator[Case]:
        for i in (1, (chunks + 1) // 2, chunks):
            seen = intervals.cache(i * chunk, chunk, tokens)
            yield Case(f"rollout, chunk {i}", seen, heads, width, dtype, batch=batch)

    yield from rollout(1)
    yield Case("teacher forcing", forcing, heads, width, dtype, True)
    yield Case("noisy half", noisy, heads, width, dtype, True, context=half * tokens)
    if cuda:
        yield from rollout(2)
    yield Case("window 3 with sink 1", window, heads, width, dtype)
    yield Case("causal training", causal, heads, width, dtype, True)
    yield Case("teacher forcing, forward", forcing, heads, width, dtype)


def steps(case: Case, args: argparse.Namespace, absent: dict[str, list[str]]) -> dict[str, Step]:
    """Steps of every available provider; `absent` collects why and where others cannot run."""
    found = {}
    for name in args.providers:
        why = _why_absent(name, case, args)
        if why is None:
            found[name] = _step(name, case, args.device)
        else:
            absent.setdefault(f"{name}: {why}", []).append(case.name)
    return found


def _why_absent(name: str, case: Case, args: argparse.Namespace) -> str | None:
    backend = OURS.get(name)
    if backend is not None:
        return ops.explain("block_attention", args.device, {DTYPES[case.dtype]})[backend]
    if name == "flex":
        if args.quick:
            return "--quick compiles nothing"
        if args.device == "cuda" and all(len(one) == 1 for one in case.rows.rows):
            return "no mask is needed, and compiling one takes longer than all else"
        if args.device == "cpu" and case.backward:
            return "flex_attention has no backward on the CPU"
    for package in ("flash-attn", "xformers"):
        if name.startswith(package):
            if args.device != "cuda":
                return f"{package} needs a CUDA device"
            if importlib.util.find_spec(package.replace("-", "_")) is None:
                return f"{package} is not installed"
    return None


def _step(name: str, case: Case, device: str) -> Step:
    if name in OURS:
        return case.our_step(OURS[name])
    if name == "dense mask":
        mask = case.rows.mask(case.rows.keys, device)[:, None]
        return case.step(lambda q, k, v: _sdpa(q, k, v, mask))
    if name == "flex":
        return case.step(_flex(case, device))
    if name == "sdpa per block":
        return case.step(_per_block(case, _sdpa))
    if name.startswith("flash-attn"):
        from flash_attn import flash_attn_func

        return case.step(_per_block(case, flash_attn_func))
    from xformers.ops import memory_efficient_attention

    return case.step(_per_block(case, memory_efficient_attention))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _per_block(
    case: Case, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The usual wrapper of a library: a call per block, with its keys concatenated."""
    (rows,) = case.rows.rows

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for q0, q1, a0, a1, b0, b1 in rows:
            keys, values = k[:, a0:a1], v[:, a0:a1]
            if b1:
                keys = torch.cat((keys, k[:, b0:b1]), 1)
                values = torch.cat((values, v[:, b0:b1]), 1)
            outs.append(attend(q[:, q0:q1], keys, values))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    return run


def _flex(case: Case, device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (rows,) = case.rows.rows
    bounds = torch.tensor([row[2:] for row in rows for _ in range(row[0], row[1])], device=device)
    a0, a1, b0, b1 = bounds.T.contiguous()

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((j >= a0[i]) & (j < a1[i])) | ((j >= b0[i]) & (j < b1[i]))

    # Compiled, so that no dense mask is materialised.
    make = torch.compile(create_block_mask)
    blocks = make(seen, None, None, case.rows.queries, case.rows.keys, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=blocks).transpose(1, 2)

    return run


def oracle(case: Case, i: Tensors) -> tuple[Tensor, ...]:
    """The pass in float64 on the first head, block by block."""
    one = {name: x[:, :, :1].double() for name, x in i.items()}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("blhd,bnhd->bhln", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhln,bnhd->blhd", scores.softmax(-1), v)

    return tuple(x.detach() for x in case.step(_per_block(case, attend))(one))


@dataclass(frozen=True)
class Row:
    """One provider on one case. Times in milliseconds."""

    case: str
    provider: str
    dtype: str
    B: int
    queries: int
    keys: int
    backward: bool
    median_ms: float
    p20: float
    p80: float
    host_ms: float | None
    reps: int
    tflops: float
    pct_of_floor: float
    peak_mib: float
    error: float  # worst relative L2 error against float64, measured before timing
    speedup: float | None


def measure(
    case: Case, args: argparse.Namespace, absent: dict[str, list[str]]
) -> tuple[list[Row], dict[str, str]]:
    """Rows of the providers that run and agree with float64, and why the rest were not timed."""
    return compare(case, steps(case, args, absent), args)


def compare(
    case: Case, found: dict[str, Step], args: argparse.Namespace
) -> tuple[list[Row], dict[str, str]]:
    """Rows of the given steps on one case."""
    torch._dynamo.reset()  # a compiled function keeps at most eight specialisations
    failed: dict[str, str] = {}
    given = case.tensors(args.device, 0)
    nbytes = sum(x.numel() * x.element_size() for x in given.values())
    count = harness.input_sets(nbytes, args.device)
    sets = [given, *(case.tensors(args.device, seed) for seed in range(1, count))]
    errors = _checked(case, given, found, failed)
    runs = {name: _on(step, sets) for name, (step, _) in errors.items()}
    side = 8192 if args.device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=args.device).to(DTYPES[case.dtype]) for _ in "ab")
    timings = harness.timed(
        runs | {"matmul": lambda _: a @ b}, args.device, count, args.reps, args.budget
    )
    floor = 2 * side**3 / timings["matmul"].median_ms / 1e9
    print(f"{case.name}: matrix product {floor:.3g} TFLOP/s")
    dense = timings.get("dense mask")
    rows = []
    for name, run in runs.items():
        timing = timings[name]
        rate = case.flop / timing.median_ms / 1e9
        rows.append(
            Row(
                case=case.name,
                provider=name,
                dtype=case.dtype,
                B=case.batch,
                queries=case.rows.queries,
                keys=case.rows.keys,
                backward=case.backward,
                **asdict(timing),
                tflops=rate,
                pct_of_floor=100 * rate / floor,
                peak_mib=harness.peak_mib(run, args.device),
                error=errors[name][1],
                speedup=None if dense is None else dense.median_ms / timing.median_ms,
            )
        )
    return rows, failed


def _on(step: Step, sets: list[Tensors]) -> harness.Run:
    return lambda index: step(sets[index])


def _checked(
    case: Case, given: Tensors, found: dict[str, Step], failed: dict[str, str]
) -> dict[str, tuple[Step, float]]:
    """The steps that run and agree with float64 on the first head, with their errors."""
    kept = {}
    exact = oracle(case, given)
    for name, step in found.items():
        try:
            output = step(given)
        except Exception as error:  # a failing provider must not stop the rest
            failed[f"{case.name}, {name}"] = f"{type(error).__name__}: {error}"
            continue
        # Tensor max, because Python's max() ignores a NaN that is not first.
        distances = [_distance(x, y) for x, y in zip(output, exact, strict=True)]
        error = float(torch.tensor(distances).max())
        if error <= BOUND[case.dtype]:
            kept[name] = (step, error)
        else:  # NaN comes here too
            failed[f"{case.name}, {name}"] = f"relative error {error:.3g} is above the bound"
    return kept


def _distance(out: Tensor, exact: Tensor) -> float:
    return float((out[:, :, :1].detach().double() - exact).norm() / exact.norm())


def show(rows: list[Row]) -> None:
    """The table of one case."""
    first = rows[0]
    what = "forward and backward" if first.backward else "forward"
    title = f"{first.case}: {first.queries} x {first.keys}, {first.dtype}, B={first.B}, {what}"
    report.table(
        title,
        ("provider",),
        ("ms", "p20", "p80", "host ms", "TFLOP/s", "% floor", "peak MiB", "error", "speedup"),
        [
            (
                *(row.provider, row.median_ms, row.p20, row.p80, row.host_ms, row.tflops),
                *(row.pct_of_floor, row.peak_mib, f"{row.error:.1e}", row.speedup),
            )
            for row in rows
        ],
    )


def main(argv: list[str] | None = None) -> None:
    args = report.parse(report.arguments(__doc__.splitlines()[0], PROVIDERS), argv)
    absent: dict[str, list[str]] = {}
    named = ((case.name, partial(measure, case, args, absent)) for case in cases(args))
    parts = (
        (case.name, partial(compare, case, case.steps(), args))
        for case in attention_parts.cases(args)
    )
    report.run("attention", HOW, chain(parts, named), show, args, absent=absent)


if __name__ == "__main__":
    main()
