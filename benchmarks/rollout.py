"""The streaming rollout: chunks per second against the same network written plainly.

    python benchmarks/rollout.py                 # CPU: toy size, and dim 256 at three latent sizes
    python benchmarks/rollout.py --device cuda   # 480x832, 1.3 B random weights in bfloat16

Timed is a chunk of a running stream: its denoising steps and its context pass, with given noise and
(if the case has one) a full window, so that every chunk shifts the window. Providers are
interleaved in one run. Before timing, every provider streams the same video from the same noise;
one that disagrees with eager in float32 is not timed and fails the run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd.lab.student import ToyConfig
from afd.models.wan.kv_cache import cache_bytes
from afd.models.wan.student import WanStudent
from afd.models.wan.types import WanConfig
from afd.rollout import denoise_chunk
from benchmarks import harness, report
from benchmarks.eager_wan import EagerWan, denoised, random_network
from benchmarks.hardware import Machine, chunk_seconds, pass_work

# "eager+text" also runs the text MLP in every call, as the released code does; "eager" caches its
# result, which is the only possible gain where matrix products dominate.
PROVIDERS = ("eager", "eager+text", "ours", "compile", "graph")
STEPS = (1000, 750, 500, 250)
# Relative L2 error of a video of several chunks between two float32 orders of the same sums;
# bfloat16's own error is about 1e-2, and it grows from chunk to chunk.
BOUND = {"fp32": 1e-4, "bf16": 0.2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HOW = (
    "ms: median of one chunk (denoising steps and context pass); FPS: video frames, four per "
    "latent frame; floor: hardware.py's, from the copy bandwidth and the product rate measured in "
    "this run; GB: what the algorithm moves per chunk; traffic: what the provider's ops read and "
    "write, counted; syncs: calls that make the host wait for the device, per chunk; cache: bytes "
    "held, and the formula; peak: allocated above that during a chunk; x released: "
    "against eager+text, which runs the text MLP in every call as the released code does."
)
_SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


@dataclass(frozen=True)
class Case:
    """One network and stream. `frames`: cache size of a stream without a window."""

    name: str
    wan: WanConfig
    height: int
    width: int
    frames: int
    dtype: str = "fp32"

    @property
    def frame_tokens(self) -> int:
        rows, cols = self.wan.grid(self.height, self.width)
        return rows * cols

    @property
    def kept(self) -> int:
        """Frames that a timed chunk attends, including its own."""
        return self.frames if self.wan.window is None else self.wan.window


@dataclass(frozen=True)
class Row:
    """One provider on one case; times in milliseconds per chunk."""

    case: str
    provider: str
    dtype: str
    B: int
    tokens: int
    keys: int
    median_ms: float
    p20: float
    p80: float
    host_ms: float | None
    reps: int
    chunks_per_s: float
    fps: float
    floor_ms: float
    gflop: float
    gb: float
    traffic_gb: float
    ops: int
    syncs: int
    cache_mib: float
    formula_mib: float
    peak_mib: float
    error: float
    speedup: float | None  # against "eager"
    speedup_released: float | None  # against "eager+text"


class Stream:
    """A provider's endless stream: `next()` makes the next chunk, from noise shared by all.

    Without a window the last chunk is repeated, since later ones would need a larger cache.
    """

    def __init__(self, case: Case, batch: int, student: WanStudent, provider: str) -> None:
        self.case, self.batch, self.student = case, batch, student
        self.start = 0
        device, wan = student.device, case.wan
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, wan.chunk, *student.frame_shape)
        self.noise = [
            torch.randn(shape, generator=generator, device=device).to(student.dtype) for _ in STEPS
        ]
        text = torch.randn(
            (batch, wan.text_len, wan.text_dim), generator=generator, device=device
        ).to(student.dtype)
        self.levels = student.levels(STEPS)
        self.clean = student.levels(STEPS)[-1].at(0.0, 0.0, device)
        self.eager: EagerWan | None = None
        if provider.startswith("eager"):
            weights = student.net.state_dict()
            self.eager = EagerWan(wan, weights, embeds_text=provider == "eager+text")
            self.cache: Any = self.eager.new_cache(
                text, case.frames, case.frame_tokens, wan.window, wan.sink
            )
        else:
            self.cache = student.new_cache(text, case.frames)

    def next(self) -> Tensor:
        start = self.start
        if self.case.wan.window is not None or start + 2 * self.case.wan.chunk <= self.case.frames:
            self.start += self.case.wan.chunk
        if self.eager is not None:
            times = tuple(level.t for level in self.levels)
            return denoised(self.eager, self.cache, self.noise, times, start, self.student.schedule)
        x0 = denoise_chunk(
            self.student, self.cache, lambda _, step: self.noise[step], self.levels, 0, start
        )
        self.student.remember(x0, self.clean, self.cache, start)
        return x0

    @property
    def cache_bytes(self) -> int:
        if self.eager is None:
            return int(self.cache.bytes)
        held = [x for layer in self.cache.layers for x in (layer.k, layer.v)]
        held += [x for kv in self.cache.text for x in kv]
        return sum(x.numel() * x.element_size() for x in held)


class Counter(TorchDispatchMode):
    """Counts a chunk's ops, the bytes they read and write, and host synchronisations."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = harness.Traffic()
        self.syncs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = self.traffic.__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        moved = [x.device.type for x in (*args, out) if isinstance(x, Tensor)]
        across = name in ("_to_copy", "copy_") and len(set(moved)) > 1
        self.syncs += name in _SYNCS or across
        return out


def make_student(case: Case, device: str, provider: str) -> WanStudent:
    """Make a student, with the same weights for every provider."""
    net = random_network(case.wan, device, DTYPES[case.dtype])
    if not provider.startswith("eager"):
        net.fuse_projections()
    if provider == "compile":
        net.compile_blocks()
    student = WanStudent(net, height=case.height, width=case.width, frames=case.frames)
    if provider == "graph":
        student.use_graphs()
    return student


def measure(
    case: Case, batch: int, machine: Machine, args: Any
) -> tuple[list[Row], dict[str, str]]:
    """Rows of the providers that agree, and why the rest were not timed."""
    torch._dynamo.reset()  # a compiled function keeps at most eight specialisations
    streams, failed = {}, {}
    videos: dict[str, Tensor] = {}
    fill = -(-case.kept // case.wan.chunk) + 2
    for provider in args.providers:
        try:
            student = make_student(case, args.device, provider)
            stream = Stream(case, batch, student, provider)
            videos[provider] = torch.cat([stream.next() for _ in range(fill)], 1).float().cpu()
        except Exception as error:  # a failure must not lose the other providers' numbers
            failed[f"{case.name} {provider}"] = f"{type(error).__name__}: {error}"
            continue
        streams[provider] = stream
    if not videos:
        return [], failed
    expected = videos.get("eager", next(iter(videos.values())))
    errors = {name: _distance(video, expected) for name, video in videos.items()}
    for name, distance in errors.items():
        if not distance <= BOUND[case.dtype]:
            failed[f"{case.name} {name}"] = f"relative error {distance:.2g} against eager"
            del streams[name]
    runs: dict[str, harness.Run] = {name: _chunk(stream) for name, stream in streams.items()}
    timings = harness.timed(runs, args.device, 1, args.reps, args.budget)
    rows = []

    def speedup(against: str, ms: float) -> float | None:
        return timings[against].median_ms / ms if against in timings else None

    for name, stream in streams.items():
        timing = timings[name]
        rows.append(
            Row(
                case=case.name,
                provider=name,
                dtype=case.dtype,
                B=batch,
                **asdict(timing),
                chunks_per_s=1e3 * batch / timing.median_ms,
                fps=4e3 * batch * case.wan.chunk / timing.median_ms,
                speedup=speedup("eager", timing.median_ms),
                speedup_released=speedup("eager+text", timing.median_ms),
                error=errors[name],
                **_work(case, batch, machine),
                **_counted(case, batch, stream, args.device),
            )
        )
    return rows, failed


def _chunk(stream: Stream) -> harness.Run:
    return lambda _: stream.next()


def _distance(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


def _work(case: Case, batch: int, machine: Machine) -> dict[str, Any]:
    tokens = case.wan.chunk * case.frame_tokens
    keys, passes = case.kept * case.frame_tokens, len(STEPS) + 1
    itemsize = DTYPES[case.dtype].itemsize
    work = pass_work(case.wan, tokens, keys, batch, itemsize)
    floor = chunk_seconds(machine, case.wan, tokens, keys, passes, batch, itemsize)
    return {
        "tokens": tokens,
        "keys": keys,
        "floor_ms": 1e3 * floor,
        "gflop": passes * work.flop / 1e9,
        "gb": passes * work.bytes / 1e9,
    }


def _counted(case: Case, batch: int, stream: Stream, device: str) -> dict[str, Any]:
    with Counter() as counter:
        stream.next()
    wan, slots = case.wan, case.kept * case.frame_tokens
    formula = cache_bytes(wan.num_layers, batch, slots, wan.text_len, wan.dim, DTYPES[case.dtype])
    return {
        "traffic_gb": counter.traffic.bytes / 1e9,
        "ops": counter.traffic.ops,
        "syncs": counter.syncs,
        "cache_mib": stream.cache_bytes / 2**20,
        "formula_mib": formula / 2**20,
        "peak_mib": harness.peak_mib(_chunk(stream), device),
    }


def cases(args: Any) -> Iterator[Case]:
    """The released size on a GPU; else sizes feasible on a CPU."""
    small = WanConfig(dim=256, num_heads=4, ffn_dim=1024, num_layers=2)
    windowed = replace(small, window=9, sink=3)
    if args.quick:
        tiny = replace(windowed, dim=48, num_heads=2, ffn_dim=64, text_len=8, text_dim=16)
        yield Case("quick", tiny, 4, 6, 21)
        yield Case("quick, no window", replace(tiny, window=None, sink=0), 4, 6, 6)
        return
    if args.device == "cuda":
        whole = WanConfig()
        yield Case("480x832, 21 frames", whole, 60, 104, 21, "bf16")
        yield Case(
            "480x832, window 9, sink 3", replace(whole, window=9, sink=3), 60, 104, 21, "bf16"
        )
        return
    toy = ToyConfig()
    yield Case("toy", toy.wan, toy.height, toy.width, toy.frames)
    yield Case("dim 256, 8x8, window 9, sink 3", windowed, 8, 8, 21)
    yield Case("dim 256, 16x16, window 9, sink 3", windowed, 16, 16, 21)
    yield Case("dim 256, 30x52, window 9, sink 3", windowed, 30, 52, 21)
    yield Case("dim 256, 16x16, 21 frames", small, 16, 16, 21)


def show(rows: list[Row]) -> None:
    """The table of one case."""
    first = rows[0]
    title = f"{first.case}: {first.tokens} tokens see {first.keys}, {first.dtype}, B={first.B}"
    report.table(
        title,
        ("provider",),
        (
            *("ms a chunk", "p20", "p80", "host ms", "chunks/s", "FPS", "x floor", "GFLOP", "GB"),
            *("traffic GB", "ops", "syncs", "cache MiB", "formula", "peak MiB", "error", "x eager"),
            "x released",
        ),
        [
            (
                *(row.provider, row.median_ms, row.p20, row.p80, row.host_ms, row.chunks_per_s),
                *(row.fps, row.median_ms / row.floor_ms, row.gflop, row.gb, row.traffic_gb),
                *(row.ops, row.syncs, row.cache_mib, row.formula_mib, row.peak_mib),
                *(f"{row.error:.1e}", row.speedup, row.speedup_released),
            )
            for row in rows
        ],
    )


def main(argv: list[str] | None = None) -> None:
    parser = report.arguments(__doc__.splitlines()[0], PROVIDERS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    args = report.parse(parser, argv)
    if args.device != "cuda":
        args.providers = [name for name in args.providers if name != "graph"]
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    machine = Machine.measured(args.device, dtype, 0.02 if args.quick else 0.5)
    print(f"{machine.bandwidth / 1e9:.1f} GB/s, {machine.matmul / 1e12:.3g} TFLOP/s")
    named = (
        (f"{case.name} B={batch}", partial(measure, case, batch, machine, args))
        for case in cases(args)
        for batch in args.batch
    )
    report.run("rollout", HOW, named, show, args, machine=asdict(machine))


if __name__ == "__main__":
    main()
