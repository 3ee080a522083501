"""What a user of the packages relies on: light imports, types, one sentence for what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import afd
from afd import extras
from tests.afd.test_extending import files

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Every package is blocked but torch, with what torch itself imports or asks for, triton and numpy.
CORE_ONLY = """
import contextlib, io, json, sys
import torch, triton, numpy

allowed = {"afd", "afd_kernels", *sys.stdlib_module_names, *(m.split(".")[0] for m in sys.modules)}
torchs = {"sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock"}
asked = set()

class Core:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in allowed | torchs:
            asked.add(top)
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Core(finder) for finder in sys.meta_path]
"""
ONE_OP = """
import afd
assert "afd.ops" not in sys.modules
from afd.integrations import nft
assert not nft.r_from_advantages(torch.zeros(2)).sub(0.5).any()
x0 = torch.randn(2, 3, 4, 4, 4)
x_t = afd.ops.forward_noise(x0, torch.zeros(2), seed=torch.arange(2))
assert torch.equal(x_t, x0)
assert not asked & FOREIGN, asked
"""
COMMANDS = """
from afd.cli import main
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = main(words)
        except SystemExit as exit:
            code = exit.code
    print(json.dumps([code, said.getvalue()]))
"""


def core_only(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CORE_ONLY + program, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_an_op_needs_the_core_alone() -> None:
    foreign = {package.module for package in extras.PACKAGES}
    done = core_only(ONE_OP.replace("FOREIGN", repr(foreign)))
    assert done.returncode == 0, done.stderr


def test_the_command_names_the_extra_that_is_missing(tmp_path: Path) -> None:
    lacks = "which is not installed; pip install 'afd-video"
    cases: dict[str, tuple[int, str]] = {
        "--version": (0, re.escape(f"afd {afd.__version__}")),
        "--help": (0, "evaluate a run's newest checkpoint again"),
        "train x.yaml": (2, rf"afd train: needs \w+, {lacks}\[train\]'"),
        "sample x.yaml": (2, rf"afd sample: needs \w+, {lacks}\[train\]'"),
        "doctor": (0, r"training at 480x832 lacks pydantic, PyYAML, .*: pip install 'afd-video\["),
        "doctor --json": (0, r'"gpu_gb": null'),
        "configs": (0, r"afd train\n +\w+"),
        "configs copy quickstart {}": (0, r"quickstart\.yaml"),
        "configs copy quikstart": (2, r"closest: \w*quickstart"),
        "teacher": (2, "teacher: needs a subcommand"),
        "teacher simulate --out x": (2, rf"simulate: needs av, {lacks}\[train\]'"),
        "--print-completion zsh": (2, rf"needs shtab, {lacks}\[completion\]'"),
    }
    for verb in ("resume", "eval", "benchmark", "ablation", "adapt", "export", "report"):
        cases[f"{verb} x"] = (2, rf"afd {verb}: needs \w+, {lacks}\[\w+\]'")
    for verb in ("quickstart", "live", "teacher fetch x", "teacher status x", "teacher audit x"):
        cases[verb] = (2, rf"afd {verb.split()[0]}: needs \w+, {lacks}\[\w+\]'")
    words = [words.format(tmp_path).split() for words in cases]
    done = core_only(COMMANDS, json.dumps(words))
    assert done.returncode == 0, done.stderr
    for line, (words, (code, sentence)) in zip(
        done.stdout.splitlines(), cases.items(), strict=True
    ):
        got, said = json.loads(line)
        assert got == code, (words, said)
        assert re.search(sentence, said), (words, said)


def test_python_m_afd_says_its_version() -> None:
    words = [sys.executable, "-m", "afd", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"afd {afd.__version__}\n"
    assert afd.__version__ == importlib.metadata.version(extras.DISTRIBUTION)


def test_the_lazy_modules_are_attributes_and_nothing_else_is() -> None:
    x0, t = torch.ones(1, 2), torch.zeros(1)
    assert torch.equal(afd.ops.forward_noise(x0, t, seed=torch.tensor([0])), x0)
    assert callable(afd.rollout.rollout)
    assert {"ops", "rollout", "__version__"} <= set(dir(afd))
    with pytest.raises(AttributeError, match="module 'afd' has no attribute 'opps'"):
        _ = afd.opps


def test_every_package_of_an_extra_is_named_with_it() -> None:
    """Except what runs or checks the tests, or builds the documentation."""
    named = {package.name: package.extra for package in extras.PACKAGES}
    for extra, listed in PROJECT["optional-dependencies"].items():
        for text in listed:
            name = re.split(r"[><=\[ ]", text)[0]
            if name != extras.DISTRIBUTION and (extra not in ("dev", "docs") or name in named):
                assert named[name] == extra, text
    assert PROJECT["name"] == extras.DISTRIBUTION
    assert set(named.values()) - {None} <= PROJECT["optional-dependencies"].keys()
    core = {re.split(r"[><=\[ ;]", text)[0] for text in PROJECT["dependencies"]}
    assert core == {"torch", "triton", "numpy"}


def test_a_command_names_the_extras_of_all_that_is_missing() -> None:
    by_name = {package.name: package for package in extras.PACKAGES}
    chosen = [by_name[name] for name in ("peft", "jinja2", "ftfy", "wandb")]
    assert extras.command(*chosen) == "pip install 'afd-video[wan,lab]' wandb"


@pytest.mark.slow
def test_a_users_files_pass_mypy_strict(tmp_path: Path) -> None:
    """With the packages found as installed ones, whose types count by their py.typed alone."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "afd").symlink_to(ROOT / "python" / "afd")
    (site / "afd_kernels").symlink_to(ROOT / "afd_kernels")
    user = tmp_path / "user"
    for name, text in files().items():
        if name.endswith(".py"):
            (user / name).parent.mkdir(parents=True, exist_ok=True)
            (user / name).write_text(text, encoding="utf-8")
    own = (ROOT / "tests" / "afd" / "fixtures" / "user_file.py").read_text(encoding="utf-8")
    (user / "squares" / "__init__.py").touch()
    (user / "user_file.py").write_text(own, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary"]
    command += [f"--cache-dir={ROOT / '.mypy_cache' / 'user'}", "user_file.py", "squares"]
    done = subprocess.run(
        command,
        cwd=user,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_importing_the_ops_loads_no_triton() -> None:
    """Triton's compiler takes longer to load than the ops, and may be wanted as an interpreter."""
    code = "import sys; import afd.ops; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
