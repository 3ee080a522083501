"""The door of prompts: files, lists and single ones give usable jobs, or ConfigError."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.benchmarks import videophy
from afd.benchmarks.config import VideoPhyConfig
from afd.config.run import make_config
from afd.errors import ConfigError
from afd.sampling.config import SampleConfig
from afd.sampling.jobs import Job, read_jobs

GOOD = {"prompt": "a red ball", "name": "ball", "seed": 3, "switches": [[2, "it bounces"]]}
TOY = {"student": {"kind": "toy", "denoising_steps": [1.0, 0.5]}}
ODD = (
    *(b"\xef\xbb\xbf", b"\r\n", b"\r", b"\0", b"\x1b[31m", b"\x85", b"\xe2\x80\xa8", b"\xff"),
    *(b"\xed\xa0\x80", b'"\\ud83d"', b'"\\u0000"', b"NaN", b"1e999", b"9" * 5000, b"[" * 3000),
    *(b"{}", b"null", b'""', b"\n\n", b'"seed": -1', b'"name": "../x"', b'"image": "/etc/passwd"'),
    *(b'"image": "a\\u0000"', b"'", b'"', b",", "😀é".encode(), "x y".encode("utf-16")),
    *(b"caf\xe9", b"x" * 70_000),
)


def good(suffix: str) -> bytes:
    if suffix == ".jsonl":
        lines = [json.dumps({**GOOD, "name": f"ball{i}"}) for i in range(3)]
    elif suffix == ".csv":
        lines = ["caption,other", *(f'"a ball, {i}",x' for i in range(3))]
    else:
        lines = ["a red ball", "", "a green ball"]
    return "\n".join(lines).encode() + b"\n"


@st.composite
def mutated(draw: st.DrawFn, suffix: str) -> bytes:
    data = good(suffix)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        piece = draw(st.sampled_from(ODD) | st.binary(max_size=5))
        data = data[:at] + piece + data[at + draw(st.integers(0, 8)) :]
    return data


def check(jobs: list[Job]) -> None:
    assert jobs
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        assert 0 <= job.seed < 2**63
        # Its file, while it is being written, has a name that every file system takes.
        assert len(os.fsencode(f"{job.name}.mp4.partial")) <= 255
        assert "/" not in job.name
        for prompt in job.prompts:
            prompt.encode("utf-8")
            assert "\0" not in prompt
        assert job.prompt.strip()


def refused(error: ConfigError) -> None:
    assert str(error).startswith(("prompts", "videophy2.prompts", "seed", "override"))
    assert len(str(error)) < 4000


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@given(data=st.data())
def test_a_damaged_list_gives_jobs_or_a_sentence(
    suffix: str, data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / f"[list] #1{suffix}"
    path.write_bytes(data.draw(mutated(suffix)))
    config = SampleConfig(**TOY, prompts=str(path), samples=2)
    try:
        jobs = read_jobs(config)
    except ConfigError as error:
        refused(error)
    else:
        check(jobs)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
@given(data=st.data())
def test_a_damaged_list_of_a_benchmark_gives_prompts_or_a_sentence(
    suffix: str, data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / f"list{suffix}"
    path.write_bytes(data.draw(mutated(suffix)))
    column = "prompt" if suffix == ".jsonl" else "caption"
    try:
        prompts = videophy.read(VideoPhyConfig(prompts=path, column=column))
    except ConfigError as error:
        refused(error)
    else:
        assert all(prompt.text.encode() and "\0" not in prompt.text for prompt in prompts)


@given(text=st.text(max_size=300) | st.binary(max_size=300).map(os.fsdecode))
def test_any_prompt_on_the_command_line_is_that_prompt_or_refused(text: str) -> None:
    try:
        config = make_config(TOY, [f"prompts={text}"], "command", SampleConfig)
        jobs = read_jobs(config)
    except ConfigError as error:
        refused(error)
        return
    check(jobs)
    if text[0] not in "['\"":
        assert [job.prompt for job in jobs] == [text]


def test_what_is_wrong_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    for line, message in (
        ('{"prompt": "a\\u0000"}', ":2: not valid JSON .*zero byte"),
        ('{"prompt": "\\ud83d"}', ":2: not valid JSON"),
        ("[" * 100_000, ":2: not valid JSON"),
        ('{"prompt": "a", "seed": 9223372036854775808}', ":2: seed: "),
        ('{"prompt": "a", "name": "' + "n" * 201 + '"}', ":2: name: "),
    ):
        path.write_text('{"prompt": "first"}\n' + line)
        with pytest.raises(ConfigError, match=message):
            read_jobs(SampleConfig(**TOY, prompts=str(path)))
    path.write_text('{"prompt": "a", "seed": 9223372036854775807}')
    with pytest.raises(ConfigError, match="needed: below 2"):
        read_jobs(SampleConfig(**TOY, prompts=str(path), samples=2))
    path.write_text("a\0b")
    with pytest.raises(ConfigError, match="line 1: a zero byte"):
        read_jobs(SampleConfig(**TOY, prompts=str(path)))
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_jobs(SampleConfig(**TOY, prompts=str(path)))
