"""The small checkpoints shipped with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

SHIPPED = {
    "base": "base_student.safetensors",
    "endless": "endless_student.safetensors",
    "motion": "motion_backbone.safetensors",
}


def checkpoint_path(name: str) -> Path:
    """Resolve the short name of a shipped checkpoint, or a path, to a file."""
    if name in SHIPPED:
        return Path(str(files("afd.lab") / "assets" / SHIPPED[name]))
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {name} is neither a file nor one of {list(SHIPPED)}")
    return path
