"""Triton reductions: fp32 partial sums in a fixed order, and squares beyond fp32's range."""
# mypy: ignore-errors
# (@triton.jit bodies are not ordinary Python)

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


@triton.jit
def factor_of_row(mean_square):
    """The power of two by which a row is multiplied before its squares are summed again.

    1 where fp32 holds the squares. A norm is blind to its row's length but for eps, which goes with
    the factor's square. The limits are those of csrc/cpu/rows.h.
    """
    below = mean_square < 1e-24
    kept = (mean_square >= 1e-24) & (mean_square <= 1e24)
    return tl.where(kept, 1.0, tl.where(below, 1.2089258196146292e24, 8.271806125530277e-25))
