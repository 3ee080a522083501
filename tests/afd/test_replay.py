"""Replayed prompts: no teacher, no discriminator, only the prior to what the run started from."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.cli import main
from afd.config.run import RunConfig, make_config
from afd.errors import DONE, ConfigError, TeacherError
from afd.lab.simulator import write_folder
from afd.methods.afd import Afd
from afd.methods.base import Batch
from afd.methods.config import ReplayConfig
from afd.models.config import LoraConfig
from afd.models.policies import make_policies
from afd.trainer.loop import load_run, train
from tests.afd.test_origin import SMALL
from tests.afd.test_resume import numbers
from tests.afd.tiny_methods import (
    gradients,
    make_afd,
    make_sft,
    step,
    toy_batch,
    toy_student,
    wan_batch,
    wan_student,
    weights,
)

REPLAY = ReplayConfig(fraction=0.5, prompts=Path("x"), weight=3.0)
STUDENTS = {"toy": (toy_student, toy_batch), "wan": (wan_student, wan_batch)}
MAKE = {"afd": make_afd, "sft": make_sft}


def replayed(batch: Batch, prompts: list[str]) -> Batch:
    batch.replay = Batch(batch.update, prompts, torch.empty(len(prompts), 0))
    return batch


def with_replay(kind: str, student: Any, lora: LoraConfig | None = None, **settings: Any) -> Any:
    """A method that replays, with its frozen start."""
    settings |= {"grad_clip": 1e9}
    method = MAKE[kind](student, lora=lora, how={"replay": REPLAY}, **settings)
    if kind == "sft" and lora is None:
        method = MAKE[kind](student, how={"replay": REPLAY}, **settings)
        method.policies = make_policies(student, ("theta", "ema", "ref"))
        method.optimizer.__init__(method.policies.weights("theta"), method.config)
    return method


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8)], ids=["full", "lora"])
@pytest.mark.parametrize("which", list(STUDENTS))
@pytest.mark.parametrize("kind", list(MAKE))
def test_replay_pulls_the_student_back_to_its_start_and_nothing_else(
    kind: str, which: str, lora: LoraConfig | None
) -> None:
    make, batch = STUDENTS[which]
    method = with_replay(kind, make(), lora)
    # At the start the student is its start, and the prior has no gradient.
    alone = with_replay(kind, make(), lora)
    metrics = step(method, replayed(batch(), ["a", "b"]))
    assert metrics["student/replay_prior"] == 0
    step(alone, batch())
    ours, theirs = (torch.cat([g.flatten() for g in gradients(m)]) for m in (method, alone))
    # Half of the update's prompts are replayed.
    assert float((ours - theirs / 2).norm() / theirs.norm()) < 1e-3
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        for master in method.policies.weights("theta").masters:
            master.add_(torch.randn(master.shape, generator=draw), alpha=0.02)
    method.policies.weights("theta").publish()
    assert step(method, replayed(batch(1), ["a", "b"]))["student/replay_prior"] > 0


def test_a_replayed_update_is_the_same_in_micro_batches_and_over_ranks() -> None:
    whole, pieces = (
        make_afd(wan_student(), how={"replay": REPLAY}, micro_batch=size, learning_rate=1e-2)
        for size in (None, 1)
    )
    for update in range(2):
        lines = [
            step(method, replayed(wan_batch(update), ["a", "b", "c"])) for method in (whole, pieces)
        ]
    assert lines[0]["student/replay_prior"] == pytest.approx(
        lines[1]["student/replay_prior"], rel=1e-3
    )
    ours, theirs = weights(whole, "theta"), weights(pieces, "theta")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)


def test_prompts_with_a_cached_video_count_once_among_all() -> None:
    """Two of the teacher's and one of two replayed ones: AFD on three of four, the prior on two."""
    prompts = ["up", "up!", "a"]
    method, alone = (with_replay("afd", wan_student()) for _ in range(2))
    mixed, three = (wan_batch(count=3) for _ in range(2))
    mixed.prompts = three.prompts = prompts
    mixed.cached = 1
    step(method, replayed(mixed, ["a", "bb"]))
    step(alone, three)
    assert (mixed.share, mixed.replay_share) == (0.75, 0.5)
    ours, theirs = (torch.cat([g.flatten() for g in gradients(m)]) for m in (method, alone))
    # At the start the prior to it has no gradient.
    assert float((ours - 0.75 * theirs).norm() / theirs.norm()) < 1e-3


def config(out: Path, prompts: Path, *overrides: str) -> RunConfig:
    replay = {"fraction": 0.5, "prompts": str(prompts), "weight": 2.0}
    data = {**SMALL, "out": str(out), "replay": replay, "checkpoint": {"every": 1}, "updates": 4}
    return make_config(data, [f"teacher.path={out.parent / 'teacher'}", *overrides])


@pytest.mark.parametrize("method", ["afd", "sft", "gan"])
def test_a_stopped_run_with_replay_continues_bit_by_bit(tmp_path: Path, method: str) -> None:
    prompts = tmp_path / "earlier.txt"
    prompts.write_text("a ball\nanother ball\na third ball\n", encoding="utf-8")
    train(config(tmp_path / "straight", prompts, f"method={method}"))
    train(config(tmp_path / "parts", prompts, f"method={method}", "updates=2"))
    train(load_run(tmp_path / "parts", ["updates=4"]))
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "straight")
    assert numbers(tmp_path / "parts")[-1]["student/replay_prior"] > 0
    prompts.write_text("other\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"replay\.prompts|other prompts"):
        train(load_run(tmp_path / "parts", ["updates=5"]))


class Spied:
    """The batches of a run, beside what its method makes of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Batch] = []
        rollout = Afd.rollout

        def noted(method: Afd, batch: Batch) -> None:
            self.seen.append(batch)
            rollout(method, batch)

        monkeypatch.setattr(Afd, "rollout", noted)


def test_earlier_teachers_videos_are_learned_from_and_nothing_is_bought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of three prompts have one; the run keeps to the files that were there when it began."""
    caplog.set_level(logging.INFO, "afd")
    spied, earlier = Spied(monkeypatch), tmp_path / "earlier"
    write_folder(earlier, "nuis", 3, 5, domain="heavy")
    lines = (earlier / "prompts.jsonl").read_text().splitlines()
    held = [json.loads(line)["prompt"] for line in lines]
    (earlier / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines[:2]))
    ledger = earlier / "ledger.sqlite3"
    ledger.write_bytes(b"opened by nobody")
    prompts = tmp_path / "earlier.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in held), encoding="utf-8")
    places = json.dumps([str(earlier), str(tmp_path / "gone")])
    more = ["replay.teacher=cached", f"replay.videos={places}", "prompts_per_update=4"]
    train(config(tmp_path / "straight", prompts, "method=afd", *more))
    whole, spied.seen = spied.seen, []
    words = "replay: 2 of 3 prompts have a video of an earlier teacher (2 videos)"
    assert words in caplog.text
    assert f"replay.videos: {tmp_path / 'gone'} is not there" in caplog.text
    for batch in whole:
        assert batch.replay is not None
        assert batch.prompts[2:] == [p for p in batch.replay.prompts if p in held[:2]]
        assert batch.cached == len(batch.prompts) - 2
        assert len(batch.teacher_BFCHW) == len(batch.prompts)
    # Both of the replayed prompts of an update have one, or one of them.
    assert {batch.cached for batch in whole} == {1, 2}
    train(config(tmp_path / "parts", prompts, "method=afd", *more, "updates=2"))
    (earlier / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines))
    train(load_run(tmp_path / "parts", ["updates=4"]))
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "straight")
    for ours, theirs in zip(spied.seen, whole, strict=True):
        assert ours.prompts == theirs.prompts
        assert torch.equal(ours.teacher_BFCHW, theirs.teacher_BFCHW)
    assert ledger.read_bytes() == b"opened by nobody"
    names = {"prompts.jsonl", "ledger.sqlite3"}
    assert {p.name for p in earlier.iterdir() if p.suffix != ".mp4"} == names
    # A video that was replaced is noticed.
    first = earlier / json.loads(lines[0])["file"]
    shutil.copy(earlier / json.loads(lines[2])["file"], first)
    with pytest.raises(TeacherError, match="is not the one that this run was trained on"):
        train(load_run(tmp_path / "parts", ["updates=6"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["replay.teacher=cached"], "replay.teacher: got cached without replay.videos"),
        (
            ["replay.teacher=cached", "replay.videos=[x]", "method=gan"],
            "got cached with method=gan",
        ),
        (
            ["replay.teacher=cached", "replay.videos=[x]", "teacher.robust.trim=0.1"],
            "got cached with teacher.robust",
        ),
        (["replay.teacher=bought"], "replay.teacher is 'bought'"),
    ],
)
def test_videos_that_cannot_be_learned_from_are_one_sentence(
    overrides: list[str], words: str
) -> None:
    start = {"prompts_per_update": 2, "replay": {"fraction": 0.5, "prompts": "x"}}
    with pytest.raises(ConfigError) as raised:
        make_config(start, overrides)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["replay.fraction=0.5"], "replay.fraction: got 0.5 without replay.prompts"),
        (["replay.fraction=0.01", "replay.prompts=x"], "0 of the 2 prompts of an update"),
        (["replay.fraction=0.9", "replay.prompts=x"], "2 of the 2 prompts of an update"),
        (["replay.fraction=1", "replay.prompts=x"], "replay.fraction is 1"),
        (["replay.fraction=0.5", "replay.prompts=x", "replay.weight=0"], "replay.weight is 0"),
        (["replay.fraction=0.5", "replay.prompts=x", "method=dmd"], "with method=dmd; needed: 0"),
        (["replay.fraction=0.5", "replay.prompts=x", "method=sft"], "replay.weight: not given"),
    ],
)
def test_a_replay_that_cannot_be_is_one_sentence(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_config({"prompts_per_update": 2}, overrides)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_of_no_prompts_is_one_sentence(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"replay\.prompts: contains no prompt"):
        train(config(tmp_path / "run", empty))


def test_several_held_out_sets_are_measured_by_name_and_again_with_overrides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"gravity": {"domain": "gravity"}, "style": {"domain": "style", "seed": 5}}
    evaluation = {"kind": "physics", "videos": 4, "curve_videos": 2, "every": 0, "sets": sets}
    data = {**SMALL, "out": str(tmp_path / "run"), "evaluation": evaluation}
    run = make_config(data)
    train(run)
    (line,) = [json.loads(x) for x in (tmp_path / "run" / "evaluation.jsonl").open()]
    metrics = line["metrics"]
    assert {"gravity/phys", "gravity/rend", "style/rend", "style/adh"} <= metrics.keys()
    assert "style/phys" not in metrics  # its teacher has no gravity of its own
    assert not {"phys", "rend"} & metrics.keys()
    capsys.readouterr()
    words = ["eval", str(tmp_path / "run"), "evaluation.sets={only: {domain: light}}"]
    assert main([*words, "--videos", "4"]) == DONE
    again = json.loads(capsys.readouterr().out)["metrics"]
    assert {key.partition("/")[0] for key in again} == {"only"}
    same = ["eval", str(tmp_path / "run"), "--videos", "4"]
    assert main(same) == DONE
    assert json.loads(capsys.readouterr().out)["metrics"] == metrics
    assert main([*same, "seed=3"]) == 2
    assert "seed: 0 there, 3 now" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"evaluation\.sets\.a\.domain: got sun; needed: one of"):
        make_config(data, ["evaluation.sets={a: {domain: sun}}"])
    with pytest.raises(ConfigError, match=r"evaluation\.sets\.a\.kind: got 'none2'"):
        make_config(data, ["evaluation.sets={a: {kind: none2}}"])
