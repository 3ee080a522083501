"""`afd quickstart`: a black-box teacher, the base student, SFT and AFD side by side, and a report.

The folder (runs/quickstart, or `out=`) holds teacher/, base/, sft/, afd/, report.html. Every part
runs once; rerunning the command resumes where it stopped and repeats nothing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from afd.config.run import RunConfig, make_config, to_yaml
from afd.data.videos import Videos
from afd.errors import ConfigError
from afd.files import read_json_lines, write_text
from afd.lab import physics
from afd.lab.metrics import measured_domain
from afd.lab.report.page import write_report
from afd.trainer.evaluate import finite, make_evaluator, write_samples
from afd.trainer.logging import log_to
from afd.trainer.loop import Outcome, train
from afd.trainer.run_folder import refuse_another_run

_log = logging.getLogger("afd")
# Settings of the parts that the user's overrides replace: AFD gets no more time than SFT's 400
# updates take, about 100 updates.
OWN: dict[str, dict[str, Any]] = {"afd": {"updates": 100, "afd": {"cosine_updates": 70}}}
COLUMNS = ("phys", "g_mae", "fit_res", "motion", "rend", "adh", "div", "traj_fd")


def quickstart(overrides: Sequence[str], console: Console) -> bool:
    """Run or resume every part; False if Ctrl-C interrupted it (all progress saved)."""
    began = time.perf_counter()
    parts = {name: part(overrides, name) for name in ("base", "sft", "afd")}
    root = parts["base"].run_dir.parent
    console.rule("teacher and base student")
    base(parts["base"], console)
    for method in ("sft", "afd"):
        console.rule({"sft": "supervised fine-tuning", "afd": "AFD"}[method])
        outcome = train(parts[method], console=console)
        if outcome is Outcome.STOPPED:
            console.print("stopped, everything is saved; the same command continues")
            return False
        if outcome is Outcome.ALREADY_FINISHED:
            console.print(f"{root / method} is already finished; kept")
    console.print(results(root))
    report = write_report(root)
    console.print(f"{time.perf_counter() - began:.0f} s in all; open {report}", soft_wrap=True)
    return True


def part(overrides: Sequence[str], name: str) -> RunConfig:
    """The configuration of one part: the method's own settings, shared teacher folder, separate run
    folder."""
    given = [*overrides, f"method={'sft' if name == 'sft' else 'afd'}"]
    data = {"name": "quickstart", "device": "cpu"} | OWN.get(name, {})
    config = make_config(data, given, origin="afd quickstart")
    root = config.run_dir
    teacher = config.teacher.model_copy(update={"path": config.teacher_dir})
    return config.model_copy(update={"name": name, "out": root / name, "teacher": teacher})


def base(config: RunConfig, console: Console) -> None:
    """Evaluate the untrained student and the teacher's videos."""
    out = config.run_dir
    refuse_another_run(out, config)
    if (out / "DONE").exists():
        console.print(f"{out} is already finished; kept")
        return
    out.mkdir(parents=True, exist_ok=True)
    with log_to(out / "train.log", console):
        # As in training: the thread count changes the last bits of matrix products.
        if config.threads:
            torch.set_num_threads(config.threads)
        write_text(out / "config.yaml", to_yaml(config))
        teacher = config.open_teacher(console)
        requests, videos = teacher.requests, Videos(teacher, config.video)
        evaluate = make_evaluator(config, lambda: videos.fetch(requests))
        lines = []
        if evaluate is not None:
            with console.status("teacher videos and base student are measured"):
                prompts = [request.prompt for request in requests]
                domain = measured_domain(config.evaluation)
                shown = physics.measure(videos.fetch(requests), prompts, domain=domain)
                of_teacher = finite(shown)
                student, _ = config.student.build(config.video)
                result = evaluate(student, config.evaluation.videos)
            lines = [_line(config, "teacher", len(requests), of_teacher)]
            lines.append(_line(config, "base", result.count, result.metrics))
            write_samples(out, result, config.evaluation.samples)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(out / "evaluation.jsonl", text)
        write_text(out / "DONE", "measured\n")


def results(root: Path) -> Table:
    """Final metrics of every finished part."""
    table = Table("", *COLUMNS, title="held-out seeds", title_justify="left")
    for name, folder in (("teacher", "base"), ("base", "base"), ("sft", "sft"), ("afd", "afd")):
        line = final_evaluation(root / folder, name)
        if line is not None:
            values = (line["metrics"].get(column) for column in COLUMNS)
            printed = (f"{v:.3f}" if isinstance(v, int | float) else "" for v in values)
            table.add_row(name, *printed)
    return table


def final_evaluation(folder: Path, method: str) -> dict[str, Any] | None:
    """The last entry for `method` in a part's evaluation.jsonl."""
    found = lines(folder / "evaluation.jsonl")
    of_method = (line for line in reversed(found) if line.get("method") == method)
    return next((line for line in of_method if isinstance(line.get("metrics"), dict)), None)


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; empty if it is absent. ConfigError if it is damaged."""
    found = []
    for line in read_json_lines(path):
        if line.value is None:
            raise ConfigError(f"{path}: line {line.number} is damaged ({line.problem})")
        found.append(line.value)
    return found


def _line(config: RunConfig, method: str, count: int, metrics: dict[str, float]) -> dict[str, Any]:
    return {"update": 0, "seed": config.seed, "method": method, "videos": count, "metrics": metrics}
