"""Distributed runs: how work is split over processes and results are combined.

Every process draws the random numbers of the whole batch and takes its share of them, so the
results of a run do not depend on the number of processes, except for the rounding of sums.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from afd.errors import ConfigError, ProcessLostError

# Elements per all-reduce: enough to saturate the interconnect, small next to the gradients.
BUCKET = 1 << 24
# How long one process waits for another beyond a teacher's deadline. A process that ended is
# detected immediately by its closed connection; this is for one that hangs.
PATIENCE = timedelta(minutes=30)
FAILED = "afd/failed"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process's place in a run; a single one without torchrun.

    Attributes:
        rank, world: its share of an update's videos, and the number of shares.
        part, parts: its place among the processes that have the same share and compute each of its
            videos together (`parallel.sequence`). Outside the student they do the same work.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    part: int = 0
    parts: int = 1

    @property
    def process(self) -> int:
        """Index of this process among all of the run."""
        return self.rank * self.parts + self.part

    @property
    def processes(self) -> int:
        """Number of processes of the run."""
        return self.world * self.parts

    def in_parts(self, parts: int) -> Ranks:
        """The same process, with `parts` processes for each share. Raises ConfigError if the
        processes do not divide into them."""
        refuse_parts(parts, self.processes)
        rank, part = divmod(self.process, parts)
        return Ranks(rank, self.processes // parts, self.device, part, parts)

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.process == 0

    def share(self, count: int) -> slice:
        """This process's contiguous share of `count` items; share sizes differ by at most one."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate all shares in order along dim 0; bitwise equal on every process.

        Shares may differ only in length. Detached, on x's device; x itself for a single process.
        """
        if self.processes == 1:
            return x
        # Processes with one share have the same; the first one's is taken.
        shares = self._gathered(x)[:: self.parts]
        rows = sum(len(one) for one in shares) // (x.element_size() * prod(x.shape[1:]))
        return torch.cat(shares).view(x.dtype).view(rows, *x.shape[1:])

    def _gathered(self, x: Tensor) -> list[Tensor]:
        """The bytes of every process's tensor."""
        # As bytes, because the backends support few dtypes.
        mine = x.detach().contiguous().view(-1).view(torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(self.processes)]
        collective(dist.all_gather, sizes, torch.tensor([mine.numel()], device=x.device))
        lengths = [int(size) for size in sizes]
        padded = mine.new_zeros(max(lengths))
        padded[: mine.numel()] = mine
        parts = [torch.empty_like(padded) for _ in lengths]
        collective(dist.all_gather, parts, padded)
        return [part[:length] for part, length in zip(parts, lengths, strict=True)]

    def sum_(self, tensors: list[Tensor], *, over_parts: bool = False) -> None:
        """Sum each tensor over the shares, in place; bitwise equal on every process.

        `over_parts`: each process of a share has a part of its sum (as of the student's gradients)
        rather than the whole.
        """
        if self.processes == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([x.reshape(-1) for x in bucket])
            if self.part > 0 and not over_parts:
                flat.zero_()
            collective(dist.all_reduce, flat)
            parts = flat.split([x.numel() for x in bucket])
            for x, part in zip(bucket, parts, strict=True):
                x.copy_(part.view_as(x))

    def same(self, value: Any) -> Any:
        """Broadcast the main process's value, which must be JSON (a tuple arrives as a list)."""
        if self.processes == 1:
            return value
        data = bytearray(json.dumps(value).encode()) if self.main else bytearray()
        size = torch.tensor([len(data)])
        collective(dist.broadcast, size, 0)
        sent = torch.zeros(int(size), dtype=torch.uint8)
        if self.main:
            sent = torch.frombuffer(data, dtype=torch.uint8)
        collective(dist.broadcast, sent, 0)
        return json.loads(bytes(sent.tolist()))

    def each(self, value: Any) -> list[Any]:
        """All-gather the values of all processes in order; each must be JSON."""
        if self.processes == 1:
            return [value]
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(bytes(one.tolist())) for one in self._gathered(data)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any process."""
        return any(self.each(flag))

    def barrier(self) -> None:
        """Wait until every process reaches this call."""
        self.each(None)


ALONE = Ranks()


def refuse_parts(parts: int, processes: int) -> None:
    """Raise ConfigError unless the processes divide into groups of `parts` for a video each."""
    if processes % parts:
        raise ConfigError(
            f"parallel.sequence is {parts}, and there are {processes} process(es); needed: a "
            "multiple of it"
        )


def collective(call: Callable[..., Any], *args: Any) -> None:
    """Run a collective call. Raises ProcessLostError if another process has ended or hangs."""
    try:
        call(*args)
    except RuntimeError as error:
        raise ProcessLostError(
            f"process {dist.get_rank()} lost another process of this run, which was killed or "
            f"does not respond ({str(error).splitlines()[0]})"
        ) from error


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group consecutive tensors of one dtype and device, up to BUCKET elements per group."""
    bucket: list[Tensor] = []
    for x in tensors:
        alike = bucket and (x.dtype, x.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (alike and sum(b.numel() for b in bucket) + x.numel() <= BUCKET):
            yield bucket
            bucket = []
        bucket.append(x)
    if bucket:
        yield bucket


@contextmanager
def join(device: str = "auto", *, patience_s: float = 0.0, parts: int = 1) -> Iterator[Ranks]:
    """Join the process group started by torchrun for the block; a single process without it.

    `device`: auto, cpu, cuda or cuda:N. `patience_s`: seconds beyond PATIENCE that a process may
    keep the rest waiting. `parts`: processes for each share of the videos (`Ranks`).

    An error that ends the block propagates on the process that raised it; all other processes,
    which fail as a consequence, exit silently with code 1. Raises ConfigError if the device is not
    available, or the processes do not divide into parts.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, world)
    if world == 1:
        yield Ranks(device=chosen).in_parts(parts)
        return
    if dist.is_initialized():  # joined by an outer block
        yield Ranks(dist.get_rank(), world, chosen).in_parts(parts)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    store, rank, world = next(rendezvous("env://"))
    # gloo for CPU tensors, so that small values never wait for the GPU's queue.
    backend = "gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl"
    patience = PATIENCE + timedelta(seconds=patience_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    try:
        ranks = Ranks(rank, world, chosen).in_parts(parts)
        yield ranks
        # No process leaves while another still works: that would tear down its group.
        ranks.barrier()
    except BaseException as error:
        # No orderly shutdown: the exit of this process is what unblocks the rest.
        if _is_first(store):
            raise
        raise SystemExit(1) from error
    dist.destroy_process_group()


def _is_first(store: Store) -> bool:
    """Whether this is the first process to fail, which therefore knows the reason."""
    try:
        return store.add(FAILED, 1) == 1
    except RuntimeError:  # the process that hosts the store has exited and reported the reason
        return False


def _device(name: str, world: int) -> torch.device:
    """The device of this process for a device name."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, and torch finds no CUDA here")
    if world == 1:
        return torch.device(name.replace("auto", "cuda"))
    if ":" in name:
        raise ConfigError(f"device is {name!r}; {world} processes need device=cuda, one GPU each")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"process {index} of this machine has no GPU; start at most "
            f"{torch.cuda.device_count()} processes (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", index)
