"""Many videos with the same fault are a few lines on the terminal, and all of them in a file."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch

from afd.cli import main
from afd.errors import DONE, MISTAKE
from afd.listing import FEW, Some, counted, few
from tests.afd.commands import small_run

MANY = 40


def test_a_list_is_cut_where_that_is_shorter() -> None:
    names = [str(n) for n in range(20)]
    assert few(names[:11]) == names[:11]
    assert few(names[:12]) == [*names[:10], "and 2 more"]
    assert few(names, 4) == [*names[:4], "and 16 more"]


def test_a_thing_is_logged_once_and_the_rest_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "afd")
    some = Some(logging.getLogger("afd"), logging.WARNING, "skipped: %s")
    for n in [*range(MANY), *range(MANY)]:
        some(f"clip {n}")
    some.end()
    shown = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert shown == [*(f"skipped: clip {n}" for n in range(FEW)), "30 more like these"]
    assert len(caplog.records) == MANY + 1


def _broken(folder: Path) -> Path:
    """A run whose teacher's folder has, beside its own clips, MANY that cannot be read."""
    config = small_run(folder)
    with (folder / "clips" / "prompts.jsonl").open("a", encoding="utf-8") as manifest:
        for n in range(MANY):
            (folder / "clips" / f"broken{n}.mp4").write_bytes(b"no video")
            manifest.write(json.dumps({"file": f"broken{n}.mp4", "prompt": "up"}) + "\n")
    return config


def test_a_run_on_many_broken_clips_lists_some_and_its_log_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = _broken(tmp_path), tmp_path / "runs"
    assert main(["train", str(config), "name=x", f"out={out}"]) == MISTAKE
    told = capsys.readouterr().err
    assert f"prompts.jsonl: {MANY} wrong:" in told
    assert len(re.findall(r"broken\d+\.mp4: cannot be read", told)) == FEW
    assert f"  and {MANY - FEW} more" in told
    (log,) = out.rglob("train.log")
    logged = re.findall(r"broken(\d+)\.mp4: cannot be read", log.read_text(encoding="utf-8"))
    assert {int(n) for n in logged} == set(range(MANY))


def test_an_audit_of_many_broken_clips_counts_them_and_its_file_names_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _broken(tmp_path)
    assert main(["teacher", "audit", str(tmp_path / "clips")]) == DONE
    told = capsys.readouterr().out
    assert f"unreadable: {MANY} of" in told
    assert set(re.findall(r"broken\d+", told)) == {"broken0"}
    found = json.loads((tmp_path / "clips" / "audit" / "audit.json").read_text(encoding="utf-8"))
    named = [clip["file"] for clip in found["clips"] if "unreadable" in clip["findings"]]
    assert len(named) == MANY


def test_an_audit_of_many_wrong_lines_lists_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"file": "a.mp4"}\n' * MANY, encoding="utf-8")
    assert main(["teacher", "audit", str(tmp_path)]) == MISTAKE
    told = capsys.readouterr().err
    assert told.count("needs a file and a prompt") == FEW
    assert f"  and {MANY - FEW} more" in told


def test_one_thing_is_in_the_singular() -> None:
    assert [counted(n, "video") for n in (0, 1, 2)] == ["0 videos", "1 video", "2 videos"]
    assert [counted(n, "pass") for n in (1, 1.5)] == ["1 pass", "1.5 passes"]


# One thing in the plural, and the ways around it.
PLURAL = re.compile(
    r"(?<![\d.,])(?<!of )\b1 (videos|clips|updates|prompts|threads|cores|processes|chunks|frames|"
    r"passes|steps|pairs|draws|tokens|GPUs)\b|\((s|es)\)"
)


@pytest.mark.parametrize("method", ["afd", "sft", "gan", "dmd"])
def test_a_dry_run_of_one_of_everything_is_in_the_singular(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"method={method}", "updates=1", "prompts_per_update=1", "--dry-run"]
    assert main(["train", "afd_self_forcing_480x832", *words]) == DONE
    assert PLURAL.search(capsys.readouterr().out) is None


def test_the_doctor_counts_a_single_thread_in_the_singular(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(["doctor"]) == DONE
    finally:
        torch.set_num_threads(before)
    told = capsys.readouterr().out
    assert ", 1 thread," in told
    assert PLURAL.search(told) is None
