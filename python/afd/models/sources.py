"""Where a pipeline's parts are: a local folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def local_copy(source: str | Path, parts: tuple[str, ...], needed: str) -> Path:
    """`source` itself where it is a path; else the hub's copy of those folders of a pipeline.

    The hub is asked only for a name like `owner/name` that is no local path. Raises
    FileNotFoundError, saying what is `needed`, where neither has it.
    """
    path = Path(source)
    if path.exists():
        return path
    reason = "there is no such path"
    if isinstance(source, str) and _HUB_NAME.fullmatch(source):
        # Imported here: most runs have local folders.
        from huggingface_hub import snapshot_download

        try:
            wanted = [name for part in parts for name in (part, f"{part}/*")]
            return Path(snapshot_download(source, allow_patterns=wanted))
        except (OSError, ValueError) as error:
            reason = f"there is no such path, and the hub said: {error}"
    raise FileNotFoundError(f"{parts[0]}: got {source}; needed: {needed} ({reason})")


def weights_digest(weights: Mapping[str, Tensor], *settings: object) -> str:
    """SHA-256 of tensors, their names and dtypes, and of settings: the same from any file."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in memory, row by row."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())
