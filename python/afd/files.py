"""File utilities: atomic writes, locks, hashes, and parsing of JSON lines and CSV.

Every OSError raised by this module names its file.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from afd.errors import ConfigError, LockedError

try:
    from safetensors import SafetensorError
except ModuleNotFoundError:  # core install only (afd.extras): safetensors is not used

    class SafetensorError(Exception):  # type: ignore[no-redef]
        """Never raised."""


# Errors of a full, read-only or failing disk, and a remedy for each.
DISK = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of the quota there",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "make it writable, or choose another folder",
    errno.EIO: "check the disk, or choose another folder",
    errno.ESTALE: "mount it again, or choose another folder",
}
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
BLOCK = 1 << 20
PARTIAL = ".partial"
_log = logging.getLogger("afd")
# Maximum bytes of a file name on common file systems.
LONGEST_NAME = 255


def what_failed(error: OSError) -> str:
    """The file and the system's message: "runs/a/metrics.jsonl: No space left on device"."""
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{error.filename}: {reason}"


def refuse_odd(path: Path) -> None:
    """Raise OSError if `path` exists and is not a regular file: opening a pipe would block
    forever."""
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
    """Add the file name to every OSError of the block: those of writes and syncs lack it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except SafetensorError as error:
        # The safetensors writer reports the system's error only in its message.
        number = _SYSTEM_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Replace `path` atomically: yields a temporary name beside it, and the file or folder that the
    block creates there is flushed to disk and renamed to `path`. On error nothing changes. The
    permissions follow the umask, whichever library wrote the file.

    `shared`: several processes may write this path concurrently, and the last one wins. Otherwise
    the remains of a killed process are removed by the next call.
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
            # An error of the write takes precedence.
            with suppress(OSError):
                remove(partial)


def _partial_name(name: str, ending: str) -> str:
    """A hidden temporary name for `name`, which may have the maximum length."""
    if len(os.fsencode(f".{name}{ending}")) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}{ending}"


def _open_up(path: Path) -> None:
    """Apply the umask's permissions to a file created as owner-only (safetensors, tempfile)."""
    mode = path.stat().st_mode
    if mode & 0o077 or path.is_symlink():
        return
    # Reading the umask directly requires changing it temporarily, for every thread.
    probe = path.with_name(f".{uuid.uuid4().hex}")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        wanted = probe.stat().st_mode & 0o666
    finally:
        probe.unlink(missing_ok=True)
    path.chmod(wanted | (wanted & 0o444) >> 2 if path.is_dir() else wanted)


def write_bytes(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write a file atomically, with the umask's permissions; see `replacing`."""
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
    """Flush a file's contents, or a folder's entries, to disk."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems do not support syncing folders, nor need it.
            if error.errno != errno.EINVAL or not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, link or folder tree, if it exists."""
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
    """One non-empty line of a JSON lines file.

    Attributes:
        number: from 1.
        value: the object; None if the line is damaged.
        problem: what is wrong with it, or None.
        torn: whether it is a last line truncated by a kill or a full disk.
    """

    number: int
    value: dict[str, Any] | None
    problem: str | None = None
    torn: bool = False


def read_json_lines(path: Path) -> list[JsonLine]:
    """Read the lines of a JSON lines file, including damaged ones; empty if the file is missing."""
    refuse_odd(path)
    try:
        with naming(path):
            data = path.read_bytes()
    except FileNotFoundError:
        return []
    ended = data.endswith(b"\n")
    # Bytes that are not UTF-8 become lone surrogates, which json_rows refuses.
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
    """Appends to a JSON lines file. `write` returns once the operating system has the line."""

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
        """Flush every line to disk."""
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


# --- locks ---


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock on a folder, or on a file (created if absent), for the block.

    Yields whether it could be locked: some network file systems do not support locks. The lock is
    released when the process ends. Raises LockedError if another process holds it.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            raise LockedError(str(path)) from None
        except OSError as error:
            _log.warning(
                "%s cannot be locked (%s): do not write there from two processes", path, error
            )
            held = False
        yield held
    finally:
        os.close(descriptor)


@contextmanager
def only_one(folder: Path, *, made: tuple[str, ...] = ()) -> Iterator[None]:
    """Hold exclusive access to a folder (created if absent) for the block; the lock is released
    when the process ends.

    Files with one of the endings in `made` were left by a killed process and are removed. The lock
    is on the folder itself, so there is no lock file in it. Raises ConfigError if another process
    holds it.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            held = stack.enter_context(locked(folder))
        except LockedError:
            raise ConfigError(
                f"{folder}: another process is writing videos there; wait for it, or choose "
                "another folder"
            ) from None
        if held:
            for ending in made:
                for left in folder.glob(f"*{ending}"):
                    remove(left)
        try:
            yield
        finally:
            # The folder may have been removed or become unreadable meanwhile.
            with suppress(OSError):
                if new and not any(folder.iterdir()):
                    folder.rmdir()


# --- rows ---
# Line number, from 1, with the row as a dictionary, or with a message if the row is invalid.
Rows = Iterator[tuple[int, "dict[str, Any] | str"]]


# Maximum size of a text file; enough for a million prompts.
MAX_BYTES = 1 << 30
# A NUL character as escaped in JSON, but not a literal backslash followed by "u0000".
_ZERO = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark; every line ends with \\n.

    Raises ValueError, without the file's name, if it cannot be read or is not text.
    """
    try:
        refuse_odd(path)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"cannot be read (it has more than {MAX_BYTES} bytes)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        wrong = f"line {line}: byte {data[error.start]:#04x} is not UTF-8"
        raise ValueError(f"cannot be read ({wrong})") from error
    if "\0" in text:
        line = 1 + text.count("\n", 0, text.index("\0"))
        raise ValueError(f"cannot be read (line {line}: a zero byte; needed: UTF-8 text)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError for any problem, including NUL characters and lone surrogates,
    which JSON can express but paths and tokenizers do not accept."""
    try:
        value = json.loads(text)
        written = json.dumps(value, ensure_ascii=False)
        written.encode()
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if _ZERO.search(written):
        raise ValueError("a text contains a zero byte")
    return value


def json_rows(text: str) -> Rows:
    """Parse one JSON object per line, skipping empty lines."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            yield number, f"not JSON ({error})"
            continue
        yield number, row if isinstance(row, dict) else f"{type(row).__name__}, not an object"


def csv_rows(text: str, columns: Sequence[str] = ()) -> Rows:
    """Parse CSV rows under a header that must have the `columns`; cells missing from a short row
    are None."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        header = rows.fieldnames
        if not set(columns) <= set(header or ()):
            yield 1, f"the header is {header}, needs {' and '.join(columns)}"
            return
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        yield rows.line_num, f"not CSV ({error})"
