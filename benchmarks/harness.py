"""Interleaved timing of several providers of one computation, with the machine's floors.

Each repetition runs every provider once, in rotating order, so that clock changes and other load
affect all of them equally. Reports medians and the 20th and 80th percentile.

CPU: wall time of the call. CUDA: events around the call, with its launches queued behind a spin, so
that only device time is measured; the host time to issue the call is reported as well (if it is the
larger of the two, the call is launch-bound). Input sets rotate so that no inputs of the last call
remain in the last-level cache.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Run = Callable[[int], object]  # called with the index of the input set

_MIN_ROUNDS = 3
_MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """Milliseconds. host_ms is the median time to issue the call (CUDA only)."""

    median_ms: float
    p20: float
    p80: float
    host_ms: float | None
    reps: int


def timed(
    runs: Mapping[str, Run],
    device: str,
    sets: int,
    reps: int,
    budget_s: float,
    most_s: float = float("inf"),
) -> dict[str, Timing]:
    """Interleaved timing of `runs`: at most `reps` rounds, about `budget_s` seconds in total.

    Each run has an equal share of the budget. A run that has used its share is dropped, but never
    before three rounds, so that a slow run does not reduce the repetitions of faster ones; after
    `most_s` seconds no run begins that has run once.
    """
    began = perf_counter()
    names = list(runs)
    first = {name: _once(runs[name], 0, device, 0.0) for name in names}
    slow = {name for name in names if first[name][0] > 100 * budget_s}
    # How long the host takes to issue a call, without what the first one compiles.
    again = [name for name in names if name not in slow] if device == "cuda" else []
    host_s = {name: _once(runs[name], 0, device, 0.0)[1] for name in again}
    spent: dict[str, list[float]] = {name: [] for name in names}
    issued: dict[str, list[float]] = {name: [] for name in names}
    used_s = dict.fromkeys(names, 0.0)
    gc.collect()
    gc.disable()
    try:
        for rep in range(reps):
            shift = rep % len(names)
            for name in names[shift:] + names[:shift]:
                if rep >= _MIN_ROUNDS and used_s[name] > budget_s / len(names):
                    continue
                if spent[name] and perf_counter() - began > most_s:
                    continue
                head_start_s = 1.5 * host_s[name] + 2e-4 if name in host_s else 0.0
                start = perf_counter()
                ms, host = _once(runs[name], rep % sets, device, head_start_s)
                used_s[name] += perf_counter() - start
                spent[name].append(ms)
                issued[name].append(host * 1e3)
    finally:
        gc.enable()
    return {name: _timing(spent[name], issued[name], device) for name in names}


def _timing(ms: list[float], host_ms: list[float], device: str) -> Timing:
    p20, median, p80 = _percentiles(ms)
    host = _percentiles(host_ms)[1] if device == "cuda" else None
    return Timing(median, p20, p80, host, len(ms))


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def _once(run: Run, index: int, device: str, head_start_s: float) -> tuple[float, float]:
    """Milliseconds of one call, and the seconds the host took to issue it."""
    if device != "cuda":
        start = perf_counter()
        run(index)
        elapsed = perf_counter() - start
        return elapsed * 1e3, elapsed
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    # The spin covers the time to issue the call. No clock is above 2e9 cycles per second.
    torch.cuda._sleep(int(2e9 * head_start_s))
    first.record()
    start = perf_counter()
    run(index)
    issued = perf_counter() - start
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last), issued


def peak_mib(run: Run, device: str) -> float:
    """Peak memory allocated during one call, above that allocated before, in MiB.

    CUDA: the caching allocator's peak. CPU: from the profiler's record of PyTorch's CPU allocator,
    on all threads. Neither includes allocations by compiled code outside PyTorch (our core
    allocates nothing there beyond a few scalars per tile).
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(0)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / _MIB
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # what earlier calls left would be freed, and counted, in this one
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run(0)
    del result
    inner: Any = profiler.profiler
    events = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak / _MIB


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the lines that the profiler prints to stderr from C++ at each start and stop."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


class Traffic(TorchDispatchMode):
    """Counts bytes read and written by unfused ops: all inputs and outputs of non-view ops."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.ops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.ops += 1
            for value in tree_leaves((args, kwargs, out)):
                if isinstance(value, torch.Tensor):
                    held = value.untyped_storage().nbytes()  # an expanded tensor is read once
                    self.bytes += min(held, value.numel() * value.element_size())
        return out


def traffic(run: Run) -> tuple[int, int]:
    """Bytes and number of ops of one eager call, as counted by Traffic."""
    with Traffic() as counter:
        run(0)
    return counter.bytes, counter.ops


def cache_bytes(device: str) -> int:
    """Size of the last-level cache, 32 MiB if a CPU does not report it."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    found = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return int(found[-1].read_text().rstrip("K\n")) * 1024 if found else 32 * _MIB


def input_sets(bytes_per_set: int, device: str) -> int:
    """Number of input sets to rotate so that each is evicted before it is reused."""
    return 1 + min(7, 2 * cache_bytes(device) // max(bytes_per_set, 1))


def free_bytes(device: str) -> int:
    """Memory available for allocation, in bytes."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    lines = (
        Path("/proc/meminfo").read_text().splitlines() if os.path.exists("/proc/meminfo") else []
    )
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    if "MemAvailable" in kib:
        return kib["MemAvailable"] * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
