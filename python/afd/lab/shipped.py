"""The two small checkpoints that the package ships."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

SHIPPED = {"base": "base_student.safetensors", "motion": "motion_backbone.safetensors"}


def checkpoint_path(name: str) -> Path:
    """A shipped checkpoint by its short name, or any file by its path."""
    if name in SHIPPED:
        return Path(str(files("afd.lab") / "assets" / SHIPPED[name]))
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {name} is neither a file nor one of {list(SHIPPED)}")
    return path
