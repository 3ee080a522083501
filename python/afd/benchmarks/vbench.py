"""VBench: read its prompts, lay out videos as its code expects them, and read its results.

In its standard mode VBench looks for `<prompt_en>-<0..4>.mp4` in a folder that holds only videos,
and recovers the prompt from that name; for temporal_flickering it first discards moving videos out
of 25. So a prompt must be a valid file name, unique within each dimension.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from afd.benchmarks.config import VBenchConfig
from afd.benchmarks.suites import Clip, Prompt, Score, need, read_lines, read_text
from afd.errors import ConfigError
from afd.files import parse_json

_log = logging.getLogger("afd")
FLICKERING = "temporal_flickering"
# Maximum bytes of a file name on common file systems.
LONGEST = 255


def read(config: VBenchConfig) -> list[Prompt]:
    """The prompts of the requested dimensions, each with its dimensions.

    Raises ConfigError for an invalid file, and for a prompt by which VBench could not find a video.
    """
    key, augmented = "vbench.prompts", config.augmented
    path = need(config.prompts, key, "VBench_full_info.json or a .txt of VBench's prompts")
    found = _full_info(path, key) if path.suffix == ".json" else _lines(path, key)
    generate = [text for text, _ in found]
    if augmented is not None:
        generate = _longer(config, augmented, generate)
    known = {dimension for _, dimensions in found for dimension in dimensions}
    wanted = known if config.dimensions is None else set(config.dimensions)
    if wanted - known:
        raise ConfigError(
            f"vbench.dimensions: got {sorted(wanted - known)}; {path} has {sorted(known)}"
        )
    prompts: dict[str, Prompt] = {}
    for index, ((text, dimensions), longer) in enumerate(zip(found, generate, strict=True)):
        mine = tuple(d for d in dimensions if d in wanted)
        before = prompts.get(text)
        if before is not None:
            # VBench finds the same files for both entries.
            mine = tuple(dict.fromkeys(before.dimensions + mine))
            prompts[text] = replace(before, dimensions=mine, samples=_samples(config, mine))
        elif mine:
            prompts[text] = Prompt(index, text, longer, _samples(config, mine), mine)
    for prompt in prompts.values():
        file_name(prompt.text, prompt.samples - 1)
    return list(prompts.values())


def _longer(config: VBenchConfig, augmented: Path, texts: list[str]) -> list[str]:
    """The augmented text of each prompt, from the lines of `augmented`."""
    lines = read_lines(augmented, "vbench.augmented")
    originals = texts
    if config.originals is not None:
        originals = read_lines(config.originals, "vbench.originals")
    if len(lines) != len(originals):
        raise ConfigError(
            f"vbench.augmented {augmented}: {len(lines)} lines; needed: {len(originals)}, one for "
            f"each prompt of {config.originals or config.prompts}"
        )
    known = {text.strip(): line for text, line in zip(originals, lines, strict=True)}
    lacking = [text for text in texts if text.strip() not in known]
    if lacking:
        raise ConfigError(
            f"vbench.originals {config.originals}: {len(lacking)} prompts of {config.prompts} are "
            f"not in it, such as {lacking[0]!r}"
        )
    return [known[text.strip()] for text in texts]


def file_name(prompt: str, sample: int) -> str:
    """VBench's file name for a video; ConfigError if it is not a valid file name."""
    name = f"{prompt}-{sample}.mp4"
    wrong = None
    if "/" in prompt or "\0" in prompt:
        wrong = f"it contains {'/' if '/' in prompt else 'a zero byte'!r}"
    elif len(os.fsencode(name)) > LONGEST:
        wrong = f"with -{sample}.mp4 it is {len(os.fsencode(name))} bytes long, more than {LONGEST}"
    if wrong is not None:
        raise ConfigError(
            f"vbench.prompts: {prompt!r} is not a valid file name ({wrong}), and VBench finds "
            "videos by their prompt; leave the prompt out, or use vbench's custom_input mode"
        )
    return name


def check_disk(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Raises ConfigError if two prompts of a dimension map to the same file on this disk."""
    pairs = list(_alike(prompts))
    if not pairs:
        return
    dimension, one, other = pairs[0]
    alike = f"{one!r} and {other!r} of {dimension} differ by case only"
    if _ignores_case(folder):
        raise ConfigError(
            f"vbench.prompts: {alike}, which the file system of {folder} does not "
            "distinguish; choose an out= on another file system"
        )
    _log.warning("vbench: %s: do not copy these videos to a case-insensitive file system", alike)


def link(folder: Path, clips: Sequence[Clip], videos: Path) -> None:
    """Fill folder/<dimension>/ with the videos under VBench's names.

    Hard links take no space; where the disk does not support them the videos are copied.
    """
    for clip in clips:
        for dimension in clip.prompt.dimensions:
            if clip.sample >= count_for(dimension, clip.prompt.samples):
                continue
            place = folder / dimension
            place.mkdir(parents=True, exist_ok=True)
            _link(videos / clip.file, place / file_name(clip.prompt.text, clip.sample))


def count_for(dimension: str, samples: int) -> int:
    """How many of a prompt's `samples` videos VBench reads for a dimension."""
    return samples if dimension == FLICKERING else min(samples, 5)


def read_results(folder: Path, clips: Sequence[Clip]) -> list[Score]:
    """The newest score of each dimension in VBench's results folder, if it exists."""
    files = sorted(folder.glob("*_eval_results.json"), key=lambda file: file.stat().st_mtime_ns)
    scores: dict[str, Score] = {}
    for file in files:
        for dimension, held in _results(file).items():
            videos = [clip for clip in clips if dimension in clip.prompt.dimensions]
            of = sum(clip.sample < count_for(dimension, clip.prompt.samples) for clip in videos)
            scores[dimension] = Score("vbench", dimension, *held, of)
    return [scores[dimension] for dimension in sorted(scores)]


def _results(file: Path) -> dict[str, tuple[float, int | None]]:
    """Mean and number of videos per dimension in an *_eval_results.json."""
    try:
        held = parse_json(read_text(file, "vbench.results"))
        found = {}
        for dimension, (mean, *each) in held.items():
            found[str(dimension)] = float(mean), len(each[0]) if each else None
        if not all(math.isfinite(mean) for mean, _ in found.values()):
            raise ValueError("a mean is not finite")
        return found
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"vbench.results {file}: {error}; needed: a mean and its videos by dimension"
        ) from error


def _full_info(path: Path, key: str) -> list[tuple[str, tuple[str, ...]]]:
    """Prompt and dimensions of every entry of VBench_full_info.json."""
    try:
        held = parse_json(read_text(path, key))
    except ValueError as error:
        raise ConfigError(f"{key} {path}: not valid JSON ({error})") from error
    found = []
    for number, entry in enumerate(held if isinstance(held, list) else [None]):
        text = entry.get("prompt_en") if isinstance(entry, dict) else None
        dimensions = entry.get("dimension") if isinstance(entry, dict) else None
        listed = isinstance(dimensions, list) and all(_is_folder(d) for d in dimensions)
        if not isinstance(text, str) or not text.strip() or not listed or dimensions is None:
            raise ConfigError(
                f"{key} {path}: entry {number} is not, as in VBench_full_info.json, an object "
                "with prompt_en and a list of dimension names"
            )
        found.append((text, tuple(dimensions)))
    return found


def _is_folder(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"\w[\w -]*", name) is not None


def _lines(path: Path, key: str) -> list[tuple[str, tuple[str, ...]]]:
    if path.suffix != ".txt":
        raise ConfigError(f"{key} {path}: needs the ending .json or .txt")
    if not _is_folder(path.stem):
        raise ConfigError(f"{key} {path}: it must be named after a dimension, such as scene.txt")
    return [(line, (path.stem,)) for line in read_lines(path, key)]


def _samples(config: VBenchConfig, dimensions: tuple[str, ...]) -> int:
    return config.flickering_samples if FLICKERING in dimensions else config.samples


def _alike(prompts: Sequence[Prompt]) -> Iterator[tuple[str, str, str]]:
    seen: dict[tuple[str, str], str] = {}
    for prompt in prompts:
        for dimension in prompt.dimensions:
            other = seen.setdefault((dimension, prompt.text.casefold()), prompt.text)
            if other != prompt.text:
                yield dimension, other, prompt.text


def _ignores_case(folder: Path) -> bool:
    probe = folder / ".afd-Case"
    probe.touch()
    try:
        return (folder / ".AFD-cASE").exists()
    finally:
        probe.unlink()


def _link(video: Path, name: Path) -> None:
    if name.exists() and name.samefile(video):
        return
    name.unlink(missing_ok=True)
    try:
        os.link(video, name)
    except OSError:
        shutil.copy2(video, name)
