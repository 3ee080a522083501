"""One iteration of AFD: rollout, discriminator, score and update, in the three context modes.

    python benchmarks/train_step.py                 # CPU: the toy student, and dim 256 with LoRA
    python benchmarks/train_step.py --device cuda   # 480x832, 1.3 B random weights, LoRA r = 256

Ours is the trainer's own method. Eager is a naive implementation of the same iteration
(eager_train.py); compare its update with `recompute`, which has the same gradients. Before timing,
the two networks must agree. Providers are interleaved in one run. The discriminator is the toy's or
the small one on latents; VideoAlign, the autoencoder and the codec are not included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd.models.wan.types import WanConfig
from afd.planning.cost_model import nft_flop, rollout_flop
from benchmarks import harness, report
from benchmarks.hardware import Machine
from benchmarks.train_sides import MODES, Case, Eager, Ours, Provider, disagreement

PHASES = ("rollout", "discriminator", "score", "update")
# Relative L2 error of one forward against eager's: two float32 orders of sums, or bfloat16.
BOUND = {"fp32": 1e-4, "bf16": 0.1}
HOW = (
    "ms: median of a phase (one CPU thread: of the process's own time, which neighbours on the "
    "machine do not lengthen; else of wall time); update: noised copies, three networks, loss, "
    "backward, optimizer and averages, from given scores; x recompute, x eager: of medians of the "
    "same run; floor: the operations of afd.planning.cost_model at the product rate measured in "
    "this run "
    "(eager: those of recompute); peak: allocated during the phase above what was alive before it "
    "(kept contexts count to the rollout)."
)


@dataclass(frozen=True)
class Row:
    """One phase of one provider; times in milliseconds."""

    case: str
    phase: str
    provider: str
    dtype: str
    B: int
    median_ms: float
    p20: float
    p80: float
    reps: int
    floor_ms: float | None
    gflop: float | None
    peak_mib: float
    x_recompute: float | None
    speedup: float | None  # against "eager"


def timed(
    providers: dict[str, Provider], device: str, reps: int, budget_s: float
) -> dict[str, str]:
    """Fills in the providers' times and peaks, in rounds of rotating order; returns failures.

    On CUDA the allocator reports the peak of every call, and a short case has warmed up; on the CPU
    a separate profiled round does both.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    names, failed, start = list(providers), dict[str, str](), time.perf_counter()
    rounds = (*(["profiled"] if device != "cuda" else []), *range(reps))
    for rep in rounds:
        if rep not in ("profiled", 0) and time.perf_counter() - start > budget_s:
            break
        shift = 0 if rep == "profiled" else int(rep) % len(names)
        for name in names[shift:] + names[:shift]:
            if name in failed:
                continue
            try:
                for phase, run in providers[name].phases.items():
                    if rep == "profiled":
                        providers[name].peak_mib[phase] = harness.peak_mib(_call(run), device)
                    else:
                        _once(providers[name], phase, run, device, clock)
            except Exception as broken:  # a failure must not lose the other providers' numbers
                failed[name] = f"{type(broken).__name__}: {broken}"
    return failed


def _once(
    provider: Provider,
    phase: str,
    run: Callable[[], object],
    device: str,
    clock: Callable[[], float],
) -> None:
    """One timed call; on CUDA also its peak memory."""
    before = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        held = (torch.cuda.max_memory_allocated() - before) / 2**20
        provider.peak_mib[phase] = max(held, provider.peak_mib.get(phase, 0.0))
    provider.ms.setdefault(phase, []).append(1e3 * (clock() - began))


def _call(run: Callable[[], object]) -> harness.Run:
    return lambda _: run()


def measure(
    case: Case, machine: Machine, args: argparse.Namespace
) -> tuple[list[Row], dict[str, str]]:
    """Rows of every phase, and why providers were not timed."""
    failed: dict[str, str] = {}
    ours = Ours(case, args.device)
    providers = {mode: ours.provider(mode) for mode in MODES if mode in args.providers}
    if "eager" in args.providers:
        eager = Eager(ours)
        error = disagreement(ours, eager)
        if error <= BOUND[case.dtype]:
            providers = {"eager": eager.provider()} | providers
        else:
            failed[f"{case.name} eager"] = f"relative error {error:.2g} against ours"
    for name, why in timed(providers, args.device, args.reps, args.budget).items():
        failed[f"{case.name} {name}"] = why
        del providers[name]
    rows = [
        _row(case, phase, name, providers, machine)
        for phase in PHASES
        for name, provider in providers.items()
        if phase in provider.phases
    ]
    return rows, failed


def _row(
    case: Case, phase: str, name: str, providers: dict[str, Provider], machine: Machine
) -> Row:
    provider = providers[name]
    ms = provider.ms[phase]
    tenths = statistics.quantiles(ms, n=10, method="inclusive") if len(ms) > 1 else ms * 9
    median = statistics.median(ms)

    def against(other: str) -> float | None:
        found = providers[other].ms.get(phase) if other in providers else None
        return None if found is None else statistics.median(found)

    recompute, eager = against("recompute"), against("eager")
    flop = _flop(case, phase, name)
    return Row(
        case=case.name,
        phase=phase,
        provider=name,
        dtype=case.dtype,
        B=case.videos,
        median_ms=median,
        p20=tenths[1],
        p80=tenths[7],
        reps=len(ms),
        floor_ms=None if flop is None else 1e3 * flop / machine.matmul,
        gflop=None if flop is None else flop / 1e9,
        peak_mib=provider.peak_mib[phase],
        x_recompute=median / recompute if phase == "update" and recompute else None,
        speedup=eager / median if eager else None,
    )


def _flop(case: Case, phase: str, name: str) -> float | None:
    """FLOP of a student phase over all videos."""
    if phase == "rollout":
        return case.videos * rollout_flop(case.costs, 4)
    if phase != "update":
        return None
    mode = MODES["recompute" if name == "eager" else name]
    return case.videos * nft_flop(
        case.costs,
        mode["context"],
        draws=case.draws,
        kept=mode.get("keep_context", False),
        checkpointed=case.checkpoint_blocks,
    )


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The released size on a GPU; else sizes feasible on a CPU."""
    if args.quick:
        tiny = WanConfig(
            dim=48, num_heads=2, ffn_dim=64, num_layers=2, freq_dim=16, text_dim=16, text_len=8
        )
        yield Case("toy, quick", 2, 2)
        yield Case("wan, quick", 1, 2, 1, tiny, 4, 6, 6, rank=4, micro_batch=1)
    elif args.device == "cuda":
        whole = Case("480x832", 1, 1, 1, WanConfig(), 60, 104, 21, 256, "bf16", True, 1)
        # Short videos, so that nothing is compiled while the long ones are timed.
        yield replace(whole, name="480x832, 6 frames (warm-up)", frames=6)
        yield whole
    else:
        yield Case("toy, 1 draw", 8, 4)
        yield Case("toy, 2 draws (quickstart)", 8, 4, 2)
        # Deeper and with more tokens: in the toy the last of 3 layers, whose clean half is only
        # keys and values, is a third, and work outside the layers has more weight.
        deep = WanConfig(dim=256, num_heads=4, ffn_dim=1024, num_layers=6, text_len=64)
        yield Case("6 layers, 16x16, LoRA", 1, 1, 1, deep, 16, 16, 12, 32, "fp32", True, 1)


def show(rows: list[Row]) -> None:
    """Show the table of one case, and the time of an iteration in each mode."""
    first = rows[0]
    report.table(
        f"{first.case}: {first.B} videos, {first.dtype}",
        ("phase", "provider"),
        (
            *("ms", "p20", "p80", "reps", "floor ms", "x floor", "GFLOP", "peak MiB"),
            *("x recompute", "x eager"),
        ),
        [
            (
                *(row.phase, row.provider, row.median_ms, row.p20, row.p80, row.reps),
                row.floor_ms,
                None if row.floor_ms is None else row.median_ms / row.floor_ms,
                *(row.gflop, row.peak_mib, row.x_recompute, row.speedup),
            )
            for row in rows
        ],
    )


def main(argv: list[str] | None = None) -> None:
    parser = report.arguments(__doc__.splitlines()[0], ("eager", *MODES), budget_s=30.0)
    args = report.parse(parser, argv)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    machine = Machine.measured(args.device, dtype, 0.02 if args.quick else 0.5)
    print(f"{machine.bandwidth / 1e9:.1f} GB/s, {machine.matmul / 1e12:.3g} TFLOP/s")
    named = ((case.name, partial(measure, case, machine, args)) for case in cases(args))
    report.run("train_step", HOW, named, show, args, machine=asdict(machine))


if __name__ == "__main__":
    main()
