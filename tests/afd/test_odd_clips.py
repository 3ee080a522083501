"""Clips of every kind: the decoded frames, and that the check and the reader agree."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from av.stream import Disposition
from PIL import Image

import afd.video.read
from afd.errors import VideoError
from afd.video import Limits, check_video, frame_size, read_video, write_video
from tests.afd.odd_clips import (
    HEIGHT,
    RATE,
    WIDTH,
    copy_packets,
    corners,
    encode,
    grey_ramp,
    with_edits,
)

SIZE = {"height": HEIGHT, "width": WIDTH}
FRAMES = 24


def shown(
    path: Path, frames: int = FRAMES, fps: float | None = RATE, of: int = FRAMES
) -> list[int]:
    """The numbers of a grey ramp's frames that are read, once the check has accepted them."""
    check_video(path, frames=frames, fps=fps)
    levels = (read_video(path, frames=frames, fps=fps, **SIZE).mean((1, 2, 3)) + 1) * 127.5
    wanted = torch.linspace(20, 220, FRAMES)
    return [int((wanted - level).abs().argmin()) for level in levels]


def refused(path: Path, words: str, frames: int = FRAMES, fps: float | None = RATE) -> None:
    with pytest.raises(VideoError, match=words):
        check_video(path, frames=frames, fps=fps)
    with pytest.raises(VideoError, match=words):
        read_video(path, frames=frames, fps=fps, **SIZE)


@pytest.fixture(params=[True, False], ids=["decoding", "by packets"])
def decoding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of the check: of clips that are small, and of those that are large."""
    if not request.param:
        monkeypatch.setattr(afd.video.read, "DECODED_PIXELS", 0)
    return request.param


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """24 frames, one key frame in eight, B-frames."""
    return encode(tmp_path / "plain.mp4", grey_ramp(FRAMES), g="8", bf="2", sc_threshold="0")


# --- containers and codecs ---


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mkv", "libx264", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),  # with frames that are never shown
        ("b.webm", "libvpx", "yuv420p"),
        ("a.ts", "libx264", "yuv420p"),
        ("a.avi", "libx264", "yuv420p"),  # holds decode times alone
        ("b.avi", "mpeg4", "yuv420p"),
        ("c.avi", "mjpeg", "yuvj420p"),
        ("a.mov", "libx265", "yuv420p10le"),
        ("b.mov", "prores_ks", "yuv422p10le"),
        ("a.flv", "libx264", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
        ("a.apng", "apng", "rgb24"),
        ("a.mp4", "libsvtav1", "yuv420p"),
        ("b.mp4", "libx264", "yuv444p"),
        ("b.mkv", "ffv1", "gray"),
    ],
)
def test_every_frame_comes_at_its_time(
    tmp_path: Path, decoding: bool, name: str, codec: str, pixels: str
) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    options = {
        "libx265": {"x265-params": "log-level=none"},
        "libvpx-vp9": {"auto-alt-ref": "1", "lag-in-frames": "12"},
        "libvpx": {"auto-alt-ref": "1", "lag-in-frames": "12"},
        "libsvtav1": {"svtav1-params": "enable-overlays=0"},
        "libx264": {"bf": "2"},
        "mpeg4": {"bf": "2", "qmin": "1", "qmax": "2"},
    }.get(codec, {})
    path = encode(tmp_path / name, grey_ramp(FRAMES), codec, pixels, **options)
    assert shown(path) == list(range(FRAMES))
    assert shown(path, fps=None) == list(range(FRAMES))
    refused(path, "has 24 of the requested 25 frames", frames=25)


def test_a_fragmented_mp4_is_one_clip(tmp_path: Path, decoding: bool) -> None:
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    path = encode(tmp_path / "a.mp4", grey_ramp(FRAMES), container=fragments, g="8")
    assert shown(path) == list(range(FRAMES))


# --- what is shown, and when ---


@pytest.mark.parametrize(
    ("edits", "right"),
    [
        ([(1.0, 0)], range(16)),  # ends early
        ([(1.0, 0.5)], range(8, 24)),  # begins at a key frame
        ([(0.75, 5 / 16)], range(5, 17)),  # and in mid-group
        ([(2.0, None), (1.5, 0)], range(24)),  # shown late
        ([(0.5, 0), (0.5, 1)], [*range(8), *range(16, 24)]),
        ([(0.5, 0), (0.5, 0)], [*range(8), *range(8)]),
        ([(9.0, 0)], range(24)),  # beyond the end
    ],
)
def test_edit_lists_are_followed(
    tmp_path: Path,
    plain: Path,
    decoding: bool,
    edits: list[tuple[float, float | None]],
    right: list[int],
) -> None:
    # The encoder's B-frames begin two frames late on the media's clock.
    late = [(length, None if at is None else at + 2 / RATE) for length, at in edits]
    path = with_edits(plain, tmp_path / "cut.mp4", late)
    assert shown(path, frames=len(right)) == list(right)
    refused(
        path, f"has {len(right)} of the requested {len(right) + 1} frames", frames=len(right) + 1
    )


def test_an_edit_list_that_shows_nothing_is_named(tmp_path: Path, plain: Path) -> None:
    refused(with_edits(plain, tmp_path / "a.mp4", [(0, 0)]), "without any frame", frames=1)


@pytest.mark.parametrize("name", ["a.ts", "a.mkv", "a.mp4"])
def test_a_copy_that_begins_in_mid_group_begins_with_its_first_whole_picture(
    tmp_path: Path, decoding: bool, name: str
) -> None:
    source = encode(tmp_path / "s.mp4", grey_ramp(FRAMES), g="8", bf="0", sc_threshold="0")
    path = copy_packets(source, tmp_path / name, lambda index, packet: index >= 5)
    assert shown(path, frames=16) == list(range(8, 24))
    refused(path, "has 16 of the requested 17 frames", frames=17)


def test_a_first_sample_without_the_key_flag_is_read(
    tmp_path: Path, plain: Path, decoding: bool
) -> None:
    def change(index: int, packet: Any) -> None:
        packet.is_keyframe = packet.is_keyframe and index > 0

    path = copy_packets(plain, tmp_path / "a.mp4", change)
    assert shown(path) == list(range(FRAMES))


def test_joined_streams_go_on_where_the_first_ends(tmp_path: Path, decoding: bool) -> None:
    one = encode(tmp_path / "a.ts", grey_ramp(FRAMES), bf="2")
    two = encode(tmp_path / "b.ts", grey_ramp(FRAMES, 48, 64), bf="2")  # of another size
    both = tmp_path / "both.ts"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    assert shown(both, frames=48) == [*range(24), *range(24)]
    refused(both, "has 48 of the requested 49 frames", frames=49)


def test_pauses_and_offsets_of_the_clock(tmp_path: Path, decoding: bool) -> None:
    source = encode(tmp_path / "s.mp4", grey_ramp(FRAMES), bf="0")

    def change(index: int, packet: Any) -> None:
        late = Fraction(100) + (60 if index >= 12 else 0)
        packet.pts += int(late / packet.time_base)
        packet.dts += int(late / packet.time_base)

    for name in ("a.mkv", "a.ts", "a.mp4"):
        path = copy_packets(source, tmp_path / name, change)
        assert shown(path, fps=None) == list(range(FRAMES))
        assert shown(path, frames=61, fps=1.0)[29:33] == [11, 11, 12, 12], name


# --- which stream ---


def test_a_cover_picture_is_no_clip(tmp_path: Path, plain: Path) -> None:
    Image.fromarray(corners()).save(tmp_path / "cover.jpg")
    path = tmp_path / "a.mp4"
    with (
        av.open(str(tmp_path / "cover.jpg")) as cover,
        av.open(str(plain)) as clip,
        av.open(str(path), "w") as target,
    ):
        picture = target.add_stream_from_template(cover.streams.video[0])
        picture.disposition = Disposition.attached_pic
        video = target.add_stream_from_template(clip.streams.video[0])
        for source, stream in ((cover, picture), (clip, video)):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
    assert shown(path) == list(range(FRAMES))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("default", [0, 1])
def test_of_several_streams_the_default_one_is_read(
    tmp_path: Path, name: str, default: int
) -> None:
    sizes = [(32, 48), (64, 96)]
    with av.open(str(tmp_path / name), "w") as target:
        streams = []
        for index, (height, width) in enumerate(sizes):
            stream = target.add_stream("libx264", rate=RATE)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.disposition = Disposition.default if index == default else Disposition(0)
            streams.append((stream, grey_ramp(FRAMES, height, width)))
        for index in range(FRAMES):
            for stream, pictures in streams:
                frame = av.VideoFrame.from_ndarray(pictures[index], format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, RATE)
                target.mux(stream.encode(frame))
        for stream, _ in streams:
            target.mux(stream.encode(None))
    assert frame_size(tmp_path / name) == sizes[default]
    assert shown(tmp_path / name) == list(range(FRAMES))


# --- limits ---


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(pixels=HEIGHT * WIDTH - 1), "96x64, more than the 6143 pixels of video.max_pixels"),
        (Limits(frames=23), "more than the 23 frames of video.max_frames"),
        (Limits(seconds=1.4), "longer than the 1.4 seconds of video.max_seconds"),
    ],
)
def test_what_a_clip_may_cost_is_bounded(
    plain: Path, decoding: bool, limits: Limits, words: str
) -> None:
    for use in (check_video, lambda *a, **k: read_video(*a, **k, **SIZE)):
        with pytest.raises(VideoError, match=words):
            use(plain, frames=FRAMES, fps=RATE, limits=limits)
        use(plain, frames=FRAMES, fps=RATE, limits=Limits(HEIGHT * WIDTH, FRAMES, 1.5))


def test_what_is_not_read_of_a_clip_may_last(plain: Path, decoding: bool) -> None:
    limits = Limits(seconds=0.5)
    check_video(plain, frames=2, fps=RATE, limits=limits)
    assert len(read_video(plain, frames=2, fps=RATE, limits=limits, **SIZE)) == 2


def test_a_small_file_of_a_giant_picture_costs_no_memory(tmp_path: Path) -> None:
    Image.new("P", (16_000, 16_000)).save(tmp_path / "bomb.gif")
    Image.new("L", (8_000, 8_000)).save(tmp_path / "bomb.png")
    code = f"""
import resource, sys
from afd.video import VideoError, check_video, read_video
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ("bomb.gif", "bomb.png"):
    for use in (check_video, lambda p: read_video(p, frames=1, height=16, width=16)):
        try: use({str(tmp_path)!r} + "/" + name)
        except VideoError as error: assert "video.max_pixels" in str(error), error
        else: sys.exit("accepted")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert int(grown) < 100_000, f"{grown} KiB"


@pytest.mark.parametrize("fps", [1e-6, 1e9, float("nan"), float("inf"), -1.0])
def test_absurd_rates_are_named(tmp_path: Path, plain: Path, fps: float) -> None:
    for use in (
        lambda: check_video(plain, fps=fps),
        lambda: read_video(plain, frames=1, fps=fps, **SIZE),
        lambda: write_video(tmp_path / "b.mp4", torch.zeros(2, 3, 16, 16), fps=fps),
    ):
        with pytest.raises(ValueError, match="fps"):
            use()


def test_the_check_of_a_large_clip_decodes_one_frame(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(afd.video.read, "DECODED_PIXELS", 0)
    decoded = 0
    timed = afd.video.read.decoded

    def counted(source: Any) -> Any:
        nonlocal decoded
        for frame in timed(source):
            decoded += 1
            yield frame

    monkeypatch.setattr(afd.video.read, "decoded", counted)
    check_video(plain, frames=FRAMES, fps=RATE)
    assert decoded == 1
