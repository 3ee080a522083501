"""The configurations that the package ships: found by name, listed, copied."""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from afd.errors import ConfigError
from afd.files import write_text
from afd.hub import CONFIGS
from afd.listing import shown


class Shipped(NamedTuple):
    """A configuration of the package.

    Attributes:
        name: path below `CONFIGS` without its suffix, as commands take it.
        path: its file.
        purpose: the first line of its comment, without the full stop.
        command: the verb that takes it: train, adapt, ablation, sample, teacher fetch, benchmark.
    """

    name: str
    path: Path
    purpose: str
    command: str


def shipped() -> Iterator[Shipped]:
    """Every configuration of the package, by name."""
    for path in sorted(CONFIGS.rglob("*.yaml")):
        name = path.relative_to(CONFIGS).with_suffix("").as_posix()
        text = path.read_text(encoding="utf-8")
        purpose = text.partition("\n")[0].removeprefix("# ").removesuffix(".")
        command = re.search(rf"^# afd ([a-z ]+) {re.escape(name)}\b", text, re.M)
        yield Shipped(name, path, purpose, command[1] if command else "")


def listing() -> str:
    """The shipped configurations by command, one line each."""
    found = sorted(shipped(), key=lambda one: one.command)
    width = max(len(one.name) for one in found)
    lines = []
    for command, group in groupby(found, key=lambda one: one.command):
        lines += [f"afd {command}", *(f"  {one.name:{width}} {one.purpose}" for one in group)]
    return "\n".join(lines)


def find_config(named: Path | str, beside: Path | None = None) -> Path:
    """The file that a path or a name of a shipped configuration stands for.

    A file that exists at the path wins; `beside` is the file that names it, from whose folder the
    path is then taken. Otherwise it is looked up among the shipped names, with or without `.yaml`
    and the folder's name, as in configs/quickstart.yaml. Raises ConfigError, with the closest
    names, if it is neither.
    """
    path = Path(named) if beside is None else beside.parent / named
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return path
    except (FileNotFoundError, NotADirectoryError):
        if (found := _by_name().get(_name(named))) is None:
            where = f"config {shown(str(path), 400)}"
            raise ConfigError(f"{where}: cannot be read ({_unknown(named)})") from None
        return found
    except (OSError, ValueError):
        return path  # the error of reading it is more precise
    return _by_name().get(_name(named), path)


def _unknown(named: Path | str) -> str:
    close = difflib.get_close_matches(_name(named), _by_name(), 2)
    closest = f"closest: {', '.join(close)}; " if close else ""
    return f"neither a file nor a shipped configuration; {closest}afd configs lists those"


def copy_config(name: str, to: Path | None = None) -> Path:
    """Copy a shipped configuration to a file or into a folder; returns the new file.

    Raises ConfigError for an unknown name and for a file that exists.
    """
    source = _by_name().get(_name(name))
    if source is None:
        raise ConfigError(f"configs copy: {name} is {_unknown(name)}")
    target = Path(source.name) if to is None else to / source.name if to.is_dir() else to
    if target.exists():
        raise ConfigError(f"configs copy: {target} exists; needed: another DEST")
    write_text(target, source.read_text(encoding="utf-8"))
    return target


def _by_name() -> dict[str, Path]:
    return {
        path.relative_to(CONFIGS).with_suffix("").as_posix(): path
        for path in CONFIGS.rglob("*.yaml")
    }


def _name(named: Path | str) -> str:
    return Path(named).as_posix().removeprefix("configs/").removesuffix(".yaml")
