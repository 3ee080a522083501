"""On-disk cache of tensors that are expensive to compute: text embeddings, teacher latents.

A `Store` is a folder of safetensors files, each named by the hash of everything that its tensor
depends on, so that any number of runs can share one folder safely. Files are written atomically; a
damaged one is detected and recomputed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from afd.errors import ConfigError
from afd.files import sha256_of, write_bytes
from afd.hub import tensor_bytes

DEFAULT = Path("~/.cache/afd")
# Part of every name; increment it when the same facts no longer give the same values.
VERSION = 1
# A snapshot in the hub's cache; its name identifies its content.
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})(/.*)?$")
_log = logging.getLogger("afd")

# What a tensor depends on, as plain data.
Facts = dict[str, Any]


class Store:
    """Stores tensors by kind and facts; processes may read and write one folder concurrently."""

    def __init__(self, folder: Path) -> None:
        try:
            self.folder = folder.expanduser()
        except RuntimeError:
            raise ConfigError(
                f"cache: is {folder} (the default is {DEFAULT}), and this account has no home "
                "folder; needed: another folder"
            ) from None
        self._writes = True

    @classmethod
    def of(cls, cache: Path | None) -> Store:
        """The store in a folder; None: ~/.cache/afd."""
        return cls(cache or DEFAULT)

    def path(self, kind: str, facts: Facts) -> Path:
        """Path of the tensor of these facts, whether it exists or not."""
        name = hashlib.sha256(_written(kind, facts).encode()).hexdigest()
        return self.folder / kind / name[:2] / f"{name}.safetensors"

    def get(self, kind: str, facts: Facts) -> Tensor | None:
        """The tensor, on the CPU; None if it is absent or its file is damaged."""
        path = self.path(kind, facts)
        try:
            # Opening a pipe would block forever.
            if path.exists() and not path.is_file():
                raise OSError("is not a file")
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor("tensor")
                held = file.metadata() or {}
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            why = str(error)
        else:
            if held.get("sha256") != hashlib.sha256(tensor_bytes(tensor)).hexdigest():
                why = "its contents do not match its checksum"
            elif held.get("facts") != _written(kind, facts):
                why = "it was made from other inputs"
            else:
                return tensor
        _log.warning("cache %s: is damaged and is computed again (%s)", path, why)
        return None

    def put(self, kind: str, facts: Facts, tensor: Tensor) -> None:
        """Store a tensor. If the folder cannot be written, this is logged and the run continues."""
        path = self.path(kind, facts)
        tensor = tensor.detach().cpu().contiguous()
        sha256 = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        data = save({"tensor": tensor}, {"facts": _written(kind, facts), "sha256": sha256})
        try:
            write_bytes(path, data, shared=True)
        except OSError as error:
            if self._writes:
                _log.warning("cache %s: cannot be written, continuing without it (%s)", path, error)
            self._writes = False

    def size(self, kind: str) -> tuple[int, int]:
        """Number of files of a kind, and their total bytes."""
        sizes = [entry.stat().st_size for entry in self.folder.glob(f"{kind}/*/*.safetensors")]
        return len(sizes), sum(sizes)

    def summary(self, kind: str) -> str:
        """Summary of the folder's files of a kind, for the log."""
        count, held = self.size(kind)
        return f"{self.folder / kind} holds {count}, {held / 2**20:.1f} MiB"


def files_identity(paths: Sequence[Path], store: Store | None = None) -> str:
    """One-line identity of the contents of files and folders: hub name and revision, or SHA-256.

    With a store a file's hash is reused while its size and modification times are unchanged.
    """
    digest = hashlib.sha256()
    names = []
    for path in paths:
        if snapshot := _SNAPSHOT.search(path.absolute().as_posix()):
            owner, name, revision, rest = snapshot.groups()
            names.append(f"{owner}/{name}@{revision}{rest or ''}")
            continue
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            inside = file.relative_to(path).as_posix()
            digest.update(f"{inside} {file_hash(file, store)}\n".encode())
    return " ".join([*names, f"sha256:{digest.hexdigest()}"])


def file_hash(path: Path, store: Store | None = None) -> str:
    """SHA-256 of a file's bytes (see `files_identity`)."""
    stat, path = path.stat(), path.resolve()
    # Unlike the modification time, ctime cannot be set by a program.
    times = {"time_ns": stat.st_mtime_ns, "changed_ns": stat.st_ctime_ns, "inode": stat.st_ino}
    facts = {"path": str(path), "bytes": stat.st_size, **times}
    known = store.get("hashes", facts) if store is not None else None
    if known is None:
        digest = bytearray.fromhex(sha256_of(path))
        known = torch.frombuffer(digest, dtype=torch.uint8)
        if store is not None:
            store.put("hashes", facts, known)
    return bytes(known.tolist()).hex()


def _written(kind: str, facts: Facts) -> str:
    return json.dumps({"version": VERSION, "kind": kind, **facts}, sort_keys=True)
