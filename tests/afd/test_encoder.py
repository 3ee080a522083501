"""The same pixels give the same h264 bytes, whatever process, memory and threads they meet."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from afd.video import VideoWriter, through_codec, to_uint8, write_video
from afd.video.write import _encode

SIZES = [(16, 16), (18, 34), (64, 64), (48, 96), (130, 66), (240, 416), (480, 832)]


def textured(height: int, width: int, frames: int = 8) -> Tensor:
    """Moving waves under noise, in [-1, 1]."""
    noise = torch.randn(frames, 3, height, width, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.linspace(0, 5, height)[:, None], torch.linspace(0, 6, width)
    time = torch.arange(frames).view(-1, 1, 1, 1) * 0.3
    colour = torch.arange(1, 4).view(1, 3, 1, 1)
    wave = torch.sin(columns * colour + time) * torch.cos(rows + time / 3)
    return (wave + 0.1 * noise).clamp(-1, 1)


def digest_of_all(folder: Path) -> str:
    """Of what is written, streamed and seen through the codec at every size."""
    digest = hashlib.sha256()
    for height, width in SIZES:
        video_FCHW = textured(height, width, frames=8 if height < 200 else 3)
        write_video(folder / "a.mp4", video_FCHW, fps=16)
        digest.update((folder / "a.mp4").read_bytes())
        with VideoWriter(folder / "b.mp4", fps=16) as writer:
            writer.append(to_uint8(video_FCHW))
        digest.update((folder / "b.mp4").read_bytes())
        digest.update(through_codec(video_FCHW[None], fps=16).numpy().tobytes())
    return digest.hexdigest()


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """Memory that nobody wrote holds something else in each: glibc fills it as it is asked to."""
    here = digest_of_all(tmp_path)
    code = (
        "import sys; from pathlib import Path; from tests.afd.test_encoder import digest_of_all; "
        "print(digest_of_all(Path(sys.argv[1])))"
    )
    folder = tmp_path / "there"
    folder.mkdir()
    there = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "MALLOC_PERTURB_": "85", "OMP_NUM_THREADS": "2"},
    )
    assert there.stdout.strip() == here


@pytest.mark.parametrize(("height", "width"), SIZES[:5])
def test_bytes_do_not_depend_on_where_the_frames_lie(
    tmp_path: Path, height: int, width: int
) -> None:
    video_FCHW = textured(height, width)
    held, seen = [], set()
    for shift in range(12):
        held.append(bytearray(7919 * shift + 1))  # moves what is allocated next
        room = torch.empty(video_FCHW.numel() + shift)
        moved = room[shift:].view_as(video_FCHW).copy_(video_FCHW)
        write_video(tmp_path / "a.mp4", moved, fps=16)
        seen.add((tmp_path / "a.mp4").read_bytes())
    assert len(seen) == 1


@pytest.mark.soak
def test_bytes_are_the_same_thousands_of_times() -> None:
    """x264's AVX-512 code gives others in about one of 500 videos, in memory that is reused."""
    video_FCHW, seen = textured(34, 18), set()
    random = np.random.default_rng(0)
    held: list[bytearray] = []
    for i in range(4000):
        held = [*held[-9:], bytearray(int(random.integers(1, 200_000)))]
        np.full(int(random.integers(1, 300_000)), i % 256, np.uint8)
        target = BytesIO()
        _encode(target, video_FCHW, 16, 18)
        seen.add(target.getvalue())
    assert len(seen) == 1


def test_a_batch_is_seen_as_each_of_its_videos_alone() -> None:
    videos = torch.stack([textured(64, 64), textured(64, 64).flip(-1), textured(64, 64).flip(-2)])
    for one, both in zip(videos, through_codec(videos, fps=16), strict=True):
        assert torch.equal(through_codec(one[None], fps=16)[0], both)


def test_players_are_told_the_colours(tmp_path: Path) -> None:
    """Without a tag they would take a large clip for BT.709."""
    write_video(tmp_path / "a.mp4", textured(16, 16), fps=16)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (6, 1)
