"""The folder teacher: what it answers, and that it finds every fault before training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import av
import pytest
import torch

from afd.data.videos import Videos
from afd.errors import TeacherError
from afd.teachers.base import Request
from afd.teachers.folder import FolderTeacher
from afd.video import write_video
from afd.video.config import VideoConfig
from tests.afd.clips import make_clip_folder


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Three clips of four frames, without a manifest."""
    for i in range(3):
        colour = torch.tensor([0.5 * i - 0.5, 0.0, 0.3]).view(1, 3, 1, 1)
        write_video(tmp_path / f"{i}.mp4", colour.expand(4, 3, 16, 16), fps=8)
    return tmp_path


def manifest(folder: Path, *entries: tuple[str, str]) -> Path:
    lines = (json.dumps({"file": file, "prompt": prompt}) for file, prompt in entries)
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_a_prompt_is_answered_with_its_videos_in_turn(clips: Path) -> None:
    teacher = FolderTeacher(manifest(clips, ("0.mp4", "up"), ("1.mp4", "down"), ("2.mp4", "up")))
    assert list(teacher.requests) == [Request("up", 0), Request("down", 0), Request("up", 1)]
    assert teacher.answer(Request("up", 1)) == clips / "2.mp4"
    with pytest.raises(TeacherError, match="no video 2 for 'up'"):
        teacher.answer(Request("up", 2))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.jsonl", '{"file": "0.mp4", "prompt": "a, \\"b\\" ü"}\n\n'),
        ("prompts.csv", 'seen,prompt,file\n3,"a, ""b"" ü",0.mp4\n'),
        ("prompts.csv", '\ufeffprompt,file\r\n"a, ""b"" ü",0.mp4\r\n'),
        ("prompts.txt", '0.mp4\ta, "b" ü\n'),
    ],
)
def test_every_manifest_format_says_the_same(clips: Path, name: str, text: str) -> None:
    (clips / name).write_text(text, encoding="utf-8")
    assert list(FolderTeacher(clips).requests) == [Request('a, "b" ü')]


def test_a_manifest_may_lie_elsewhere(
    clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "mine.csv"
    elsewhere.write_text("file,prompt\n1.mp4,down\n", encoding="utf-8")
    assert FolderTeacher(clips, elsewhere).answer(Request("down")) == clips / "1.mp4"


def test_one_error_lists_every_fault(clips: Path) -> None:
    (clips / "cut.mp4").write_bytes((clips / "0.mp4").read_bytes()[:200])
    (clips / "empty.mp4").write_bytes(b"")
    inside = clips / "inside"
    inside.mkdir()
    for name in ("0", "1", "2"):
        (clips / f"{name}.mp4").rename(inside / f"{name}.mp4")
    write_video(clips / "outside.mp4", torch.zeros(4, 3, 16, 16), fps=8)
    os.symlink(clips / "outside.mp4", inside / "link.mp4")
    os.symlink(clips / "cut.mp4", clips / "other.mp4")
    (inside / "cut.mp4").write_bytes((clips / "cut.mp4").read_bytes())
    (inside / "empty.mp4").write_bytes(b"")
    manifest(
        inside,
        ("0.mp4", "fine"),
        ("missing.mp4", "a"),
        ("cut.mp4", "b"),
        ("empty.mp4", "c"),
        ("./0.mp4", "again"),
        ("1.mp4", "  "),
        ("../outside.mp4", "d"),
        ("link.mp4", "e"),
        ("", "f"),
    )
    with (inside / "prompts.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"file": "2.mp4"}\n{torn\n[1]\n')
    with pytest.raises(TeacherError) as error:
        FolderTeacher(inside)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("prompts.jsonl: 11 wrong:")
    for line, fault in enumerate(
        [
            "missing.mp4: no such file",
            "cut.mp4: cannot be read as a video",
            "empty.mp4: cannot be read as a video",
            "0.mp4: is listed twice (also line 1)",
            "1.mp4: has an empty prompt",
            "outside.mp4: lies outside",
            "link.mp4: lies outside",
            "needs a file and a prompt",
            "needs a file and a prompt",
            "not JSON",
            "list, not an object",
        ],
        start=2,
    ):
        assert any(told.startswith(f"  line {line}: ") and fault in told for told in lines), fault


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("prompts.jsonl", '{"file": "a\\u0000.mp4", "prompt": "a"}', "zero byte"),
        ("prompts.jsonl", json.dumps({"file": "a" * 5000, "prompt": "a"}), "is no path"),
        ("prompts.jsonl", '{"file": "ring.mp4", "prompt": "a"}', "(is no path|no such file)"),
        ("prompts.jsonl", '{"file": "0.mp4", "prompt": "\\ud800"}', "not JSON"),
        ("prompts.jsonl", "[" * 100_000, "not JSON"),
        ("prompts.jsonl", f'{{"file": "0.mp4", "prompt": {"1" * 5000}}}', "not JSON"),
        ("prompts.csv", f'file,prompt\n0.mp4,"{"a" * 200_000}"\n', "not CSV"),
    ],
    ids=["zero byte", "long name", "ring", "half a character", "deep", "long number", "long field"],
)
def test_whatever_stands_in_a_manifest_its_line_is_named(
    clips: Path, name: str, text: str, fault: str
) -> None:
    os.symlink("ring.mp4", clips / "ring.mp4")
    (clips / name).write_text(text, encoding="utf-8")
    with pytest.raises(TeacherError, match=f"line [12]: .*{fault}"):
        FolderTeacher(clips)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{outside}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile 0.mp4\n",
    ],
)
def test_a_file_that_only_lists_other_files_is_no_video(
    clips: Path, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    """FFmpeg would play them, wherever they are."""
    outside = tmp_path_factory.mktemp("outside") / "clip.ts"
    with av.open(str(clips / "0.mp4")) as held, av.open(str(outside), "w") as container:
        stream = container.add_stream("mpeg2video", rate=24)
        stream.height = stream.width = 16
        for frame in held.decode(video=0):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24")))
            )
        container.mux(stream.encode(None))
    (clips / "list.m3u8").write_text(text.format(outside=outside), encoding="utf-8")
    with pytest.raises(TeacherError, match=r"list\.m3u8: is not one of the containers mov"):
        FolderTeacher(manifest(clips, ("list.m3u8", "a")))


def test_clips_too_short_for_the_run_are_found_before_it(clips: Path) -> None:
    write_video(clips / "short.mp4", torch.zeros(2, 3, 16, 16), fps=8)
    manifest(clips, ("0.mp4", "a"), ("short.mp4", "b"))
    with pytest.raises(
        TeacherError, match=r"short\.mp4: is too short, it has 2 of the requested 4"
    ):
        FolderTeacher(clips, frames=4)
    with pytest.raises(
        TeacherError, match=r"short\.mp4: is too short, it has 4 of the requested 5"
    ):
        FolderTeacher(manifest(clips, ("short.mp4", "b")), frames=5, fps=16)
    assert len(FolderTeacher(clips, frames=4, fps=16).requests) == 1


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("prompts.jsonl", "", "lists no video"),
        ("prompts.csv", "path,prompt\n0.mp4,a\n", "needs file and prompt"),
        ("prompts.csv", "file,prompt\n0.mp4\n", "line 2: needs a file and a prompt"),
        ("prompts.txt", "0.mp4 no tab\n", "line 1: needs file and prompt with a tab"),
    ],
)
def test_a_manifest_that_says_nothing_is_refused(
    clips: Path, name: str, text: str, fault: str
) -> None:
    (clips / name).write_text(text, encoding="utf-8")
    with pytest.raises(TeacherError, match=fault):
        FolderTeacher(clips)


def test_a_folder_or_manifest_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="none: does not exist"):
        FolderTeacher(tmp_path / "none")
    with pytest.raises(TeacherError, match=r"contains none of prompts\.jsonl"):
        FolderTeacher(tmp_path)
    with pytest.raises(TeacherError, match=r"mine\.csv: cannot be read"):
        FolderTeacher(tmp_path, tmp_path / "mine.csv")
    with pytest.raises(TeacherError, match=r"needs the ending \.jsonl, \.csv or \.txt"):
        FolderTeacher(tmp_path, tmp_path / "mine.parquet")


def test_each_file_is_decoded_once(clips: Path) -> None:
    teacher = FolderTeacher(manifest(clips, ("0.mp4", "a"), ("1.mp4", "b")))
    videos = Videos(teacher, VideoConfig(frames=4))
    first = videos.fetch(teacher.requests)
    assert first.shape == (2, 4, 3, 16, 16)
    assert first.dtype == torch.float32
    for name in ("0.mp4", "1.mp4"):
        (clips / name).unlink()
    assert torch.equal(videos.fetch(teacher.requests), first)


def test_reads_a_folder_of_real_clips(tmp_path: Path, shared: Path) -> None:
    teacher = FolderTeacher(make_clip_folder(shared, tmp_path / "clips"), frames=12, fps=8)
    assert len(teacher.requests) == 6
    assert len({request.prompt for request in teacher.requests}) == 3
