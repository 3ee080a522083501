"""`afd quickstart-full`: the full table of teachers x runs x seeds, with controls.

Every cell is a run folder runs/quickstart-full/<row>/seed<k>/ that is skipped once finished;
`rows=` and `seeds=` select a subset; all other overrides apply to every run. At the end
results.json and results.md hold the results so far.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from afd.config.run import make_config
from afd.files import write_text
from afd.lab.grid import Study, choice

MOTION, RANDOM = "discriminator.backbone=motion", "discriminator.backbone=random"
# The plain discriminator: whole clips, no augmentation, no pretrained features.
SCRATCH = [
    "discriminator.backbone=scratch",
    "discriminator.random_looks=false",
    "discriminator.beginnings=false",
]
START = {"device": "cpu"}
# Row name: overrides. Its first word is the teacher's look.
ROWS: dict[str, list[str]] = {
    "nuis-sft": ["method=sft"],
    "nuis-afd-scratch": SCRATCH,
    "nuis-afd-motion": [MOTION],
    "mark-sft": ["method=sft"],
    "mark-afd-scratch": SCRATCH,
    "mark-afd-motion": [MOTION],
    "outline-sft": ["method=sft"],
    "outline-afd-motion": [MOTION],
    "noise-sft": ["method=sft"],
    "noise-afd-motion": [MOTION],
    "clean-sft": ["method=sft"],
    "clean-afd-scratch": SCRATCH,
    "clean-afd-motion": [MOTION],
    # Controls: random advantages, and a frozen backbone that was never trained.
    "nuis-control-random-advantage": [MOTION, "afd.advantage=random"],
    "clean-control-random-advantage": [*SCRATCH, "afd.advantage=random"],
    "nuis-control-random-backbone": [RANDOM],
}


def quickstart_full(overrides: Sequence[str], console: Console) -> bool:
    """Run or resume every selected cell; False if Ctrl-C interrupted it (all progress saved)."""
    table = study(overrides)
    if not table.run(console):
        return False
    results = table.write(console)
    write_text(table.root / "results.md", table.markdown(results))
    console.print(f"{table.root / 'results.json'} and {table.root / 'results.md'}", soft_wrap=True)
    return True


def study(overrides: Sequence[str]) -> Study:
    """Build the study selected by the overrides."""
    chosen, seeds, common = choice(overrides, list(ROWS), [0, 1, 2])
    origin = "afd quickstart-full"
    root = make_config({"name": "quickstart-full", **START}, common, origin).run_dir
    rows = {row: [f"teacher.style={row.split('-')[0]}", *own] for row, own in ROWS.items()}
    return Study(root, rows, seeds, chosen, start=START, common=common, origin=origin)
