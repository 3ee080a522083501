"""Every extra in an environment of its own that holds nothing else: `make extras ARGS="train lab"`.

The wheel comes from the source distribution, built without git and without a compiler: what is
tried is what the package installs and imports, not its core. torch, triton and numpy, with what
they need, are linked from the environment that runs this; an extra's other packages come from the
index. `bare`, the package without an extra, needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CORE = ("torch", "triton", "numpy")
# Imported by a program: the distributions that its modules belong to.
IMPORTED = """
import json, sys
from importlib.metadata import packages_distributions
import afd, torch
x0 = torch.ones(2, 3, 4, 4, 4)
x_t = afd.ops.forward_noise(x0, torch.zeros(2), seed=torch.arange(2))
assert torch.equal(x_t, x0)
owners = packages_distributions()
tops = {name.partition(".")[0] for name in sys.modules}
print(json.dumps(sorted({owner for top in tops for owner in owners.get(top, ())})))
"""
TINY = (
    "updates=1",
    "prompts_per_update=1",
    "teacher.count=2",
    "discriminator.warmup_updates=0",
    "evaluation.every=0",
    "evaluation.videos=2",
)
# Per extra: the words of a command, its exit code, and what it prints.
PROBES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "bare": (("train", "quickstart"), 2, r"pip install 'afd-video\[train\]'"),
    "train": (("train", "quickstart", *TINY, "out=run"), 0, "run"),
    "lab": (("quickstart", *TINY, "out=run"), 0, "report.html"),
    "wan": (("train", "afd_self_forcing_480x832", "--dry-run"), 0, "GPU-hours"),
    "teachers": (("teacher", "status", "seedance"), 2, "has no ledger"),
    "live": (("sample", "self_forcing_480x832", "--dry-run"), 0, "GiB"),
    "completion": (("--print-completion", "bash"), 0, "complete"),
    "all": (("doctor",), 0, "compiled core"),
}
# What the extra's own modules are, besides the command above.
MODULES = {
    "train": "afd.video",
    "wan": "afd.models.wan.vae, diffusers, transformers, peft",
    "teachers": "afd.teachers.paid.http",
    "live": "afd.sampling.sample",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="*", help=f"of {', '.join(PROBES)}; default: all of them")
    asked = parser.parse_args().extras or list(PROBES)
    if odd := [extra for extra in asked if extra not in PROBES]:
        sys.exit(f"extras: got {', '.join(odd)}; needed: some of {', '.join(PROBES)}")
    with tempfile.TemporaryDirectory() as home:
        wheel = build(Path(home))
        for extra in asked:
            found = try_extra(extra, wheel, Path(home) / extra)
            print(f"{extra}: works with {len(found)} packages", flush=True)
    return 0


def build(home: Path) -> Path:
    """A wheel without the core, from a source distribution made outside any repository."""
    archive = build_sdist(tracked_copy(home / "tree"))
    no_compiler = {"CXX": "/nonexistent/c++", "CUDACXX": "/nonexistent/nvcc"}
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index")
    words = ("--no-build-isolation", "--wheel-dir", str(home), str(archive))
    run_lines(*pip, *words, cwd=home, **no_compiler)
    (wheel,) = home.glob("*.whl")
    return wheel


def tracked_copy(tree: Path) -> Path:
    """A copy of what git tracks, with uncommitted changes and without the repository."""
    for name in run_lines(
        "git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT
    ):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def build_sdist(tree: Path) -> Path:
    """The source distribution of a tree, made beside it and without git on the PATH."""
    hook = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    return tree.parent / run_lines(sys.executable, "-c", hook, cwd=tree, PATH=_without("git"))[-1]


def try_extra(extra: str, wheel: Path, home: Path) -> list[str]:
    """Install the wheel with one extra in a new environment and run its command.

    Returns the distributions that the environment then holds, or for `bare` those that importing
    and running an op brings in.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    (site,) = (home / "lib").glob("python*/site-packages")
    for name in needed(CORE):
        link(distribution(name), site)
    target = str(wheel) if extra == "bare" else f"{wheel}[{extra}]"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet")
    run_lines(*pip, *(["--no-index"] if extra == "bare" else []), target, cwd=home)
    if extra in MODULES:
        run_lines(str(python), "-c", f"import {MODULES[extra]}", cwd=home)
    words, code, text = PROBES[extra]
    command = [str(home / "bin" / "afd"), *words]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode != code or not re.search(text, said):
        raise SystemExit(f"{extra}: {' '.join(words)} ended with {done.returncode}:\n{said}")
    if extra == "bare":
        found: list[str] = json.loads(run_lines(str(python), "-c", IMPORTED, cwd=home)[-1])
        return found
    return run_lines(*pip[:5], "list", "--format", "freeze", cwd=home)


def needed(names: tuple[str, ...]) -> set[str]:
    """Distributions and, recursively, what they need here; canonical names."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        asked = (Requirement(text) for text in requires)
        todo += [r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def link(held: Distribution, site: Path) -> None:
    """Put an installed distribution into another environment, by links where the disk has them."""
    for file in held.files or ():
        source, target = Path(str(held.locate_file(file))), site / file
        if ".." in file.parts or not source.is_file() or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)


def _without(tool: str) -> str:
    """The PATH less the folders that hold a tool, but for the interpreter's."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(f for f in folders if not (Path(f) / tool).exists())


def run_lines(*command: str, cwd: Path, **environment: str) -> list[str]:
    """The lines that a command prints; ends this program with its output if it fails."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return [line for line in done.stdout.splitlines() if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
