"""torch.cuda and everything else that is replaced for the simulated device."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import afd_kernels
from afd import schedules
from afd_kernels import dispatch, launch_config, native, plans
from afd_kernels.block_attention import library_cuda, library_impl, tiles
from tests.fake_cuda.machine import GPU, HIGH, FakeCuda, OnGpu, device_of, inner_of, machines


@contextlib.contextmanager
def fake_cuda(compiles: bool = False) -> Iterator[FakeCuda]:
    """A machine with one GPU, and nothing left of it afterwards.

    With `compiles` every launch is passed on to Triton, whose active driver must be a simulated one
    (tests/fake_cuda/compiling.py): kernels are compiled as on the device, and launch nothing.
    """
    machine = FakeCuda()
    machine.compiles = compiles
    _forget()
    with contextlib.ExitStack() as stack:
        stack.callback(_forget)
        for change in _changes(machine):
            stack.enter_context(change)
        machines.append(machine)
        stack.callback(machines.pop)
        stack.enter_context(machine)
        yield machine


class CudaGenerator(torch._C.Generator):
    device = property(lambda self: GPU)  # type: ignore[assignment]


class _Generator(torch._C.Generator):
    """torch.Generator, which makes one of the device it is asked for."""

    def __new__(cls, device: Any = "cpu") -> Any:
        kind = CudaGenerator if device_of(device) == GPU else torch._C.Generator
        return kind.__new__(kind)


class _Stream(torch.Stream):
    """The one stream: nothing is asynchronous here."""

    cuda_stream, device, device_index = 0, GPU, 0  # type: ignore[assignment]

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return torch.Stream.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None:
        machines[-1].synchronize()

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timed = enable_timing

    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None:
        machines[-1].synchronize()

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: _Event) -> float:
        assert self.timed
        assert later.timed
        return 1.0


def _run_in(machine: FakeCuda) -> Callable[[threading.Thread], None]:
    """`Thread.run` with the machine switched on: torch's modes are a thread's own."""
    run = threading.Thread.run

    def within(thread: threading.Thread) -> None:
        with machine:
            run(thread)

    return within


def _nothing() -> Callable[..., None]:
    """A function each time: torch keeps a table of them."""
    return lambda *_, **__: None


def _of_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of the device's autocast, which torch would not find on tensors that are the CPU's to it."""
    return lambda kind=None, *args, **how: function("cpu" if kind == "cuda" else kind, *args, **how)


class _NoGraph:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("no CUDA graph on a fake GPU")


class _Core:
    """The compiled core with launches of CUDA kernels that only check the addresses."""

    def __init__(self, machine: FakeCuda, core: Any) -> None:
        self._machine, self._core = machine, core

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_workspace"):
            return lambda problem: 1024
        if name == "cuda_unusable":
            return lambda: None
        if not name.endswith("_cuda"):
            return getattr(self._core, name)
        return functools.partial(self._launch, name)

    def _launch(self, name: str, *args: Any) -> None:
        problems = [x for x in args if not isinstance(x, int)]
        fields = {key: getattr(x, key) for x in problems for key in dir(x)}
        for key, value in [*fields.items(), *enumerate(args)]:
            # Of token rows the address comes with strides.
            address = value[0] if isinstance(value, tuple) else value
            if isinstance(address, int) and 2**40 < address < HIGH:
                raise RuntimeError(f"{name}: {key} is on the CPU")
        self._machine.launches[name] += 1


def _launcher(machine: FakeCuda, name: str, real: Any) -> Any:
    """In a kernel's place: takes a launch if every tensor of it is on the device."""

    class Kernel:
        arg_names = real.arg_names

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            sizes = grid if isinstance(grid, tuple) else ()
            assert all(isinstance(n, int) and n > 0 for n in sizes), (name, grid)
            return functools.partial(self.run, grid)

        def run(self, grid: Any, *args: Any, **kwargs: Any) -> None:
            given = dict(zip(self.arg_names, args, strict=False)) | kwargs
            for key, value in given.items():
                if isinstance(value, Tensor) and not isinstance(value, OnGpu):
                    raise RuntimeError(f"{name}: {key} is on the CPU")
            machine.launches[name] += 1
            if machine.compiles:
                real[grid](*args, **kwargs)

    return Kernel()


def _changes(machine: FakeCuda) -> Iterator[Any]:
    """Everything that is replaced while the machine is there."""
    properties = SimpleNamespace(
        name="fake", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132,
        L2_cache_size=50 * 2**20, gcnArchName="",
    )  # fmt: skip
    yield patch.multiple(
        torch.cuda,
        Event=_Event,
        Stream=_Stream,
        CUDAGraph=_NoGraph,
        graph=_NoGraph,
        _lazy_init=_nothing(),
        _sleep=_nothing(),
        current_device=lambda: 0,
        current_stream=_Stream,
        default_stream=_Stream,
        device=lambda *_: contextlib.nullcontext(),
        device_count=lambda: 1,
        empty_cache=_nothing(),
        get_device_capability=lambda *_: (9, 0),
        get_device_name=lambda *_: "fake",
        get_device_properties=lambda *_: properties,
        get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8),
        graph_pool_handle=lambda: (0, 0),
        is_available=lambda: True,
        is_current_stream_capturing=lambda: False,
        is_initialized=lambda: True,
        max_memory_allocated=lambda *_: 0,
        mem_get_info=lambda *_: (70 * 2**30, 80 * 2**30),
        memory_allocated=lambda *_: 0,
        reset_peak_memory_stats=_nothing(),
        set_device=_nothing(),
        set_rng_state=_nothing(),
        stream=lambda *_: contextlib.nullcontext(),
        synchronize=lambda device=None: machines[-1].synchronize(),
    )
    yield patch.object(threading.Thread, "run", _run_in(machine))
    save = torch.save
    yield patch.object(
        torch, "save", lambda x, *a, **k: save(tree_map_only(OnGpu, inner_of, x), *a, **k)
    )
    yield patch.object(torch, "Generator", _Generator)
    if native.why_missing() is None:
        core = _Core(machine, native.core())
        yield patch.multiple(native, core=lambda: core, has_cuda=lambda: True)
    for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
        yield patch.object(torch, name, _of_the_cpu(getattr(torch, name)))
    yield patch.object(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    known = [Tensor, nn.Parameter, OnGpu]
    # What AdamW takes to be tensors that it may update together.
    for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        yield patch.object(importlib.import_module(name), "_foreach_supported_types", known)
    grouped = torch._C._group_tensors_by_device_and_dtype

    def by_device(lists: Any, with_indices: bool = False) -> Any:
        groups = grouped(lists, with_indices)
        places = {key: held[0][0][0].device for key, held in groups.items()}
        return {(places[key], key[1]): held for key, held in groups.items()}

    yield patch.object(torch._C, "_group_tensors_by_device_and_dtype", by_device)
    backward = torch.autograd.graph._engine_run_backward

    def with_machine(*args: Any, **kwargs: Any) -> Any:
        # torch calls it with the machine set aside.
        with machine:
            return backward(*args, **kwargs)

    yield patch.object(torch.autograd, "_engine_run_backward", with_machine)
    # All are imported before any is changed: one that imports another's kernel keeps what it finds.
    found = pkgutil.walk_packages(afd_kernels.__path__, "afd_kernels.")
    modules = [importlib.import_module(one.name) for one in found if "triton" in one.name]
    for module in modules:
        kernels = {k: v for k, v in vars(module).items() if k.endswith("_kernel")}
        if kernels:
            fakes = {k: _launcher(machine, k, v) for k, v in kernels.items()}
            yield patch.multiple(module, **fakes)


def _forget() -> None:
    """What is remembered about devices, or lies on one that comes or goes."""
    for remembered in (
        dispatch._refusal,
        launch_config.device_arch,
        library_cuda.first,
        library_impl._backend,
        schedules._on,
        tiles._key_table,
        tiles._query_table,
    ):
        remembered.cache_clear()
    dispatch._logged.clear()
    plans.clear()
