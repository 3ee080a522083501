"""Checkpoints: one folder per step that is either whole or not there.

`checkpoints/step_000400/` holds the shards that every process wrote for itself and `state.json`
(afd.training.shards), and `meta.json`: step, method, configuration, who wrote it, and the SHA-256
of every other file. It is written under another name, flushed to disk by all processes and renamed,
so a power cut at any moment leaves the newest whole checkpoint in place. Any number of processes
reads it, sharded or not. All functions that take `ranks` are called by every process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import afd
from afd.config import ConfigError, differences
from afd.ranks import ALONE, Ranks
from afd.training import shards

META = "meta.json"
# Changes whenever older checkpoints can no longer be read.
FORMAT = 3
_log = logging.getLogger("afd")
_NAME = re.compile(r"step_(\d{6,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says why."""


def save(folder: Path, state: dict[str, Any], *, keep: int, ranks: Ranks = ALONE) -> Path:
    """Write `state` (with the keys step, method, config) atomically; keep the newest `keep`.

    `written_by` in the state says who writes. What a state may hold: `shards.write`.
    """
    final = folder / f"step_{state['step']:06d}"
    partial = final.with_suffix(".partial")
    if ranks.same(final.exists()) and _problem(final, ranks) is None:
        return final
    if ranks.main:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir()
    ranks.barrier()
    shards.write(partial, state, ranks)
    digests = _digests(partial, ranks)
    if ranks.main:
        meta = {key: state[key] for key in ("step", "method", "config")}
        meta |= {"format": FORMAT, "written_by": state.get("written_by", written_by())}
        meta |= {"sha256": _of_all(digests), "files": digests}
        with (partial / META).open("w", encoding="utf-8") as text:
            json.dump(meta, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        _sync_folder(partial)
        if final.exists():
            shutil.rmtree(final)  # damaged, or we had returned above
        partial.rename(final)
        _sync_folder(folder)
        for old in list(_newest_first(folder))[keep:]:
            shutil.rmtree(old)
    ranks.barrier()
    return final


def latest(folder: Path, ranks: Ranks = ALONE) -> Path | None:
    """The newest whole checkpoint, or None. Damaged ones are passed over and named in the log."""
    for name in ranks.same([path.name for path in _newest_first(folder)]):
        problem = _problem(folder / name, ranks)
        if problem is None:
            return folder / name
        _log.warning("checkpoint %s is passed over: %s", folder / name, problem)
    return None


def load(
    path: Path,
    *,
    method: str,
    config: dict[str, Any],
    into: dict[str, Any] | None = None,
    only: str = "",
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """The state in a checkpoint folder.

    Tensors are read into those of `into` where it has them, and are left out where `only` says so:
    see `shards.read`. Raises CheckpointError where the checkpoint is damaged or of another format,
    ConfigError where it belongs to another method or another configuration (naming each differing
    key).
    """
    problem = _problem(path, ranks)
    if problem is not None:
        raise CheckpointError(f"checkpoint {path}: {problem}")
    meta = json.loads((path / META).read_text(encoding="utf-8"))
    if meta["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {path}: has format {meta['format']}, this afd reads {FORMAT}; go on "
            f"with the one that wrote it ({meta.get('written_by', 'unknown')}), or train again"
        )
    wrong = differences(meta["config"], config)
    if meta["method"] != method:
        wrong.insert(0, f"method: {meta['method']!r} there, {method!r} now")
    if wrong:
        listed = "\n".join(f"  {line}" for line in dict.fromkeys(wrong))
        raise ConfigError(
            f"checkpoint {path}: belongs to another run:\n{listed}\nchoose another out=, or the "
            "settings it was made with"
        )
    return shards.read(path, ranks, into=into, only=only)


@lru_cache
def written_by() -> dict[str, Any]:
    """Who writes: the package's version, and its git commit where it runs from a repository."""
    return {"afd": afd.__version__, "torch": str(torch.__version__), "commit": _commit()}


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    # A package installed below somebody's repository is not of that repository.
    known = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    try:
        subprocess.run(known, capture_output=True, check=True)
        named = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(named, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def seed_everything(seed: int) -> None:
    """Seed the process-wide generators; what a method draws for itself has its own."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The process-wide random states (torch CPU, its own GPU's, numpy, Python) as JSON holds."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {
        "torch": _hex(torch.get_rng_state()),
        "cuda": None if cuda is None else _hex(cuda),
        "numpy": [kind, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "python": list(random.getstate()),
    }


def set_random_state(states: Sequence[dict[str, Any]], rank: int = 0) -> None:
    """Put back what `random_state` returned on this process; a new process takes the first's."""
    state = states[rank if rank < len(states) else 0]
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _newest_first(folder: Path) -> Iterator[Path]:
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    yield from sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def _problem(path: Path, ranks: Ranks = ALONE) -> str | None:
    """Why a checkpoint is not whole, or None; one of another format is for `load` to refuse."""
    files, problem = ranks.same(_promised(path))
    if files is None:
        return cast("str | None", problem)
    there = _digests(path, ranks)
    odd = [name for name in files | there if not files.get(name) == there.get(name) is not None]
    return f"{min(odd)} differs from the SHA-256 in {META}" if odd else None


def _promised(path: Path) -> tuple[dict[str, str] | None, str | None]:
    """The files that meta.json names, with their SHA-256; or None, and perhaps the reason."""
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            return None, None
        files = dict(meta["files"])
        return (files, None) if _of_all(files) == meta["sha256"] else (None, f"{META} is damaged")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{META} cannot be read ({error!r})"


def _digests(folder: Path, ranks: Ranks) -> dict[str, str | None]:
    """SHA-256 of every file but meta.json, or None; each process reads some of them."""
    names = ranks.same(sorted(path.name for path in folder.iterdir() if path.name != META))
    own = {name: _sha256(folder / name) for name in names[ranks.share(len(names))]}
    return {name: digest for part in ranks.each(own) for name, digest in part.items()}


def _of_all(digests: Mapping[str, str | None]) -> str:
    """One SHA-256 for all files."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str | None:
    """None where the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
