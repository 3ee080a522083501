"""Verification of the files in a folder of bought videos against what was bought."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from afd.errors import ContentsError, TeacherError, VideoError
from afd.files import sha256_of
from afd.video import check_video

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
# A folder or file has been replaced by something else, or is gone.
_DISK |= {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENOENT, errno.ESTALE}


@dataclass(frozen=True)
class Saved:
    """Hash and size of a finished file."""

    sha256: str
    bytes: int


def lying(path: Path) -> Saved | None:
    """Hash and size of the file at a path if it is a complete video, else None."""
    try:
        check_video(path)
        return _hashed(path)
    except (VideoError, FileNotFoundError):
        return None


def compare(path: Path, sha256: str | None) -> tuple[bool, Saved | None]:
    """Whether the file has these contents; and its hash and size, None if it is not a complete
    video."""
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
    """Convert disk errors in the block to TeacherError, which stops further purchases."""
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
    return Saved(sha256_of(path), path.stat().st_size)
