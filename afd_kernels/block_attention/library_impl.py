"""block_attention by calling an attention library once per interval.

If a block of queries has two intervals, the two outputs are merged by their LSE; the backward of an
interval takes the merged output and LSE and is then exact (MATH.md). Nothing is masked and no keys
are copied: every call gets views. Letters: B streams, L queries, N keys, h heads, d channels.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from afd_kernels.block_attention import library_cuda
from afd_kernels.block_attention.contract import AttentionInputs
from afd_kernels.block_attention.intervals import Intervals, Row
from afd_kernels.block_attention.library_cpu import CpuFlash, attend_again

_CPU = CpuFlash()
_HALF = (torch.bfloat16, torch.float16)
# Widest head of the Triton kernels.
_TRITON_WIDEST = 128


class Library(Protocol):
    """Softmax attention of every query with every key; tensors [B, l, h, d], lse fp32 [B, h, l]."""

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """out and lse."""
        ...

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        keys: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """dq and, if `keys`, dk and dv, given out and lse over all keys of the queries."""
        ...


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    """The reason why no library can run these dtypes on this device type, or None."""
    if torch.float64 in dtypes:
        return "attention libraries do not support float64"
    if device == "cpu":
        return None
    if device != "cuda":
        return f"there is no attention library for {device}"
    return library_cuda.refuse(dtypes)


def unfit(tensors: Sequence[Tensor]) -> str | None:
    """The reason why no library can read these tensors [B, l, h, d] in place, or None."""
    return None if tensors[0].device.type == "cpu" else library_cuda.unfit(tensors)


def describe(device: str, dtype: torch.dtype) -> str:
    """Describe which libraries run the forward and the full backward of 128-channel heads.

    Includes the reasons against those of higher priority.
    """
    if device == "cpu":
        return f"forward and backward {_CPU.name}"
    capability = library_cuda.major()
    forward, backward = (_name(pick(capability, 128, backward=b)) for b in (False, True))
    earlier = itertools.takewhile(
        lambda item: item[0] != forward, library_cuda.reasons(capability, 128).items()
    )
    passed = "".join(f"; not {name}: {why}" for name, why in earlier)
    return f"forward {forward}, backward {backward}{passed}"


def _name(runs: Any) -> str:
    if isinstance(runs, ModuleType):
        return runs.__name__.rpartition(".")[2].removesuffix("_impl")
    return str(runs.name)


def pick(major: int, head_dim: int, *, backward: bool, keys: bool = True) -> Any:
    """The library, or this op's backend module, that runs this head width on a GPU.

    Our own kernels run the backward if no key needs a gradient (dq alone takes three matrix
    products instead of five), and instead of PyTorch's deterministic flash attention 2, which is
    slow.
    """
    library = library_cuda.first(major, head_dim, backward)
    own = _backend("triton_impl") if head_dim <= _TRITON_WIDEST else None
    if library is None:
        return own or _backend("reference")
    newest = isinstance(library, (library_cuda.Flash3, library_cuda.Flash4))
    return own if backward and own and not (newest and keys) else library


@functools.cache
def _backend(name: str) -> Any | None:
    """Another backend of this op, or None if it cannot be imported or refuses CUDA tensors."""
    try:
        module = importlib.import_module(f"afd_kernels.block_attention.{name}")
    except ImportError:
        return None
    return module if module.refuse("cuda", set(_HALF)) is None else None


class Part(NamedTuple):
    """Consecutive blocks of queries that attend equally many keys each.

    Block i: queries [q0 + i queries, + queries), keys [k0 + i step, + keys) of one source.
    """

    q0: int
    queries: int
    blocks: int
    context: bool
    k0: int
    keys: int
    step: int


class Plan(NamedTuple):
    """The calls for one stream: blocks without keys, first intervals, second intervals.

    `by_keys` covers the same pairs by key segments, each with the queries that attend it.
    """

    empty: tuple[tuple[int, int], ...]
    first: tuple[Part, ...]
    second: tuple[Part, ...]
    by_keys: tuple[Part, ...]

    def backward(self, keys: bool, context_keys: bool) -> list[Part]:
        """The parts of a backward in which k or the context may need gradients.

        By keys if that takes no more calls: only dq is then accumulated, instead of dk and dv.
        """
        parts = []
        for context, wanted in ((False, keys), (True, context_keys)):
            rows = [part for part in (*self.first, *self.second) if part.context == context]
            segments = [part for part in self.by_keys if part.context == context]
            parts += segments if wanted and len(segments) <= len(rows) else rows
        return parts


@functools.lru_cache(maxsize=1024)
def plan(rows: tuple[Row, ...], border: int, join: bool) -> Plan:
    """The calls for a stream's rows; with `join`, adjacent blocks of equal size share a call."""
    empty = tuple((row[0], row[1]) for row in rows if row[3] == 0)
    firsts = _same_keys([_part(row[:2], row[2], row[3], border) for row in rows if row[3]])
    seconds = [_part(row[:2], row[4], row[5], border) for row in rows if row[5]]
    if join:
        firsts, seconds = _join(firsts), _join(seconds)
    return Plan(empty, tuple(firsts), tuple(seconds), tuple(_by_keys(rows, border)))


def _part(queries: tuple[int, int], low: int, high: int, border: int) -> Part:
    context = high <= border
    start = low if context else low - border
    return Part(queries[0], queries[1] - queries[0], 1, context, start, high - low, 0)


def _by_keys(rows: tuple[Row, ...], border: int) -> Iterator[Part]:
    """A part per key segment between interval ends and run of rows that attend it."""
    ends = sorted({border, *(end for row in rows for end in row[2:])})
    for low, high in itertools.pairwise(ends):
        runs: list[tuple[int, int]] = []
        for q0, q1, a0, a1, b0, b1 in rows:
            if not (a0 <= low < high <= a1 or b0 <= low < high <= b1):
                continue
            if runs and runs[-1][1] == q0:
                q0 = runs.pop()[0]
            runs.append((q0, q1))
        for queries in runs:
            yield _part(queries, low, high, border)


def _same_keys(parts: list[Part]) -> list[Part]:
    """Consecutive blocks of queries that attend the same keys (a sink, a shared past) as one."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last and part == last._replace(q0=last.q0 + last.queries, queries=part.queries):
            joined[-1] = last._replace(queries=last.queries + part.queries)
        else:
            joined.append(part)
    return joined


def _join(parts: list[Part]) -> list[Part]:
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and _continues(last, part):
            step = part.k0 - last.k0 if last.blocks == 1 else last.step
            joined[-1] = last._replace(blocks=last.blocks + 1, step=step)
        else:
            joined.append(part)
    return joined


def _continues(last: Part, part: Part) -> bool:
    """Whether `part` continues `last` as its next block: same sizes, source and key step."""
    step = part.k0 - last.k0 if last.blocks == 1 else last.step
    return (
        part.q0 == last.q0 + last.blocks * last.queries
        and (part.queries, part.keys, part.context) == (last.queries, last.keys, last.context)
        and step > 0
        and part.k0 == last.k0 + last.blocks * step
    )


def _tokens(x_BNhd: Tensor, start: int, length: int) -> Tensor:
    return x_BNhd if length == x_BNhd.shape[1] else x_BNhd.narrow(1, start, length)


def _blocks(x_BNhd: Tensor, start: int, length: int, count: int, step: int) -> Tensor:
    """View [count, length, h, d] of blocks starting every `step` tokens; B = 1 if count > 1."""
    if count == 1:
        return _tokens(x_BNhd, start, length)
    _, token, head, channel = x_BNhd.stride()
    return x_BNhd.as_strided(
        (count, length, *x_BNhd.shape[2:]),
        (step * token, token, head, channel),
        x_BNhd.storage_offset() + start * token,
    )


def _lse_blocks(lse_BhL: Tensor, part: Part) -> Tensor:
    """View [count, h, queries] of the lse of a part's queries."""
    if part.blocks == 1:
        return lse_BhL.narrow(2, part.q0, part.queries)
    _, head, token = lse_BhL.stride()
    return lse_BhL.as_strided(
        (part.blocks, lse_BhL.shape[1], part.queries),
        (part.queries * token, head, token),
        lse_BhL.storage_offset() + part.q0 * token,
    )


class _Keys(NamedTuple):
    """k and v, or their gradients, of both sources."""

    k: Tensor | None
    v: Tensor | None
    k_context: Tensor | None
    v_context: Tensor | None

    def stream(self, index: slice) -> _Keys:
        return _Keys(*(None if x is None else x[index] for x in self))

    def source(self, context: bool) -> tuple[Tensor, Tensor]:
        k, v = (self.k_context, self.v_context) if context else (self.k, self.v)
        assert k is not None
        assert v is not None
        return k, v

    def blocks(self, part: Part) -> tuple[Tensor, Tensor]:
        k, v = self.source(part.context)
        at = (part.k0, part.keys, part.blocks, part.step)
        return _blocks(k, *at), _blocks(v, *at)


def _streams(intervals: Intervals, batch: int, border: int) -> Iterator[tuple[slice, Plan]]:
    for index, rows in enumerate(intervals.rows):
        alone = intervals.streams > 1 or batch == 1
        at = slice(index, index + 1) if intervals.streams > 1 else slice(None)
        yield at, plan(rows, border, alone)


def _queries(x_BLhd: Tensor, part: Part) -> Tensor:
    return _blocks(x_BLhd, part.q0, part.queries, part.blocks, part.queries)


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merges attention over other keys into out [B, l, h, d] and lse [B, h, l], in place, in fp32.

    If neither attended a key, out is 0 and lse -inf.
    """
    top = torch.maximum(lse, other_lse)
    top = top.masked_fill(top == -torch.inf, 0)
    mine, theirs = (lse - top).exp(), (other_lse - top).exp()
    total = mine + theirs
    lse.copy_(top + total.log())
    share = (theirs / total.clamp(min=torch.finfo(total.dtype).tiny)).transpose(1, 2)[..., None]
    if out.dtype == torch.float32:
        out.lerp_(other, share)
    else:
        out.copy_(torch.lerp(out.float(), other.float(), share))


def forward(
    library: Library,
    q: Tensor,
    sources: _Keys,
    intervals: Intervals,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B, L, h, d] contiguous and lse fp32 [B, h, L] contiguous."""
    border = 0 if sources.k_context is None else sources.k_context.shape[1]
    if len(intervals.rows) == len(intervals.rows[0]) == 1:
        ((_, _, low, high, _, more),) = intervals.rows[0]
        if high and not more:
            # One block and one interval, as in a rollout: return the library's result as is.
            k, v = sources.source(high <= border)
            start, count = low if high <= border else low - border, high - low
            k, v = _tokens(k, start, count), _tokens(v, start, count)
            out, lse = library.forward(q, k, v, scale)
            return out.contiguous(), lse.contiguous()
    batch, queries, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    for at, work in _streams(intervals, batch, border):
        query, keys, out_, lse_ = q[at], sources.stream(at), out[at], lse[at]
        for low, high in work.empty:
            out_[:, low:high].zero_()
            lse_[..., low:high].fill_(-torch.inf)
        for part in work.first:
            part_out, part_lse = library.forward(_queries(query, part), *keys.blocks(part), scale)
            _queries(out_, part).copy_(part_out)
            _lse_blocks(lse_, part).copy_(part_lse)
        for part in work.second:
            answer = library.forward(_queries(query, part), *keys.blocks(part), scale)
            merge_(_queries(out_, part), _lse_blocks(lse_, part), *answer)
        # On a GPU this check would synchronise.
        if work.second and q.device.type == "cpu" and not out_.sum(dtype=torch.float32).isfinite():
            _mend_merged(out_, lse_, query, keys, intervals.rows[at.start or 0], scale)
    return out, lse


def _mend_merged(
    out: Tensor, lse: Tensor, q: Tensor, keys: _Keys, rows: tuple[Row, ...], scale: float
) -> None:
    """Recomputes, in place, outputs that are not finite after a merge.

    An interval with all scores -inf is NaN on its own but contributes nothing next to another, and
    an infinite value in one interval becomes NaN when rescaled by the merge.
    """
    for q0, q1, *ends in rows:
        if not ends[3]:
            continue
        which = ~out[:, q0:q1].isfinite().flatten(2).all(2)
        if not bool(which.any()):
            continue
        border = 0 if keys.k_context is None else keys.k_context.shape[1]
        both = []
        for low, high in (ends[:2], ends[2:]):
            start = low if high <= border else low - border
            both.append([_tokens(x, start, high - low) for x in keys.source(high <= border)])
        k, v = (torch.cat(parts, dim=1) for parts in zip(*both, strict=True))
        attend_again(which, out[:, q0:q1], lse[..., q0:q1], q[:, q0:q1], k, v, scale)


def backward(
    library: Library,
    grad_out: Tensor,
    q: Tensor,
    sources: _Keys,
    out: Tensor,
    lse: Tensor,
    intervals: Intervals,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dk_context, dv_context; None where not needed."""
    if sources.k_context is None and len(intervals.rows) == len(intervals.rows[0]) == 1:
        key, value = sources.source(False)
        ((_, _, low, high, _, more),) = intervals.rows[0]
        if high - low == key.shape[1] > 0 and not more:
            # Every query attends to every key: return the library's result as is.
            found = library.backward(grad_out, q, key, value, out, lse, scale, needs[1])
            asked = (found[0] if needs[0] else None, *found[1:], None, None)
            return tuple(None if g is None else g.to(q.dtype).contiguous() for g in asked)
    border = 0 if sources.k_context is None else sources.k_context.shape[1]
    # Contributions of all parts to queries and keys are accumulated in fp32, in order.
    wanted = (needs[0], needs[1], needs[1], needs[2], needs[2])
    dq, *key_grads = (
        x.new_zeros(x.shape, dtype=torch.float32) if want and x is not None else None
        for x, want in zip((q, *sources), wanted, strict=True)
    )
    grads = _Keys(*key_grads)
    for at, work in _streams(intervals, q.shape[0], border):
        keys, totals = sources.stream(at), grads.stream(at)
        for part in work.backward(needs[1], needs[2]):
            key_grads_too = needs[2 if part.context else 1]
            if dq is None and not key_grads_too:
                continue
            part_dq, part_dk, part_dv = library.backward(
                _queries(grad_out[at], part),
                _queries(q[at], part),
                *keys.blocks(part),
                _queries(out[at], part),
                _lse_blocks(lse[at], part),
                scale,
                key_grads_too,
            )
            if dq is not None:
                _queries(dq[at], part).add_(part_dq)
            if key_grads_too:
                assert part_dk is not None
                assert part_dv is not None
                _add(totals.source(part.context), (part_dk, part_dv), part)
    return tuple(None if g is None else g.to(q.dtype) for g in (dq, *grads))


def _add(totals: tuple[Tensor, Tensor], shares: tuple[Tensor, Tensor], part: Part) -> None:
    """Accumulates the blocks' contributions into their keys."""
    for total, share in zip(totals, shares, strict=True):
        if part.step >= part.keys or part.blocks == 1:
            _blocks(total, part.k0, part.keys, part.blocks, part.step).add_(share)
            continue
        for i, one in enumerate(share):  # overlapping windows: sequentially
            total[0, part.k0 + i * part.step :][: part.keys].add_(one)


def block_attention(
    inputs: AttentionInputs, intervals: Intervals, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, L, h, d] in q's dtype and lse fp32 [B, h, L]."""
    q = inputs.q
    library: Any = _CPU
    if not q.is_cpu:
        library = pick(library_cuda.major(q.device), q.shape[-1], backward=False)
        if isinstance(library, ModuleType):
            return library.block_attention(inputs, intervals, scale)
    return forward(library, q, _Keys._make(inputs[1:]), intervals, scale)


def block_attention_bwd(
    grad_out: Tensor,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    intervals: Intervals,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dk_context, dv_context in q's dtype; None where not needed."""
    q, sources = inputs.q, _Keys._make(inputs[1:])
    if q.device.type != "cpu":
        keys = needs[1] or needs[2]
        library = pick(library_cuda.major(q.device), q.shape[-1], backward=True, keys=keys)
        if isinstance(library, ModuleType):
            return library.block_attention_bwd(grad_out, inputs, out, lse, intervals, scale, needs)
        return backward(library, grad_out, q, sources, out, lse, intervals, scale, needs)
    if q.dtype in _HALF:
        # PyTorch's CPU kernel is an order of magnitude slower in half precision than in float32.
        sources = _Keys(*(None if x is None else x.float() for x in sources))
        grad_out, query, out = (x.float() for x in (grad_out, q, out))
    else:
        query = q
    grads = backward(_CPU, grad_out, query, sources, out, lse, intervals, scale, needs)
    return tuple(None if g is None else g.to(q.dtype) for g in grads)
