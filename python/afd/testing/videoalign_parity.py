"""Does this installation score as VideoAlign's own code did?

`python -m afd.testing.videoalign_parity DIR` compares every golden file of a folder: one line per
file with the worst error, its limit and the tensor it was seen in. Exits with 1 where an error is
above its limit, where something that must be equal is not, or where a file is of no known kind;
with 2 where there is nothing to compare.

A folder holds checkpoint_root/ (the released layout), tiny_base/ (config.json and tokenizer),
prompts.json, and any of forward_*.safetensors with forward.json, preprocess_*.safetensors with
preprocess.json, rope.safetensors, tiny_state_dict_keys.json, full_size_keys.json. The prompt
template is taken from prompts.json. Prose (README*, LICENSE*) is not compared.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from afd.testing.videoalign_golden import Folder, Line
from afd.testing.videoalign_inputs import compare_clip, compare_preprocess, compare_prompts
from afd.testing.videoalign_scores import compare_api, compare_case, compare_keys, compare_rotary

Compare = Callable[[Line, Path, Folder], None]
KINDS: tuple[tuple[str, Compare], ...] = (
    ("forward_*.safetensors", compare_case),
    ("forward.json", compare_api),
    ("preprocess_*.safetensors", compare_clip),
    ("preprocess.json", compare_preprocess),
    ("prompts.json", compare_prompts),
    ("rope.safetensors", compare_rotary),
    ("*_keys.json", compare_keys),
)
INPUTS = ("checkpoint_root/**", "tiny_base/*", "README*", "LICENSE*")


def run_folder(path: Path, device: torch.device | str = "cpu") -> Iterator[Line]:
    """A line for every golden file of `path`, one after another."""
    folder = Folder(path, torch.device(device))
    inputs = {file for pattern in INPUTS for file in path.glob(pattern)}
    inputs |= {file for file in path.glob("checkpoint_root/**/*")}
    for file in sorted(path.rglob("*")):
        if file in inputs or file.is_dir():
            continue
        line = Line(file.relative_to(path).as_posix())
        compare = next((c for pattern, c in KINDS if file in set(path.glob(pattern))), None)
        if compare is None:
            line.wrong.append("unknown: no golden file of a known kind")
        else:
            try:
                compare(line, file, folder)
            except (KeyError, RuntimeError, ValueError, OSError) as error:
                line.wrong.append(f"{type(error).__name__}: {error}")
        yield line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m afd.testing.videoalign_parity", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="a folder of golden files")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    # The template is the folder's, so log messages about ours do not apply.
    logging.getLogger("afd").setLevel(logging.ERROR)
    if not (given.folder / "checkpoint_root").is_dir():
        print(f"{given.folder}: no folder of golden files (no checkpoint_root/)", file=sys.stderr)
        return 2
    lines = []
    for line in run_folder(given.folder, given.device):
        print(line.text(), flush=True)
        lines.append(line)
    failed = sum(not line.ok for line in lines)
    print(f"{len(lines)} files, {failed} failed")
    return 1 if failed or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
