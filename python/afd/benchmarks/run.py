"""`afd benchmark CONFIG.yaml`: make a student's videos in the benchmarks' layouts and score them.

All files of a student are in <out>/<name>/<checkpoint>/: videos/ holds only the mp4 files; beside
it manifest.jsonl (a description of each video), vbench/<dimension>/, videophy.csv, videoalign.csv,
and the scores. Existing files are kept; a second call does what is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table

from afd.benchmarks import vbench, videoalign_mq, videophy
from afd.benchmarks.config import SEEDS, BenchmarkConfig
from afd.benchmarks.student import Subject, find_subject, with_rater
from afd.benchmarks.suites import Clip, Prompt, Score, write_csv, write_whole
from afd.distributed import Ranks, join
from afd.files import only_one
from afd.sampling.config import SampleConfig
from afd.sampling.jobs import Job
from afd.sampling.sample import make_videos

LEFT = (".mp4.partial", ".mp4.whole")


def evaluate(config: BenchmarkConfig, console: Console) -> list[Score]:
    """Make missing videos, write the layouts, rate the videos, and print the available scores.

    Under torchrun the processes split videos and ratings. Raises ConfigError for an invalid
    configuration or file, before the first video is made.
    """
    config = with_rater(config)
    clips = [clip for suite in config.suites for clip in _clips(config, suite)]
    subject = find_subject(config)
    folder = (config.out or Path("samples")) / subject.name / subject.checkpoint
    videos = folder / "videos"
    with (
        join(config.device) as ranks,
        # The main process holds the folder's lock for all processes.
        only_one(videos, made=LEFT) if ranks.main else nullcontext(),
    ):
        if ranks.main:
            vbench.check_disk(folder, [clip.prompt for clip in clips])
            if not all((videos / clip.file).exists() for clip in clips):
                _check_rater(config)
            subject.export(folder)
        ranks.barrier()
        stream = subject.stream(folder, videos, ranks.device)
        _make(stream, clips, ranks, console)
        ranks.barrier()
        scores = _rated(config, stream, clips, folder, ranks)
        if ranks.main:
            _layouts(config, stream, subject, clips, folder)
            scores += _read_back(config, clips, folder)
            _write_scores(folder, subject, scores)
            _show(config, console, folder, scores, clips)
        ranks.barrier()
    return scores


def _check_rater(config: BenchmarkConfig) -> None:
    """Check early that the rater's files exist, since rating comes last."""
    if "videoalign_mq" in config.suites:
        videoalign_mq.check_files(config.videoalign_mq)


def _clips(config: BenchmarkConfig, suite: str) -> list[Clip]:
    """All videos of a benchmark, with seeds that a subset shares with the whole."""
    prompts: list[Prompt] = {
        "vbench": lambda: vbench.read(config.vbench),
        "videophy2": lambda: videophy.read(config.videophy2),
        "videoalign_mq": lambda: videoalign_mq.read(config.videoalign_mq),
    }[suite]()
    return [
        Clip(suite, prompt, sample, _seed(config, prompt, sample), _name(suite, prompt, sample))
        for prompt in prompts[: config.limit]
        for sample in range(prompt.samples)
    ]


def _seed(config: BenchmarkConfig, prompt: Prompt, sample: int) -> int:
    return config.seed + SEEDS * prompt.index + sample


def _name(suite: str, prompt: Prompt, sample: int) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.text.lower())[:40].strip("-")
    parts = (suite.replace("_", "-"), f"{prompt.index:04d}", words, str(sample))
    return "-".join(part for part in parts if part)


def _make(stream: SampleConfig, clips: Sequence[Clip], ranks: Ranks, console: Console) -> None:
    """Make the missing videos, split among processes; the main one checks the others' results."""
    jobs = [Job(clip.name, clip.prompt.generate, clip.seed) for clip in clips]
    assert stream.out is not None
    there = [(stream.out / clip.file).exists() for clip in clips]
    missing = ranks.same([i for i, found in enumerate(there) if not found])
    finished = [job for job, found in zip(jobs, there, strict=True) if found]
    if ranks.main and finished:
        make_videos(stream, finished, console)
    mine = [jobs[i] for i in missing[ranks.share(len(missing))]]
    if mine:
        make_videos(stream, mine, console)


# --- the layouts ---


def _layouts(
    config: BenchmarkConfig, stream: SampleConfig, subject: Subject, clips: list[Clip], folder: Path
) -> None:
    """Write manifest.jsonl and the input files of each benchmark."""
    videos = folder / "videos"
    lines = (
        {
            "file": f"videos/{clip.file}",
            "suite": clip.suite,
            "prompt": clip.prompt.text,
            "generated_with": clip.prompt.generate,
            "seed": clip.seed,
            "sample": clip.sample,
            "dimensions": list(clip.prompt.dimensions),
            "student": subject.origin,
            "frames": stream.frames,
            "fps": stream.fps,
        }
        for clip in clips
    )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(folder / "manifest.jsonl", text)
    vbench.link(folder / "vbench", _of(clips, "vbench"), videos)
    if "videophy2" in config.suites:
        videophy.write(folder / "videophy.csv", _of(clips, "videophy2"), videos)
    if "videoalign_mq" in config.suites:
        mine = _to_rate(config, clips)
        videoalign_mq.write(folder / "videoalign.csv", mine, videos, stream.fps, stream.frames)


def _of(clips: Sequence[Clip], suite: str) -> list[Clip]:
    return [clip for clip in clips if clip.suite == suite]


def _to_rate(config: BenchmarkConfig, clips: Sequence[Clip]) -> list[Clip]:
    """Clips to rate for motion quality: its own if it has prompts, else those of all suites."""
    own = config.videoalign_mq.prompts is not None
    return _of(clips, "videoalign_mq") if own else list(clips)


# --- the scores ---


def _rated(
    config: BenchmarkConfig, stream: SampleConfig, clips: list[Clip], folder: Path, ranks: Ranks
) -> list[Score]:
    if "videoalign_mq" not in config.suites:
        return []
    mine = _to_rate(config, clips)
    ratings = videoalign_mq.Ratings(folder / "videoalign_ratings.jsonl", config.videoalign_mq)
    found = ratings.rate(
        mine,
        folder / "videos",
        lambda: videoalign_mq.make_rater(
            config.videoalign_mq,
            fps=stream.fps,
            frames=stream.frames,
            height=stream.height,
            width=stream.width,
            device=ranks.device,
        ),
        ranks,
    )
    return videoalign_mq.scores(mine, found)


def _read_back(config: BenchmarkConfig, clips: list[Clip], folder: Path) -> list[Score]:
    """Read the results of VBench and VideoPhy-2, as far as they exist."""
    scores = []
    if "vbench" in config.suites:
        results = config.vbench.results or folder / "vbench_results"
        scores += vbench.read_results(results, _of(clips, "vbench"))
    if "videophy2" in config.suites:
        pc = config.videophy2.pc or folder / "videophy_pc.csv"
        sa = config.videophy2.sa or folder / "videophy_sa.csv"
        scores += videophy.read_results(pc, sa, _of(clips, "videophy2"))
    return scores


def _write_scores(folder: Path, subject: Subject, scores: Sequence[Score]) -> None:
    """Write scores.csv and scores.json."""
    rows = [(s.suite, s.metric, s.value, s.videos, s.of) for s in scores]
    write_csv(folder / "scores.csv", ("suite", "metric", "value", "videos", "of"), rows)
    held = {
        "name": subject.name,
        "checkpoint": subject.checkpoint,
        "student": subject.origin,
        "scores": [vars(score) for score in scores],
    }
    write_whole(folder / "scores.json", json.dumps(held, indent=1, ensure_ascii=False) + "\n")


def _show(
    config: BenchmarkConfig, console: Console, folder: Path, scores: list[Score], clips: list[Clip]
) -> None:
    """Print the table, and the commands of the benchmarks without results."""
    table = Table(title=str(folder))
    for column in ("suite", "metric", "mean", "videos"):
        table.add_column(column, justify="right" if column in ("mean", "videos") else "left")
    for s in scores:
        counted = f"{s.of}" if s.videos in (None, s.of) else f"{s.videos} of {s.of}"
        table.add_row(s.suite, s.metric, f"{s.value:.4f}", counted)
    if scores:
        console.print(table)
    answered = {score.suite for score in scores if not score.metric.startswith("VideoAlign")}
    where = folder.resolve()
    if "vbench" in config.suites and "vbench" not in answered:
        dimensions = sorted({d for clip in clips for d in clip.prompt.dimensions})
        _print(
            console, f"VBench has not rated {', '.join(dimensions)} yet; in its checkout, for each:"
        )
        _print(
            console,
            f"  vbench evaluate --videos_path {where}/vbench/DIMENSION --dimension DIMENSION "
            f"--output_path {where}/vbench_results",
        )
    if "videophy2" in config.suites and "videophy2" not in answered:
        _print(console, "VideoPhy-2 has not rated yet; in its checkout, for pc and sa:")
        _print(
            console,
            f"  python inference.py --input_csv {where}/videophy.csv --checkpoint "
            f"videophy_2_auto --task pc --output_csv {where}/videophy_pc.csv",
        )


def _print(console: Console, sentence: str) -> None:
    console.print(sentence, highlight=False, soft_wrap=True, markup=False)
