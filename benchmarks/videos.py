"""Whole videos: frames per second at several batch sizes, memory of a long stream, decoding.

    python benchmarks/videos.py                  # CPU: the toy's size
    python benchmarks/videos.py --device cuda    # 480x832, 81 frames, 1.3 B random weights, bf16

The naive network (eager_wan.py) and ours make the same videos from the same noise, one provider
after the other, because a batch of 8 leaves no memory for two; a first chunk that disagrees fails
the run. A stream with a window then continues to ten times a video's length. The autoencoder is
timed separately, with random weights, if diffusers is installed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd.lab.student import ToyConfig
from afd.models.wan.types import WanConfig
from benchmarks import harness, report
from benchmarks.hardware import Machine, chunk_seconds
from benchmarks.rollout import BOUND, DTYPES, STEPS, Case, Stream, make_student

PROVIDERS = ("eager", "eager+text", "ours", "graph")
LONGER = 10  # length of the windowed stream, in videos
HOW = (
    "s: median of a batch of videos (denoising steps and context passes; decoding is a case of its "
    "own); FPS: video frames, 1 + 4 (F - 1) of a video's F; x floor: hardware.py's, from the copy "
    "bandwidth and the product rate measured in this run; cache: keys and values held; peak: "
    "allocated above what was alive before; error: relative, of the first chunk, against the first "
    "provider's; x eager: where eager came before; it keeps the prompt's keys; x released: against "
    "eager+text, which runs the text MLP in every call as the released code does."
)


@dataclass(frozen=True)
class Row:
    """One provider on one length and batch."""

    case: str
    provider: str
    dtype: str
    B: int
    frames: int  # of the latents
    seconds: float
    reps: int
    fps: float
    floor_s: float | None
    cache_mib: float | None
    peak_mib: float
    error: float | None
    speedup: float | None  # against "eager"
    speedup_released: float | None  # against "eager+text"


@dataclass(frozen=True)
class Run:
    """One provider's videos, to be compared with those of other providers."""

    case: Case
    batch: int
    provider: str

    def __str__(self) -> str:
        return f"{self.case.name} B={self.batch} {self.provider}"


def measure(
    run: Run,
    machine: Machine,
    before: list[Row],
    firsts: dict[int, Tensor],
    args: argparse.Namespace,
) -> tuple[list[Row], dict[str, str]]:
    """The rows of one provider, or the reason why they are missing.

    `before`: rows to compare with, extended by the new ones; `firsts`: first chunks by batch.
    """
    case, device = run.case, args.device
    if device == "cuda":  # free the last provider's memory
        gc.collect()
        torch.cuda.empty_cache()
    try:
        stream = Stream(case, run.batch, make_student(case, device, run.provider), run.provider)
        first = stream.next().float().cpu()
        if run.provider == "graph" or device != "cuda":
            _whole(stream, case.frames)  # graphs are captured chunk by chunk
        expected = firsts.setdefault(run.batch, first)
        error = float((first - expected).norm() / expected.norm())
        if not error <= BOUND[case.dtype]:  # NaN comes here too
            return [], {str(run): f"relative error {error:.2g} against the first provider"}
        rows = []
        for frames in lengths(case):
            seconds, peak = _timed(partial(_whole, stream, frames), args)
            rows.append(
                _row(run, frames, seconds, peak, stream.cache_bytes, error, machine, before)
            )
    except Exception as broken:  # a failure must not lose the other providers' numbers
        return [], {str(run): f"{type(broken).__name__}: {broken}"}
    before += rows
    return rows, {}


def lengths(case: Case) -> tuple[int, ...]:
    """Lengths in latent frames: a video's, and with a window also `LONGER` times that."""
    return (case.frames,) if case.wan.window is None else (case.frames, LONGER * case.frames)


def _whole(stream: Stream, frames: int) -> None:
    """Makes a video from its first chunk on."""
    stream.start = 0
    if stream.eager is None:
        stream.cache.reset()
    else:
        for layer in stream.cache.layers:
            layer.global_end.zero_()
            layer.local_end.zero_()
    for _ in range(frames // stream.case.wan.chunk):
        stream.next()


def _timed(call: Callable[[], object], args: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of up to three calls, as many as fit into the budget, and peak memory in MiB."""
    seconds, peak = list[float](), 0.0
    cuda = args.device == "cuda"
    while len(seconds) < 3 and sum(seconds) < args.budget / 2:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if cuda else 0
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
            peak = max(peak, (torch.cuda.max_memory_allocated() - held) / 2**20)
        seconds.append(time.perf_counter() - start)
    return seconds, peak if cuda else harness.peak_mib(lambda _: call(), args.device)


def _row(
    run: Run,
    frames: int,
    seconds: list[float],
    peak: float,
    cache_bytes: int,
    error: float,
    machine: Machine,
    before: list[Row],
) -> Row:
    case, median = run.case, statistics.median(seconds)
    others = {
        row.provider: row.seconds
        for row in before
        if (row.case, row.B, row.frames) == (case.name, run.batch, frames)
    } | {run.provider: median}

    def against(other: str) -> float | None:
        return others[other] / median if other in others else None

    return Row(
        case=case.name,
        provider=run.provider,
        dtype=case.dtype,
        B=run.batch,
        frames=frames,
        seconds=median,
        reps=len(seconds),
        fps=run.batch * (1 + 4 * (frames - 1)) / median,
        floor_s=_floor(case, frames, run.batch, machine),
        cache_mib=cache_bytes / 2**20,
        peak_mib=peak,
        error=error,
        speedup=against("eager"),
        speedup_released=against("eager+text"),
    )


def _floor(case: Case, frames: int, batch: int, machine: Machine) -> float:
    """The floor in seconds; every chunk has a context pass, including the last."""
    chunk, total = case.wan.chunk, 0.0
    for end in range(chunk, frames + 1, chunk):
        kept = end if case.wan.window is None else min(end, case.wan.window)
        sizes = (chunk * case.frame_tokens, kept * case.frame_tokens)
        passes, itemsize = len(STEPS) + 1, DTYPES[case.dtype].itemsize
        total += chunk_seconds(machine, case.wan, *sizes, passes, batch, itemsize)
    return total


def decode(args: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Time decoding one video with the Wan2.1 autoencoder and random weights."""
    frames, size, width, dtype = (21, (60, 104), 96, "bf16")
    if args.quick or args.device != "cuda":
        frames, size, width, dtype = (3, (8, 8), 8, "fp32")
    if find_spec("diffusers") is None:
        print("absent: diffusers is not installed, so the autoencoder is not measured")
        return [], {}
    try:
        from diffusers import AutoencoderKLWan

        from afd.models.wan.vae import VideoVAE

        with torch.device(args.device):
            vae = VideoVAE(AutoencoderKLWan(base_dim=width).to(DTYPES[dtype]))
            latent = torch.randn(1, frames, 16, *size)
        with torch.no_grad():
            vae.decode(latent[:, :2])
            seconds, peak = _timed(lambda: vae.decode(latent), args)
    except Exception as broken:
        return [], {"autoencoder": f"{type(broken).__name__}: {broken}"}
    median, shown = statistics.median(seconds), 1 + 4 * (frames - 1)
    what = ("autoencoder", "diffusers", dtype, 1, frames, median, len(seconds), shown / median)
    return [Row(*what, None, None, peak, None, None, None)], {}


def runs(args: argparse.Namespace) -> Iterator[Run]:
    """The real size on a GPU, else the toy's. When time runs short, the last runs are skipped."""
    if args.quick:
        tiny = WanConfig(
            dim=48, num_heads=2, ffn_dim=64, num_layers=2, freq_dim=16, text_dim=16, text_len=8
        )
        whole, batches = Case("quick", tiny, 4, 6, 9), (2,)
    elif args.device == "cuda":
        whole, batches = Case("480x832", WanConfig(), 60, 104, 21, "bf16"), (4, 8)
    else:
        toy = ToyConfig()
        whole, batches = Case("toy", toy.wan, toy.height, toy.width, toy.frames), (4, 8)
    cuda = args.device == "cuda"
    wan = replace(whole.wan, window=9, sink=3) if cuda else replace(whole.wan, window=6, sink=1)
    for provider in args.providers:
        yield Run(whole, 1, provider)
    ours = args.providers[-1]
    yield Run(replace(whole, name=f"{whole.name}, window", wan=wan), 1, ours)
    # For large batches only what is compared; eager last, because it takes half a minute.
    for provider in dict.fromkeys((ours, args.providers[0])):
        for batch in batches:
            yield Run(whole, batch, provider)


def show(rows: list[Row]) -> None:
    """The table of one provider."""
    report.table(
        f"{rows[0].case}, {rows[0].dtype}, B={rows[0].B}",
        ("provider",),
        (
            *("frames", "s", "reps", "FPS", "x floor", "cache MiB", "peak MiB", "error"),
            *("x eager", "x released"),
        ),
        [
            (
                *(row.provider, row.frames, row.seconds, row.reps, row.fps),
                None if row.floor_s is None else row.seconds / row.floor_s,
                *(row.cache_mib, row.peak_mib),
                None if row.error is None else f"{row.error:.1e}",
                *(row.speedup, row.speedup_released),
            )
            for row in rows
        ],
    )


def main(argv: list[str] | None = None) -> None:
    args = report.parse(report.arguments(__doc__.splitlines()[0], PROVIDERS), argv)
    if args.device != "cuda":
        args.providers = [name for name in args.providers if name != "graph"]
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    machine = Machine.measured(args.device, dtype, 0.02 if args.quick else 0.5)
    print(f"{machine.bandwidth / 1e9:.1f} GB/s, {machine.matmul / 1e12:.3g} TFLOP/s")
    before: list[Row] = []
    firsts: dict[int, Tensor] = {}

    def named() -> Iterator[tuple[str, report.Measure]]:
        for run in runs(args):
            yield str(run), partial(measure, run, machine, before, firsts, args)
            if run.case.wan.window is not None:
                yield "autoencoder", partial(decode, args)

    report.run("videos", HOW, named(), show, args, machine=asdict(machine))


if __name__ == "__main__":
    main()
