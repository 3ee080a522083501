"""What the processes of a run send each other in an update.

Of what P processes gather, scatter or exchange, each sends (P - 1)/P, and twice that in an
all-reduce. Scores, metrics and the discriminator's gradients are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from afd.methods.config import StudentOptimizerConfig
from afd.methods.copies import Place
from afd.planning import cost_model as cost
from afd.planning.work import Work


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in an update, of one kind of collective call."""

    name: str
    bytes: float
    note: str


@dataclass(frozen=True)
class _Pass:
    """One pass through the student by one process.

    Attributes:
        videos: videos in it.
        frames: frames of each that its blocks compute.
        out: frames whose velocity it returns; 0: only keys and values.
        trained: whether a backward pass follows.
        adapted: whether the network has adapters; false for a frozen copy beside them.
    """

    videos: int
    frames: int
    out: int
    trained: bool = False
    adapted: bool = True


def traffic(work: Work) -> list[Traffic]:
    """The communication of an update in which the student learns; empty for a single process."""
    found: list[Traffic] = []
    if work.sharded:
        found += _sharded(work)
    elif work.processes > 1:
        numbers = len(work.weights.trained) * work.net.trained
        each = 2 * _share(work.processes) * cost.FLOAT * numbers
        found.append(Traffic("all-reduce", each, "gradients, fp32, once an update"))
    if work.parts > 1:
        found += _exchanged(work)
    return found


def _share(processes: int) -> float:
    return (processes - 1) / processes


def _sharded(work: Work) -> Iterator[Traffic]:
    """Gathered weights and scattered gradients of FSDP."""
    passes = list(_rollout(work)), list(_update(work))
    mean = work.places.mean
    rolled, forward = (mean(sum(each for each, _ in of) for of in one) for one in passes)
    # A pass over the prompt begins every rollout batch, and another one follows at a switch.
    texts = [_batches(work, one) * (1 + work.places.switches(one)) for one in work.places.all]
    rolled += mean(texts) if work.rolls else 0
    backward = mean(sum(n for n, one in of if one.trained) for of in passes[1])
    bare = mean(sum(n for n, one in of if not one.adapted) for of in passes[1])
    network, adapters, trained = _numbers(work)
    every = rolled + forward + backward
    numbers = every * network + (every - bare) * adapters
    many = f"{forward:.4g} forward and {backward:.4g} backward passes"
    note = f"weights of each block in turn: {rolled:.4g} passes of the rollout, {many}"
    yield Traffic("all-gather", _share(work.processes) * numbers * work.item, note)
    scattered = backward * _share(work.processes) * trained * cost.FLOAT
    yield Traffic("reduce-scatter", scattered, "gradients, fp32, after each backward pass")


def _numbers(work: Work) -> tuple[int, int, int]:
    """Parameters that a pass gathers of the network and of all adapters in it, and those whose
    gradients it scatters, with FSDP's padding of each to a multiple of the processes in its first
    dimension."""
    student, parts = work.config.student, work.processes

    def padded(x: Tensor | tuple[int, ...]) -> int:
        shape = x.shape if isinstance(x, Tensor) else x
        return -(-shape[0] // parts) * parts * prod(shape[1:])

    network = student.skeleton()
    held = dict(network.named_parameters())
    whole = sum(map(padded, held.values()))
    if student.lora is None:
        return whole, 0, whole

    def adapter(rank: int) -> int:
        layers = (name.rpartition(".weight") for name in held)
        shapes = [
            held[layer + kind].shape
            for layer, kind, rest in layers
            if kind and not rest and re.fullmatch(network.adapted, layer)
        ]
        return sum(padded((rank, columns)) + padded((rows, rank)) for rows, columns in shapes)

    trained = adapter(student.lora.rank)
    frozen = sum(map(adapter, work.weights.frozen))
    return whole, len(work.weights.own) * trained + frozen, trained


def _exchanged(work: Work) -> Iterator[Traffic]:
    """All-to-alls around self-attention, and gathered predictions, of a group with one video."""
    net, parts = work.net, work.parts
    own = -(-net.tokens // parts)
    sizes = work.config.student.sizes()
    token = net.dim * work.item * _share(parts)
    checkpointed = work.config.student.checkpoint_blocks

    def around(one: _Pass) -> float:
        """Queries, keys and values to heads, and the result to tokens, in every layer."""
        last = one.out * token
        others = (net.layers - 1) * 4 * one.frames * token
        forward = others + 3 * one.frames * token + last
        again = (forward if one.out else others) if one.trained and checkpointed else 0.0
        return one.videos * own * (forward * (1 + one.trained) + again)

    def joined(one: _Pass) -> float:
        pixels = sizes.out_dim * prod(sizes.patch)
        return one.videos * one.out * own * pixels * work.item * (parts - 1)

    def mean(of: Callable[[_Pass], float]) -> float:
        both = (_rollout(work), _update(work))
        average = work.places.mean
        return sum(average(sum(n * of(one) for n, one in each) for each in some) for some in both)

    note = f"q, k, v and the result of self-attention in each layer, among {parts} processes"
    yield Traffic("all-to-all", mean(around), note)
    yield Traffic("velocities", mean(joined), "all-gather of what each pass returns")


def _rollout(work: Work) -> list[list[tuple[float, _Pass]]]:
    """Passes of the rollouts of an update at each of its places."""
    return [list(_rolled(work, place)) for place in work.places.all] if work.rolls else [[]]


def _widths(work: Work, place: Place) -> list[tuple[int, int, int]]:
    """Streams of each rollout batch: (before they fork, after, batches after the fork)."""
    batch = min(work.config.student.rollout_batch or work.videos, work.videos)
    if place.fork is None:
        whole, rest = divmod(work.videos, batch)
        return [(0, n, 1) for n in [batch] * whole + [rest] * bool(rest)]
    count, copies = max(1, batch // work.group), min(batch, work.group)
    whole, rest = divmod(work.prompts, count)
    groups = [count] * whole + [rest] * bool(rest)
    return [(n, n * copies, -(-work.group // copies)) for n in groups]


def _batches(work: Work, place: Place) -> int:
    return len(_widths(work, place))


def _rolled(work: Work, place: Place) -> Iterator[tuple[float, _Pass]]:
    net, student = work.net, work.config.student
    steps, first = len(student.denoising_steps), student.first_chunk_steps
    end, fork = place.clip + net.chunks, place.fork or 0

    def passes(chunks: range) -> int:
        """Denoising steps and context passes of these chunks."""
        more = len(first) - steps if first is not None and 0 in chunks else 0
        return len(chunks) * (steps + 1) + more

    for before, after, times in _widths(work, place):
        for streams, chunks, repeats in (
            (before, range(fork), 1),
            (after, range(fork, end), times),
        ):
            contexts = len(chunks) - (chunks.stop == end)
            yield repeats * contexts, _Pass(streams, net.chunk, 0)
            denoised = passes(chunks) - len(chunks)
            yield repeats * denoised, _Pass(streams, net.chunk, net.chunk)
        for again, likely in work.places.recaches(place).items():
            yield likely, _Pass(before or after, again.frames, 0)


def _update(work: Work) -> list[list[tuple[float, _Pass]]]:
    """Passes of the student's update at each of its places; replayed videos are not counted."""
    places = work.places.all if work.config.method == "afd" else [Place()]
    return [list(_learned(work, place)) for place in places]


def _learned(work: Work, place: Place) -> Iterator[tuple[float, _Pass]]:
    config, net, method = work.config, work.net, work.method
    chunks = min(getattr(method, "chunks_per_update", None) or net.chunks, net.chunks - place.first)
    noisy, context = chunks * net.chunk, getattr(method, "context", "own_context")
    videos = work.videos if work.rolls else work.prompts
    draws = getattr(method, "draws", 1)
    references = len(work.priors())
    # Passes through a frozen copy of a network with adapters: it is that of one reference.
    copied = sum(name in work.priors() for name in work.weights.copies)
    for n in _pieces(videos * draws, method):
        clean = _Pass(min(n, videos), net.frames, 0)
        if config.method == "sft":
            yield 1, _Pass(n, net.frames, 0, trained=True)
            yield 1, _Pass(n, noisy, noisy, trained=True)
            continue
        others = references + (config.method == "afd")
        halves = net.frames if context == "recompute" else 0
        whole = _Pass(n, halves + noisy, noisy)
        yield others - copied, whole
        yield copied, replace(whole, adapted=False)
        yield 1, replace(whole, trained=True)
        if context == "own_context":
            yield others + 1 - copied, clean
            yield copied, replace(clean, adapted=False)
        if context == "shared_context" and not work.keeps_context():
            yield 1, clean
        if config.method == "dmd":
            yield 2, clean
            yield 2, _Pass(n, net.frames, net.frames)
    if config.method == "dmd":
        for count in (work.prompts, videos):
            for n in _pieces(count, method):
                fits = config.dmd.score_updates
                yield fits, _Pass(n, net.frames, 0, trained=True)
                yield fits, _Pass(n, net.frames, net.frames, trained=True)


def _pieces(copies: int, method: StudentOptimizerConfig) -> list[int]:
    width = method.micro_batch or copies
    whole, rest = divmod(copies, width)
    return [width] * whole + [rest] * bool(rest)
