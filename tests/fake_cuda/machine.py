"""The tensors, and what a GPU makes of the ops that are asked of it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from afd_kernels import dispatch, native, registry

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / folder) for folder in ("python", "afd_kernels", "benchmarks", "examples"))
# Where the device's addresses begin; those of the host lie below.
HIGH = 2**62
aten = torch.ops.aten
# What makes the host wait, besides copies: it needs the size or value of the result now.
WAITING = {
    aten._local_scalar_dense,
    aten.allclose,
    aten.bincount,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten._unique2,
    aten.unique_dim,
    aten.repeat_interleave.Tensor,
    aten.repeat_interleave.self_Tensor,
}
# Their indices may lie on the CPU.
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
# Of these not even a number on the CPU may come beside tensors on the device.
STRICT = {aten.cat, aten.stack, aten.mm, aten.bmm, aten.addmm, aten.gather, aten.scatter}


class OnGpu(Tensor):
    """A tensor that reports cuda:0; `inner` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        # A view of a normal tensor is one also where no gradients can be asked for.
        with torch.inference_mode(inner.is_inference()):
            made = Tensor._make_wrapper_subclass(
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=CPU,
            )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        super().__init__()

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr() + HIGH

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __repr__(self) -> str:  # type: ignore[override]
        if machines:
            machines[-1].wait("repr")
        return f"OnGpu({self.inner!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else repr(self)

    # Says that a module's parameters are exchanged as wholes.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> OnGpu:
        return OnGpu(parts["inner"])

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _machine()._dispatch(func, args, kwargs or {})


class _Move(torch.autograd.Function):
    """To the device or back, with the gradient going the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_gpu: bool) -> Tensor:
        ctx.to_gpu = to_gpu
        return OnGpu(x.detach().clone()) if to_gpu else inner_of(x).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Move.apply(grad, not ctx.to_gpu), None


def inner_of(x: Tensor) -> Tensor:
    return x.inner if isinstance(x, OnGpu) else x


machines: list[FakeCuda] = []


def _machine() -> FakeCuda:
    if not machines:
        raise RuntimeError("a fake CUDA tensor was used outside fake_cuda()")
    return machines[-1]


def device_of(asked: Any) -> torch.device:
    """The device meant; a bare "cuda" or a number is the GPU."""
    if asked is None:
        return CPU
    device = torch.device("cuda", asked) if isinstance(asked, int) else torch.device(asked)
    return GPU if device.type == "cuda" else device


class FakeCuda(TorchFunctionMode):
    """The machine (`fake_cuda` switches it on).

    Attributes:
        waits: how often the host would have waited for the device, by (op, file:line of ours).
        launches: names of the Triton kernels and library calls that host code has made.
        compiles: whether launches go on to Triton's compiler.
    """

    compiles = False

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()
        self._seen: set[Any] = set()
        self._within = 0
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def no_waits(self) -> Iterator[None]:
        """Inside nothing may wait for the device."""
        before = self.waits.copy()
        yield
        assert not self.waits - before, self.waits - before

    def wait(self, what: str) -> None:
        """Count a wait at the nearest line of ours; another thread than the test's may wait."""
        if threading.get_ident() != self._thread:
            return
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(OURS):
            frame = frame.f_back
        line = "elsewhere"
        if frame is not None:
            name = Path(frame.f_code.co_filename).relative_to(ROOT)
            line = f"{name}:{frame.f_lineno}"
        self.waits[what, line] += 1

    def synchronize(self) -> None:
        """Of the device, a stream or an event."""
        self.wait("synchronize")

    # --- what is asked of torch by name ---

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        special = _SPECIAL.get(func)
        if special is not None:
            with self:
                return special(self, func, *args, **kwargs)
        asked, generator = kwargs.get("device"), kwargs.get("generator")
        like = next((x for x in args if isinstance(x, Tensor)), None)
        target = device_of(asked) if asked is not None or like is None else like.device
        if generator is not None and generator.device.type != target.type:
            raise RuntimeError(
                f"Expected a '{target.type}' generator, found '{generator.device.type}'"
            )
        if "device" not in kwargs or target.type == "meta":
            return func(*args, **kwargs)
        del kwargs["device"]
        pinned, grad = kwargs.pop("pin_memory", False), kwargs.pop("requires_grad", False)
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and target == GPU:
            self.wait("tensor")
        made = func(*args, **kwargs, device=CPU)
        made = OnGpu(inner_of(made)) if target == GPU else inner_of(made)
        if pinned:
            made.pinned = True
        return made.requires_grad_() if grad else made

    def move(self, x: Tensor, target: torch.device, non_blocking: bool = False) -> Tensor:
        """x on a device, itself if it is there."""
        if target == x.device:
            return x
        pinned = non_blocking and (getattr(x, "pinned", False) or target == CPU)
        if not pinned:
            self.wait("copy to the device" if target == GPU else "copy to the host")
        return _Move.apply(x, target == GPU)

    # --- what arrives at the device ---

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        packet = func.overloadpacket
        ours = func.namespace == "afd"
        if _needs_values(func):
            # Below autograd, as in an op's host code, torch leaves `item` and its like whole.
            parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        tensors: list[Tensor] = []
        plain_args, plain_kwargs = _plain(args, tensors), _plain(kwargs, tensors)
        strangers = [x for x in tensors if not isinstance(x, OnGpu)]
        if strangers:
            if packet is aten.copy_:
                return self._copy(*args, **kwargs)
            self._refuse(func, args, tensors, strangers, ours or packet in STRICT)
        if packet in WAITING or func in WAITING:
            self.wait(str(packet))
        if packet in INDEXING and any(x.dtype == torch.bool for x in args[1] if x is not None):
            self.wait(str(packet))
        if ours:
            self._host_code(func, args, kwargs)
        if "device" in plain_kwargs:
            plain_kwargs["device"] = CPU
        library = _LIBRARIES.get(packet)
        if library is not None:
            self.launches[packet.__name__] += 1
        with dispatch.use_requested(_ON_CPU) if ours else contextlib.nullcontext():
            out = (library or func)(*plain_args, **plain_kwargs)
        changed = {id(inner_of(x)): x for x in tensors}

        def outer(x: Tensor) -> Tensor:
            # A conjugate that is only marked as one would not be marked outside.
            return changed[id(x)] if id(x) in changed else OnGpu(x.resolve_conj().resolve_neg())

        return outer(out) if isinstance(out, Tensor) else tree_map_only(Tensor, outer, out)

    def _refuse(
        self, func: Any, args: Any, tensors: list[Tensor], strangers: list[Tensor], strict: bool
    ) -> None:
        """Raises where CPU tensors beside the device's are not what a GPU takes."""
        if func.overloadpacket in INDEXING:
            places = [x for x in strangers if any(x is y for y in args[1])]
            for _ in places:
                self.wait("copy to the device")
            strangers = [x for x in strangers if not any(x is y for y in places)]
        if torch._C._current_graph_task_id() >= 0:
            # autograd makes a gradient that nothing flowed to where torch itself sees the tensor.
            strangers = [x for x in strangers if x.any()]
        if any(x.ndim or strict for x in strangers):
            shown = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in tensors)
            raise RuntimeError(f"{func}: tensors on both devices: {shown}")

    def _copy(self, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        host = source if isinstance(to, OnGpu) else to
        pinned = non_blocking and getattr(host, "pinned", False)
        if not pinned and (host.ndim or to is host):
            self.wait("copy to the host" if to is host else "copy to the device")
        inner_of(to).copy_(inner_of(source))
        return to

    def _host_code(self, func: Any, args: Any, kwargs: Any) -> None:
        """Runs what our op does on a GPU, once for each kind of inputs; its results go unused."""
        kind = (func, *(_kind(x) for x in (*args, *kwargs.values())))
        if self._within or kind in self._seen:
            return
        self._seen.add(kind)
        name = func.overloadpacket.__name__
        module = importlib.import_module(f"afd_kernels.{_folder(name)}.op")
        args, kwargs = tree_map_only(
            Tensor, lambda x: OnGpu(_same_strides(inner_of(x))), (args, kwargs)
        )
        op = name if name in dispatch.OPS else _folder(name)
        refusals = dispatch.explain(op, "cuda", {next(x.dtype for x in args if x is not None)})
        self._within += 1
        try:
            for backend in refusals:
                if backend == "reference" or refusals[backend] is not None:
                    continue
                run = registry._on_its_device(getattr(module, f"_{name}"))
                with torch.no_grad(), self, dispatch.use_backend(backend):
                    run(*args, **kwargs)
        finally:
            self._within -= 1


@functools.cache
def _needs_values(func: Any) -> bool:
    """Whether an op's result is a number, or has a size that its input's values decide."""
    if func.overloadpacket in (aten.argwhere, aten.nonzero_numpy) or func is aten.where.default:
        return True
    return any(
        str(result.type) not in ("Tensor", "List[Tensor]") for result in func._schema.returns
    )


def _plain(x: Any, tensors: list[Tensor]) -> Any:
    """Arguments with the CPU's tensors in the place of ours; `tensors` gets all there are."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return inner_of(x)
    if isinstance(x, dict):
        return {key: _plain(value, tensors) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)([_plain(value, tensors) for value in x])
    return x


def _kind(x: Any) -> Any:
    """What host code may decide by."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(x) if isinstance(x, list) else x


def _same_strides(x: Tensor) -> Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return made.copy_(x) if 0 not in x.stride() else x


def _folder(name: str) -> str:
    return name.removesuffix("_").removesuffix("_append").removesuffix("_bwd")


def _flash(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float) -> tuple[Any, ...]:
    """The CUDA op's results by the CPU's: out and lse, and the state of a dropout not used."""
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    seed = torch.empty(2, dtype=torch.uint64)
    return out, lse, None, None, q.shape[2], k.shape[2], seed, seed[:0], seed[:0]


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *_: Any, scale: float
) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, scale=scale
    )


# Who makes our ops' values: none whose kernels are replaced.
_ON_CPU = () if native.why_missing() is None else (dispatch.Request("reference", ()),)
_LIBRARIES: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention: _flash,
    aten._scaled_dot_product_flash_attention_backward: _flash_backward,
}


# --- Tensor's own ways between devices ---


def _to(machine: FakeCuda, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    other = args[0] if args else kwargs.pop("other", None)
    if isinstance(other, Tensor):
        args, kwargs = (other.dtype, *args[1:]), {**kwargs, "device": other.device}
    if args and isinstance(args[0], torch.device | str | int):
        args, kwargs = args[1:], {**kwargs, "device": args[0]}
    device = kwargs.pop("device", None)
    if device is not None and torch.device(device).type == "meta":
        return torch.empty_like(x, device="meta")
    # After the device come dtype, non_blocking and copy.
    non_blocking = kwargs.get("non_blocking", False) or any(a is True for a in args[:2])
    moved = x if device is None else machine.move(x, device_of(device), non_blocking)
    args = tuple(a for a in args if not isinstance(a, bool) and a is not None)
    if not args and not (kwargs.keys() - {"non_blocking"}):
        return moved
    with torch._C.DisableTorchFunction():
        return func(moved, *args, **kwargs)


def _cuda(machine: FakeCuda, func: Any, x: Tensor, device: Any = None, **how: Any) -> Tensor:
    return machine.move(x, device_of(0 if device is None else device), **how)


def _cpu(machine: FakeCuda, func: Any, x: Tensor, **how: Any) -> Tensor:
    return machine.move(x, CPU)


def _pin(machine: FakeCuda, func: Any, x: Tensor, *_: Any) -> Tensor:
    if isinstance(x, OnGpu):
        raise RuntimeError("cannot pin a CUDA tensor")
    pinned = x.clone()
    pinned.pinned = True  # type: ignore[attr-defined]
    return pinned


def _tolist(machine: FakeCuda, func: Any, x: Tensor) -> Any:
    if isinstance(x, OnGpu):
        machine.wait("tolist")
    with torch._C.DisableTorchFunction():
        return func(inner_of(x))


def _numpy(machine: FakeCuda, func: Any, x: Tensor, *args: Any, **how: Any) -> Any:
    if isinstance(x, OnGpu):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    with torch._C.DisableTorchFunction():
        return func(x, *args, **how)


def _new_tensor(machine: FakeCuda, func: Any, x: Tensor, data: Any, **how: Any) -> Tensor:
    return torch.tensor(data, **{"dtype": x.dtype, "device": x.device, **how})


def _set_data(machine: FakeCuda, func: Any, x: Tensor, value: Tensor) -> None:
    with torch._C.DisableTorchFunction():
        func(x, value)
    if isinstance(x, OnGpu) != isinstance(value, OnGpu):
        raise RuntimeError("data: tensors on both devices")
    if isinstance(x, OnGpu):
        x.inner = inner_of(value)


def _deepcopy(machine: FakeCuda, func: Any, x: Tensor, memo: dict[int, Any]) -> Tensor:
    if not isinstance(x, OnGpu):
        with torch._C.DisableTorchFunction():
            return func(x, memo)
    if id(x) not in memo:
        memo[id(x)] = copied = OnGpu(x.inner.clone()).requires_grad_(x.requires_grad)
        if isinstance(x, nn.Parameter):
            copied._is_param = True
    return memo[id(x)]


def _record_stream(machine: FakeCuda, func: Any, x: Tensor, stream: Any) -> None:
    assert isinstance(x, OnGpu)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cuda: _cuda,
    Tensor.cpu: _cpu,
    Tensor.pin_memory: _pin,
    Tensor.tolist: _tolist,
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.new_tensor: _new_tensor,
    Tensor.__deepcopy__: _deepcopy,
    Tensor.record_stream: _record_stream,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}
