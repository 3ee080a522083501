"""Hierarchy of the errors that a user can act on. Each message states in one sentence what to do,
and the `afd` command exits with the error's exit code."""

from __future__ import annotations

# Exit codes of the `afd` command; docs/TRAINING.md has the table.
DONE, FAILED, MISTAKE, STORAGE, STOPPED = 0, 1, 2, 3, 130


class AfdError(Exception):
    """Base class of afd's errors. `exit_code`: exit code of the command."""

    exit_code = FAILED


class ConfigError(AfdError, ValueError):
    """Invalid configuration; the message names the key, the value given and what is needed."""

    exit_code = MISTAKE


class YamlError(ConfigError):
    """Text is not plain YAML within the size limits; the one-line message gives the line number."""


class VideoError(AfdError, ValueError):
    """A video file cannot be used; the message names the file and the reason."""

    exit_code = MISTAKE


class TeacherError(AfdError, ValueError):
    """A teacher cannot be used; the message lists the first reasons and counts the others."""

    exit_code = MISTAKE


class Unanswered(TeacherError):
    """A request has no video and will not get one in this run; other requests may."""

    def __init__(self, message: str, *, rejected: bool = False) -> None:
        """`rejected`: permanently refused by moderation."""
        super().__init__(message)
        self.rejected = rejected


class ContentsError(TeacherError):
    """A file in a teacher's folder does not match its ledger; other requests may be unaffected."""


class BudgetError(TeacherError):
    """The next submission could exceed the budget."""


class SchemaError(TeacherError):
    """A database is not a ledger that this version can use; the message names the reason."""


class StorageError(AfdError, RuntimeError):
    """The disk failed while a command was running; the message states what to do and what is
    saved."""

    exit_code = STORAGE


class LockedError(AfdError, RuntimeError):
    """Another process holds the lock."""

    exit_code = MISTAKE


class TrainingError(AfdError, RuntimeError):
    """A run cannot continue; the message gives the update and the reason."""


class CheckpointError(AfdError, RuntimeError):
    """A checkpoint cannot be used; the message gives the reason."""


class ProcessLostError(AfdError, RuntimeError):
    """Another process of a distributed run was killed or hangs."""
