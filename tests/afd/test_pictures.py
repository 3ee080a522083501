"""Pictures as a screen shows them: orientation, size, colours, HDR, interlacing."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from afd.data.videos import Videos
from afd.errors import VideoError
from afd.teachers.base import Request
from afd.video import check_video, frame_size, from_uint8, read_video, to_uint8
from afd.video.config import VideoConfig
from tests.afd.odd_clips import (
    HEIGHT,
    RATE,
    WIDTH,
    corners,
    encode,
    encode_levels,
    with_matrix,
)

SIZE = {"height": HEIGHT, "width": WIDTH}


def refused(path: Path, words: str, frames: int = 1, fps: float | None = RATE) -> None:
    with pytest.raises(VideoError, match=words):
        check_video(path, frames=frames, fps=fps)
    with pytest.raises(VideoError, match=words):
        read_video(path, frames=frames, fps=fps, **SIZE)


# --- orientation and size ---


def corner_names(picture_CHW: Tensor) -> str:
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
    picked = picture_CHW[:, 8 :: picture_CHW.shape[1] - 17, 8 :: picture_CHW.shape[2] - 17] > 0
    return "".join(names[tuple(column.int().tolist())] for column in picked.flatten(1).T)


@pytest.mark.parametrize(
    ("matrix", "right"),
    [
        ((1, 0, 0, 1), "RGBW"),
        ((-1, 0, 0, 1), "GRWB"),
        ((1, 0, 0, -1), "BWRG"),
        ((-1, 0, 0, -1), "WBGR"),
        ((0, 1, -1, 0), "BRWG"),
        ((0, -1, 1, 0), "GWRB"),
        ((0, 1, 1, 0), "RBGW"),
        ((0, -1, -1, 0), "WGBR"),
    ],
)
def test_clips_are_turned_and_mirrored_as_they_ask(
    tmp_path: Path, matrix: tuple[int, int, int, int], right: str
) -> None:
    source = encode(tmp_path / "s.mp4", [corners()] * 2)
    path = with_matrix(source, tmp_path / "a.mp4", *matrix)
    size = (HEIGHT, WIDTH) if matrix[0] else (WIDTH, HEIGHT)
    assert frame_size(path) == size
    picture = read_video(path, frames=1, height=size[0], width=size[1])[0]
    assert corner_names(picture) == right


def test_an_oblique_clip_is_named(tmp_path: Path) -> None:
    source = encode(tmp_path / "s.mp4", [corners()] * 2)
    path = with_matrix(source, tmp_path / "a.mp4", 0.7, 0.7, -0.7, 0.7)
    refused(path, "not a multiple of 90 degrees")


@pytest.mark.parametrize("ending", ["jpg", "webp", "png", "tiff"])
def test_pictures_follow_their_exif(tmp_path: Path, ending: str) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{ending}"
        Image.fromarray(corners()).save(path, exif=exif, quality=95)
        upright = np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        height, width = upright.shape[:2]
        check_video(path)
        assert frame_size(path) == (height, width)
        picture = read_video(path, frames=1, height=height, width=width)[0]
        assert corner_names(picture) == corner_names(from_uint8(torch.from_numpy(upright)))


class OneClip:
    requests = (Request("a"),)

    def __init__(self, path: Path) -> None:
        self.path = path

    def answer(self, request: Request) -> Path:
        return self.path


@pytest.mark.parametrize(
    ("height", "width", "aspect", "turned", "displayed", "again"),
    [
        (64, 96, None, False, (64, 96), False),
        (96, 128, None, False, (96, 128), True),
        (64, 96, None, True, (96, 64), True),
        (96, 64, None, True, (64, 96), False),
        (64, 96, Fraction(4, 3), False, (64, 128), True),
        # Displayed in the size wanted, but by scaling.
        (64, 72, Fraction(4, 3), False, (64, 96), True),
        (72, 64, Fraction(3, 4), True, (48, 72), True),
    ],
)
def test_only_clips_whose_pixels_changed_pass_the_codec_again(
    tmp_path: Path,
    height: int,
    width: int,
    aspect: Fraction | None,
    turned: bool,
    displayed: tuple[int, int],
    again: bool,
) -> None:
    def setup(stream: Any) -> None:
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect

    noise = np.random.default_rng(0).integers(0, 255, (4, height, width, 3), np.uint8)
    path = encode(tmp_path / "a.mp4", list(noise), setup=setup)
    if turned:
        path = with_matrix(path, tmp_path / "b.mp4", 0, 1, -1, 0)
    assert frame_size(path) == displayed
    video = VideoConfig(frames=4, codec_match=True, **SIZE)
    videos = Videos(OneClip(path), video)
    seen = videos.fetch(OneClip.requests)[0]
    videos.close()
    plain = from_uint8(to_uint8(read_video(path, frames=4, **SIZE)))
    assert torch.equal(seen, plain) is not again


# --- colours ---

MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
GREEN = (20, 220, 20)


def planes(matrix: int, full: bool, depth: int = 8) -> list[float]:
    """Y, Cb and Cr of GREEN in a matrix of H.273."""
    kr, kb = MATRICES[matrix]
    r, g, b = (level / 255 for level in GREEN)
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    scale = 2.0 ** (depth - 8)
    if full:
        return [255 * y * scale, (128 + 255 * cb) * scale, (128 + 255 * cr) * scale]
    return [(16 + 219 * y) * scale, (128 + 224 * cb) * scale, (128 + 224 * cr) * scale]


@pytest.mark.parametrize("matrix", [1, 5, 6, 9, 2])
@pytest.mark.parametrize("full", [0, 1, 2])
@pytest.mark.parametrize(
    ("codec", "pixels"), [("libx264", "yuv420p"), ("ffv1", "yuv444p"), ("libx264", "yuv422p10le")]
)
def test_matrix_and_range_follow_the_tags(
    tmp_path: Path, codec: str, pixels: str, matrix: int, full: int
) -> None:
    """Untagged: BT.601 in limited range."""
    levels = planes(6 if matrix == 2 else matrix, full == 2, 10 if "10" in pixels else 8)
    options = {"crf": "1"} if codec == "libx264" else {}
    path = encode_levels(tmp_path / "a.mkv", levels, codec, pixels, matrix, full, **options)
    got = to_uint8(read_video(path, frames=1, **SIZE))[0, 32, 48].int()
    assert (got - torch.tensor(GREEN)).abs().max() <= 4, got


def test_a_matrix_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    path = encode_levels(tmp_path / "a.mkv", [120, 90, 90], "libx264", "yuv444p", 8, 1)
    refused(path, "colour matrix 8", frames=1)


@pytest.mark.parametrize(("name", "transfer", "signal"), [("HLG", 18, 0.75), ("PQ", 16, 0.58)])
def test_hdr_is_mapped_with_white_to_white_or_refused(
    tmp_path: Path, name: str, transfer: int, signal: float
) -> None:
    path = tmp_path / "a.mov"

    def mean(share: float) -> float:
        levels = [64 + share * 876, 512, 512]
        encode_levels(path, levels, "prores_ks", "yuv422p10le", 9, 1, transfer)
        check_video(path)
        return float((read_video(path, frames=1, **SIZE).mean() + 1) * 127.5)

    # Reference white (203 cd/m2), black, and greys that rise between.
    assert mean(signal) > 250
    assert mean(0) < 2
    assert 40 < mean(signal / 2) < mean(signal * 0.75) < 220
    with pytest.raises(VideoError, match=rf"is an HDR clip \({name}\); convert it to BT\.709, or"):
        check_video(path, hdr="refuse")
    with pytest.raises(VideoError, match=r"video\.hdr=tonemap"):
        read_video(path, frames=1, hdr="refuse", **SIZE)


@pytest.mark.parametrize("first", ["tff", "bff"])
def test_interlaced_clips_are_deinterlaced_frame_by_frame(tmp_path: Path, first: str) -> None:
    """A bar that moves on from field to field leaves no comb."""
    pictures = []
    for index in range(8):
        picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        for field in range(2):
            at = 8 * index + 4 * field
            line = field if first == "tff" else 1 - field
            picture[line::2, at : at + 16] = 255
        pictures.append(picture)
    path = encode(tmp_path / "a.mp4", pictures, **{"x264-params": f"{first}=1", "crf": "4"})
    check_video(path, frames=8, fps=RATE)
    read = to_uint8(read_video(path, frames=8, fps=RATE, **SIZE)).numpy().astype(int)
    comb = np.abs(2 * read[:, 1:-1] - read[:, :-2] - read[:, 2:]).mean()
    assert comb < 1  # 42 in the clip itself
    bar = [np.flatnonzero(row > 127).mean() for row in read[1:, HEIGHT // 2, :, 1]]
    assert np.abs(np.diff(bar) - 8).max() <= 1, "frames stay in order, in their own times"
    refused(path, "has 8 of the requested 9 frames", frames=9)


def test_an_animated_webp_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    pages = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(4)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with pytest.raises(VideoError, match=r"a\.webp: .*convert an animated WebP to mp4"):
        check_video(path)
