"""Loads the compiled core `afd_kernels._native` once, or records why it is missing."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from afd_kernels.contracts import Plan
from afd_kernels.kept import Kept

# The codes of afd::DType and afd::ScheduleKind in csrc/include/afd.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCHEDULES = {"rectified_flow": 0, "vp_cosine": 1, "vp_linear": 2}
_READS = (
    *("data_ptr", "dim", "sizes", "strides"),
    *("dtype", "device_type", "device_index", "layout"),
)
# Predicates of tensors with state beyond their memory: lazily negated ones and those of a
# vmapped backward (torch.autograd.grad with is_grads_batched) or a transform, which set no mode.
UNUSUAL: tuple[Callable[[Tensor], bool], ...] = (
    Tensor.is_neg,
    torch._C._functorch.is_legacy_batchedtensor,
    torch._C._functorch.is_functorch_wrapped_tensor,
)


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        core = importlib.import_module("afd_kernels._native")
    except ModuleNotFoundError:
        # setup.py writes the compiler's output there if the build failed.
        note = Path(__file__).with_name("_native_missing.txt")
        reason = " ".join(note.read_text(encoding="utf-8").split()) if note.is_file() else ""
        return (
            None,
            f"the compiled core was not built ({reason or 'it is not part of this installation'})",
        )
    except ImportError as error:
        return None, f"the compiled core cannot be loaded ({error})"
    connect(core)
    return core, None


def connect(core: ModuleType) -> None:
    """Connects a build of the core to PyTorch's stable C interface, through which it reads tensors.

    The functions are declared in torch/csrc/inductor/aoti_torch/c/shim.h and looked up in PyTorch's
    library. Every build needs this call once, before any other.
    """
    library = ctypes.CDLL(torch._C.__file__)
    functions = {
        name: ctypes.cast(library[f"aoti_torch_get_{name}"], ctypes.c_void_p).value
        for name in _READS
    }
    strided = library.aoti_torch_layout_strided()
    core.connect(functions, strided, Tensor, torch.nn.Parameter, list(UNUSUAL))


_core, _why_missing = _load()


def core() -> Any:
    """The extension module.

    Raises:
        RuntimeError: if it is missing, with the reason.
    """
    if _core is None:
        raise RuntimeError(_why_missing)
    return _core


def why_missing() -> str | None:
    """The reason why the compiled core is missing, in one sentence, or None if it exists."""
    return _why_missing


def has_cuda() -> bool:
    """Whether the core was built with nvcc."""
    return bool(cuda_archs())


def cuda_archs() -> list[str]:
    """Compute capabilities the CUDA code was compiled for, such as ["80", "90", "100"]."""
    return [] if _core is None else [x for x in _core.cuda_archs.split(",") if x]


def isa() -> str | None:
    """The instruction set in use: "baseline", "avx2" or "avx512"; None without the core."""
    return None if _core is None else _core.isa()


def isas() -> list[str]:
    """The instruction sets this CPU can run, narrowest first."""
    return [] if _core is None else _core.isas()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the block with one instruction set, in all threads (for tests and benchmarks)."""
    before = core().isa()
    if not core().use_isa(name):
        raise ValueError(f"name: got {name!r}; needed: one of {', '.join(isas())}")
    try:
        yield
    finally:
        core().use_isa(before)


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    """The reason why the compiled core cannot run such inputs, in one sentence, or None."""
    if _core is None:
        return _why_missing
    if device == "cuda" and not has_cuda():
        return "the compiled core was built without nvcc, so it has no CUDA code"
    if device == "cuda" and (why := core().cuda_unusable()) is not None:
        archs = ", ".join(f"sm_{arch}" for arch in cuda_archs())
        return f"the compiled core's CUDA code (for {archs}) cannot run on this device: {why}"
    if device not in ("cpu", "cuda"):
        return f"device {device} is neither cpu nor cuda"
    for dtype in dtypes - set(_TYPES):
        return f"{str(dtype).removeprefix('torch.')} is not float32, bfloat16 or float16"
    return None


def refuse_rows(x: Tensor, channels: int) -> str | None:
    """The reason why the CUDA row kernels cannot take x, in one sentence, or None."""
    if x.device.type == "cuda" and channels > (most := core().cuda_most_channels):
        return f"{channels} channels per token, and the CUDA kernels take at most {most}"
    return None


def run_rows(op: str, problem: Any, x: Tensor, scratch: bool = False) -> None:
    """Runs an op on token rows on x's device; with `scratch` it needs a GPU workspace."""
    if x.is_cpu:
        getattr(core(), f"{op}_cpu")(problem, threads(x))
        return
    given: list[Any] = [problem]
    if scratch:
        size = getattr(core(), f"{op}_workspace")(problem)
        # Kept alive until the launch; the stream-ordered allocator handles the rest.
        memory = torch.empty(size, dtype=torch.uint8, device=x.device)
        given.append(memory.data_ptr())
    with torch.cuda.device(x.device):
        getattr(core(), f"{op}_cuda")(*given, stream(x))


def type_code(dtype: torch.dtype) -> int:
    """The core's code for a dtype."""
    return _TYPES[dtype]


def take(kept: Kept | None, make: Callable[[], Any]) -> Any:
    """Take a problem filled in except for its addresses: a cached one, or a new one from `make`."""
    try:
        return kept.problems.pop() if kept is not None else make()
    except IndexError:
        return make()


def put_back(kept: Kept | None, problem: Any) -> None:
    """Returns a taken problem to the cache for the next call."""
    if kept is not None:
        kept.problems.append(problem)


def rows(x: Tensor) -> tuple[int, int, int]:
    """Address and strides of B and L of a tensor [B, L, ...] whose tokens are contiguous."""
    return x.data_ptr(), x.stride(0), x.stride(1)


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor like x; new_empty(x.shape) takes three times as long."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def threads(x: Tensor) -> int:
    """Number of threads for a pass over x: torch's setting, or one for a small x.

    Results do not depend on it; waking a thread costs as much as processing tens of thousands of
    elements.
    """
    wanted = 1 + x.numel() // 32768
    return 1 if wanted == 1 else min(torch.get_num_threads(), wanted)


def stream(x: Tensor) -> int:
    """The current CUDA stream of x's device, as an integer."""
    return torch.cuda.current_stream(x.device).cuda_stream


def describe(problem: Any, plan: Plan) -> Any:
    """Fills the fields common to all ops' problems, and returns the problem."""
    problem.batch = plan.batch
    problem.outer = plan.outer
    problem.frames = plan.frames
    problem.inner = plan.inner
    problem.t_chunks = plan.t_chunks
    problem.schedule = _SCHEDULES[plan.schedule]
    if plan.schedule_args:
        problem.beta_min, problem.beta_max = plan.schedule_args
    return problem


def philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    """The four output words of Philox4x32-10 for four counter words and two key words."""
    return list(core().philox(counter, *key))


def normals(seed: int, first: int, count: int) -> Tensor:
    """Elements first .. first + count - 1 of the noise of `seed`: fp32 [count] on the CPU."""
    out = torch.empty(count, dtype=torch.float32)
    core().normals(seed, first, count, out.data_ptr())
    return out


def scale(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = x * factor for a contiguous x and a scalar tensor, read on x's device. In place (out is
    x), a factor of exactly 1 writes nothing."""
    code, count = type_code(x.dtype), x.numel()
    if x.is_cpu:
        value = float(factor.detach())
        core().scale_cpu(code, x.data_ptr(), out.data_ptr(), count, value, threads(x))
        return
    wide = factor.detach().to(torch.float32)
    with torch.cuda.device(x.device):
        core().scale_cuda(code, x.data_ptr(), out.data_ptr(), count, wide.data_ptr(), stream(x))


def stream_5r1w(inputs: list[Tensor], out: Tensor, *, non_temporal: bool) -> None:
    """out = the sum of five fp32 CPU tensors: the memory traffic of nft_loss with given noise.

    The benchmarks' floor; `non_temporal` selects stores that bypass the caches.
    """
    core().stream_5r1w(
        [x.data_ptr() for x in inputs], out.data_ptr(), out.numel(), non_temporal, threads(out)
    )
