"""The tests of every dependency at the lowest version that pyproject.toml allows.

`make lowest`, or `python -m tests.lowest`. A copy of the tree is installed into its own virtual
environment, `.lowest/`, where every `package>=X` is `package==X`, with the build
requirements at their bounds too; the development environment is unchanged. torch and triton are
taken from requirements.lock: their older builds are gigabytes for a GPU; `make gpu-check` tries
what a GPU box has. What has no bound, and what only a GPU uses, is left out.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LOCKED = ("torch", "triton")
# Extras for a GPU, and packages that run or check the tests and are in no test themselves.
NOT_HERE = ("flash", "xformers")
# Every dependency, with the test files that reach what we use of it.
TESTS = {
    "numpy": ("test_watching", "test_simulator", "test_checkpoint"),
    "einops": ("test_causal_wan", "test_latent_discriminator", "test_videoalign"),
    "rich": ("test_doctor", "test_cli", "test_watching"),
    "PyYAML": ("test_config", "test_file_errors"),
    "pydantic": ("test_config", "test_sample_jobs", "test_benchmark"),
    "av": ("test_video", "test_codec_match", "test_folder", "test_sample"),
    "pillow": ("test_pictures", "test_odd_clips", "test_watching"),
    "safetensors": ("test_checkpoints", "test_shards", "test_caches", "test_export"),
    "httpx": ("test_teacher_http", "test_api_teacher"),
    "tensorboard": ("test_watching",),
    "matplotlib": ("test_report", "test_ablation", "test_watching"),
    "jinja2": ("test_report",),
    "starlette": ("test_live", "test_live_security"),
    "uvicorn": ("test_live_browser", "test_live_client"),
    "websockets": ("test_live_client",),
    "shtab": ("test_cli",),
    "diffusers": ("test_vae", "test_diffusers_equality", "test_export"),
    "transformers": ("test_text", "test_videoalign", "test_videoalign_inputs"),
    "peft": ("test_policies", "test_export", "test_videoalign"),
    "ftfy": ("test_text",),
    "huggingface_hub": ("test_sources", "test_text"),
    "mkdocs-material": ("test_site",),
    "mkdocstrings-python": ("test_site",),
    "nbclient": ("test_notebook",),
    "ipykernel": ("test_notebook",),
    "accelerate": ("test_diffusers_equality", "test_export"),
    # These run all other packages.
    "pytest": (),
    "pytest-benchmark": (),
    "pytest-timeout": (),
    "pytest-xdist": (),
    "hypothesis": (),
    # These build the core.
    "setuptools": (),
    "cmake": (),
    "pybind11": (),
}


def main() -> int:
    """The exit status of the tests, or of the installation that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="dependencies whose tests run; default: all")
    asked = parser.parse_args()
    pins = dict(lowest())
    if odd := pins.keys() ^ TESTS.keys():
        sys.exit(f"{sorted(odd)}: needed: in pyproject.toml with a lower bound, and in TESTS")
    if odd := set(asked.only) - pins.keys():
        sys.exit(f"{sorted(odd)}: needed: some of {', '.join(pins)}")
    home = ROOT / ".lowest"
    python, tree = home / "venv" / "bin" / "python", home / "tree"
    if not python.exists():
        _run(sys.executable, "-m", "venv", str(home / "venv"))
    wanted = [f"{name}=={version}" for name, version in {**pins, **dict(locked())}.items()]
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _copy(tree)
    if status := (
        _run(*pip, "wheel", "ninja", *wanted)
        or _run(*pip, "--no-deps", "--no-build-isolation", "--editable", str(tree))
    ):
        return status
    names = dict.fromkeys(name for key in asked.only or TESTS for name in TESTS[key])
    # What an editable install of the tree imports is the copy.
    files = [f"tests/afd/{name}.py" for name in sorted(names)] + [
        "tests/integrations",
        "tests/properties",
        "tests/native",
    ]
    return _run(str(python), "-m", "pytest", "-q", *files, cwd=tree)


def lowest() -> Iterator[tuple[str, str]]:
    """Name and lower bound of everything that pyproject.toml asks for and that can run here."""
    held = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = held["project"]["optional-dependencies"]
    texts = [*held["project"]["dependencies"], *held["build-system"]["requires"]]
    texts += [text for extra, listed in extras.items() if extra not in NOT_HERE for text in listed]
    for text in texts:
        asked = Requirement(text)
        bounds = [part.version for part in asked.specifier if part.operator == ">="]
        if bounds and asked.name not in LOCKED:
            yield asked.name, bounds[0]


def locked() -> Iterator[tuple[str, str]]:
    """torch and triton as requirements.lock has them."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for name in LOCKED:
        found = re.search(rf"^{name}==([^ ;\n]+)", text, re.MULTILINE)
        if found and (name != "triton" or sys.platform == "linux"):
            yield name, found[1]


def _copy(tree: Path) -> None:
    """The files that git tracks, with uncommitted changes."""
    shutil.rmtree(tree, ignore_errors=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    # Some tests ask git which files there are, and of which commit.
    author = ["-c", "user.name=afd", "-c", "user.email=afd"]
    commit = ["commit", "--quiet", "--no-verify", "--message", "the tree under test"]
    for words in (["init", "--quiet"], ["add", "--all", "--force"], [*author, *commit]):
        subprocess.run(["git", *words], cwd=tree, check=True)


def _run(*command: str, cwd: Path = ROOT) -> int:
    return subprocess.run(command, cwd=cwd, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
