"""The folder of a run: its lock, its owner, and recovery if it is moved or removed."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from afd.config.base import Section
from afd.config.run import (
    RunConfig,
    differences,
    load_config,
    make_config,
    plain,
    read_yaml,
    to_yaml,
)
from afd.distributed import ALONE, Ranks
from afd.errors import ConfigError, LockedError, StorageError, TrainingError
from afd.files import locked, refuse_odd, remove, write_text
from afd.listing import shown

CONFIG, DONE, LOCK = "config.yaml", "DONE", ".lock"
# What a hub name ends with when it is pinned.
_COMMIT = re.compile(r"@[0-9a-f]{40}\Z")
Kind = TypeVar("Kind", bound=Section)
_log = logging.getLogger("afd")


class RunFolder:
    """The folder into which this process writes a run.

    Attributes:
        path: its location when the run started.
    """

    def __init__(self, config: RunConfig, descriptor: int) -> None:
        self.path, self._config = config.run_dir, config
        # Kept open for the whole run, so that no other folder can reuse its inode number.
        self._descriptor = descriptor
        self._stat = os.fstat(descriptor)

    @property
    def gone(self) -> bool:
        """Whether the folder was moved or removed, or its path now holds something else."""
        try:
            return not os.path.samestat(os.stat(self.path), self._stat)
        except OSError:
            return True

    def make_again(self) -> None:
        """Recreate the folder at its old path, to save the state of a run whose folder has gone.

        Raises StorageError if that path is now otherwise in use.
        """
        lost = f"run folder {self.path}: was moved or removed while the run wrote there, and"
        nearest = next(parent for parent in self.path.parents if parent.exists())
        if nearest.stat().st_dev != self._stat.st_dev:
            raise StorageError(
                f"{lost} its disk no longer exists; progress since the newest "
                "checkpoint was not saved: mount it again and continue: afd resume"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise StorageError(
                    f"{lost} another folder is there now; progress since "
                    "the newest checkpoint was not saved: continue where that is: afd resume"
                )
            write_text(self.path / CONFIG, to_yaml(self._config))
        except OSError as error:
            raise StorageError(f"{lost} cannot be created again ({error})") from error


@contextmanager
def run_folder(config: RunConfig) -> Iterator[RunFolder]:
    """Lock the run's folder (created if absent) for this process, and write its config.yaml.

    Raises TrainingError if another process holds it.
    """
    out = config.run_dir
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out / LOCK):
            descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # Atomic: a run killed here leaves either the old file or the new one.
                write_text(out / CONFIG, to_yaml(config))
                yield RunFolder(config, descriptor)
            finally:
                os.close(descriptor)
    except LockedError:
        raise TrainingError(f"run folder {out}: another process is training here") from None


def with_commits(config: RunConfig, ranks: Ranks = ALONE, *, ask: bool = True) -> RunConfig:
    """The configuration with hub names pinned to commits, which its config.yaml then records.

    A run that continues keeps its commits; the hub is asked for the others if `ask`. Every process
    must call this.
    """
    found = None
    if ranks.main:
        there: dict[str, Any] = {}
        with suppress(ConfigError):  # absent, or damaged: it is written again
            there = read_yaml(config.run_dir / CONFIG)
        update: dict[str, Any] = {"student": _pinned(config.student, there.get("student"), ask)}
        if config.method in ("afd", "gan") and config.discriminator is not None:
            of_run = there.get("discriminator")
            update["discriminator"] = _pinned(config.discriminator, of_run, ask)
        rewards = there.get("rewards")
        before = rewards if isinstance(rewards, dict) else {}
        update["rewards"] = {
            name: _pinned(one, before.get(name), ask) for name, one in config.rewards.items()
        }
        pinned = config.model_copy(update=update)
        found = None if pinned == config else plain(pinned)
    data = ranks.same(found)
    return config if data is None else make_config(data)


def _pinned(section: Kind, there: Any, ask: bool) -> Kind:
    """A section with its hub names pinned, to the commits of `there`, the run's own section, first.

    Names that `there` has without a commit, from an earlier version of afd, stay as they are.
    """
    given = {k: v for k, v in section if isinstance(v, str | Path)}
    before = there if isinstance(there, dict) else {}
    kept = {
        key: type(value)(before[key])
        for key, value in given.items()
        if isinstance(before.get(key), str) and str(value) in (before[key], _bare(before[key]))
    }
    return (section.pinned() if ask else section).model_copy(update=kept)


def _bare(name: str) -> str:
    """A hub name without the commit that it is pinned to."""
    return _COMMIT.sub("", name)


def refuse_another_run(out: Path, config: RunConfig) -> None:
    """Raise ConfigError if the folder holds a run of another configuration, or a finished run of
    more updates.

    A folder without any metrics or checkpoint is free to use. If config.yaml is damaged, the
    configuration in the checkpoint is compared instead, when the checkpoint is loaded.
    """
    path = out / CONFIG
    checkpoints = list(out.glob("checkpoints/*/meta.json"))
    if not path.is_file() or not _written([*out.glob("*.jsonl"), *checkpoints]):
        return
    try:
        there = written_config(path)
    except ConfigError as error:
        if not checkpoints or (out / DONE).exists():
            raise
        _log.warning("%s; the run continues from its checkpoint and writes it again", error)
        return
    now = plain(config)
    wrong = differences(there, now)
    done = _done(out)
    if done is not None and done > now["updates"]:
        wrong.append(f"updates: {done} there (finished), {now['updates']} now")
    if wrong:
        listed = "\n".join(f"  {line}" for line in wrong)
        raise ConfigError(f"run folder {out}: contains another run:\n{listed}\nchoose another out=")


def finished(out: Path, updates: int) -> bool:
    """Whether the folder's run has finished with at least this many updates. One with fewer is
    lengthened."""
    if not (out / DONE).exists():
        return False
    done = _done(out)
    return done is None or done >= updates


def lengthen(out: Path, updates: int, ranks: Ranks) -> None:
    """Make a finished run of fewer updates an unfinished one. Every process must call this."""
    if ranks.main and (out / DONE).exists():
        _log.info("lengthened: %s updates are done, %d now", _done(out), updates)
        remove(out / DONE)
    ranks.barrier()


def _done(out: Path) -> int | None:
    """Updates of a finished run; None if it is unfinished, or no run of updates."""
    try:
        count = (out / DONE).read_text(encoding="utf-8").partition(" update")[0]
    except (OSError, ValueError):
        return None
    return int(count) if count.isdecimal() else None


def refuse_idle_processes(config: RunConfig, world: int) -> None:
    """Raise ConfigError if `world` processes, or groups of them (`parallel.sequence`), cannot share
    the prompts of an update."""
    counts = {"prompts_per_update is": config.taught}
    if config.replayed:
        counts = {"replay.fraction: prompts with a teacher are": config.taught}
        counts["replay.fraction: replayed prompts are"] = config.replayed
    whom = "processes" if config.parallel.sequence == 1 else "groups of processes"
    for what, prompts in counts.items():
        if prompts < world:
            raise ConfigError(f"{what} {prompts}; {world} {whom} need one each")
        # Every forward and backward pass of a sharded network involves all processes.
        if config.parallel.weights == "fsdp" and prompts % world:
            raise ConfigError(
                f"{what} {prompts}; parallel=fsdp needs a multiple of {world} ({whom})"
            )


def load_run(folder: Path, overrides: Sequence[str] = (), *, key: str = "RUN_DIR") -> RunConfig:
    """Load the configuration of the run in a folder; `overrides` may change only
    config.FREE_KEYS. `key`: the argument or key that names the folder, for errors."""
    if not (folder / CONFIG).exists():
        exists = "is a file" if folder.is_file() else f"has no {CONFIG}"
        what = exists if folder.exists() else "does not exist"
        raise ConfigError(f"{key}: {shown(str(folder), 400)} {what}; needed: the folder of a run")
    written_config(folder / CONFIG)
    return load_config(folder / CONFIG, [*overrides, f"out={json.dumps(str(folder))}"])


def written_config(path: Path) -> dict[str, Any]:
    """All sections of a run's config.yaml. Raises ConfigError if it is damaged."""
    refuse_odd(path)
    there = read_yaml(path)
    missing = [key for key in RunConfig.model_fields if key not in there]
    if missing:
        raise ConfigError(
            f"config {path}: is damaged: it lacks {', '.join(missing[:4])}; needed: the "
            f"configuration of the run (afd train CONFIG.yaml out={path.parent} writes it again)"
        )
    return there


def _written(files: Sequence[Path]) -> bool:
    return any(file.is_file() and file.stat().st_size for file in files)
