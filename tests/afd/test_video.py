"""Video files: what is read of clips of any rate and shape, what is written, what is refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from afd.errors import VideoError
from afd.video import check_video, from_uint8, read_video, to_uint8, write_video

TOY = {"height": 16, "width": 16}


def ramp(frames: int, height: int = 16, width: int = 16) -> Tensor:
    """Grey frames of rising brightness, so that a frame is known by its mean."""
    return torch.linspace(-0.9, 0.9, frames).view(-1, 1, 1, 1).expand(frames, 3, height, width)


def which(video_FCHW: Tensor, count: int) -> list[int]:
    """The numbers of a ramp's frames."""
    levels = ramp(count).mean((1, 2, 3))
    return [int((levels - mean).abs().argmin()) for mean in video_FCHW.mean((1, 2, 3))]


def write_with_times(path: Path, times: list[Fraction], size: int = 16) -> None:
    """A ramp whose frames are shown at the given seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=100)
        stream.height = stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "10"}
        base = Fraction(1, 1000)
        stream.codec_context.time_base = base
        for picture, seconds in zip(to_uint8(ramp(len(times), size, size)), times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            frame.pts, frame.time_base = int(seconds / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(6, 3, 4, 4, generator=generator) * 1.6 - 0.8
    video = torch.nn.functional.interpolate(smooth, size=(32, 48), mode="bilinear")
    write_video(path, video, fps=8)
    back = read_video(path, frames=6, height=32, width=48)
    assert back.shape == video.shape
    assert back.dtype == torch.float32
    # Lossy at crf 18 and half colour resolution: a few grey levels on smooth pictures.
    assert (back - video).abs().mean() < 0.03


def test_the_same_video_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, ramp(5), fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "b.mp4"}


@pytest.mark.parametrize(
    "shape", [(0, 3, 16, 16), (2, 1, 16, 16), (2, 3, 15, 16), (2, 3, 16, 15), (3, 16, 16)]
)
def test_a_tensor_that_no_mp4_holds_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="video_FCHW: got shape"):
        write_video(tmp_path / "a.mp4", torch.zeros(shape), fps=8)
    assert not list(tmp_path.iterdir())


def test_without_a_rate_frames_come_one_by_one(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", ramp(10), fps=30)
    assert which(read_video(tmp_path / "a.mp4", frames=6, **TOY), 10) == list(range(6))


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (24.0, [0, 1, 2, 3]),
        (8.0, [0, 3, 6, 9]),
        # 16 from 24: 0, 1.5, 3, 4.5; half-way goes to the earlier frame.
        (16.0, [0, 1, 3, 4]),
        (48.0, [0, 0, 1, 1]),
    ],
)
def test_the_frame_nearest_in_time_is_taken(
    tmp_path: Path, fps: float, expected: list[int]
) -> None:
    write_video(tmp_path / "a.mp4", ramp(12), fps=24)
    assert which(read_video(tmp_path / "a.mp4", frames=4, fps=fps, **TOY), 12) == expected


def test_a_varying_rate_is_followed_by_presentation_time(tmp_path: Path) -> None:
    milliseconds = [0, 10, 20, 30, 500, 510, 990]
    write_with_times(tmp_path / "a.mp4", [Fraction(ms, 1000) for ms in milliseconds])
    # Wanted at 0, 250, 500 and 750 ms; 750 lies half-way, which goes to the earlier frame.
    assert which(read_video(tmp_path / "a.mp4", frames=4, fps=4, **TOY), 7) == [0, 3, 4, 5]


def test_a_first_frame_that_is_shown_late_is_time_zero(tmp_path: Path) -> None:
    write_with_times(tmp_path / "a.mp4", [Fraction(5) + Fraction(k, 10) for k in range(8)])
    assert which(read_video(tmp_path / "a.mp4", frames=4, fps=5, **TOY), 8) == [0, 2, 4, 6]


def test_a_clip_that_ends_early_is_refused_or_its_last_frame_repeated(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, ramp(4), fps=8)
    for arguments in ({"fps": None}, {"fps": 8.0}):
        with pytest.raises(
            VideoError, match=r"a\.mp4: is too short, it has 4 of the requested 6 frames"
        ):
            read_video(path, frames=6, **arguments, **TOY)
        with pytest.raises(VideoError, match="has 4 of the requested 6"):
            check_video(path, frames=6, **arguments)
        taken = read_video(path, frames=6, short="repeat", **arguments, **TOY)
        assert which(taken, 4) == [0, 1, 2, 3, 3, 3]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 32), (32, 16), (10, 14)])
def test_the_centre_is_kept_whatever_the_shape(tmp_path: Path, height: int, width: int) -> None:
    # A white square in the middle, a quarter of the shorter side wide, black around it.
    picture = torch.full((2, 3, 120, 160), -1.0)
    picture[..., 45:75, 65:95] = 1
    write_video(tmp_path / "a.mp4", picture, fps=8)
    taken = read_video(tmp_path / "a.mp4", frames=1, height=height, width=width)[0, 0]
    assert taken.shape == (height, width)
    assert taken[height // 2, width // 2] > 0.8
    bright = (taken > 0).float()
    rows, columns = bright.sum(0).max(), bright.sum(1).max()
    assert abs(rows - columns) <= 1, "pixels stay square"
    assert torch.allclose(bright, bright.flip(0).flip(1)), "the crop is centred"


def test_shrinking_averages_instead_of_picking_pixels(tmp_path: Path) -> None:
    stripes = torch.full((1, 3, 64, 64), -0.8)
    stripes[..., ::2] = 0.8
    write_video(tmp_path / "a.mp4", stripes, fps=8)
    assert read_video(tmp_path / "a.mp4", frames=1, height=8, width=8).abs().max() < 0.15


def test_oblong_pixels_are_seen_as_on_a_screen(tmp_path: Path) -> None:
    picture = to_uint8(torch.full((3, 64, 64), -1.0).index_fill(2, torch.arange(16, 48), 1.0))
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode(None))
    # On screen 128 x 64 with a white middle half, so the central square is all white.
    assert read_video(tmp_path / "a.mp4", frames=1, **TOY).min() > 0.8


@pytest.mark.parametrize(("tag", "space"), [(1, "ITU709"), (5, "ITU601")])
def test_the_colours_follow_the_tag_in_the_file(tmp_path: Path, tag: int, space: str) -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[..., 0], picture[..., 1] = 200, 40
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height = stream.width = 32
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "1"}
        stream.codec_context.colorspace = tag
        container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=space)))
        container.mux(stream.encode(None))
    taken = to_uint8(read_video(tmp_path / "a.mp4", frames=1, height=32, width=32))
    difference = taken[0, 16, 16].int() - torch.tensor([200, 40, 0])
    assert difference.abs().max() <= 3


def test_bytes_and_floats_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0]).view(3, 1, 1)).flatten().tolist() == [
        0,
        255,
        128,
    ]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (check_video, lambda path: read_video(path, frames=1, **TOY)):
        with pytest.raises(VideoError, match=r"none\.mp4: no such file"):
            read(tmp_path / "none.mp4")


@pytest.mark.parametrize("content", [b"", b"no video at all"])
def test_a_file_that_is_no_video_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"a\.mp4: cannot be read as a video"):
        check_video(path)


def test_a_file_with_sound_only_is_refused(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match=r"a\.mp4: has no video stream"):
        check_video(tmp_path / "a.mp4")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.mkv", tmp_path / "cut.mkv"
    noise = torch.rand(24, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_video(tmp_path / "a.mp4", noise, fps=24)
    content = (tmp_path / "a.mp4").read_bytes()
    for share in (0.02, 0.5, 0.9, 0.99):
        cut.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(VideoError, match="cut"):
            check_video(cut)
    # With the index in front the file still opens; the missing frames are noticed.
    with av.open(str(tmp_path / "a.mp4")) as source:
        options = {"movflags": "faststart"}
        with av.open(str(whole), "w", format="mp4", options=options) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
    check_video(whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(VideoError, match=r"is cut off \(\d+ of 24 frames"):
        check_video(cut)


@pytest.mark.parametrize("arguments", [{"frames": 0}, {"height": 0}, {"fps": 0.0}])
def test_sizes_and_rates_must_be_positive(tmp_path: Path, arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="all must be positive"):
        read_video(tmp_path / "a.mp4", **({"frames": 1} | TOY | arguments))


@pytest.mark.parametrize("name", [f"example_{i}_{side}" for i in (1, 2, 3) for side in "AB"])
def test_real_clips_become_the_toys_size(shared: Path, name: str) -> None:
    path = shared / "data" / "videos" / f"{name}.mp4"
    check_video(path, frames=12, fps=8)
    toy = read_video(path, frames=12, fps=8, **TOY)
    assert toy.shape == (12, 3, 16, 16)
    assert toy.min() >= -1
    assert toy.max() <= 1
    assert toy.std() > 0.1
    # The same picture, larger: shrinking the large one gives the small one.
    large = read_video(path, frames=12, fps=8, height=64, width=64)
    small = torch.nn.functional.interpolate(large, size=(16, 16), mode="area")
    assert (small - toy).abs().mean() < 0.03
