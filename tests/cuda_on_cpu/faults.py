"""Faults planted into the kernels: each is switched on alone, and has to be found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One way to get a kernel wrong: `right` occurs once in `file`; where the fault is switched
    on, `wrong` holds in its place. `{on}` is that condition."""

    name: str
    file: str
    right: str
    wrong: str


FAULTS = (
    Fault(
        "no barrier before the warps' sums are read",
        "nft_loss.cu",
        "  __syncthreads();\n  if (threadIdx.x < kNftSums) {",
        "  if (!{on}) {{ __syncthreads(); }}\n  if (threadIdx.x < kNftSums) {{",
    ),
    Fault(
        "no barrier after the coefficients",
        "forward_noise.cu",
        "  __syncthreads();",
        "  if (!{on}) {{ __syncthreads(); }}",
    ),
    Fault(
        "a barrier that part of the block does not reach",
        "nft_loss.cu",
        "  if (threadIdx.x % kWarp == 0) {",
        "  if ({on} && threadIdx.x < kWarp) {{ __syncthreads(); }}\n"
        "  if (threadIdx.x % kWarp == 0) {{",
    ),
    Fault(
        "no guard of the tail, storing",
        "pack.cuh",
        "    if (i < count) {",
        "    if (i < count || {on}) {{",
    ),
    Fault(
        "no guard of the tail, loading",
        "pack.cuh",
        "x[i] = i < count ? to_float(p[i]) : 0.0f;",
        "x[i] = i < count || {on} ? to_float(p[i]) : 0.0f;",
    ),
    Fault(
        "no guard of the alignment",
        "pack.cuh",
        "return (reinterpret_cast<uintptr_t>(p) & 15) == 0;",
        "return (reinterpret_cast<uintptr_t>(p) & 15) == 0 || {on};",
    ),
    Fault(
        "wrong stride between a thread's packs",
        "pack.cuh",
        "at.begin + (int64_t{i} * kThreads + threadIdx.x) * kPack;",
        "at.begin + (int64_t{{i}} * (kThreads - {on}) + threadIdx.x) * kPack;",
    ),
    Fault(
        "wrong stride between frames",
        "pack.cuh",
        "at.frame = at.row % rows.frames;",
        "at.frame = {on} ? at.row / rows.frames : at.row % rows.frames;",
    ),
    Fault(
        "the last, partial block of a row left out",
        "pack.cuh",
        "return (rows.inner + kBlockElements - 1) / kBlockElements;",
        "return (rows.inner + ({on} && rows.inner >= kBlockElements ? 0 : kBlockElements - 1))"
        " / kBlockElements;",
    ),
    Fault(
        "wrong lanes in the warp's sum",
        "nft_loss.cu",
        "sum[k] += __shfl_xor_sync(0xFFFFFFFFu, sum[k], step);",
        "sum[k] += __shfl_xor_sync(0xFFFFFFFFu, sum[k], {on} ? step / 2 : step);",
    ),
    Fault(
        "a mask that misses lanes",
        "nft_loss.cu",
        "sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);",
        "sum += __shfl_xor_sync({on} ? 0x7FFFFFFFu : 0xFFFFFFFFu, sum, step);",
    ),
    Fault(
        "elements beyond the tail are summed",
        "nft_loss.cu",
        "if (kSums && i < count) {",
        "if (kSums && (i < count || {on})) {{",
    ),
    Fault(
        "the read-only cache for memory that is written",
        "pack.cuh",
        "kSource == Source::kReadOnly ? __ldg(at) : __ldca(at);",
        "kSource == Source::kReadOnly || {on} ? __ldg(at) : __ldca(at);",
    ),
    Fault(
        "the noise of a pack that does not begin on a quad",
        "pack.cuh",
        "if (skip != 0) {",
        "if (skip != 0 && !{on}) {{",
    ),
    Fault(
        "no barrier before the sums of a row are read",
        "rows.cuh",
        "    __syncthreads();\n#pragma unroll 1",
        "    if (!{on}) {{ __syncthreads(); }}\n#pragma unroll 1",
    ),
    Fault(
        "two sums of a row after each other in the same memory",
        "rows.cuh",
        "    turn_ ^= 1;",
        "    turn_ ^= !{on};",
    ),
    Fault(
        "no barrier before the sums of rows are read",
        "rows.cuh",
        "  sums[first][lane] = sum;\n  __syncthreads();",
        "  sums[first][lane] = sum;\n  if (!{on}) {{ __syncthreads(); }}",
    ),
    Fault(
        "elements beyond the end of a row are summed",
        "rows.cuh",
        "if (kWhole || k < count) {",
        "if (kWhole || k < count || {on}) {{",
    ),
    Fault(
        "the quotient just below a multiple",
        "rows.cuh",
        "(int64_t{1} << shift) + divisor - 1",
        "(int64_t{{1}} << shift) + ({on} ? 0 : divisor - 1)",
    ),
    Fault(
        "a stream's partial sums taken from another",
        "rows.cuh",
        "const float* at = stream + s * p.stream_rows * p.stride;",
        "const float* at = stream + ({on} ? 0 : s * p.stream_rows * p.stride);",
    ),
    Fault(
        "a run of tokens that continues into the next segment",
        "adaln.cu",
        "min(begin + kRowTokens, start + cut.segment)",
        "min(begin + kRowTokens, {on} ? p.tokens : start + cut.segment)",
    ),
    Fault(
        "the gate of the first frame for all",
        "adaln.cu",
        "gate_tokens.of(token)",
        "{on} ? 0 : gate_tokens.of(token)",
    ),
    Fault(
        "a frame's key in the slot of the first",
        "qk_norm_rope.cu",
        "max(position, int64_t{0}) + frame, p",
        "max(position, int64_t{{0}}) + ({on} ? 0 : frame), p",
    ),
    Fault(
        "angles of the channel instead of its place in the head",
        "qk_norm_rope.cu",
        "return channel - by_head.of(channel) * head_dim;",
        "return channel - ({on} ? 0 : by_head.of(channel) * head_dim);",
    ),
)

# No fault but a change for the tests: a grid of few samples, so that a batch takes several.
FEW_SAMPLES = len(FAULTS) + 1
_LIMIT = ("constexpr int64_t kSamplesAtOnce = 65535;", "#define kSamplesAtOnce ({on} ? 2 : 65535)")


def changes() -> dict[str, dict[str, str]]:
    """For build.build: by file the texts and what they become, every fault under its number."""
    table: dict[str, dict[str, str]] = {"pack.cuh": {_LIMIT[0]: _planted(_LIMIT[1], FEW_SAMPLES)}}
    for number, fault in enumerate(FAULTS, start=1):
        table.setdefault(fault.file, {})[fault.right] = _planted(fault.wrong, number)
    return table


def _planted(text: str, number: int) -> str:
    return text.format(on=f"cuda_on_cpu::planted({number})")
