"""Store a tree of tensors and plain values as a folder of safetensors shards and one JSON file.

Every process writes its own shards (torch.distributed.checkpoint plans which), and reads only what
it needs. No pickle is involved: DCP's default storage writes one, its safetensors storage does not,
since each shard's header records where the shard belongs.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from afd.distributed import Ranks, collective
from afd.files import naming, sync
from afd.models.weights import local

TREE = "state.json"
# Bytes of a process's shards after which a new file is started: each file is assembled in memory
# before it is written.
FILE_BYTES = 1 << 30
# Reserved JSON keys that stand for values JSON cannot hold.
_TENSOR, _SCALAR, _INTEGERS = "$tensor", "$scalar", "$integers"


def write(folder: Path, tree: Mapping[str, Any], ranks: Ranks) -> None:
    """Write a tree into an empty folder, flushed to disk. Every process must call this; when it
    returns on the main process, all processes have written.

    A tree consists of dictionaries with str or int keys, lists, tuples (read back as lists),
    tensors, str, numbers and None. Tensors other than sharded ones (DTensor) must be the same on
    every process; plain values are taken from the main process. Raises TypeError for other types,
    OSError if a file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    packed = _pack(tree, "", tensors)
    if tensors:
        filled = accumulate(local(tensor).nbytes for tensor in tensors.values())
        files = {name: 1 + size // FILE_BYTES for name, size in zip(tensors, filled, strict=True)}
        writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
        planner = DefaultSavePlanner(flatten_state_dict=False)
        _planned(folder, ranks, save, tensors, storage_writer=writer, planner=planner)
    if ranks.main:
        with naming(folder / TREE), (folder / TREE).open("w", encoding="utf-8") as file:
            json.dump(packed, file)
        sync(folder / TREE)


def read(
    folder: Path,
    ranks: Ranks,
    *,
    into: Mapping[str, Any] | None = None,
    only: str = "",
    files: Collection[str] | None = None,
) -> dict[str, Any]:
    """Read the tree in a folder, written by any number of processes. Every process must call this.

    Args:
        into: a tree whose tensors are filled in place (of a sharded tensor, each process fills its
            own shard) if the folder holds one of the same path, shape and dtype. Other tensors are
            read in full, onto the CPU.
        only: prefix of the tensor paths ("a/b/c") to read; others are returned on device "meta".
        files: names of the files to read; None: all files in the folder.
    """
    there: dict[str, Tensor] = {}
    _pack(into or {}, "", there)
    tensors: dict[str, Tensor] = {}
    packed = json.loads((folder / TREE).read_text(encoding="utf-8"))
    tree = _unpack(packed, lambda name, like: _place(name, like, there, only), tensors)
    if tensors:
        reader = HuggingFaceStorageReader(str(folder))
        if files is not None:
            reader.fs = _Only(files)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        _planned(folder, ranks, load, tensors, storage_reader=reader, planner=planner)
    return dict(tree)


class _Only(FileSystem):
    """A file system that lists only the given files, as the folder may hold unrelated ones."""

    def __init__(self, files: Collection[str]) -> None:
        self._files = files

    def ls(self, path: str | os.PathLike) -> list[str]:
        return [str(Path(path) / name) for name in sorted(self._files)]


def _place(name: str, like: Tensor, there: Mapping[str, Tensor], only: str) -> Tensor:
    """The tensor to read into; `like` is on the meta device."""
    if not name.startswith(only):
        return like
    present = there.get(name)
    if present is not None and (present.shape, present.dtype) == (like.shape, like.dtype):
        return present
    return torch.empty_like(like, device="cpu")


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Convert a tree to JSON values and collect its tensors by name. `path` is empty or ends in
    "/"."""
    name = path[:-1]
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.ndim == 0:
            return {_SCALAR: value.item(), "dtype": dtype}
        if name in tensors:
            raise TypeError(f"state: two tensors have the name {name!r}; needed: other keys")
        value = value.detach()
        # safetensors accepts only contiguous tensors.
        tensors[name] = value if value.is_contiguous() else value.contiguous()
        return {_TENSOR: name, "shape": list(value.shape), "dtype": dtype}
    if isinstance(value, Mapping):
        packed = {str(key): _pack(one, f"{path}{key}/", tensors) for key, one in value.items()}
        if value and all(type(key) is int for key in value):
            return {_INTEGERS: packed}
        odd = [key for key in value if not isinstance(key, str) or key.startswith("$")]
        if odd:
            raise TypeError(f"state: {name!r} has keys {odd[:4]}; needed: str without $, or int")
        return packed
    if isinstance(value, list | tuple):
        return [_pack(one, f"{path}{i}/", tensors) for i, one in enumerate(value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"state: {name!r} is {type(value)}; needed: tensors or JSON values")


def _unpack(packed: Any, place: Callable[[str, Tensor], Tensor], tensors: dict[str, Tensor]) -> Any:
    """Inverse of `_pack`; collects the tensors to be read, by name."""
    if isinstance(packed, list):
        return [_unpack(one, place, tensors) for one in packed]
    if not isinstance(packed, dict):
        return packed
    if _INTEGERS in packed:
        return {int(k): _unpack(v, place, tensors) for k, v in packed[_INTEGERS].items()}
    if _SCALAR in packed:
        return torch.tensor(packed[_SCALAR], dtype=getattr(torch, packed["dtype"]))
    if _TENSOR in packed:
        name, dtype = packed[_TENSOR], getattr(torch, packed["dtype"])
        tensor = place(name, torch.empty(packed["shape"], dtype=dtype, device="meta"))
        if not tensor.is_meta:
            tensors[name] = tensor
        return tensor
    return {key: _unpack(value, place, tensors) for key, value in packed.items()}


def _planned(
    folder: Path, ranks: Ranks, call: Callable[..., Any], tensors: Any, **named: Any
) -> None:
    """Run DCP's `save` or `load`, re-raising the original error of any process."""

    def plan() -> None:
        call(tensors, no_dist=ranks.processes == 1, **named)

    with naming(folder), warnings.catch_warnings():
        # With a single process DCP warns on every call.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            plan() if ranks.processes == 1 else collective(plan)
        except CheckpointException as error:  # aggregates all processes; not an Exception
            first, _ = next(iter(error.failures.values()))
            raise first from error
