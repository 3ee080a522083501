"""Teacher and student in the same pixels: time, crop, and the codec's traces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from afd.data.videos import Videos
from afd.discriminators.videoalign.preprocess import Preprocessing
from afd.teachers.folder import FolderTeacher
from afd.video import (
    VideoWriter,
    check_video,
    from_uint8,
    read_video,
    through_codec,
    to_uint8,
    write_video,
)
from afd.video.config import VideoConfig

SIZE = {"height": 480, "width": 832}
FULL = VideoConfig(frames=81, fps=16, codec_match=True, **SIZE)


def moving(frames: int = 20, height: int = 48, width: int = 64, seed: int = 0) -> Tensor:
    """A textured picture that moves, in [-1, 1], with more detail than a codec keeps."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 4, width // 2, generator=generator) * 1.6 - 0.8
    wide = torch.nn.functional.interpolate(coarse, (height, width + frames), mode="bilinear")[0]
    wide = (wide + 0.15 * torch.randn(wide.shape, generator=generator)).clamp(-1, 1)
    return torch.stack([wide[..., k : k + width] for k in range(frames)])


def clip_folder(folder: Path, **clips: Path | Tensor) -> FolderTeacher:
    folder.mkdir()
    for name, clip in clips.items():
        if isinstance(clip, Tensor):
            write_video(folder / f"{name}.mp4", clip, fps=16)
        else:
            (folder / f"{name}.mp4").write_bytes(clip.read_bytes())
    (folder / "prompts.txt").write_text("".join(f"{n}.mp4\t{n}\n" for n in clips))
    return FolderTeacher(folder)


@pytest.mark.parametrize("crf", [10, 18, 30])
def test_the_codec_in_memory_is_a_file_written_and_read(tmp_path: Path, crf: int) -> None:
    video = torch.stack([moving(), moving(seed=1)])
    seen = through_codec(video, fps=16, crf=crf)
    assert seen.shape == video.shape
    assert seen.dtype == torch.float32
    for one, got in zip(video, seen, strict=True):
        write_video(tmp_path / "a.mp4", one, fps=16, crf=crf)
        assert torch.equal(read_video(tmp_path / "a.mp4", frames=20, height=48, width=64), got)
    assert not torch.equal(seen[0], from_uint8(to_uint8(video[0])))
    assert torch.equal(through_codec(video[:1], fps=16, crf=crf), seen[:1])


def test_a_teacher_file_and_a_student_video_of_one_content_look_the_same(tmp_path: Path) -> None:
    """What a discriminator reads: the bits are equal, so the container cannot be recognised."""
    content = moving(frames=81)
    teacher = clip_folder(tmp_path / "clips", same=content)
    video = VideoConfig(frames=81, height=48, width=64, fps=16, codec_match=True)
    preprocessing = Preprocessing(max_pixels=56 * 56)

    def prepare(video_BFCHW: Tensor) -> Tensor:
        return preprocessing.choose(video_BFCHW, 16.0)

    theirs = Videos(teacher, video, prepare=prepare).fetch(teacher.requests)
    ours = prepare(through_codec(content[None], fps=video.fps, crf=video.crf))
    assert theirs.shape == (1, 10, 3, 48, 64)
    assert torch.equal(preprocessing.patches(theirs)[0], preprocessing.patches(ours)[0])
    # Without the codec they would be distinguishable.
    raw = preprocessing.patches(prepare(content[None]))[0]
    assert not torch.equal(preprocessing.patches(theirs)[0], raw)


def blockiness(video_FCHW: Tensor) -> float:
    """How much larger steps are across the borders of a codec's 8 x 8 blocks than inside."""
    step = (video_FCHW[..., 1:] - video_FCHW[..., :-1]).abs().mean((0, 1, 2))
    at = torch.arange(1, len(step) + 1) % 8 == 0
    return float(step[at].mean() / step[~at].mean())


def test_a_clip_of_another_size_gets_the_traces_that_the_students_have(tmp_path: Path) -> None:
    """Scaling takes the blocks of a teacher's own codec away; the student's would give it away."""
    large = moving(height=96, width=160)
    teacher = clip_folder(tmp_path / "clips", large=large)
    video = VideoConfig(frames=20, height=48, width=64, fps=16, codec_match=True, crf=44)
    off = video.model_copy(update={"codec_match": False})
    (request,) = teacher.requests
    matched = Videos(teacher, video).fetch([request])[0]
    plain = Videos(teacher, off).fetch([request])[0]
    assert torch.equal(matched, through_codec(plain[None], fps=16, crf=44)[0])
    student = through_codec(moving(seed=1)[None], fps=16, crf=44)[0]
    assert blockiness(plain) < 1.1
    assert blockiness(matched) > 1.2
    assert blockiness(student) > 1.2


def test_the_gradient_passes_the_codec_as_if_it_were_not_there() -> None:
    video = moving()[None].requires_grad_()
    weight = torch.randn(video.shape, generator=torch.Generator().manual_seed(2))
    seen = through_codec(video, fps=16)
    assert torch.equal(seen, through_codec(video.detach(), fps=16))
    (seen * weight).sum().backward()
    assert torch.equal(video.grad, weight)


@pytest.mark.parametrize("shape", [(20, 3, 16, 16), (1, 2, 3, 15, 16), (1, 2, 1, 16, 16)])
def test_what_no_codec_takes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"video_B?FCHW: got"):
        through_codec(torch.zeros(shape))


# --- 16 frames a second, 81 frames, 480 x 832, from real clips ---


@pytest.mark.parametrize(
    ("name", "wanted", "there", "rows", "columns"),
    [
        # 672x384 at 24: 384 rows of 666 columns are the target's shape.
        ("example_2_A", 81, 81, slice(0, 384), slice(3, 669)),
        # 1280x768 at 24: 738 rows of all columns.
        ("example_3_A", 21, 21, slice(15, 753), slice(0, 1280)),
        # 688x384 at 16, 60 frames: the last one is repeated.
        ("example_3_B", 81, 60, slice(0, 384), slice(11, 677)),
    ],
)
def test_real_clips_are_resampled_cropped_and_scaled(
    shared: Path, name: str, wanted: int, there: int, rows: slice, columns: slice
) -> None:
    import av

    path = shared / "data" / "videos" / f"{name}.mp4"
    check_video(path, frames=there, fps=16)
    video = read_video(path, frames=wanted, fps=16, short="repeat", **SIZE)
    assert video.shape == (wanted, 3, 480, 832)
    assert video.dtype == torch.float32
    assert video.abs().max() <= 1
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        pictures = [
            frame.to_ndarray(format="rgb24")
            for index, frame in enumerate(container.decode(video=0))
            if index in {0, 15, 75, 78} and index < 1.5 * wanted
        ]
    # Frame 50 at 16 a second is frame 75 at 24 and 50 at 16; half-way goes to the earlier frame.
    taken = [0, 10, 50, 52] if rate == 24 else [0, 15]
    for at, picture in zip(taken, pictures, strict=False):
        cropped = from_uint8(torch.from_numpy(picture))[:, rows, columns]
        expected = torch.nn.functional.interpolate(
            cropped[None], (480, 832), mode="bilinear", antialias=True
        )[0].clamp(-1, 1)
        assert torch.equal(video[at], expected), at
    assert all(torch.equal(video[k], video[there - 1]) for k in range(there, wanted))


def test_a_real_teacher_and_a_real_student_file_see_the_same_treatment(
    tmp_path: Path, shared: Path
) -> None:
    """A 24-a-second clip of another size becomes what a student's mp4 of that content would be."""
    video = FULL.model_copy(update={"frames": 9})
    teacher = clip_folder(tmp_path / "clips", clip=shared / "data" / "videos" / "example_2_A.mp4")
    (request,) = teacher.requests
    videos = Videos(teacher, video)
    content = videos.clip(request)
    got = videos.fetch([request])[0]
    write_video(tmp_path / "student.mp4", content, fps=16, crf=video.crf)
    assert torch.equal(got, read_video(tmp_path / "student.mp4", frames=9, **SIZE))
    # What `afd sample` writes is another stream of the same codec: close, and never the same bits.
    with VideoWriter(tmp_path / "sampled.mp4", fps=16, crf=video.crf) as writer:
        writer.append(to_uint8(content))
    sampled = read_video(tmp_path / "sampled.mp4", frames=9, **SIZE)
    assert 0 < (got - sampled).abs().mean() < 0.02
