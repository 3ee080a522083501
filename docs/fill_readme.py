"""Writes the measured tables between their markers: `make readme`.

docs/QUICKSTART.md gets the metrics of runs/quickstart, docs/PERFORMANCE.md the tables of
benchmarks/results/<device>/*.json, and README.md one summary of both.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from afd.lab.quickstart import COLUMNS, final_evaluation
from benchmarks.report import device_name

ROOT = Path(__file__).parents[1]
LOOK = "distance to the student's own look"
MEANING = {
    "phys": "distance in pixels to the best trajectory of the teacher's physics",
    "g_mae": "error of the fitted gravity",
    "motion": "pixels per frame",
    "rend": LOOK,
    "adh": "share of videos with every attribute of the prompt",
    "traj_fd": "Fréchet distance of trajectories to the teacher's",
}


Rows = list[dict[str, Any]]


def quickstart_table(root: Path) -> str:
    """The final metrics of teacher, base, SFT and AFD, with their provenance."""
    columns = [c for c in COLUMNS if c in MEANING]
    rows = []
    for name, folder in (("teacher", "base"), ("base", "base"), ("sft", "sft"), ("afd", "afd")):
        line = final_evaluation(root / folder, name)
        if line is None:
            raise SystemExit(f"{root / folder}: no evaluation of {name}; run `make quickstart`")
        label = name.upper() if name in ("sft", "afd") else name
        rows.append([label, *(f"{line['metrics'][c]:.3f}" for c in columns)])
    spent = {m: (root / m / "DONE").read_text().strip() for m in ("sft", "afd")}
    meanings = "; ".join(f"`{c}`: {MEANING[c]}" for c in columns)
    return (
        f"{_table(['', *columns], rows)}\n\n"
        f"{meanings}. Held-out seeds, one training seed ({line['seed']}), teacher look `nuis`. "
        f"SFT: {spent['sft']}; AFD: {spent['afd']} ({device_name('cpu')}, Python "
        f"{platform.python_version()}, torch {torch.__version__})."
    )


def nft_loss_table(rows: Rows) -> str:
    """Eager, torch.compile and ours side by side."""
    # A part that fits a page: the official weighting, one small and one large batch.
    shown = [r for r in rows if r["case"] == "x0_adaptive" and r["B"] in (2, 8)]
    found = {(r["dtype"], r["B"], r["noise"], r["backend"]): r for r in shown}
    columns = ["inputs", "B", "noise", "eager ms", "compile ms", "afd ms", "× eager", "× compile"]
    columns += ["% of stream", "MiB eager → afd"]
    lines = []
    for dtype, batch, noise in dict.fromkeys(key[:3] for key in found):
        eager, compiled, ours = (
            found[dtype, batch, noise, backend] for backend in ("eager", "compile", "native")
        )
        ms = [r["median_ms"] for r in (eager, compiled, ours)]
        cells = [f"{value:.1f}" for value in ms]
        cells += [f"{ms[0] / ms[2]:.0f}", f"{ms[1] / ms[2]:.1f}", f"{ours['pct_of_floor']:.0f}"]
        cells += [f"{eager['peak_mib']:.0f} → {ours['peak_mib']:.0f}"]
        lines.append([dtype, str(batch), noise, *cells])
    return _table(columns, lines)


def attention_table(rows: Rows) -> str:
    """Every pass against one dense-masked SDPA."""
    found = {(row["case"], row["B"], row["provider"]): row for row in rows}
    columns = ["pass", "B", "queries × keys", "dense mask ms", "flex ms", "afd ms"]
    columns += ["× dense mask", "× flex"]
    lines = []
    for case, batch in dict.fromkeys(key[:2] for key in found):
        dense, flex, ours = (
            found.get((case, batch, provider)) for provider in ("dense mask", "flex", "ours")
        )
        if dense is None or ours is None:
            continue
        name = case + (", forward and backward" if ours["backward"] else "")
        times = [_ratio(row, None) for row in (dense, flex, ours)]
        ratios = [_ratio(row, ours) for row in (dense, flex)]
        shape = f"{ours['queries']} × {ours['keys']}"
        lines.append([name, str(batch), shape, *times, *ratios])
    return _table(columns, lines)


def rollout_table(rows: Rows) -> str:
    """Milliseconds per chunk of a stream in its steady state."""
    found = {(row["case"], row["B"], row["provider"]): row for row in rows}
    columns = ["student", "queries × keys", "plain ms", "plain, text kept ms", "afd ms", "× plain"]
    columns += ["× text kept", "× floor", "ops", "host waits"]
    lines = []
    for case, batch in dict.fromkeys(key[:2] for key in found):
        released, kept, ours = (
            found[case, batch, provider] for provider in ("eager+text", "eager", "ours")
        )
        cells = [_ratio(row, None) for row in (released, kept, ours)]
        cells += [_ratio(row, ours) for row in (released, kept)]
        cells += [f"{ours['median_ms'] / ours['floor_ms']:.1f}"]
        cells += [f"{kept[key]} → {ours[key]}" for key in ("ops", "syncs")]
        lines.append([case, f"{ours['tokens']} × {ours['keys']}", *cells])
    return _table(columns, lines)


def live_table(rows: Rows) -> str:
    """Every measured quantity of the live server."""
    lines = [[r["case"], r["quantity"], f"{r['value']:.3g} {r['unit']}"] for r in rows]
    return _table(["case", "quantity", "measured"], lines)


def streaming_table(rows: Rows) -> str:
    """The rollouts of an update: groups that share a prefix, clips of long streams."""
    columns = ["rollouts", "from chunk, or length", "ms", "passes", "µs per pass", "× off"]
    lines = []
    for r in rows:
        speedup = "" if r["speedup"] is None else f"{r['speedup']:.2f}"
        numbers = [f"{r['median_ms']:.0f}", str(r["passes"]), f"{r['us_per_pass']:.0f}", speedup]
        lines.append([r["case"], r["provider"], *numbers, f"{r['peak_mib']:.2f}"])
    return _table([*columns, "peak MiB"], lines)


def train_step_table(rows: Rows) -> str:
    """The student's update in each context mode, and the phases before it."""
    found = {(row["case"], row["phase"], row["provider"]): row for row in rows}
    modes = ("recompute", "own_context", "shared_context", "shared_context, kept")
    columns = ["student", "videos", "rollout ms", "discriminator ms", "plain ms"]
    columns += [*(f"{mode} ms" for mode in modes), "plain / recompute", "kept / recompute"]
    lines = []
    for case in dict.fromkeys(key[0] for key in found):
        plain = found.get((case, "update", "eager"))
        ours = [found[case, "update", mode] for mode in modes]
        before = [found.get((case, phase, modes[0])) for phase in ("rollout", "discriminator")]
        cells = [_ratio(row, None) for row in (*before, plain, *ours)]
        cells += [_ratio(plain, ours[0]), _ratio(ours[-1], ours[0])]
        lines.append([case, str(ours[0]["B"]), *cells])
    return _table(columns, lines)


def _table(columns: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    head, *rest = (f"| {' | '.join(cells)} |" for cells in (columns, *lines))
    return "\n".join([head, "|---" * len(columns) + "|", *rest])


def _ratio(row: dict[str, Any] | None, to: dict[str, Any] | None) -> str:
    """Milliseconds of a row, or how many times those of `to` they are; a dash for no row."""
    if row is None:
        return "–"
    ms = row["median_ms"]
    return f"{ms:.1f}" if to is None else f"{ms / to['median_ms']:.2f}"


def provenance(path: Path, saved: dict[str, Any]) -> str:
    """The command that made the numbers, where and when."""
    about = saved["environment"]
    commit, _, changed = about["commit"].partition("+")
    state = f"{commit[:9]} with changes" if changed else commit[:9]
    return (
        f"`{_command(path)}`, {about['device_name']}, threads: {about['threads']}, "
        f"torch {about['versions']['torch']}, {about['date'][:10]}, commit {state}; "
        f"all rows of this and more in `{path.relative_to(ROOT)}`."
    )


def _command(path: Path) -> str:
    """The command that wrote a file of results."""
    return f"python benchmarks/{path.stem}.py" + " --all" * (path.stem == "nft_loss")


def fill(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL)


TABLES = {
    "nft_loss": nft_loss_table,
    "attention": attention_table,
    "rollout": rollout_table,
    "train_step": train_step_table,
    "live": live_table,
    "streaming": streaming_table,
}
# The page of a table, if not docs/PERFORMANCE.md.
PAGE_OF = {"live": "docs/LIVE.md", "streaming": "docs/TRAINING.md"}


# What the summary states of each benchmark: its subject, and columns with what they compare to.
FACTS = {
    "nft_loss": (
        "speed of `nft_loss` at 480×832, forward and backward",
        {"× eager": "eager PyTorch", "× compile": "`torch.compile`"},
    ),
    "attention": (
        "speed of `block_attention`",
        {"× dense mask": "SDPA with a dense mask", "× flex": "`flex_attention`"},
    ),
    "rollout": (
        "speed of a streamed chunk",
        {"× plain": "the plain network", "× text kept": "the same with its text cached"},
    ),
    "train_step": (
        "speed of the student's update (`recompute`)",
        {"plain / recompute": "the plain update"},
    ),
}


def benchmark_table(path: Path) -> str:
    """The table of one saved benchmark, with provenance."""
    saved = json.loads(path.read_text())
    return f"{TABLES[path.stem](saved['rows'])}\n\n{provenance(path, saved)}"


def quickstart_facts(root: Path) -> list[list[str]]:
    """The summary's rows of the laptop task."""
    parts = (("base", "base"), ("afd", "afd"), ("sft", "sft"), ("teacher", "base"))
    found = {name: final_evaluation(root / folder, name) for name, folder in parts}
    values = {name: line["metrics"] for name, line in found.items() if line is not None}
    made = date.fromtimestamp((root / "afd" / "DONE").stat().st_mtime)
    source = f"`make quickstart`; {device_name('cpu')}, torch {torch.__version__}, {made}"
    rows = []
    for column, what in (("phys", "distance to the teacher's physics, pixels"), ("rend", LOOK)):
        base, afd, sft, teacher = (f"{values[name][column]:.3f}" for name, _ in parts)
        result = f"base {base}, AFD {afd}, SFT {sft}, teacher {teacher}"
        rows.append([f"laptop task, {what}", result, source])
    return rows


def benchmark_fact(path: Path) -> list[str]:
    """The summary's row of one saved benchmark: the range of its table's ratios."""
    saved = json.loads(path.read_text())
    what, ratios = FACTS[path.stem]
    lines = TABLES[path.stem](saved["rows"]).splitlines()
    head, _, *rows = (line.strip("| ").split(" | ") for line in lines)
    spans = []
    for column, against in ratios.items():
        cells = [row[head.index(column)] for row in rows]
        numbers = sorted((cell for cell in cells if cell != "–"), key=float)
        spans.append(f"{numbers[0]} to {numbers[-1]} × {against}")
    about = saved["environment"]
    device = f"{about['device_name']}, threads: {about['threads']}"
    source = f"`{_command(path)}`; {device}, {about['date'][:10]}"
    return [f"{what}, {len(rows)} cases", "; ".join(spans), source]


def results(name: str) -> list[Path]:
    """The saved results of a benchmark, one per device."""
    return sorted((ROOT / "benchmarks" / "results").glob(f"*/{name}.json"))


def main() -> None:
    run = ROOT / "runs" / "quickstart"
    facts = quickstart_facts(run) + [benchmark_fact(p) for name in FACTS for p in results(name)]
    pages = {
        "README.md": {"facts": _table(["measured", "result", "command; device, date"], facts)},
        "docs/QUICKSTART.md": {"quickstart": quickstart_table(run)},
        "docs/PERFORMANCE.md": {
            name: "\n\n".join(map(benchmark_table, results(name)))
            for name in TABLES
            if name not in PAGE_OF
        },
    }
    for name, page in PAGE_OF.items():
        pages[page] = {name: "\n\n".join(map(benchmark_table, results(name)))}
    for page, tables in pages.items():
        text = (ROOT / page).read_text()
        for name, content in tables.items():
            text = fill(text, name, content)
        (ROOT / page).write_text(text)


if __name__ == "__main__":
    sys.exit(main())
