"""Optional packages, each with the extra of pyproject.toml that installs it.

The core, `afd.ops` and `afd.schedules`, needs only torch, triton and numpy.
"""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from afd.errors import ConfigError

# The name on the package index. `afd` there belongs to another project, which has a package `afd`
# and a command `afd` too: both cannot be installed in one environment.
DISTRIBUTION = "afd-video"
_STRANGER = "afd"


class Package(NamedTuple):
    """An optional package.

    Attributes:
        name: distribution name.
        module: name of the imported module.
        extra: afd's extra that installs it; None: it is installed by its own name.
        purpose: what it is used for.
    """

    name: str
    module: str
    extra: str | None
    purpose: str


PACKAGES = (
    Package("pydantic", "pydantic", "train", "configurations"),
    Package("PyYAML", "yaml", "train", "configuration files"),
    Package("rich", "rich", "train", "tables and progress bars"),
    Package("einops", "einops", "train", "students and discriminators"),
    Package("safetensors", "safetensors", "train", "checkpoints"),
    Package("av", "av", "train", "video files"),
    Package("pillow", "PIL", "train", "picture files"),
    Package("matplotlib", "matplotlib", "train", "labels on side-by-side videos, plots"),
    Package("tensorboard", "tensorboard", "train", "event files (logging.tensorboard)"),
    Package("diffusers", "diffusers", "wan", "the autoencoder of Wan students"),
    Package("transformers", "transformers", "wan", "their text encoder, and VideoAlign"),
    Package("ftfy", "ftfy", "wan", "prompt cleaning of that text encoder"),
    Package("peft", "peft", "wan", "LoRA of students and of VideoAlign"),
    Package("huggingface_hub", "huggingface_hub", "wan", "models by hub name"),
    Package("httpx", "httpx", "teachers", "teachers behind an API"),
    Package("jinja2", "jinja2", "lab", "report.html"),
    Package("starlette", "starlette", "live", "the page and the socket of afd live"),
    Package("uvicorn", "uvicorn", "live", "their server"),
    Package("websockets", "websockets", "live", "its WebSocket protocol"),
    Package("flash-attn", "flash_attn", "flash", "attention on CUDA, timed beside ours"),
    Package("xformers", "xformers", "xformers", "attention on CUDA"),
    Package("shtab", "shtab", "completion", "shell completion (afd --print-completion)"),
    Package("wandb", "wandb", None, "a board for runs (logging.wandb)"),
    Package("pytest", "pytest", "dev", "the test suite"),
)
_BY_MODULE = {package.module: package for package in PACKAGES}


def missing() -> list[Package]:
    """The optional packages that are not installed. Nothing is imported."""
    return [package for package in PACKAGES if find_spec(package.module) is None]


def need(key: str, *modules: str) -> None:
    """Raise ConfigError, in one sentence, if a package required by a setting is not installed.

    Nothing is imported.
    """
    absent = [_BY_MODULE[name] for name in modules if find_spec(name) is None]
    if absent:
        names = ", ".join(package.name for package in absent)
        verb = "is" if len(absent) == 1 else "are"
        raise ConfigError(f"{key}: needs {names}, which {verb} not installed; {command(*absent)}")


def absent_module(key: str, error: ModuleNotFoundError) -> ConfigError | None:
    """A ConfigError for a failed import if the module is one of `PACKAGES`; else None."""
    package = _BY_MODULE.get((error.name or "").partition(".")[0])
    if package is None:
        return None
    return ConfigError(f"{key}: needs {package.name}, which is not installed; {command(package)}")


def command(*packages: Package) -> str:
    """The pip command that installs packages through their extras.

    It is the same for every kind of installation: pip finds the installed distribution, from an
    index, a wheel or a checkout, and adds what the extra lacks.
    """
    extras = ",".join(dict.fromkeys(p.extra for p in packages if p.extra is not None))
    wanted = [f"'{DISTRIBUTION}[{extras}]'"] if extras else []
    return " ".join(["pip install", *wanted, *(p.name for p in packages if p.extra is None)])


def reinstall(*options: str) -> str:
    """The pip command that installs this package again, from where it came.

    `options` apply to the package index alone: a checkout is built in any case.
    """
    try:
        text = distribution(DISTRIBUTION).read_text("direct_url.json")
    except PackageNotFoundError:
        text = None
    origin = json.loads(text) if text else {}
    folder = unquote(urlsplit(origin.get("url", "")).path)
    if "dir_info" in origin and Path(folder, "pyproject.toml").is_file():
        editable = "--editable " if origin["dir_info"].get("editable") else ""
        return f"pip install --no-deps {editable}{shlex.quote(folder)}"
    return " ".join(["pip install --force-reinstall --no-deps", *options, DISTRIBUTION])


def build_core() -> str:
    """The pip command that builds the compiled core."""
    return reinstall(f"--no-binary {DISTRIBUTION}")


def stranger() -> str | None:
    """One sentence if the other project's distribution is in this environment; else None.

    An installation of this project under its former name has no files in a folder of its own.
    """
    try:
        other = distribution(_STRANGER)
    except PackageNotFoundError:
        return None
    if not any(file.parts[0] == "afd" for file in other.files or ()):
        return None
    return (
        f"another distribution, {_STRANGER} {other.version}, is installed, whose packages replace "
        f"parts of {DISTRIBUTION}; pip uninstall --yes {_STRANGER}, then {reinstall()}"
    )
