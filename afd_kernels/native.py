"""The compiled core `afd_kernels._native`: loaded once; where it is missing, the reason."""

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
# A tensor of which one is true is not only its memory: lazily negated, or of a vmapped backward
# (torch.autograd.grad with is_grads_batched) or a transform, neither of which a mode announces.
UNUSUAL: tuple[Callable[[Tensor], bool], ...] = (
    Tensor.is_neg,
    torch._C._functorch.is_legacy_batchedtensor,
    torch._C._functorch.is_functorch_wrapped_tensor,
)


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        core = importlib.import_module("afd_kernels._native")
    except ModuleNotFoundError:
        # setup.py leaves the compiler's words there when the build failed.
        note = Path(__file__).with_name("_native_missing.txt")
        said = " ".join(note.read_text(encoding="utf-8").split()) if note.is_file() else ""
        return (
            None,
            f"the compiled core was not built ({said or 'build it with: pip install -e .'})",
        )
    except ImportError as error:
        return None, f"the compiled core cannot be loaded ({error})"
    connect(core)
    return core, None


def connect(core: ModuleType) -> None:
    """Lets an extension module read tensors, through PyTorch's stable C interface.

    Its functions are those of torch/csrc/inductor/aoti_torch/c/shim.h, looked up in PyTorch.
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
        RuntimeError: where it is missing, with the reason.
    """
    if _core is None:
        raise RuntimeError(_why_missing)
    return _core


def why_missing() -> str | None:
    """Why there is no compiled core, in one sentence; None where there is one."""
    return _why_missing


def has_cuda() -> bool:
    """Whether the core was built with nvcc."""
    return bool(cuda_archs())


def cuda_archs() -> list[str]:
    """Compute capabilities the CUDA code was compiled for, such as ["80", "90", "100"]."""
    return [] if _core is None else [x for x in _core.cuda_archs.split(",") if x]


def isa() -> str | None:
    """The instruction set in use on this CPU: "baseline", "avx2" or "avx512"; None without core."""
    return None if _core is None else _core.isa()


def isas() -> list[str]:
    """The instruction sets this CPU can run, narrowest first."""
    return [] if _core is None else _core.isas()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the block on one instruction set, in every thread (for tests and benchmarks)."""
    before = core().isa()
    if not core().use_isa(name):
        raise ValueError(f"name: got {name!r}; needed: one of {', '.join(isas())}")
    try:
        yield
    finally:
        core().use_isa(before)


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    """Why the compiled core cannot run on such inputs, in one sentence, or None where it can."""
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


def type_code(dtype: torch.dtype) -> int:
    """The core's number for a dtype."""
    return _TYPES[dtype]


def take(kept: Kept | None, make: Callable[[], Any]) -> Any:
    """A problem filled but for its addresses: one that is kept, or a new one from `make`."""
    try:
        return kept.problems.pop() if kept is not None else make()
    except IndexError:
        return make()


def put_back(kept: Kept | None, problem: Any) -> None:
    """Keeps a problem that was taken, for the next call."""
    if kept is not None:
        kept.problems.append(problem)


def rows(x: Tensor) -> tuple[int, int, int]:
    """A tensor [B, L, ...] for the core, each token contiguous: address, strides of B and of L."""
    return x.data_ptr(), x.stride(0), x.stride(1)


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor for results; new_empty(x.shape) takes three times as long."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def threads(x: Tensor) -> int:
    """How many threads a pass over x deserves: torch's setting, one for a small x.

    Results do not depend on it; waking a thread costs as much as tens of thousands of elements.
    """
    return min(torch.get_num_threads(), 1 + x.numel() // 32768)


def stream(x: Tensor) -> int:
    """The current CUDA stream of x's device, as an integer."""
    return torch.cuda.current_stream(x.device).cuda_stream


def describe(problem: Any, plan: Plan) -> Any:
    """Fills the fields that every op's problem has in common, and returns the problem."""
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
    """out = x * factor for a contiguous x and a scalar tensor; in place (out is x) a factor of
    exactly 1 writes nothing. The factor is read on x's device."""
    code, count = type_code(x.dtype), x.numel()
    if x.device.type == "cpu":
        value = float(factor.detach())
        core().scale_cpu(code, x.data_ptr(), out.data_ptr(), count, value, threads(x))
        return
    wide = factor.detach().to(torch.float32)
    with torch.cuda.device(x.device):
        core().scale_cuda(code, x.data_ptr(), out.data_ptr(), count, wide.data_ptr(), stream(x))


def stream_5r1w(inputs: list[Tensor], out: Tensor, *, non_temporal: bool) -> None:
    """out = the sum of five fp32 CPU tensors: the memory traffic of nft_loss with given noise.

    The benchmarks' floor; `non_temporal` chooses stores that bypass the caches.
    """
    core().stream_5r1w(
        [x.data_ptr() for x in inputs], out.data_ptr(), out.numel(), non_temporal, threads(out)
    )
