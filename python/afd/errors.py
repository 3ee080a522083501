"""The errors that a user can act on, in one tree. Each says what to do in one sentence, and the
`afd` command ends with its exit code."""

from __future__ import annotations

# Exit codes of the `afd` command; docs/TRAINING.md has the table.
DONE, FAILED, MISTAKE, STORAGE, STOPPED = 0, 1, 2, 3, 130


class AfdError(Exception):
    """Base of all errors of afd. `exit_code`: what the command returns."""

    exit_code = FAILED


class ConfigError(AfdError, ValueError):
    """The configuration is wrong; the message names the key, what came and what is needed."""

    exit_code = MISTAKE


class YamlError(ConfigError):
    """Text that is not bounded, plain YAML; the message is one line and names the line."""


class VideoError(AfdError, ValueError):
    """A video file cannot be used; the message names the file and the reason."""

    exit_code = MISTAKE


class TeacherError(AfdError, ValueError):
    """A teacher cannot be used; the message lists every reason at once."""

    exit_code = MISTAKE


class Unanswered(TeacherError):
    """One request has no video and gets none in this run; other requests may."""

    def __init__(self, message: str, *, rejected: bool = False) -> None:
        """`rejected`: moderation refused it, for good."""
        super().__init__(message)
        self.rejected = rejected


class ContentsError(TeacherError):
    """A file of a teacher's folder is not what its ledger knows; other requests may have theirs."""


class BudgetError(TeacherError):
    """The next submit could exceed the budget."""


class SchemaError(TeacherError):
    """A database is not a ledger that this version can use; the message names the reason."""


class StorageError(AfdError, RuntimeError):
    """The disk failed while a command was working; the message says what to do and what is
    saved."""

    exit_code = STORAGE


class LockedError(AfdError, RuntimeError):
    """Another process holds the lock."""

    exit_code = MISTAKE


class TrainingError(AfdError, RuntimeError):
    """A run cannot go on; the message says at which update and why."""


class CheckpointError(AfdError, RuntimeError):
    """A checkpoint cannot be used; the message says why."""


class ProcessLostError(AfdError, RuntimeError):
    """Another process of a distributed run was killed or hangs."""
