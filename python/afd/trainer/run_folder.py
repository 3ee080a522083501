"""The folder of a run: to whom it belongs, and what becomes of the run when it goes away."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from afd.config.run import RunConfig, differences, plain, read_yaml, to_yaml
from afd.errors import ConfigError, LockedError, StorageError, TrainingError
from afd.files import locked, refuse_odd, write_text

CONFIG, DONE, LOCK = "config.yaml", "DONE", ".lock"
_log = logging.getLogger("afd")


class RunFolder:
    """The folder that this process writes a run into.

    Attributes:
        path: where it was when the run began.
    """

    def __init__(self, config: RunConfig, descriptor: int) -> None:
        self.path, self._config = config.run_dir, config
        # Open for as long as the run, so that no other folder can get its number.
        self._descriptor = descriptor
        self._stat = os.fstat(descriptor)

    @property
    def gone(self) -> bool:
        """Whether it was moved or removed, or something else lies at its path now."""
        try:
            return not os.path.samestat(os.stat(self.path), self._stat)
        except OSError:
            return True

    def make_again(self) -> None:
        """A folder at the old path, for the state of a run whose folder has gone.

        Raises StorageError where that place is another's now.
        """
        lost = f"run folder {self.path}: was moved or removed while the run wrote there, and"
        nearest = next(parent for parent in self.path.parents if parent.exists())
        if nearest.stat().st_dev != self._stat.st_dev:
            raise StorageError(
                f"{lost} its disk is not there any more; the run has ended, unsaved since its "
                "newest checkpoint: mount it again and continue: afd resume"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise StorageError(
                    f"{lost} something else lies there now; the run has ended, unsaved since its "
                    "newest checkpoint: continue where that is: afd resume"
                )
            write_text(self.path / CONFIG, to_yaml(self._config))
        except OSError as error:
            raise StorageError(f"{lost} cannot be made again ({error})") from error


@contextmanager
def run_folder(config: RunConfig) -> Iterator[RunFolder]:
    """The run's folder (made where there is none) for this process alone, with its config.yaml.

    Raises TrainingError where another process has it.
    """
    out = config.run_dir
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out / LOCK):
            descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # A run that is killed here has the old one or the new one.
                write_text(out / CONFIG, to_yaml(config))
                yield RunFolder(config, descriptor)
            finally:
                os.close(descriptor)
    except LockedError:
        raise TrainingError(f"run folder {out}: another process is training here") from None


def refuse_another_run(out: Path, config: RunConfig) -> None:
    """A run folder belongs to one configuration; a finished one also to its number of updates.

    One that never came to a first number or checkpoint belongs to nobody yet. A config.yaml that
    is damaged says nothing: then a checkpoint's own configuration is compared, by who loads it.
    """
    path = out / CONFIG
    checkpoints = list(out.glob("checkpoints/step_*/meta.json"))
    if not path.is_file() or not _written([*out.glob("*.jsonl"), *checkpoints]):
        return
    try:
        there = written_config(path)
    except ConfigError as error:
        if not checkpoints or (out / DONE).exists():
            raise
        _log.warning("%s; the run goes on from its checkpoint, and writes it again", error)
        return
    now = plain(config)
    wrong = differences(there, now)
    if (out / DONE).exists() and there["updates"] != now["updates"]:
        wrong.append(f"updates: {there['updates']} there (finished), {now['updates']} now")
    if wrong:
        listed = "\n".join(f"  {line}" for line in wrong)
        raise ConfigError(f"run folder {out}: holds another run:\n{listed}\nchoose another out=")


def written_config(path: Path) -> dict[str, Any]:
    """What a run's config.yaml holds: every section. Raises ConfigError where it is damaged."""
    refuse_odd(path)
    there = read_yaml(path)
    missing = [key for key in RunConfig.model_fields if key not in there]
    if missing:
        raise ConfigError(
            f"config {path}: is damaged, it lacks {', '.join(missing[:4])}; needed: what the run "
            f"began with (afd train CONFIG.yaml out={path.parent} writes it again)"
        )
    return there


def _written(files: Sequence[Path]) -> bool:
    return any(file.is_file() and file.stat().st_size for file in files)
