"""Atomic writes, hashes and JSON lines: whole or not there, and errors that name the file."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from afd.config.run import make_config
from afd.errors import AfdError
from afd.files import (
    JsonAppender,
    naming,
    read_json_lines,
    refuse_odd,
    remove,
    replacing,
    sha256_of,
    write_bytes,
    write_json,
    write_text,
)
from afd.teachers.manifest import read_manifest
from afd.teachers.paid.teacher import read_prompts
from afd.trainer.evaluate import evaluation_prompts


def test_a_write_replaces_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file.txt"
    for text in ("old", "new – 新"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    write_json(path, {"a": [1, "ü"]})
    assert path.read_text(encoding="utf-8") == '{\n "a": [\n  1,\n  "ü"\n ]\n}\n'
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_has_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "one", b"")
        write_bytes(tmp_path / "two", b"", shared=True)
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("one", "two")} == {0o666 & ~umask}


@pytest.mark.parametrize("shared", [False, True])
def test_an_error_changes_nothing_and_names_the_file(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path, shared=shared) as partial:
            partial.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as error:
        fail()
    assert error.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, float("nan"))
    assert path.read_text() == "old"


def test_a_file_that_may_not_grow_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with JsonAppender(path) as lines:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            with pytest.raises(OSError, match=re.escape(str(path))):
                lines.write({})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_error_that_names_a_file_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"), naming(tmp_path):
        (tmp_path / "absent").read_bytes()


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / "file"
    partial = tmp_path / ".file.partial"
    partial.mkdir()
    (partial / "half").write_text("")
    write_text(path, "new")
    partial.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    write_text(path, "newer")
    assert path.read_text() == "newer"
    assert os.listdir(tmp_path) == ["file"]


def test_a_whole_folder_can_take_a_place(tmp_path: Path) -> None:
    with replacing(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("1")
    assert (tmp_path / "folder" / "a").read_text() == "1"
    remove(tmp_path / "folder")
    remove(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = os.urandom(3 << 20) + b"x"
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    with pytest.raises(FileNotFoundError, match="absent"):
        sha256_of(tmp_path / "absent")


def test_json_lines_are_read_back_and_a_torn_one_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path) == []
    with JsonAppender(path) as lines:
        lines.write({"update": 1})
        lines.write({"update": 2, "ü": 0.5})
        lines.sync()
        with pytest.raises(ValueError, match="JSON compliant"):
            lines.write({"update": float("nan")})
    whole = path.read_bytes()
    assert [line.value for line in read_json_lines(path)] == [
        {"update": 1},
        {"update": 2, "ü": 0.5},
    ]
    for tail in (b'{"st', b"\0" * 7, b"\xff\xfe", b"7"):
        path.write_bytes(whole + tail)
        *_, last = read_json_lines(path)
        assert (last.number, last.value, last.torn) == (3, None, True), tail
        path.write_bytes(whole + tail + b"\n" + whole)
        damaged = [line for line in read_json_lines(path) if line.problem]
        assert [(line.number, line.torn) for line in damaged] == [(3, False)], tail
    # The end of a line may be all that is missing.
    path.write_bytes(whole[:-1])
    assert [line.problem for line in read_json_lines(path)] == [None, None]


def test_a_pipe_in_the_place_of_a_file_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for use in (read_json_lines, JsonAppender, refuse_odd):
        with pytest.raises(OSError, match=r"is a pipe, socket or device.*/pipe'"):
            use(tmp_path / "pipe")
        with pytest.raises(IsADirectoryError, match=str(tmp_path)):
            use(tmp_path)
    refuse_odd(tmp_path / "nothing")


def manifest_prompts(path: Path) -> list[str]:
    """The prompts of a manifest in the form of a list of prompts: a file before each."""
    if path.is_file():
        path.write_bytes(b"0.mp4\t" + path.read_bytes().replace(b"\rt", b"\r1.mp4\tt"))
    return [prompt for _, _, prompt in read_manifest(path.parent, path)[1]]


def held_out_prompts(path: Path) -> list[str]:
    evaluation = {"kind": "video", "prompts": str(path)}
    return evaluation_prompts(make_config({"evaluation": evaluation}), [])


@pytest.mark.parametrize("read", [read_prompts, held_out_prompts, manifest_prompts])
def test_every_list_of_prompts_is_read_in_one_way(
    tmp_path: Path, read: Callable[[Path], list[str]]
) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"one\rtwo\r\n")
    assert read(path) == ["one", "two"]
    for bad, reason in ((b"a\xff", "byte 0xff is not UTF-8"), (b"a\0b", "a zero byte")):
        path.write_bytes(bad)
        with pytest.raises(AfdError, match=rf"list\.txt: cannot be read \(line 1: {reason}"):
            read(path)
    path.unlink()
    with pytest.raises(AfdError, match=r"list\.txt: cannot be read \(No such file"):
        read(path)
    path.mkdir()
    with pytest.raises(AfdError, match=r"list\.txt: cannot be read \(Is a directory"):
        read(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(AfdError, match=r"list\.txt: cannot be read \(is a pipe"):
        read(path)
