"""Atomic checkpoints: one folder per update, either complete or absent.

`checkpoints/update_000400/` holds the shards that each process wrote and `state.json`
(afd.trainer.shards), and `meta.json`: update, method, configuration, the software that wrote it,
the SHA-256 of every file that a resume reads, and the SHA-256 of all of this. A checkpoint is
written under a temporary name, flushed to disk by all processes and renamed, so a power cut at any
moment leaves the newest complete checkpoint in place. Other files in the folder are ignored. A
checkpoint, sharded or not, can be loaded by any number of processes. Functions that take `ranks`
are collective: every process must call them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import random
import re
import stat
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import afd
from afd.config.run import FREE_KEYS, differences
from afd.distributed import ALONE, Ranks
from afd.errors import CheckpointError, ConfigError
from afd.files import PARTIAL, naming, parse_json, remove, sha256_of, sync
from afd.trainer import shards

META = "meta.json"
# Incremented whenever older checkpoints can no longer be read.
FORMAT = 5
_log = logging.getLogger("afd")
# Formats up to 4 used step_000400; these checkpoints are found, and refused for their format.
_NAME = re.compile(r"(?:update|step)_(\d{6,})")
# Files that a resume reads; and partial checkpoints left by a killed process.
_FILE = re.compile(r"(?!\.)[^/]*\.(safetensors|json)")
_LEFT = re.compile(_NAME.pattern + re.escape(PARTIAL))


def save(folder: Path, state: dict[str, Any], *, keep: int, ranks: Ranks = ALONE) -> Path:
    """Write `state` (with the keys update, method, config) atomically; keep the newest `keep`.

    `written_by` in the state overrides the default provenance. See `shards.write` for the types
    that a state may hold.
    """
    final = folder / f"update_{state['update']:06d}"
    partial = final.with_suffix(PARTIAL)
    if ranks.same(final.exists()) and _problem(final, ranks) is None:
        return final
    if ranks.main:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():
            if _LEFT.fullmatch(left.name):
                remove(left)
        partial.mkdir()
    ranks.barrier()
    try:
        shards.write(partial, state, ranks)
        names = sorted(path.name for path in partial.iterdir() if _FILE.fullmatch(path.name))
        digests = _digests(partial, ranks.same(names), ranks)
        if ranks.main:
            files = {name: digest for name, digest in digests.items() if digest is not None}
            if len(files) < len(digests):
                raise OSError(errno.EIO, "the file just written cannot be read back", str(partial))
            _finish(partial, final, state, files)
            # Newer checkpoints are damaged, or the run would have resumed from them.
            older = [path for path in _newest_first(folder) if _update_of(path) <= state["update"]]
            for old in older[keep:]:
                remove(old)
    except OSError:
        # On a full disk, make room for the run's other files again.
        with suppress(OSError):
            remove(partial)
        raise
    ranks.barrier()
    return final


def _finish(partial: Path, final: Path, state: dict[str, Any], files: dict[str, str]) -> None:
    """Write meta.json, which binds the files together, and give the folder its final name."""
    meta: dict[str, Any] = {key: state[key] for key in ("update", "method", "config")}
    meta |= {"format": FORMAT, "written_by": state.get("written_by", written_by()), "files": files}
    meta["sha256"] = _bound(meta)
    with naming(partial / META), (partial / META).open("w", encoding="utf-8") as text:
        json.dump(meta, text, indent=1)
    sync(partial / META)
    sync(partial)
    remove(final)  # damaged, otherwise `save` would have returned early
    partial.rename(final)
    sync(final.parent)


def latest(folder: Path, ranks: Ranks = ALONE) -> Path | None:
    """The newest complete checkpoint, or None if there are no checkpoints at all.

    Damaged checkpoints are skipped with a warning. Raises CheckpointError if all are damaged:
    starting over is for the user to decide.
    """
    problems: list[tuple[Path, str]] = []
    for name in ranks.same([path.name for path in _newest_first(folder)]):
        problem = _problem(folder / name, ranks)
        if problem is None:
            for line in problems:
                _log.warning("checkpoint %s is skipped: %s", *line)
            return folder / name
        problems.append((folder / name, problem))
    if problems:
        listed = "; ".join(f"{path}: {problem}" for path, problem in problems)
        raise CheckpointError(
            f"checkpoints {folder}: none is complete ({listed}); restore a complete one, "
            "or remove them to start over"
        )
    return None


def load(
    path: Path,
    *,
    method: str,
    config: dict[str, Any],
    into: dict[str, Any] | None = None,
    only: str = "",
    ranks: Ranks = ALONE,
    free_keys: Sequence[str] = FREE_KEYS,
) -> dict[str, Any]:
    """Load the state in a checkpoint folder, of a configuration that may differ in `free_keys`.

    Tensors are read into the matching ones of `into`, and only those selected by `only`: see
    `shards.read`. Raises CheckpointError if the checkpoint is damaged or has another format,
    ConfigError if it belongs to another method or configuration (naming each differing key).
    """
    problem = _problem(path, ranks)
    if problem is not None:
        raise CheckpointError(f"checkpoint {path}: {problem}")
    meta = ranks.same(read_meta(path) if ranks.main else None)
    if meta["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {path}: has format {meta['format']}, this version of afd reads "
            f"{FORMAT}; continue with the version that wrote it "
            f"({meta.get('written_by', 'unknown')}), or train again"
        )
    wrong = differences(meta["config"], config, free_keys)
    if meta["method"] != method:
        wrong.insert(0, f"method: {meta['method']!r} there, {method!r} now")
    if wrong:
        listed = "\n".join(f"  {line}" for line in dict.fromkeys(wrong))
        raise ConfigError(
            f"checkpoint {path}: belongs to another run:\n{listed}\nchoose another out=, or the "
            "settings of that run"
        )
    return shards.read(path, ranks, into=into, only=only, files=meta["files"])


@lru_cache
def written_by() -> dict[str, Any]:
    """Provenance: versions of afd and torch, and afd's git commit if run from a repository."""
    return {"afd": afd.__version__, "torch": str(torch.__version__), "commit": _commit()}


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    # A package installed inside an unrelated repository must not report that repository's commit.
    known = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    try:
        subprocess.run(known, capture_output=True, check=True)
        named = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(named, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def seed_everything(seed: int) -> None:
    """Seed the process-wide generators; methods draw from separate generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The process-wide random states (torch CPU and current GPU, numpy, Python), as JSON values."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {
        "torch": _hex(torch.get_rng_state()),
        "cuda": None if cuda is None else _hex(cuda),
        "numpy": [kind, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "python": list(random.getstate()),
    }


def set_random_state(states: Sequence[dict[str, Any]], rank: int = 0) -> None:
    """Restore this process's `random_state`; additional processes take that of the first."""
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


def _newest_first(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=_update_of, reverse=True)


def _update_of(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def _problem(path: Path, ranks: Ranks = ALONE) -> str | None:
    """Why a checkpoint is not complete, or None; `load` refuses other formats."""
    files, problem = ranks.same(_promised(path) if ranks.main else None)
    if problem is not None or files is None:
        return None if problem is None else str(problem)
    found = _digests(path, sorted(files), ranks)
    odd = [name for name in sorted(files) if found[name] != files[name]]
    if not odd:
        return None
    problem = _unreadable(path / odd[0])
    return f"{odd[0]} {problem or f'differs from its SHA-256 in {META}'}"


def _promised(path: Path) -> tuple[dict[str, str] | None, str | None]:
    """The files listed in meta.json with their SHA-256; or None and why they are unknown."""
    try:
        meta = read_meta(path)
        bound = meta.pop("sha256") == _bound(meta)
        if meta["format"] != FORMAT:
            problem = f"has format {meta['format']!r}, this version of afd reads {FORMAT}"
            return None, None if bound else problem
        if not bound:
            return None, f"{META} is damaged"
        if path.name != f"update_{meta['update']:06d}":
            return None, f"{META} is that of update {meta['update']}"
        return meta["files"], None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{META} {_unreadable(path / META) or f'cannot be read ({error!r})'}"


def read_meta(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint's meta.json, unverified. Raises OSError or ValueError."""
    if _unreadable(path / META):
        raise FileNotFoundError(path / META)
    meta = parse_json((path / META).read_text(encoding="utf-8"))
    return dict(meta)


def _bound(meta: Mapping[str, Any]) -> str:
    """The SHA-256 of the contents of a meta.json."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path, names: Sequence[str], ranks: Ranks) -> dict[str, str | None]:
    """The SHA-256 of each file (None if unreadable); the processes share the reading."""
    own = {name: _sha256(folder / name) for name in names[ranks.share(len(names))]}
    return {name: digest for part in ranks.each(own) for name, digest in part.items()}


def _sha256(path: Path) -> str | None:
    # Opening a pipe would block forever.
    if _unreadable(path):
        return None
    try:
        return sha256_of(path)
    except OSError:
        return None


def _unreadable(path: Path) -> str | None:
    """Why a file cannot be read, judging by its directory entry alone; None if nothing is wrong."""
    try:
        return None if stat.S_ISREG(path.stat().st_mode) else "is not a file"
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"({error.strerror})"
