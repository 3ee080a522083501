"""Lists of prompts in text files."""

from __future__ import annotations

from pathlib import Path

from afd.errors import ConfigError
from afd.files import read_text


def prompts_of(key: str, path: Path) -> list[str]:
    """The prompts of a text file with one on each line, in its order.

    Raises ConfigError, naming the key, if it cannot be read or has none.
    """
    try:
        text = read_text(path)
    except ValueError as error:
        raise ConfigError(f"{key} {path}: {error}") from None
    found = [line.strip() for line in text.split("\n") if line.strip()]
    if not found:
        raise ConfigError(f"{key}: contains no prompt; needed: one a line")
    return found
