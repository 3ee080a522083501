"""Compares frames, patches and prompts with the original's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from afd.discriminators.videoalign.preprocess import (
    FACTOR,
    MEAN,
    MERGE,
    MIN_PIXELS,
    PATCH,
    STD,
    frame_indices,
    patchify,
    resize,
    smart_resize,
)
from afd.discriminators.videoalign.prompt import chat_text
from afd.testing.videoalign_golden import PIXELS, Folder, Line


def compare_preprocess(line: Line, path: Path, folder: Folder) -> None:
    """Compares the tables of frame sampling and sizes, and the sizes of each clip."""
    held = folder.read(path.name)
    line.unknown(held.keys() - {"clips", "smart_resize", "sampling"})
    sizes = held["smart_resize"]
    line.exact("smart_resize factor", FACTOR, sizes["factor"])
    line.exact("smart_resize min_pixels", MIN_PIXELS, sizes["min_pixels"])
    for row in sizes["rows"]:
        line.exact(f"smart_resize {row[:3]}", smart_resize(*row[:3]), tuple(row[3:]))
    for row in held["sampling"]:
        indices = frame_indices(
            row["total_frames"],
            row["video_fps"],
            fps=row.get("fps", 2.0),
            count=row.get("nframes"),
        )
        line.exact(f"sampling {row['total_frames']}", len(indices), row["n"])
        line.exact(f"sampling {row['total_frames']}", indices.tolist(), row["indices"])
    for name, clip in held["clips"].items():
        indices, (rows, columns), grid = _plan(clip)
        line.exact(f"{name} frames", indices.tolist(), clip["frame_indices"])
        line.exact(f"{name} nframes", len(indices), clip["nframes"])
        line.exact(f"{name} size", [rows, columns], clip["resized_hw"])
        line.exact(f"{name} grid", grid, clip["video_grid_thw"])
        patches = grid[0] * grid[1] * grid[2]
        line.exact(f"{name} patches", [patches, 1176], clip["pixel_values_shape"])
        line.exact(f"{name} tokens", patches // MERGE**2, clip["n_video_tokens"])


def _plan(clip: dict[str, Any]) -> tuple[Tensor, tuple[int, int], list[int]]:
    """Sampled frames, their resized size, and the grid, from a clip's description."""
    indices = frame_indices(clip["total_frames"], clip["avg_fps"], fps=clip["fps"])
    rows, columns = smart_resize(clip["height"], clip["width"], clip["max_pixels"])
    return indices, (rows, columns), [len(indices) // 2, rows // PATCH, columns // PATCH]


def compare_clip(line: Line, path: Path, folder: Folder) -> None:
    """Compares resize and patches on the parts of a clip stored in the file.

    Of the whole clip it has only rows and means. They are checked against each other through this
    code's normalisation and row order, which a wrong constant or order would break.
    """
    golden = load_file(path)
    clip = folder.read("preprocess.json")["clips"][path.stem.removeprefix("preprocess_")]
    indices, _, grid = _plan(clip)
    line.equal("frame_indices", indices, golden.pop("frame_indices"))
    line.exact("video_grid_thw", [grid], golden.pop("video_grid_thw").tolist())
    raw = golden.pop("raw_crop_uint8").to(folder.device)
    exact = folder.device.type == "cpu"
    for name in [key for key in golden if key.startswith("resize_") and key.endswith("_uint8")]:
        expected = golden.pop(name)
        # Exact on a CPU; other devices may round a level differently.
        line.near(name, resize(raw, *expected.shape[-2:]), expected, 0.5 if exact else 1.0)
        size = name.removeprefix("resize_").removesuffix("_uint8")
        if f"pixel_values_{size}" in golden:
            pixels, found = patchify(expected[None])
            line.near(f"pixel_values_{size}", pixels, golden.pop(f"pixel_values_{size}"), PIXELS)
            line.equal(f"grid_{size}", found, golden.pop(f"grid_{size}"))
    _compare_rows(line, golden, clip, grid)
    for name in ("raw_frame_channel_mean",):
        golden.pop(name)
        line.notes.append(f"({name} needs the clip itself)")
    line.unknown(golden)


def _compare_rows(
    line: Line, golden: dict[str, Tensor], clip: dict[str, Any], grid: list[int]
) -> None:
    t, h, w = grid
    index_R, rows_RK = golden.pop("pixel_rows_index"), golden.pop("pixel_rows")
    mean_P, square_P = golden.pop("pixel_row_mean"), golden.pop("pixel_row_sqmean")
    line.near("pixel_row_mean", rows_RK.double().mean(1), mean_P[index_R], PIXELS)
    line.near("pixel_row_sqmean", rows_RK.double().square().mean(1), square_P[index_R], PIXELS)
    # Back to pixel levels, which are whole numbers if the constants are right.
    cells = rows_RK.double().view(-1, 3, 2, PATCH, PATCH)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1, 1) for v in (MEAN, STD))
    levels = (cells * std + mean) * 255
    line.near("pixel_rows are whole levels", levels, levels.round(), 2e-4)
    # Time is the outermost row dimension: a frame pair's means are those of its h x w rows.
    frames_N3 = golden.pop("resized_frame_channel_mean")
    normal_N = ((frames_N3 / 255 - mean.flatten()) / std.flatten()).mean(1)
    line.near("rows by time", mean_P.view(t, h * w).mean(1), normal_N.view(t, 2).mean(1), PIXELS)
    # The first and last frames are stored as a crop: rows inside it must be its patches.
    crop, (y, x, _, side) = golden.pop("resized_crop_uint8"), clip["resized_crop_yx"]
    found = 0
    for row, cell in zip(index_R.tolist(), levels, strict=True):
        step, block = divmod(row, h * w)
        block, inside = divmod(block, MERGE**2)
        top = (block // (w // MERGE) * MERGE + inside // MERGE) * PATCH - y
        left = (block % (w // MERGE) * MERGE + inside % MERGE) * PATCH - x
        if step in (0, t - 1) and 0 <= top < side and 0 <= left < side:
            end = 0 if step == 0 else 1
            part = crop[end, :, top : top + PATCH, left : left + PATCH]
            line.near("rows inside the crop", cell[:, end], part, 2e-4)
            found += 1
    line.exact("rows inside the crop: some", found > 0, True)


def compare_prompts(line: Line, path: Path, folder: Folder) -> None:
    """Compares every prompt's request, chat and tokens byte for byte."""
    prompts = folder.model("").prompts
    for number, entry in enumerate(folder.read(path.name)):
        text = prompts.request(entry["prompt"])
        chat = chat_text(text)
        ids = prompts.encode([entry["prompt"]], [1]).ids_BL[0].tolist()
        line.exact(f"{number} user_text", text, entry["user_text"])
        line.exact(f"{number} chat_text", chat, entry["chat_text"])
        digest = hashlib.sha256(chat.encode()).hexdigest()
        line.exact(f"{number} sha256", digest, entry["chat_text_sha256"])
        line.exact(f"{number} ids", ids, entry["tiny_input_ids_one_video_pad"])
