"""Files that a crash leaves whole: atomic writes, hashes, and JSON lines.

Every OSError that leaves this module names its file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from afd.rows import json_rows

# What a disk answers that is full, read-only or broken, and what can be done about it.
DISK = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of the quota there",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "make it writable, or choose another folder",
    errno.EIO: "see to the disk, or choose another folder",
    errno.ESTALE: "mount it again, or choose another folder",
}
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
BLOCK = 1 << 20
PARTIAL = ".partial"
# Bytes of a name on every file system in use.
LONGEST_NAME = 255


class StorageError(RuntimeError):
    """The disk failed a command at work; the message says what to do and what is saved."""


def what_failed(error: OSError) -> str:
    """The file and what its system said: "runs/a/metrics.jsonl: No space left on device"."""
    said = error.strerror or str(error)
    return said if error.filename is None else f"{error.filename}: {said}"


def refuse_odd(path: Path) -> None:
    """Raise OSError where something that is no regular file lies at `path`: opening a pipe would
    wait for ever. A path at which nothing lies is fine."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is a pipe, socket or device; needed: a file", str(path))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let every OSError of the block name a file: those of a write or a sync name none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except SafetensorError as error:
        # Its writer has the system's error in its words only.
        number = _SYSTEM_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A free name beside `path`; the file or folder that the block leaves there is flushed to disk
    and takes its place, or nothing changes. Its permissions are the umask's, whatever library
    has written it.

    `shared`: several processes may write this path at once, and the last one's stays. Without it
    what a killed process left is removed by the next.
    """
    unique = f".{uuid.uuid4().hex[:12]}" if shared else ""
    partial = path.with_name(_partial_name(path.name, f"{unique}{PARTIAL}"))
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        try:
            yield partial
            for written in (partial, *partial.rglob("*")):
                _open_up(written)
                sync(written)
            os.replace(partial, path)
            sync(path.parent)
        finally:
            # The error of the write is the one to report.
            with suppress(OSError):
                remove(partial)


def _partial_name(name: str, ending: str) -> str:
    """A hidden name for what becomes `name`, which may be as long as a file system allows."""
    if len(os.fsencode(f".{name}{ending}")) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}{ending}"


def _open_up(path: Path) -> None:
    """Give what was made for its owner only (safetensors, tempfile) the umask's permissions."""
    mode = path.stat().st_mode
    if mode & 0o077 or path.is_symlink():
        return
    # The umask of the process can be asked for only by changing it, for every thread.
    probe = path.with_name(f".{uuid.uuid4().hex}")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        wanted = probe.stat().st_mode & 0o666
    finally:
        probe.unlink(missing_ok=True)
    path.chmod(wanted | (wanted & 0o444) >> 2 if path.is_dir() else wanted)


def write_bytes(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write a file atomically, with the permissions that the umask gives; see `replacing`."""
    with replacing(path, shared=shared) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write a JSON file atomically. Raises ValueError for NaN and infinities."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems cannot sync a folder, and need not.
            if error.errno != errno.EINVAL or not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with naming(path), path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class JsonLine:
    """One line of a JSON lines file that is no empty line.

    Attributes:
        number: from 1.
        value: the object; None where the line is damaged.
        problem: what is wrong with it, or None.
        torn: whether it is the last line, cut off before its end by a kill or a full disk.
    """

    number: int
    value: dict[str, Any] | None
    problem: str | None = None
    torn: bool = False


def read_json_lines(path: Path) -> list[JsonLine]:
    """The lines of a JSON lines file, damaged ones included; none where there is no file."""
    refuse_odd(path)
    try:
        with naming(path):
            data = path.read_bytes()
    except FileNotFoundError:
        return []
    ended = data.endswith(b"\n")
    # Bytes that are not UTF-8 become halves of characters, which json_rows refuses.
    rows = list(json_rows(data.decode("utf-8", "surrogateescape")))
    lines = []
    for number, row in rows:
        if isinstance(row, str):
            torn = not ended and number == rows[-1][0]
            lines.append(JsonLine(number, None, row, torn))
        else:
            lines.append(JsonLine(number, row))
    return lines


class JsonAppender:
    """A JSON lines file to append to. A line is with the operating system when `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_odd(path)
        with naming(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, value: dict[str, Any]) -> None:
        """Append one object. Raises ValueError for NaN and infinities."""
        data = memoryview(json.dumps(value, allow_nan=False).encode() + b"\n")
        with naming(self.path):
            while data:
                data = data[os.write(self._descriptor, data) :]

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        with naming(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> JsonAppender:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
