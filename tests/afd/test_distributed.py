"""A run in two processes is the same run: its updates, its files, its checkpoints, its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from afd.config.run import make_config
from afd.trainer import checkpoint
from afd.trainer.loop import Outcome, load_run, train
from tests.afd.distributed import Leg, Walked, assert_alike, stopped_run, walk
from tests.afd.tiny import make_clips
from tests.afd.together import together
from tests.tolerances import DISTRIBUTED

ROOT = Path(__file__).parents[2]
METHODS = (
    ("afd", "ddp"),
    ("sft", "fsdp"),
    ("afd full", "fsdp"),
    ("afd rewards", "ddp"),
    ("afd chosen", "fsdp"),
    ("afd replay", "ddp"),
    ("afd stacked", "fsdp"),
    ("afd switched", "fsdp"),
    ("gan", "ddp"),
    ("dmd", "fsdp"),
)

# --- updates ---


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Walked]]:
    """For each method two updates and a third from their state, in every pair of worlds."""
    folder = tmp_path_factory.mktemp("states")

    def first(world: int) -> list[Leg]:
        return [Leg(m, p, 2, left=folder / f"{m} {world}") for m, p in METHODS]

    def then(world: int) -> list[Leg]:
        return [Leg(m, p, 1, given=folder / f"{m} {world}") for m, p in METHODS]

    n = len(METHODS)
    one = together(1, walk, [*first(1), *then(1)])[0]
    two, also = together(2, walk, [*first(2), *then(2), *then(1)])
    for main, other in zip(two, also, strict=True):
        assert main.said == other.said, "every process tells the whole batch's metrics"
        assert main.drawn == other.drawn
        assert all(np.array_equal(main.weights[key], other.weights[key]) for key in main.weights)
    back = together(1, walk, then(2))[0]
    return {
        "1": one[:n],
        "1 then 1": one[n:],
        "2": two[:n],
        "2 then 2": two[n : 2 * n],
        "1 then 2": two[2 * n :],
        "2 then 1": back,
    }


def test_streams_switch_in_these_updates(walks: dict[str, list[Walked]]) -> None:
    walked = walks["1"][METHODS.index(("afd switched", "fsdp"))]
    assert any(one["student/from_chunk"] >= 4 for one in walked.said), "a clip is past chunk 0"


@pytest.mark.parametrize("number", range(len(METHODS)), ids=[" ".join(m) for m in METHODS])
def test_two_processes_make_the_updates_of_one(walks: dict[str, list[Walked]], number: int) -> None:
    assert_alike(walks["2"][number], walks["1"][number])


def test_the_draws_do_not_depend_on_the_number_of_processes(
    walks: dict[str, list[Walked]],
) -> None:
    for one, two in zip(walks["1"], walks["2"], strict=True):
        assert one.drawn == two.drawn
    ends = [[walked.drawn for walked in walks[way]] for way in walks if "then" in way]
    assert all(drawn == ends[0] for drawn in ends)


@pytest.mark.parametrize("number", range(len(METHODS)), ids=[" ".join(m) for m in METHODS])
@pytest.mark.parametrize("way", ["2 then 2", "1 then 2", "2 then 1"])
def test_a_state_goes_on_in_any_number_of_processes(
    walks: dict[str, list[Walked]], number: int, way: str
) -> None:
    assert_alike(walks[way][number], walks["1 then 1"][number])


def test_a_sharded_state_goes_on_bit_by_bit_in_as_many_processes(tmp_path: Path) -> None:
    name, left = "afd full", tmp_path / "state"
    legs = [Leg(name, "fsdp", 3), Leg(name, "fsdp", 2, left=left), Leg(name, "fsdp", 1, given=left)]
    straight, before, after = together(2, walk, legs)[0]
    assert [*before.said, *after.said] == straight.said
    assert all(np.array_equal(after.weights[key], x) for key, x in straight.weights.items())


@pytest.mark.parametrize(
    ("method", "name"),
    [("sft bf16", "blocks.0.ffn.0.weight"), ("afd bf16", "blocks.0.ffn.0.lora_A.weight")],
)
def test_shares_keep_steps_that_bf16_would_round_away(method: str, name: str) -> None:
    # B of an adapter starts at 0, so that A has a gradient from the second update on.
    updates = 1 if method.startswith("sft") else 2
    leg = Leg(method, "fsdp", updates)
    start, one = together(1, walk, [Leg(method, "fsdp", 0), leg])[0]
    two = together(2, walk, [leg])[0][0]
    assert two.said[0]["student/loss"] == pytest.approx(one.said[0]["student/loss"], rel=1e-2)
    for walked in (one, two):
        moved = np.abs(walked.weights[name] - start.weights[name])
        # Adam's first step is its rate, far below bf16's resolution of most of these weights.
        assert 0.5e-5 < np.median(moved) < 1.5e-5


# --- whole runs ---


def toy_run(out: Path, clips: Path, **more: Any) -> dict[str, Any]:
    """AFD of the toy, four small updates, measured twice on the way and at the end."""
    return {
        "out": str(out),
        "updates": 4,
        "prompts_per_update": 2,
        "teacher": {"kind": "folder", "path": str(clips)},
        "discriminator": {"warmup_updates": 1, "loss": "gan", "steps_per_update": 1},
        "afd": {"samples_per_prompt": 2, "draws": 1},
        "evaluation": {"every": 2, "curve_videos": 5, "videos": 7, "samples": 3},
        "logging": {"tensorboard": False},
        "checkpoint": {"every": 3, "keep": 3},
        **more,
    }


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("teacher") / "clips", frames=12)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    torch.set_num_threads(1)
    assert train(make_config(toy_run(out, clips))) is Outcome.FINISHED
    return out


def lines(out: Path, name: str) -> list[dict[str, Any]]:
    """A .jsonl file without its times, nothing nested."""
    said = [json.loads(line) for line in (out / name).read_text().splitlines()]
    flat = [line | line.pop("metrics", {}) for line in said]
    return [{k: v for k, v in one.items() if k not in ("time_s", "phase_s")} for one in flat]


def assert_same_lines(out: Path, alone: Path, name: str, count: int | None = None) -> None:
    ours, theirs = lines(out, name), lines(alone, name)[:count]
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            if isinstance(value, str):
                assert value == other[key]
            else:
                np.testing.assert_allclose(value, other[key], **DISTRIBUTED, err_msg=key)


def test_a_sharded_run_that_one_process_is_told_to_stop_ends_in_one_process(
    tmp_path: Path, clips: Path, alone: Path
) -> None:
    out = tmp_path / "run"
    data = toy_run(out, clips, parallel="fsdp")
    assert together(2, stopped_run, data, 1, 1) == ["stopped", "stopped"]
    assert [line["update"] for line in lines(out, "metrics.jsonl")] == [1, 2]
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    assert len(list(newest.glob("*.safetensors"))) == 2, "each process has written its shares"
    assert {file.suffix for file in newest.iterdir()} == {".json", ".safetensors"}
    written_by = json.loads((newest / "meta.json").read_text())["written_by"]
    assert written_by["processes"] == 2
    assert train(load_run(out, ["parallel=ddp"])) is Outcome.FINISHED
    assert "processes: 1 now, 2 before" in (out / "train.log").read_text()
    assert_same_lines(out, alone, "metrics.jsonl")
    assert_same_lines(out, alone, "evaluation.jsonl")


# --- torchrun ---


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    # Standalone: its own port.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "afd", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_torchrun_makes_the_run_of_one_process(tmp_path: Path, clips: Path, alone: Path) -> None:
    out, path = tmp_path / "run", tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(toy_run(out, clips)))
    ended = torchrun("train", str(path), "updates=2")
    assert ended.returncode == 0, ended.stderr
    assert (out / "DONE").is_file()
    assert_same_lines(out, alone, "metrics.jsonl", 2)
    # One process logs, and each line once.
    said = (out / "train.log").read_text()
    assert said.count("2 processes, ddp") == said.count("finished: 2 updates") == 1


def test_a_run_of_two_processes_for_each_video_goes_on_in_one(
    tmp_path: Path, clips: Path, alone: Path
) -> None:
    out, path = tmp_path / "run", tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(toy_run(out, clips)))
    ended = torchrun("train", str(path), "updates=2", "parallel.sequence=2")
    assert ended.returncode == 0, ended.stderr
    assert "2 processes, ddp, 2 for each video" in (out / "train.log").read_text()
    assert train(load_run(out, ["updates=4", "parallel.sequence=1"])) is Outcome.FINISHED
    assert_same_lines(out, alone, "metrics.jsonl")


def test_a_mistake_under_torchrun_is_one_sentence(tmp_path: Path, clips: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(toy_run(tmp_path / "run", clips)))
    ended = torchrun("train", str(path), "prompts_per_update=1")
    assert ended.returncode == 1
    said = " ".join(ended.stderr.split())
    assert said.count("afd: error: prompts_per_update is 1; 2 processes need one each") == 1
    assert 'Traceback (most recent call last): File "' + str(ROOT) not in said
