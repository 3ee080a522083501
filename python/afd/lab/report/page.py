"""Build a self-contained report.html from a quickstart folder or a single run folder.

Every number comes from the run's files; missing data are listed, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from afd.config.run import flatten
from afd.errors import ConfigError
from afd.files import write_bytes
from afd.lab.report import charts, headline, metrics, phase_times, sequence_page, video_page
from afd.lab.report.clips import clip_table
from afd.lab.report.run_files import LABELS, Part, holds_run, read_parts, runs
from afd.lab.report.teachers import COLUMNS, teacher_rows
from afd.lab.report.templates import render

# Metrics with their own chart; all other metrics are under "all other values".
CURVES = {"toy.html": ("phys", "g_mae", "rend", "traj_fd"), "video.html": ("motion",)}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html (atomically) and return its path; raises as `render_report`."""
    run_dir = Path(run_dir)
    html = render_report(run_dir)
    path = run_dir / "report.html"
    # File names may contain bytes that do not decode.
    write_bytes(path, html.encode("utf-8", "backslashreplace"))
    return path


def render_report(run_dir: Path) -> str:
    """The report of a quickstart folder or a single run folder as HTML; nothing is written.

    Raises FileNotFoundError if `run_dir` is not a directory, ConfigError if it holds no run. The
    report lists parts that are missing, unfinished or unreadable.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"run_dir {run_dir}: not a directory; needed: a run's folder")
    if sequence_page.is_sequence(run_dir):
        return render("sequence.html", sequence_page.sequence_page(run_dir))
    if not holds_run(run_dir):
        raise ConfigError(
            f"report: got {run_dir}, which holds no run; needed: the folder of a run, of afd "
            "quickstart or of afd adapt"
        )
    template = "video.html" if video_page.is_video_run(run_dir) else "toy.html"
    return render(template, _page(run_dir, template))


def _page(run_dir: Path, template: str) -> dict[str, Any]:
    """The template's variables."""
    parts = read_parts(run_dir)
    known: Sequence[metrics.Metric]
    drawn: list[charts.Chart | None] = []
    if template == "video.html":
        run = next((run for run in runs(parts) if run.folder is not None), parts["afd"])
        known, columns = metrics.VIDEO_METRICS, ["base", run.name]
        page = video_page.video_page(run_dir, run, parts["base"].metrics)
        page |= {"trade_off": None, "notices": list(_notices([run]))}
        drawn = [video_page.reward_hacking(run)]
    else:
        columns = [name for name, part in parts.items() if part.folder or part.metrics]
        known = metrics.TOY_METRICS
        page = _toy_page(parts) | {"clips": clip_table(parts, columns)}
    table = list(metrics.metric_rows(parts, columns, known))
    curves = {row["metric"].key: charts.evaluation_chart(parts, row["metric"]) for row in table}
    drawn += [curves.pop(key, None) for key in CURVES[template]]
    drawn += charts.update_charts(parts, charts.GROUPS)
    others = [*charts.update_charts(parts, charts.other_groups(parts)), *curves.values()]
    times = {r.name: seconds for r in runs(parts) if (seconds := phase_times.seconds_per_phase(r))}
    configs = {run.label: dict(flatten(run.config)) for run in runs(parts) if run.config}
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    teachers = [run.config.get("teacher") for run in runs(parts)]
    counts = [line.get("videos") for run in runs(parts) for line in run.evaluations]
    return page | {
        "name": run_dir.resolve().name,
        "date": max((part.when for part in parts.values() if part.when), default=None),
        "parts": parts,
        "runs": runs(parts),
        "labels": LABELS,
        "columns": columns,
        "directions": metrics.DIRECTIONS,
        "table": table,
        "charts": [chart for chart in drawn if chart],
        "other_charts": [chart for chart in others if chart],
        "window": charts.window(max(len(run.updates) for run in runs(parts))),
        "evaluated_videos": sorted({count for count in counts if type(count) is int}),
        "teachers": teacher_rows(runs(parts)),
        "teacher_columns": list(COLUMNS),
        "times": times,
        "phases": dict.fromkeys(phase for seconds in times.values() for phase in seconds),
        "training_s": sum(sum(seconds.values()) for seconds in times.values()),
        "times_svg": phase_times.phase_chart(times) if times else "",
        "doctor": next((run.doctor for run in runs(parts) if run.doctor), {}),
        "teacher_config": next((t for t in teachers if isinstance(t, dict)), {}),
        "configs": list(configs),
        "config_rows": [(k, [str(c.get(k, "–")) for c in configs.values()]) for k in keys],
    }


def _toy_page(parts: dict[str, Part]) -> dict[str, Any]:
    """The template variables specific to toy.html."""
    unfinished = {r.name: r.progress for r in runs(parts) if r.folder and not r.finished}
    measured = {name: part.metrics for name, part in parts.items() if part.metrics}
    title, paragraph = headline.headline(measured, unfinished)
    last = [run.evaluations[-1] for run in runs(parts) if run.metrics]
    return {
        "title": title,
        "paragraph": paragraph,
        "measured": bool(last),
        "videos": sorted({str(line["videos"]) for line in last if "videos" in line}),
        "seeds": sorted({str(line["seed"]) for line in last if "seed" in line}),
        "equal": headline.EQUAL,
        "look_kept": headline.LOOK_KEPT,
        "trade_off": charts.trade_off(parts),
        "notices": list(_notices(parts.values())),
    }


def _notices(parts: Iterable[Part]) -> Iterator[str]:
    """Notices about missing data, one sentence each."""
    for part in parts:
        if part.folder is None and not part.evaluations:
            yield f"{part.label}: not in this folder."
        elif not part.metrics:
            yield f"{part.label}: no evaluation yet."
        elif part.is_run and part.folder is not None and not part.finished:
            yield f"{part.label}: unfinished, {part.progress}."
        for problem in part.problems:
            yield f"{part.label}: {problem}"
