"""A sequence of domains as runs: the configuration of each, and what was made of them before."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from afd.adapt.config import Column, DomainConfig, SequenceConfig, split
from afd.config.run import EvaluationConfig, RunConfig, make_config, plain, read_yaml
from afd.config.shipped import find_config
from afd.data.prompts import prompts_of
from afd.errors import ConfigError
from afd.files import read_text, write_text
from afd.registry import find
from afd.teachers.mix_config import MixConfig
from afd.teachers.paid.config import PaidConfig
from afd.teachers.paid.prompts import read_prompts
from afd.trainer.run_folder import DONE, finished, refuse_another_run

# The resolved sequence, by which its folder is recognised.
FILE = "sequence.json"
_FOLDER = re.compile(r"[1-9]\d*_.+")
_log = logging.getLogger("afd")


@dataclass(frozen=True)
class Domain:
    """One domain of a sequence: its settings and its run."""

    number: int
    settings: DomainConfig
    run: RunConfig

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def folder(self) -> Path:
        return self.run.run_dir


@dataclass(frozen=True)
class Chain:
    """A sequence with the run of every domain, in order.

    Attributes:
        root: its folder.
        evaluation: settings of every column, before those of its own.
    """

    config: SequenceConfig
    root: Path
    evaluation: EvaluationConfig
    domains: list[Domain]

    def measured(self, run: RunConfig, columns: dict[str, Column]) -> RunConfig:
        """A run's configuration that measures these columns, as every run of the sequence does.
        Raises ConfigError for unsuitable ones."""
        sets = {n: c.evaluated().model_dump(mode="json") for n, c in columns.items()}
        evaluation = self.evaluation.model_dump(mode="json") | {"sets": sets}
        return make_config(plain(run) | {"evaluation": evaluation})

    @property
    def columns(self) -> dict[str, Column]:
        return self.config.columns

    def description(self) -> dict[str, Any]:
        """What `afd report` needs to know, as JSON values."""
        return {
            "name": self.config.name,
            "domains": [
                {"name": d.name, "folder": d.folder.name, "updates": d.run.updates}
                for d in self.domains
            ],
            "columns": [
                {"name": name, "metric": column.metric, "better": column.better}
                for name, column in self.columns.items()
            ],
        }


def load_chain(path: Path, overrides: Sequence[str] = ()) -> Chain:
    """Read a sequence and build the run of every domain.

    `overrides` apply to the runs of all domains, before a domain's own; `name` and `out` are the
    sequence's. Raises ConfigError, naming the domain, for anything that no run could be made of.
    """
    own, common = split(overrides)
    path = find_config(path)
    data = read_yaml(path)
    given = [f"{key}={value}" for key, value in own.items()]
    config = make_config(data, given, str(path), SequenceConfig)
    base = find_config(config.base, path)
    start = read_yaml(base)
    if "domains" in start:
        raise ConfigError(f"base: {base} is a sequence itself; needed: the configuration of a run")
    root = config.out if config.out is not None else Path("runs") / config.name
    first = {**start, "teacher": config.domains[0].teacher}
    shared = make_config(first, [*config.overrides, *common, "replay.fraction=0"], str(base))
    domains: list[Domain] = []
    for number, domain in enumerate(config.domains, 1):
        try:
            run = _run(config, start, domain, root, domains, common, str(base))
        except ConfigError as error:
            raise ConfigError(f"domain {number} ({domain.name}): {error}") from None
        domains.append(Domain(number, domain, run))
    chain = Chain(config, root, shared.evaluation, domains)
    for other in domains[1:]:
        _refuse_unlike(domains[0], other)
    _check_columns(chain)
    return chain


def _run(
    config: SequenceConfig,
    start: dict[str, Any],
    domain: DomainConfig,
    root: Path,
    earlier: Sequence[Domain],
    common: Sequence[str],
    origin: str,
) -> RunConfig:
    before, number = earlier[-1] if earlier else None, len(earlier) + 1
    data = {**start, "teacher": domain.teacher, "name": f"{config.name}-{domain.name}"}
    if domain.updates is not None:
        data["updates"] = domain.updates
    settings = [*config.overrides, *common, *domain.overrides]
    keys = {override.partition("=")[0] for override in settings}
    chosen = keys & {"student.init", "discriminator.init", "replay.prompts", "replay.videos"}
    if before is not None and chosen:
        raise ConfigError(
            f"overrides: got {', '.join(sorted(chosen))}; needed: none after the first domain, "
            "where the sequence gives them"
        )
    settings.append(f"out={json.dumps(str(root / f'{number}_{domain.name}'))}")
    if domain.evaluation is not None:
        # On the way a run measures its own domain.
        own = domain.evaluation.evaluated().model_dump(mode="json", exclude_none=True)
        settings += [f"evaluation.{key}={json.dumps(value)}" for key, value in own.items()]
    if before is None:
        settings.append("replay.fraction=0")
    else:
        settings.append(f"student.init={json.dumps(str(before.folder))}")
        settings.append(f"replay.prompts={json.dumps(str(replay_file(root, number)))}")
        places = dict.fromkeys(str(path) for one in earlier for path in videos_of(one.run))
        settings.append(f"replay.videos={json.dumps(list(places))}")
        if config.discriminator == "carried":
            settings.append(f"discriminator.init={json.dumps(str(before.folder))}")
    run = make_config(data, settings, origin)
    if before is None:
        _refuse_circle(run, root)
        return run
    # Another seed: adapters of one seed would share their A, and with it their rank.
    seed = (run.seed + before.number) % 2**63
    replay = run.replay
    if not replay.fraction:
        replay = replay.model_copy(update={"prompts": None})
    if not replay.fraction or replay.teacher == "none":
        replay = replay.model_copy(update={"videos": []})
    return run.model_copy(update={"seed": seed, "replay": replay})


def videos_of(run: RunConfig) -> list[Path]:
    """Where the finished videos of a run's teacher are: folders, or manifests in them."""
    teacher = run.teacher
    sources = [(teacher, run.teacher_dir)]
    if isinstance(teacher, MixConfig):
        sources = [(o.source, teacher.folder_of(o, run.teacher_dir)) for o in teacher.teachers]
    return [getattr(one, "manifest", None) or folder for one, folder in sources if one.gives_videos]


def replay_file(root: Path, number: int) -> Path:
    """The prompts of the domains before the one of this number."""
    return root / "replay" / f"{number}.txt"


def _refuse_circle(run: RunConfig, root: Path) -> None:
    init = run.student.init
    if init is not None and Path(init).resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"student.init: {init} lies in {root}, the folder of this sequence: a circle; needed: "
            "a start of its own"
        )


def _refuse_unlike(first: Domain, other: Domain) -> None:
    """Raise ConfigError if two domains' runs are not of one student and one size of videos."""
    a, b = plain(first.run), plain(other.run)
    parts = {"video": {"frames", "height", "width", "fps"}, "student": {"kind", "checkpoint"}}
    for section, keys in parts.items():
        for key in sorted(keys):
            there, here = a[section][key], b[section][key]
            if there != here:
                raise ConfigError(
                    f"domain {other.number} ({other.name}): {section}.{key} is {here!r}, and "
                    f"{there!r} in {first.name}; needed: the same in every domain, as the student "
                    "and its videos are the same"
                )


def _check_columns(chain: Chain) -> None:
    for name, column in chain.columns.items():
        one = chain.measured(chain.domains[0].run, {name: column}).evaluation.each()[name]
        metrics = find("metrics", one.kind)
        if metrics.needs_prompts and one.prompts is None:
            raise ConfigError(
                f"{name}: evaluation.prompts is not given; needed: a file of held-out prompts, as "
                f"every domain's student is measured on them by {one.kind}"
            )


# --- folders ---


def refuse_changed(chain: Chain) -> None:
    """Raise ConfigError at the first domain that differs from the one that was run before in the
    same folder; the results of earlier ones are kept."""
    there = {
        int(path.name.partition("_")[0]): path
        for path in (chain.root.iterdir() if chain.root.is_dir() else ())
        if _FOLDER.fullmatch(path.name) and path.is_dir()
    }
    for number, path in sorted(there.items()):
        domain = chain.domains[number - 1] if number <= len(chain.domains) else None
        if domain is None or path.name != domain.folder.name:
            now = "absent" if domain is None else domain.name
            raise ConfigError(_changed(chain, number, f"{path.name} there, {now} now"))
        try:
            refuse_another_run(path, domain.run)
        except ConfigError as error:
            raise ConfigError(_changed(chain, number, str(error))) from None
        done = (path / DONE).exists() and not finished(path, domain.run.updates)
        if done and number + 1 in there:
            what = f"it had fewer than {domain.run.updates} updates when the next began"
            raise ConfigError(_changed(chain, number, what))


def _changed(chain: Chain, number: int, what: str) -> str:
    return (
        f"sequence {chain.root}: domain {number} is another than the one that was run there "
        f"({what}); domains before it are kept: put it back, choose another out=, or remove the "
        f"folders from {number} on"
    )


def write_replay(chain: Chain, domain: Domain, console: Console) -> None:
    """Write the prompts that a domain replays: those of all earlier domains, each once."""
    if not domain.run.replay.fraction:
        return
    earlier = chain.domains[: domain.number - 1]
    found = [prompt for one in earlier for prompt in replayable(chain, one, console)]
    text = "".join(f"{prompt}\n" for prompt in dict.fromkeys(found))
    path = replay_file(chain.root, domain.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or read_text(path) != text:
        write_text(path, text)


def replayable(chain: Chain, domain: Domain, console: Console) -> list[str]:
    """The prompts of a domain that later ones replay. Raises ConfigError for one that its teacher
    does not have."""
    whole = [" ".join(prompt.split()) for prompt in _asked(domain.run, console)]
    if domain.settings.prompts is None:
        return whole
    path = domain.settings.prompts
    chosen = prompts_of(f"domain {domain.number} ({domain.name}): prompts", path)
    odd = [prompt for prompt in chosen if " ".join(prompt.split()) not in whole]
    if odd:
        raise ConfigError(
            f"domain {domain.number} ({domain.name}): prompts {path}: {odd[0]!r} is a prompt of no "
            "teacher here; needed: only prompts of the domain's teacher"
        )
    return chosen


def _asked(run: RunConfig, console: Console) -> list[str]:
    """The prompts of a run's teacher. Nothing is bought."""
    if isinstance(run.teacher, PaidConfig):
        assert run.teacher.api.prompts is not None
        return list(read_prompts(run.teacher.api.prompts))
    return [request.prompt for request in run.open_teacher(console).requests]
