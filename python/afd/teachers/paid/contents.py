"""Files of a folder of bought videos: what lies there, and that it is what was bought."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from afd.errors import ContentsError, TeacherError, VideoError
from afd.video import check_video

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
# Something else stands where a folder or file belongs, or it is gone.
_DISK |= {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENOENT, errno.ESTALE}


@dataclass(frozen=True)
class Saved:
    """A finished file."""

    sha256: str
    bytes: int


def lying(path: Path) -> Saved | None:
    """What lies under a path, if it is a whole video."""
    try:
        check_video(path)
        return _hashed(path)
    except (VideoError, FileNotFoundError):
        return None


def compare(path: Path, sha256: str | None) -> tuple[bool, Saved | None]:
    """Whether the file has these contents; and what it is if not, None for no whole video."""
    try:
        found = _hashed(path)
    except (FileNotFoundError, IsADirectoryError):
        return False, None
    except OSError as error:
        raise ContentsError(f"{path}: cannot be read ({error.strerror})") from None
    if found.sha256 == sha256:
        return True, found
    return False, lying(path)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Names what the disk refuses as a TeacherError: what cannot be kept need not be bought."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        reason = error.strerror
    else:
        return
    raise TeacherError(f"{folder}: cannot be written ({reason}); nothing more is bought")


def _hashed(path: Path) -> Saved:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
            size += len(chunk)
    return Saved(digest.hexdigest(), size)
