"""The second half of a deterministic sum in Triton: rows of fp32 partial sums, in a fixed order."""
# mypy: ignore-errors
# (@triton.jit bodies are a language of their own)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_rows(rows_ptr, count, stride, column, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over `count` rows, `stride` numbers apart, of COLUMNS columns: fp32 [COLUMNS].

    ROWS rows are added side by side, so the order depends on the launch configuration alone.
    """
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    lane = tl.arange(0, ROWS)
    for start in range(0, count, ROWS):
        row = start + lane
        place = rows_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
        total += tl.load(place, mask=(row < count)[:, None] & inside[None, :], other=0.0)
    return tl.sum(total, axis=0)
