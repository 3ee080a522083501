"""Our ops on the simulated device: where the compiled core would loop on the CPU, a kernel runs.

Every tensor made meanwhile, and every one that is `placed`, ends at an inaccessible page,
and begins after bytes that must not be written.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from afd_kernels import dispatch, native
from afd_kernels.dispatch import use_backend

# Not a number in every float type, and -1.
UNDEFINED = 0xFF
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass
class Memory:
    """The device's memory: tensors between bytes that are looked after."""

    _held: list[tuple[mmap.mmap, int, int]] = field(default_factory=list)

    def place(self, x: Tensor, shift: int = 0) -> Tensor:
        """A contiguous copy of x whose address is 16 k + `shift`, as near as can be to the page
        where memory ends. Keeps what x requires of gradients."""
        size = max(x.numel(), 1) * x.element_size()
        pages = (size + 16 + 64 + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        held = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(held))
        end = pages * mmap.PAGESIZE
        start = end - size
        start -= (start - shift) % 16
        ctypes.memset(address, UNDEFINED, end)
        if _libc.mprotect(address + end, mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self._held.append((held, start, start + x.numel() * x.element_size()))
        placed = torch.frombuffer(held, dtype=torch.uint8, count=size, offset=start)
        placed = placed.view(x.dtype)[: x.numel()].view(x.shape)
        placed.copy_(x.detach())
        return placed.requires_grad_(x.requires_grad)

    def undefined(self, make: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """What an allocating function of torch gives, here, and undefined."""
        made = make(*args, **kwargs)
        if made.device.type != "cpu":
            return made
        made.detach().view(-1).view(torch.uint8).fill_(UNDEFINED) if made.numel() else None
        return self.place(made)

    def check(self) -> None:
        """Raises AssertionError where somebody wrote beside a tensor."""
        for held, start, end in self._held:
            stop = len(held) - mmap.PAGESIZE
            before, after = held[:start], held[end:stop]
            for words, beside in (("before", before), ("after", after)):
                assert beside.count(UNDEFINED) == len(beside), f"bytes {words} a tensor changed"


@dataclass
class Device:
    """One built module and the library calls that steer its device."""

    core: Any
    library: ctypes.CDLL

    @classmethod
    def load(cls, module: Path) -> Device:
        # pybind11 gives the module that it has made before where the full name is the same.
        name = f"{module.parent.name}._native"
        loader = importlib.machinery.ExtensionFileLoader(name, str(module))
        spec = importlib.util.spec_from_loader(name, loader)
        assert spec is not None
        core = importlib.util.module_from_spec(spec)
        loader.exec_module(core)
        native.connect(core)
        assert core.__file__ == str(module)
        return cls(core, ctypes.CDLL(str(module)))

    @contextlib.contextmanager
    def running(self, *, reverse: bool = False, fault: int = 0) -> Iterator[Memory]:
        """Inside, the native backend runs CPU tensors through the CUDA kernels.

        Args:
            reverse: the last thread of a block first.
            fault: which of the planted faults is switched on, 0 for none.
        """
        memory = Memory()
        core = _Core(self.core, memory)
        with contextlib.ExitStack() as stack:
            self.library.cuda_on_cpu_reverse(int(reverse))
            self.library.cuda_on_cpu_plant(fault)
            stack.callback(self.library.cuda_on_cpu_reverse, 0)
            stack.callback(self.library.cuda_on_cpu_plant, 0)
            stack.enter_context(patch.object(native, "core", lambda: core))
            for owner, name in (
                *((torch, name) for name in ("empty", "empty_like", "empty_strided")),
                *((Tensor, name) for name in ("new_empty",)),
            ):
                make = functools.partial(memory.undefined, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, _method(make)))
            stack.enter_context(use_backend("native"))
            yield memory
            memory.check()

    @contextlib.contextmanager
    def broken(self, error: int) -> Iterator[None]:
        """Inside, every call of the runtime gives this cudaError_t."""
        self.library.cuda_on_cpu_device_error(error)
        dispatch._refusal.cache_clear()
        try:
            yield
        finally:
            self.library.cuda_on_cpu_device_error(0)
            dispatch._refusal.cache_clear()


def _method(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A plain function: unlike a partial, it is bound where it is looked up on an instance."""
    return lambda *args, **kwargs: make(*args, **kwargs)


class _Core:
    """The built module; what its CPU core would do, its CUDA kernels do."""

    def __init__(self, core: Any, memory: Memory) -> None:
        self._core, self._memory = core, memory

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_cpu"):
            return functools.partial(self._launch, name.removesuffix("_cpu"))
        return getattr(self._core, name)

    def _launch(self, op: str, *args: Any) -> None:
        *given, _threads = args
        # What the host hands over as a number, the device reads from its memory.
        numbers = [self._memory.place(torch.tensor([x])) for x in given if isinstance(x, float)]
        addresses = iter([x.data_ptr() for x in numbers])
        given = [next(addresses) if isinstance(x, float) else x for x in given]
        workspace = getattr(self._core, f"{op}_workspace", None)
        if workspace is not None:
            made = torch.empty(workspace(given[0]), dtype=torch.uint8)
            given.append(made.data_ptr())
        getattr(self._core, f"{op}_cuda")(*given, 0)
