"""The core needs none of the packages of the extra `wan`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"diffusers", "transformers", "peft", "ftfy", "huggingface_hub"}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from afd.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_the_laptop_task_trains_without_the_packages_of_wan(tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "python" / "afd" / "configs" / "quickstart.yaml"
    small = [
        "updates=1",
        "prompts_per_update=1",
        "teacher.count=2",
        "discriminator.warmup_updates=0",
    ]
    small += ["evaluation.kind=none", "logging.tensorboard=false", f"out={tmp_path / 'run'}"]
    command = [sys.executable, "-c", PROGRAM, str(config), *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "run" / "DONE").is_file()
