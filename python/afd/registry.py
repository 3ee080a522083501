"""Registry of students, teachers, discriminators, rewards and metrics by their configured name.

Built-in ones are listed in the table below; an installed package adds its own through entry points
in the groups `afd.students`, `afd.teachers`, `afd.discriminators`, `afd.rewards` and `afd.metrics`
(docs/EXTENDING.md). Everything is imported when its name is first looked up, so that a run loads
only what it uses, and lower layers never import afd.lab or a paid service.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from afd.errors import ConfigError

Group = Literal["students", "teachers", "discriminators", "rewards", "metrics"]

# Base class of the objects of each group, and the methods they must override.
BASES: dict[Group, tuple[str, tuple[str, ...]]] = {
    "students": ("afd.models.config:StudentConfig", ("build", "load_network")),
    "teachers": ("afd.teachers.config:TeacherConfig", ("open",)),
    "discriminators": ("afd.discriminators.base:DiscriminatorConfig", ("build",)),
    "rewards": ("afd.rewards.base:RewardConfig", ("build",)),
    "metrics": ("afd.trainer.evaluate:Metrics", ("__call__",)),
}
BUILT_IN: dict[Group, dict[str, str]] = {
    "students": {
        "toy": "afd.lab.config:ToyStudentConfig",
        "wan": "afd.models.wan.config:WanStudentConfig",
    },
    "teachers": {
        "folder": "afd.teachers.config:FolderConfig",
        "prompts": "afd.teachers.config:PromptsConfig",
        "mix": "afd.teachers.mix_config:MixConfig",
        "simulator": "afd.lab.config:SimulatorConfig",
        "ark": "afd.teachers.paid.config:PaidConfig",
        "openai": "afd.teachers.paid.config:PaidConfig",
        "fal": "afd.teachers.paid.config:PaidConfig",
    },
    "discriminators": {
        "toy": "afd.lab.config:ToyDiscriminatorConfig",
        "videoalign": "afd.discriminators.config:VideoAlignConfig",
        "latent": "afd.discriminators.config:LatentConfig",
    },
    "rewards": {
        "discriminator": "afd.rewards.base:OnlineConfig",
        "videoalign": "afd.rewards.config:VideoAlignRewardConfig",
        "physics": "afd.lab.config:PhysicsRewardConfig",
    },
    "metrics": {
        "physics": "afd.lab.metrics:PhysicsMetrics",
        "physics_stream": "afd.lab.stream_metrics:StreamPhysicsMetrics",
        "video": "afd.trainer.evaluate:VideoMetrics",
    },
}


@functools.cache
def _entries(group: Group) -> dict[str, EntryPoint]:
    """Registered entry points by name; a package cannot override a built-in name."""
    name = f"afd.{group}"
    installed = {entry.name: entry for entry in entry_points(group=name)}
    return installed | {
        kind: EntryPoint(kind, value, name) for kind, value in BUILT_IN[group].items()
    }


def names(group: Group) -> list[str]:
    """Names in a group: built-in ones first, then those of installed packages alphabetically."""
    own = list(BUILT_IN[group])
    return own + sorted(_entries(group).keys() - set(own))


def find(group: Group, name: str) -> Any:
    """The object registered under a name.

    Raises ConfigError for an unknown name, or if an installed package's object cannot be imported
    or does not meet the requirements of its group (`BASES`).
    """
    entry = _entries(group).get(name)
    if entry is None:
        raise ConfigError(f"got {name!r}; needed: one of the {group} {', '.join(names(group))}")
    if name in BUILT_IN[group]:
        return entry.load()
    where = f"{name!r}: {entry.value}, registered in {entry.group},"
    try:
        found = entry.load()
    except Exception as error:  # importing a third-party module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{where} cannot be imported ({reason})") from error
    path, own = BASES[group]
    base = load(path)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{where} is not a subclass of {path.replace(':', '.')}")
    for method in own:
        if getattr(found, method) is getattr(base, method):
            raise ConfigError(f"{where} does not define {method}")
    return found


def importable(group: Group) -> list[Any]:
    """All objects of a group, except those of installed packages that `find` rejects."""
    found = []
    for name in names(group):
        with suppress(ConfigError):
            found.append(find(group, name))
    return found


def load(path: str) -> Any:
    """Import the object that "module:name" refers to."""
    return EntryPoint(path, path, "").load()
