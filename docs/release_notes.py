"""Prints a version's section of CHANGELOG.md: `make release-notes`, or `… VERSION=0.1.0`."""

from __future__ import annotations

import sys
from pathlib import Path

from afd import __version__

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def notes(text: str, version: str) -> str:
    """The section of a version, without its heading. Raises ValueError if there is none."""
    sections = text.split("\n## ")[1:]
    found = [s for s in sections if s.split(maxsplit=1)[0] == version]
    if len(found) != 1:
        have = ", ".join(s.split(maxsplit=1)[0] for s in sections)
        raise ValueError(f"CHANGELOG.md: no section of its own for {version}; it has {have}")
    return found[0].partition("\n")[2].strip() + "\n"


def main() -> None:
    version = sys.argv[1] if len(sys.argv) > 1 else __version__
    try:
        print(notes(CHANGELOG.read_text(encoding="utf-8"), version), end="")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
