"""What a machine could do at best: floors of attention, elementwise ops and a rollout's chunk.

    python -m benchmarks.hardware                       # of this machine, which it measures
    python -m benchmarks.hardware --bandwidth 4.3e12 --matmul 788e12     # of one that is not here
    python -m benchmarks.hardware --bandwidth 4.3e12 --matmul 788e12 --ops   # of single ops

A floor divides the algorithm's unavoidable work by two rates of the machine: bytes per second of a
large copy (reads plus writes) and floating-point operations per second of a large matrix product.
Products and attention take the larger of arithmetic and memory time, everything else its memory
time; parts run sequentially, so a pass is their sum. Partially filled waves, launches and
synchronisation are not included.

Letters: D width, L tokens, K keys, B videos, T tokens per frame.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

import torch
from rich.console import Console
from rich.table import Table

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd.models.wan.types import WanConfig
from benchmarks import report

# Bytes that a channel of a token costs in elements of the dtype, once through each fused op of a
# block: q and k in and out and v copied into the cache (6); three times residual and branch in,
# residual and normed out (4 each); the query of the cross-attention in and out (2).
FUSED_ELEMENTS = 6 + 3 * 4 + 2


@dataclass(frozen=True)
class Machine:
    """Two rates: bytes per second of a copy, FLOP per second of a matrix product."""

    bandwidth: float
    matmul: float

    @classmethod
    def measured(cls, device: str, dtype: torch.dtype, seconds: float = 0.3) -> Machine:
        """Measure both rates: fastest call within `seconds` each, at sizes beyond the caches."""
        big = device == "cuda"
        source = torch.empty(2**30 if big else 2**27, dtype=torch.uint8, device=device).fill_(1)
        target = torch.empty_like(source)
        side = 8192 if big else 1536
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        copied = _fastest(lambda: target.copy_(source), device, seconds)
        multiplied = _fastest(lambda: a @ b, device, seconds)
        return cls(2 * source.numel() / copied, 2 * side**3 / multiplied)


@dataclass(frozen=True)
class Work:
    """The work of a pass: FLOP of products and of attention, and bytes of each part."""

    linear_flop: float
    linear_bytes: float
    attention_flop: float
    attention_bytes: float
    elementwise_bytes: float

    @property
    def flop(self) -> float:
        return self.linear_flop + self.attention_flop

    @property
    def bytes(self) -> float:
        return self.linear_bytes + self.attention_bytes + self.elementwise_bytes

    def seconds(self, machine: Machine) -> float:
        """The floor in seconds."""
        linear = max(self.linear_flop / machine.matmul, self.linear_bytes / machine.bandwidth)
        attention = attention_seconds(machine, self.attention_flop, self.attention_bytes)
        return linear + attention + elementwise_seconds(machine, self.elementwise_bytes)


def attention_flop(queries: int, keys: int, width: int) -> float:
    """FLOP of an attention forward (two products) over all heads."""
    return 4.0 * queries * keys * width


def attention_seconds(machine: Machine, flop: float, nbytes: float) -> float:
    """The floor of an attention call."""
    return max(flop / machine.matmul, nbytes / machine.bandwidth)


def elementwise_seconds(machine: Machine, nbytes: float) -> float:
    """The floor of a memory-bound op."""
    return nbytes / machine.bandwidth


def pass_work(config: WanConfig, tokens: int, keys: int, batch: int, itemsize: int) -> Work:
    """One pass over a chunk of `tokens` tokens per video attending `keys` tokens, with itself."""
    D, ffn, layers = config.dim, config.ffn_dim, config.num_layers
    # q, k, v, o of self-attention, q and o of cross-attention, and the two of the feed-forward.
    weights = 6 * D * D + 2 * D * ffn
    rows = batch * tokens
    streamed = rows * (12 * D + 2 * (D + ffn))  # in and out of the eight products
    text = config.text_len
    seen = batch * (2 * tokens + 2 * keys + 2 * tokens + 2 * text) * D
    return Work(
        linear_flop=2.0 * layers * weights * rows,
        linear_bytes=float(layers * itemsize * (weights + streamed)),
        attention_flop=layers * batch * attention_flop(tokens, keys + text, D),
        attention_bytes=float(layers * itemsize * seen),
        elementwise_bytes=float(layers * itemsize * rows * D * FUSED_ELEMENTS),
    )


def chunk_seconds(
    machine: Machine,
    config: WanConfig,
    tokens: int,
    keys: int,
    passes: int,
    batch: int = 1,
    itemsize: int = 2,
) -> float:
    """The floor of a chunk: denoising steps and context pass, `passes` in total."""
    return passes * pass_work(config, tokens, keys, batch, itemsize).seconds(machine)


def rollout_seconds(
    machine: Machine,
    config: WanConfig,
    frame_tokens: int,
    frames: int,
    steps: int,
    batch: int = 1,
    itemsize: int = 2,
) -> float:
    """The floor of a whole stream; the last chunk has no context pass."""
    total = 0.0
    for end in range(config.chunk, frames + 1, config.chunk):
        kept = end if config.window is None else min(end, config.window)
        passes = steps + (end < frames)
        sizes = (config.chunk * frame_tokens, kept * frame_tokens)
        total += chunk_seconds(machine, config, *sizes, passes, batch, itemsize)
    return total


def _fastest(call: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of the fastest call among those that fit into `seconds`, at least one.

    With one CPU thread: process time, which other load on the machine does not affect.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = process_time if alone else perf_counter
    best, start = float("inf"), perf_counter()
    for _ in range(3):
        call()
    while perf_counter() - start < seconds or best == float("inf"):
        if device == "cuda":
            torch.cuda.synchronize()
        before = clock()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - before)
    return best


def op_floors(machine: Machine) -> Iterator[tuple[str, float, float, float]]:
    """Name, FLOP, minimum bytes and milliseconds of each case in the GPU targets."""
    # Imported here, because they import this file.
    from benchmarks import attention, attention_parts, forward_noise, nft_loss, row_ops
    from benchmarks.suite import WAN_480

    asked = argparse.Namespace(device="cuda", quick=False, batch=[8, 32], dtype=["bf16"])
    asked.shape, asked.weighting = WAN_480, ["x0_adaptive"]
    for case in (*nft_loss.cases(asked), *forward_noise.cases(asked)):
        for noise in ("seed", "given"):
            moved = case.bytes(noise)[1]
            what = f"{case.op} {case.dtype} B={case.batch}, noise {noise}"
            yield what, 0.0, moved, 1e3 * elementwise_seconds(machine, moved)
    for row in row_ops.cases(asked):
        yield str(row), 0.0, row.bytes, 1e3 * elementwise_seconds(machine, row.bytes)
    for seen in (*attention.cases(asked), *attention_parts.cases(asked)):
        channels = seen.heads * seen.width * attention.DTYPES[seen.dtype].itemsize
        moved = 2 * seen.batch * (seen.rows.queries + seen.rows.keys) * channels
        moved *= 2 if seen.backward else 1  # gradients are read and written likewise
        what = f"attention, {seen.name} B={seen.batch}"
        if seen.backward and not isinstance(seen, attention_parts.Backward):
            what += ", forward and backward"
        yield what, seen.flop, moved, 1e3 * attention_seconds(machine, seen.flop, moved)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bandwidth", type=float, help="bytes per second; measured if absent")
    parser.add_argument("--matmul", type=float, help="FLOP per second; measured if absent")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--ops", action="store_true", help="of single ops instead of a rollout")
    args = parser.parse_args(argv)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if args.bandwidth and args.matmul:
        machine = Machine(args.bandwidth, args.matmul)
    else:
        machine = Machine.measured(args.device, dtype)
    print(f"{machine.bandwidth / 1e9:.1f} GB/s, {machine.matmul / 1e12:.3g} TFLOP/s")
    if args.ops:
        report.table(
            "Ops at 480x832: floors",
            ("op",),
            ("TFLOP", "GB", "ms"),
            [(op, flop / 1e12, moved / 1e9, ms) for op, flop, moved, ms in op_floors(machine)],
        )
        return
    table = Table(title="Wan2.1 1.3B, 480x832, 81 frames, 4 steps: floors", title_justify="left")
    for name in ("chunk", "TFLOP a pass", "GB a pass", *(f"ms a chunk, B={b}" for b in args.batch)):
        table.add_column(name, justify="right")
    config, tokens = WanConfig(), 1560
    for chunk in range(1, 8):
        keys = chunk * config.chunk * tokens
        work = pass_work(config, config.chunk * tokens, keys, 1, 2)
        passes = 5 if chunk < 7 else 4
        times = [
            1e3 * chunk_seconds(machine, config, config.chunk * tokens, keys, passes, b)
            for b in args.batch
        ]
        table.add_row(
            str(chunk),
            f"{work.flop / 1e12:.1f}",
            f"{work.bytes / 1e9:.1f}",
            *(f"{ms:.1f}" for ms in times),
        )
    Console(width=120).print(table)
    for batch in args.batch:
        seconds = rollout_seconds(machine, config, tokens, 21, 4, batch)
        print(f"B={batch}: {seconds:.2f} s, {81 * batch / seconds:.1f} frames per second")


if __name__ == "__main__":
    main()
