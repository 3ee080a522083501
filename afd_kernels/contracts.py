"""Shape, dtype and device checks shared by all backends and fakes.

Plans read only metadata, so fakes share them; `check_times` and `check_between` read values and run
only where that needs no synchronisation (CPU).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

# L: the tokens of a frame.
LAYOUTS = ("BCFHW", "BFCHW", "BFLC")
# Domain of t per schedule; vp_linear's sigma' is unbounded at 0.
SCHEDULES = {"rectified_flow": (0.0, 1.0), "vp_cosine": (0.0, 1.0), "vp_linear": (1e-5, 1.0)}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Plan:
    """How a backend traverses a sample: `outer * frames` rows of `inner` contiguous elements.

    Frame f uses t[:, f // (frames // t_chunks)]. If everything is per video, frames = outer = 1.
    """

    batch: int
    outer: int
    frames: int
    inner: int
    t_chunks: int
    schedule: str
    schedule_args: tuple[float, ...]


def contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors in row-major layout, which all backends' kernels assume."""
    return [None if x is None else x.contiguous() for x in tensors]


def describe(value: Tensor) -> str:
    """Format a tensor's dtype, shape and device for messages."""
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"


def require(ok: bool, argument: str, got: object, needed: str) -> None:
    """Raises ValueError with the argument, its value and the requirement, unless `ok`."""
    if not ok:
        shown = describe(got) if isinstance(got, Tensor) else repr(got)
        raise ValueError(f"{argument}: got {shown}; needed: {needed}")


def expect(
    argument: str,
    value: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    beside: Tensor,
) -> None:
    """Requires a shape, one of `dtypes` and the device of `beside`; formats only on failure."""
    if value.shape == shape and value.dtype in dtypes and value.device == beside.device:
        return
    kinds = " or ".join(dict.fromkeys(str(x).removeprefix("torch.") for x in dtypes))
    require(False, argument, value, f"{kinds} {list(shape)} on {beside.device}")


def check_one_of(argument: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, argument, value, "one of " + ", ".join(map(repr, allowed)))


def check_sample(x0: Tensor) -> None:
    require(x0.dtype in FLOATS, "x0", x0, "float32, bfloat16, float16 or float64")
    require(x0.ndim >= 2, "x0", x0, "at least 2 dimensions, the first is the batch")
    require(x0.numel() > 0, "x0", x0, "at least one sample with at least one element")


def check_source(x0: Tensor, seed: Tensor | None, noise: Tensor | None) -> None:
    if (seed is None) == (noise is None):
        got = "neither" if seed is None else "both"
        raise ValueError(f"seed, noise: got {got}; needed: exactly one of them")
    if seed is not None:
        require(seed.dtype == torch.int64, "seed", seed, f"int64 [{x0.shape[0]}]")
        require(seed.shape == x0.shape[:1], "seed", seed, f"int64 [{x0.shape[0]}], one per sample")
        require(seed.device == x0.device, "seed", seed, f"the device of x0, {x0.device}")
    if noise is not None:
        require(noise.shape == x0.shape, "noise", noise, f"the shape of x0, {list(x0.shape)}")
        require(
            noise.dtype in (torch.float32, x0.dtype),
            "noise",
            noise,
            f"float32 or the dtype of x0, {x0.dtype}",
        )
        require(noise.device == x0.device, "noise", noise, f"the device of x0, {x0.device}")


def frame_count(x0: Tensor, layout: str, why: str) -> int:
    """Number of frames of x0; `why`: the argument, given per frame or chunk, that needs it."""
    if x0.ndim != len(layout):
        raise ValueError(
            f"x0: got {describe(x0)}; needed: {len(layout)} dimensions {layout}, because {why} is "
            f"per frame or per chunk"
        )
    return x0.shape[layout.index("F")]


def check_per_frame(x0: Tensor, name: str, value: Tensor, layout: str) -> int:
    """Checks t or r ([B] or [B, K]) and returns K."""
    wide = torch.float64 if x0.dtype == torch.float64 else torch.float32
    require(
        value.dtype in (torch.float32, wide),
        name,
        value,
        "float32 (half precision merges timesteps)",
    )
    require(value.device == x0.device, name, value, f"the device of x0, {x0.device}")
    batch = x0.shape[0]
    require(
        value.ndim in (1, 2) and value.shape[0] == batch,
        name,
        value,
        f"[{batch}], or [{batch}, K] with K dividing the number of frames",
    )
    if value.ndim == 1 or value.shape[1] == 1:
        return 1
    frames = frame_count(x0, layout, name)
    chunks = value.shape[1]
    require(
        chunks > 0 and frames % chunks == 0,
        name,
        value,
        f"[{batch}, K] with K dividing the {frames} frames of x0 (layout {layout})",
    )
    return chunks


def rows(x0: Tensor, layout: str, per_video: bool) -> tuple[int, int, int]:
    """outer, frames, inner of one sample."""
    if per_video:
        return 1, 1, prod(x0.shape[1:])
    axis = layout.index("F")
    return prod(x0.shape[1:axis]), x0.shape[axis], prod(x0.shape[axis + 1 :])


def check_schedule(schedule: str, args: Sequence[float]) -> None:
    check_one_of("schedule", schedule, tuple(SCHEDULES))
    if schedule != "vp_linear":
        require(not args, "schedule_args", list(args), f"none for {schedule}")
        return
    ok = len(args) == 2 and 0 < args[0] <= args[1]
    require(ok, "schedule_args", list(args), "(beta_min, beta_max) with 0 < beta_min <= beta_max")


# Up to this many elements are faster to check one by one.
_FEW = 32


def _within(x: Tensor, low: float, high: float) -> bool:
    """Whether all elements of x are in [low, high], rounded to x's dtype; False for NaN."""
    if x.numel() > _FEW:
        return bool(((x >= low) & (x <= high)).all())
    low, high = _rounded(low, x.dtype), _rounded(high, x.dtype)
    rows = x.tolist() if x.ndim > 1 else [x.tolist()]
    return all(low <= value <= high for row in rows for value in row)


@functools.cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype).item())


def check_times(t: Tensor, schedule: str) -> None:
    """Rejects timesteps outside the schedule or NaN."""
    low, high = SCHEDULES[schedule]
    check_between("t", t, low, high, f"[{low:g}, {high:g}], the domain of {schedule}")


def check_between(name: str, x: Tensor, low: float, high: float, needed: str) -> None:
    """Rejects values outside [low, high] and NaN; CPU tensors only.

    On an accelerator this would synchronise; there the kernels set the result to NaN instead.
    """
    if x.device.type == "cpu" and not _within(x, low, high):
        raise ValueError(
            f"{name}: got values in [{x.min().item():.6g}, {x.max().item():.6g}]; needed: {needed}"
        )
