"""Locates parts of a pipeline in a local folder or on the Hugging Face hub."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd.errors import ConfigError
from afd.extras import need

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# Larger than any released part; a name that would download more must be a mistake.
HUB_BYTES = 64 * 2**30
# Bytes read from either end of a file for its fingerprint.
ENDS = 2**20
# Configurations of the package, and the text files that they name.
CONFIGS = Path(str(files("afd") / "configs"))


def local_copy(source: str | Path, parts: tuple[str, ...], needed: str) -> Path:
    """`source` itself if it is a path; else a download of those folders of a pipeline on the hub.

    The hub is queried only for a name like `owner/name`, or `owner/name@revision` (a commit, tag or
    branch), that is not a local path; files go to its own cache. Raises FileNotFoundError, stating
    what is `needed`, if neither has it.
    """
    path = Path(source)
    if path.exists():
        return path
    reason = "there is no such path"
    if isinstance(source, str) and (match := _HUB_NAME.fullmatch(source)):
        try:
            return _from_hub(match["name"], match["revision"], parts)
        except (OSError, ValueError) as error:
            reason = f"there is no such path, and the hub answered: {error}"
    raise FileNotFoundError(f"{parts[0]}: got {source}; needed: {needed} ({reason})")


def pinned(source: str, parts: tuple[str, ...]) -> str:
    """A hub name pinned to its current commit, `owner/name@commit`; anything else unchanged.

    The files that `local_copy` would request are then in the hub's cache. A name unknown to both
    hub and cache is returned unchanged: loading it reports the error.
    """
    match = None if Path(source).exists() else _HUB_NAME.fullmatch(source)
    if match is None:
        return source
    try:
        return f"{match['name']}@{_from_hub(match['name'], match['revision'], parts).name}"
    except (OSError, ValueError):
        return source


def _from_hub(name: str, revision: str | None, parts: tuple[str, ...]) -> Path:
    need(name, "huggingface_hub")
    # Imported here, as most runs use local folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    wanted = [name for part in parts for name in (part, f"{part}/*")]
    try:
        files = snapshot_download(name, revision=revision, allow_patterns=wanted, dry_run=True)
    except DryRunError:
        files = []  # the hub is unreachable; use the cache
    size = sum(file.file_size or 0 for file in files if file.will_download)
    if size > HUB_BYTES:
        raise ValueError(f"{size / 2**30:.0f} GiB to download, more than {HUB_BYTES >> 30}")
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


@contextmanager
def named_errors(what: str, path: Path) -> Iterator[None]:
    """Re-raise a library's error on reading a file as a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # damaged files make parsers raise anything
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"{what} {path}: it cannot be read ({reason})") from error


def shipped_text(path: Path) -> Path:
    """The text file at a path; if none is there, the package's own of that name."""
    known = CONFIGS / path.as_posix().removeprefix("configs/")
    return known if not path.exists() and known.is_file() else path


def missing_path(key: str, path: str | Path | None, what: str) -> Iterator[str]:
    """Yield one sentence if the local path given for a key does not exist."""
    if path is None:
        yield f"{key} is not given: {what}"
    elif not Path(path).exists():
        yield f"{key}: {path} is not there: {what}"


# The files of an exported adapter, as PEFT and diffusers name them.
ADAPTERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def trained(path: Path) -> str | None:
    """What a path is, if it is a run's folder, checkpoint or adapter instead of whole weights."""
    with suppress(OSError, ValueError):  # the name is too long, or has a NUL character
        if (path / "checkpoints").is_dir():
            return "a run folder"
        if (path / "meta.json").is_file():
            return "a checkpoint of a run"
        if any((path / name).is_file() for name in ADAPTERS):
            return "an exported LoRA"
        if path.suffix == ".safetensors" and path.is_file() and holds_adapters(path):
            return "a LoRA"
    return None


def holds_adapters(path: Path) -> bool:
    """Whether a safetensors file has LoRA factors, judging by its header; damaged ones do not."""
    from safetensors import SafetensorError, safe_open  # not in the core installation

    try:
        with safe_open(path, "np") as opened:  # "pt" maps the whole file as memory
            return any(".lora_A." in name for name in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def missing_source(key: str, source: str) -> Iterator[str]:
    """Yield one sentence if a source is not a local folder, so that the hub will be queried."""
    if not Path(source).exists():
        yield f"{key}: {source} is not a local folder; the run will look it up on the hub"


def fingerprint(path: Path) -> str:
    """16 hex digits that identify a checkpoint by the size and both ends of its files.

    Training changes every tensor, and the end of a .pt file holds the checksums of all, so the rest
    need not be read: for released files that would take longer than generating a short video.
    """
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    digest = hashlib.sha256()
    for part in filter(Path.is_file, files):
        stat = part.stat()
        digest.update(f"{part.name if folder.is_dir() else ''} {stat.st_size}".encode())
        digest.update(_ends(part, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=64)
def _ends(path: Path, size: int, changed_ns: int) -> bytes:
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(ENDS))
        file.seek(max(0, size - ENDS))
        digest.update(file.read(ENDS))
    return digest.digest()


def weights_digest(weights: Mapping[str, Tensor], *settings: object) -> str:
    """SHA-256 of tensors, their names and dtypes, and settings; independent of the file format."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def refuse_other_weights(key: str, there: str | None, now: str | None) -> None:
    """Raise ConfigError if a state's start weights (digest `there`) are not those of `key` now."""
    if there != now:
        raise ConfigError(
            f"{key}: holds other weights than those that the run started from, to which "
            f"its state belongs (SHA-256 {there} there, {now} now)"
        )


def tensor_bytes(tensor: Tensor) -> Any:
    """The data of a tensor in row-major order as a buffer of bytes."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy()
