"""Maps the two import packages and drives CMake; without a compiler the rest still installs.

With AFD_REQUIRE_CORE=1, as for a release, a core that cannot be built is an error instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NOTE = "_native_missing.txt"
# An environment that is not activated still has its tools beside its interpreter.
PATH = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])


class BuildCore(build_ext):
    """Builds afd_kernels._native with CMake; on failure says why, once, and goes on without it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Read by afd_kernels.native.why_missing.
        note = (ROOT / "afd_kernels" if self.editable_mode else target.parent) / NOTE
        note.unlink(missing_ok=True)
        try:
            with tempfile.TemporaryDirectory() as build:
                self._build(Path(build))
                (core,) = Path(build).glob("_native*" + sysconfig.get_config_var("EXT_SUFFIX"))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(core, target)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or getattr(error, "stdout", None) or str(error)
            reason = said.strip()[-2000:]
            if os.environ.get("AFD_REQUIRE_CORE") == "1":
                sys.exit(f"AFD_REQUIRE_CORE=1: the compiled core cannot be built: {reason}")
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(reason, encoding="utf-8")
            self.warn(f"afd is installed without its compiled core, because: {reason}")

    def _build(self, build: Path) -> None:
        missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool, path=PATH) is None]
        if missing:
            raise OSError(f"not found: {', '.join(missing)}")
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        for command in (
            [*configure, f"-DPython_EXECUTABLE={sys.executable}"],
            ["cmake", "--build", str(build)],
        ):
            environment = os.environ | {"PATH": PATH}
            subprocess.run(command, check=True, text=True, capture_output=True, env=environment)


setup(
    ext_modules=[Extension("afd_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildCore},
)
