"""Checkpoints: one folder per step that is either whole or not there.

`checkpoints/step_000400/` holds `state.pt` (torch.save, readable with weights_only) and `meta.json`
(its SHA-256, step, method, configuration). It is written under another name, flushed to disk and
renamed, so a power cut at any moment leaves the newest whole checkpoint in place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afd.config import ConfigError, differences

_log = logging.getLogger("afd")
_NAME = re.compile(r"step_(\d{6,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says why."""


def save(folder: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Write `state` (with the keys step, method, config) atomically; keep the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.partial"):
        shutil.rmtree(leftover)
    final = folder / f"step_{state['step']:06d}"
    if final.exists() and _problem(final) is None:
        return final
    partial = final.with_suffix(".partial")
    partial.mkdir()
    with (partial / "state.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    meta = {key: state[key] for key in ("step", "method", "config")}
    meta["sha256"] = _sha256(partial / "state.pt")
    with (partial / "meta.json").open("w", encoding="utf-8") as text:
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
    return final


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. Damaged ones are passed over and named in the log."""
    for path in _newest_first(folder):
        problem = _problem(path)
        if problem is None:
            return path
        _log.warning("checkpoint %s is passed over: %s", path, problem)
    return None


def load(path: Path, *, method: str, config: dict[str, Any]) -> dict[str, Any]:
    """The state in a checkpoint folder.

    Raises CheckpointError where it is damaged, ConfigError where it belongs to another method or
    another configuration (naming each differing key).
    """
    problem = _problem(path)
    if problem is not None:
        raise CheckpointError(f"checkpoint {path}: {problem}")
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    wrong = differences(meta["config"], config)
    if meta["method"] != method:
        wrong.insert(0, f"method: {meta['method']!r} there, {method!r} now")
    if wrong:
        listed = "\n".join(f"  {line}" for line in dict.fromkeys(wrong))
        raise ConfigError(
            f"checkpoint {path}: belongs to another run:\n{listed}\nchoose another out=, or the "
            "settings it was made with"
        )
    state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return state


def seed_everything(seed: int) -> None:
    """Seed the process-wide generators; what a method draws for itself has its own."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The process-wide random states (torch CPU and CUDA, numpy, Python), plain enough to save."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [kind, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "python": list(random.getstate()),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def _newest_first(folder: Path) -> Iterator[Path]:
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    yield from sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def _problem(path: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        if _sha256(path / "state.pt") != meta["sha256"]:
            return "state.pt differs from the SHA-256 in meta.json"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"meta.json or state.pt cannot be read ({error!r})"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
