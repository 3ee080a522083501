"""Small clips side by side: selects the prompts and makes the images that page.js animates."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.image import imsave

from afd.errors import TeacherError, VideoError
from afd.lab.report.run_files import LABELS, Part, numbers, runs
from afd.teachers.base import Request
from afd.teachers.folder import FolderTeacher
from afd.video import read_video, to_uint8

PROMPTS = 6


def clip_table(parts: dict[str, Part], columns: Sequence[str]) -> dict[str, Any]:
    """The template's clip table, a row per prompt and a cell per column; empty without videos."""
    chosen = {prompt: _videos(parts, prompt) for prompt in choose_prompts(parts, PROMPTS)}
    lengths = [len(v) for row in chosen.values() for v in row.values() if not isinstance(v, str)]
    frames = max(lengths, default=0)
    rows = [
        {"prompt": prompt, "cells": [_cell(name, row[name], frames) for name in columns]}
        for prompt, row in chosen.items()
    ]
    clips = [[(clip.prompt, clip.seed) for clip in p.clips] for p in parts.values() if p.clips]
    same_noise = len(clips) > 1 and clips[0][0][1] is not None and all(c == clips[0] for c in clips)
    return {"rows": rows if lengths else [], "frames": frames, "same_noise": same_noise}


def choose_prompts(parts: dict[str, Part], count: int) -> list[str]:
    """Up to `count` prompts: the most diverse of those with a video in the most columns."""
    videos = Counter(prompt for part in parts.values() for prompt in set(part.prompts))
    order = list(dict.fromkeys(prompt for part in parts.values() for prompt in part.prompts))
    left = [prompt for prompt in order if videos[prompt] == max(videos.values())]
    chosen = left[:1]
    while (left := [prompt for prompt in left if prompt not in chosen]) and len(chosen) < count:

        def distance(prompt: str) -> tuple[int, int]:
            words = [len(set(prompt.split()) ^ set(other.split())) for other in chosen]
            return min(words), sum(words)

        chosen.append(max(left, key=distance))
    return sorted(chosen, key=order.index)


def _videos(parts: dict[str, Part], prompt: str) -> dict[str, np.ndarray | str]:
    """A prompt's video [F, H, W, 3] per column, from a common seed if there is one, or the
    reason why it is missing."""
    own = {p.name: [clip for clip in p.clips if clip.prompt == prompt] for p in parts.values()}
    seeds = [[clip.seed for clip in clips] for clips in own.values() if clips]
    common = [seed for seed in seeds[0] if all(seed in other for other in seeds)] if seeds else []
    videos: dict[str, np.ndarray | str] = {}
    for name, part in parts.items():
        if own[name]:
            chosen = [clip for clip in own[name] if clip.seed in common[:1]] or own[name]
            videos[name] = chosen[0].video
        elif part.source is not None:
            videos[name] = _decode(part.source, _video_shape(parts), prompt)
        else:
            videos[name] = "not run" if part.folder is None else "no samples yet"
    return videos


def _video_shape(parts: dict[str, Part]) -> dict[str, Any]:
    """The run's video settings; the toy's size if no configuration is found."""
    configs = (run.config.get("video") for run in runs(parts))
    video = next((config for config in configs if isinstance(config, dict)), {})
    shape: dict[str, Any] = {"frames": 12, "height": 16, "width": 16}
    shape |= {k: v for k in shape if type(v := video.get(k)) is int and 0 < v < 1 << 14}
    fps = numbers(video).get("fps", 0.0)
    shape |= {"fps": fps} if fps > 0 else {}
    return shape | ({"hdr": video["hdr"]} if video.get("hdr") in ("tonemap", "refuse") else {})


def _decode(source: FolderTeacher, shape: dict[str, Any], prompt: str) -> np.ndarray | str:
    try:
        path = source.answer(Request(prompt))
        return to_uint8(read_video(path, short="repeat", **shape)).numpy()
    except (TeacherError, VideoError, OSError, ValueError) as error:
        return str(error)


def _cell(name: str, video: np.ndarray | str, frames: int) -> dict[str, Any]:
    cell = {"label": LABELS[name], "missing": video if isinstance(video, str) else ""}
    if isinstance(video, str):
        return cell
    height, width = video.shape[1:3]
    side = max(height, width)
    # Integer scales keep the pixels square; clips that are too large are downscaled.
    scales = {size: size // side if side <= size else round(size / side, 4) for size in (112, 80)}
    still = [video[-1]] * (frames - len(video))
    return cell | {
        "width": width,
        "height": height,
        "big": scales[112],
        "small": scales[80],
        "strip": png(np.concatenate([*video, *still], axis=1)),
        "flash": exposure(video),
    }


def exposure(video_FHWC: np.ndarray, shots: int = 5) -> str:
    """A stroboscopic image of a clip as a PNG data URI: each pixel shows the frame in which it
    differs most from the frame's median colour, earlier frames dimmer."""
    video = video_FHWC.astype(np.float64)
    count = len(video)
    contrast = np.linalg.norm(video - np.median(video, axis=(1, 2), keepdims=True), axis=-1)
    ground = np.take_along_axis(video, contrast.argmin(0)[None, ..., None], 0)[0]
    flashes = np.unique(np.linspace(0, count - 1, min(shots, count)).round().astype(int))
    strength = np.linspace(0.45, 1.0, len(flashes))
    # Where two exposures overlap, the later one wins.
    best = ((0.9 + 0.1 * strength[:, None, None]) * contrast[flashes]).argmax(0)
    chosen = np.take_along_axis(video[flashes], best[None, ..., None], 0)[0]
    picture = ground + strength[best][..., None] * (chosen - ground)
    return png(picture.round().clip(0, 255).astype(np.uint8))


def png(picture_HWC: np.ndarray) -> str:
    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(picture_HWC), format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
