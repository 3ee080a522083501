"""Several teachers, and teachers that are wrong: routes, ensembles, heads, mitigation, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from afd.audit.audit import audit
from afd.audit.collect import listed, read_all
from afd.cli import main
from afd.config.run import RunConfig, make_config
from afd.data.sampler import Sampler
from afd.errors import ConfigError, TeacherError
from afd.lab.config import ToyDiscriminatorConfig
from afd.lab.detection import detection
from afd.lab.discriminator import ToyDiscriminator
from afd.lab.simulator import ATTRIBUTES, FAULTS, write_folder, write_video
from afd.methods.robust import Robust
from afd.planning.plan import make_plan
from afd.teachers.base import Request
from afd.teachers.config import RobustConfig
from afd.trainer.loop import train
from afd.trainer.several import AFTER, Several
from tests.afd.distributed import run
from tests.afd.together import together
from tests.tolerances import DISTRIBUTED

PROMPTS = [a.prompt for a in ATTRIBUTES]
TINY = {
    "device": "cpu",
    "prompts_per_update": 2,
    "updates": 4,
    "checkpoint": {"every": 2},
    "discriminator": {"warmup_updates": 1},
    "evaluation": {"kind": "none"},
    "logging": {"tensorboard": False, "progress": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    write_folder(root / "a", "nuis", 36, 0)
    write_folder(root / "b", "nuis", 36, 1, domain="drag")
    for name, side in (("left", 0), ("right", 1)):
        lines = [a.prompt for a in ATTRIBUTES if a.side == side]
        (root / f"{name}.txt").write_text("\n".join(lines))
    return {path.name: path for path in root.iterdir()}


def member(name: str, path: Path, **more: Any) -> dict[str, Any]:
    return {"name": name, "source": {"kind": "folder", "path": str(path)}, **more}


def mixed(folders: dict[str, Path], mode: str = "ensemble", **more: Any) -> dict[str, Any]:
    teachers = [member("a", folders["a"]), member("b", folders["b"], weight=3)]
    if mode == "route":
        teachers[0]["prompts"] = str(folders["left.txt"])
        teachers[1]["prompts"] = str(folders["right.txt"])
    return {"kind": "mix", "mode": mode, "teachers": teachers, **more}


def config(teacher: dict[str, Any], out: Path, **more: Any) -> RunConfig:
    return make_config({**TINY, **more, "teacher": teacher, "out": str(out)})


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- drawing ---


def test_routed_prompts_belong_to_one_teacher_and_are_drawn_by_weight(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    teacher: Any = config(mixed(folders, "route"), tmp_path).open_teacher()
    assert len(teacher.requests) == 36
    sampler = Sampler(teacher.units, 0, lambda drawn: teacher.weights(0))
    drawn = sampler.draw(360)
    share = sum(request.teacher == "b" for request in drawn) / len(drawn)
    assert share == pytest.approx(0.75, abs=0.03)
    assert {r.prompt for r in drawn if r.teacher == "a"} == {
        a.prompt for a in ATTRIBUTES if a.side == 0
    }
    again = Sampler(teacher.units, 0, lambda drawn: teacher.weights(0))
    again.draw(100)
    other = Sampler(teacher.units, 0, lambda drawn: teacher.weights(0))
    other.load_state_dict(again.state_dict())
    assert other.draw(50) == again.draw(50)


def test_without_weights_the_order_is_as_it_was() -> None:
    requests = [Request(str(i)) for i in range(5)]
    assert [r.prompt for r in Sampler(requests, 0).draw(5)] != ["0", "1", "2", "3", "4"]
    assert sorted(r.prompt for r in Sampler(requests, 0).draw(5)) == ["0", "1", "2", "3", "4"]


def test_an_ensemble_asks_every_teacher_or_so_many(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    both: Any = config(mixed(folders), tmp_path).open_teacher()
    assert len(both.units) == 36
    assert [r.teacher for r in both.expand(both.units[0])] == ["a", "b"]
    one: Any = config(mixed(folders, per_prompt=1), tmp_path).open_teacher()
    assert len(one.units) == 72
    assert {r.teacher for unit in one.units for r in one.expand(unit)} == {"a", "b"}


def test_weights_are_scheduled(folders: dict[str, Path], tmp_path: Path) -> None:
    given = mixed(folders)
    given["teachers"][0] |= {"weight": 1.0, "final_weight": 3.0, "weight_updates": 10}
    teacher: Any = config(given, tmp_path).teacher
    assert [round(teacher.weights_at(u)["a"], 3) for u in (0, 5, 10, 99)] == [0.25, 0.4, 0.5, 0.5]


# --- bad input ---


def test_bad_mixes_are_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(change: dict[str, Any], **more: Any) -> str:
        with pytest.raises(ConfigError) as error:
            config(mixed(folders) | change, tmp_path, **more)
        return str(error.value)

    a = member("a", folders["a"])
    assert "the name a twice" in refused({"teachers": [a, a]})
    assert "weight" in refused({"teachers": [a | {"weight": 0}]})
    nested = {"name": "b", "source": mixed(folders)}
    assert "kind: got mix; needed: one of folder" in refused({"teachers": [a, nested]})
    unknown = {"name": "b", "source": {"kind": "magic"}}
    assert "'magic'" in refused({"teachers": [a, unknown]})
    assert "teacher.per_prompt: got 3" in refused({"per_prompt": 3})
    assert "teacher.mode: got ensemble with method=sft" in refused({}, method="sft")
    assert "afd.normalize: got none" in refused({}, afd={"normalize": "none"})
    assert "weight_updates: got 0" in refused({"teachers": [a | {"final_weight": 2}]})
    assert "teacher.robust: got settings with method=sft" in refused(
        {"mode": "route", "robust": {"trim": 0.1}}, method="sft"
    )


def test_prompts_without_or_of_several_teachers_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shared = mixed(folders, "route")
    del shared["teachers"][0]["prompts"]
    with pytest.raises(TeacherError, match="belongs to a and to b"):
        config(shared, tmp_path).open_teacher()
    alien = tmp_path / "alien.txt"
    alien.write_text("A cow.\n")
    shared["teachers"][0]["prompts"] = str(alien)
    with pytest.raises(TeacherError, match=r"of no video of a, such as 'A cow\.'"):
        config(shared, tmp_path).open_teacher()
    lacking = mixed(folders)
    lacking["teachers"][0]["prompts"] = str(folders["left.txt"])
    with pytest.raises(TeacherError, match="a has no video of the prompt"):
        config(lacking, tmp_path).open_teacher()


def test_teachers_of_other_sizes_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.mkdir()
    write_video(large / "x.mp4", torch.zeros(12, 3, 32, 32))
    (large / "prompts.jsonl").write_text(json.dumps({"file": "x.mp4", "prompt": "cow"}) + "\n")
    given = mixed(folders, "route")
    given["teachers"][1] = member("b", large)
    with pytest.raises(TeacherError, match="of a are 16x16 at 8 a second, those of b 32x32"):
        config(given, tmp_path).open_teacher()
    with pytest.raises(TeacherError, match=r"video\.fps: got null"):
        config(given | {"resample": True}, tmp_path).open_teacher()
    config(given | {"resample": True}, tmp_path, video={"fps": 8.0}).open_teacher()


# --- training ---


@pytest.mark.parametrize("mode", ["route", "ensemble"])
def test_a_stopped_run_of_several_teachers_continues_to_the_same_bits(
    mode: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    robust = {"trim": 0.3, "after": 1, "balance": True, "downweight": True}
    teacher = mixed(folders, mode, robust=robust)
    train(config(teacher, tmp_path / "whole"))
    train(config(teacher, tmp_path / "parts", updates=2))
    (tmp_path / "parts" / "DONE").unlink()
    train(config(teacher, tmp_path / "parts"))
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    for a, b in zip(whole, parts, strict=True):
        assert {k: v for k, v in a.items() if k not in ("time_s", "phase_s")} == {
            k: v for k, v in b.items() if k not in ("time_s", "phase_s")
        }
    fates = [(tmp_path / name / "teacher_clips.json").read_text() for name in ("whole", "parts")]
    assert fates[0] == fates[1]
    clips = json.loads(fates[0])["clips"]
    assert any(clip["left_out"] for clip in clips)
    assert len({clip["drawn"] for clip in clips}) > 1
    if mode == "ensemble":
        last = whole[-1]
        assert last["teacher/a/weight"] == 0.25
        assert {"discriminator/accuracy/a", "teachers/a~b/correlation"} <= last.keys()


def test_two_processes_learn_from_several_teachers_as_one_does(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    robust = {"trim": 0.3, "after": 1, "balance": True}
    given = {**TINY, "teacher": mixed(folders, robust=robust), "updates": 2}
    train(make_config({**given, "out": str(tmp_path / "one")}))
    together(2, run, {**given, "out": str(tmp_path / "two")})
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        assert {"teacher/a/videos", "discriminator/accuracy/b", "robust/left_out"} <= one.keys()
        for key in one.keys() - {"time_s", "phase_s"}:
            np.testing.assert_allclose(two[key], one[key], **DISTRIBUTED, err_msg=key)
    ours, theirs = (
        json.loads((tmp_path / name / "teacher_clips.json").read_text())["clips"]
        for name in ("one", "two")
    )
    assert [clip["left_out"] for clip in ours] == [clip["left_out"] for clip in theirs]
    assert [clip["drawn"] for clip in ours] == pytest.approx([c["drawn"] for c in theirs])


def test_a_clean_toy_run_warns_of_nothing_and_its_clips_pass_its_own_audit(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(config({"kind": "folder", "path": str(folders["a"])}, out, updates=2))
    assert "WARNING" not in (out / "train.log").read_text()
    words = ["teacher", "audit", str(folders["a"]), f"run={out}", f"out={tmp_path / 'page'}"]
    assert main([*words, "videos=36"]) == 0
    found = json.loads((tmp_path / "page" / "audit.json").read_text())
    assert {"prompt", "worse"} <= found["clips"][0]["values"].keys()
    # The discriminator has learnt next to nothing.
    assert not [clip for clip in found["clips"] if {"prompt", "worse"} & clip["findings"].keys()]


def test_the_dry_run_names_every_teacher(folders: dict[str, Path], tmp_path: Path) -> None:
    given = mixed(folders)
    given["teachers"][0]["price_usd"] = 0.5
    lines = list(make_plan(config(given, tmp_path)).teacher.lines(0.0))
    assert any(line.startswith("a: ") and "USD at 0.50 each" in line for line in lines)
    assert any(line.startswith("b: ") for line in lines)
    assert lines[-1].startswith("teachers: 2, 0 videos to buy")


def test_each_head_learns_from_its_own_teacher() -> None:
    settings = ToyDiscriminatorConfig(random_looks=False, score_looks=1, noise=0.0, r1=0.0)
    discriminator = ToyDiscriminator(settings)
    discriminator.with_teachers(["a", "b"])
    generator = torch.Generator().manual_seed(0)
    student = torch.rand(8, 12, 3, 16, 16, generator=generator) - 0.5
    teacher = student.flip(1)
    prompts, names = PROMPTS[:8], ["a"] * 4 + ["b"] * 4
    before = discriminator.score(student, prompts, ["b"] * 8)
    for _ in range(3):
        found = discriminator.step(teacher[:4], student[:4], prompts[:4], names[:4])
    assert torch.equal(discriminator.score(student, prompts, ["b"] * 8), before)
    assert "accuracy/a" in found
    assert "accuracy/b" not in found
    with pytest.raises(ValueError, match="teachers: got 'c'"):
        discriminator.score(student, prompts, ["c"] * 8)


def test_equal_weights_of_pairs_are_no_weights() -> None:
    settings = ToyDiscriminatorConfig(random_looks=False, score_looks=1)
    both = [ToyDiscriminator(settings, seed=3) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    pair = torch.rand(2, 6, 12, 3, 16, 16, generator=generator) - 0.5
    plain = both[0].step(pair[0], pair[1], PROMPTS[:6])
    weighted = both[1].step(pair[0], pair[1], PROMPTS[:6], weights_B=torch.full((6,), 0.5))
    assert weighted["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    none = both[1].step(pair[0], pair[1], PROMPTS[:6], weights_B=torch.tensor([1.0] + [0.0] * 5))
    assert none["loss"] != pytest.approx(plain["loss"], rel=1e-3)


# --- mitigation and alarms ---


def test_the_videos_with_the_highest_smoothed_loss_are_left_out_and_may_return() -> None:
    robust = Robust(RobustConfig(trim=0.25, after=2), 4)
    clips = torch.arange(4)
    assert robust.update(clips, torch.tensor([0.1, 0.2, 3.0, 0.3])) == []
    assert robust.update(clips, torch.tensor([0.1, 0.2, 3.0, 0.3])) == [(2, True)]
    assert robust.weights([0, 2]).tolist() == [1.0, 0.0]
    again = Robust(RobustConfig(trim=0.25, after=2), 4)
    again.load_state_dict(json.loads(json.dumps(robust.state_dict())))
    for one in (robust, again):
        for _ in range(12):
            changed = one.update(clips, torch.tensor([5.0, 0.2, 0.0, 0.3]))
        assert changed == []
        assert one.trimmed_N.tolist() == [True, False, False, False]


def test_alarms_name_the_silent_head_and_the_opposed_teachers() -> None:
    signs = Several()
    for step in range(3 * AFTER):
        found = signs.look(
            {
                "discriminator/accuracy/a": 0.9 if step < AFTER else 0.5,
                "discriminator/accuracy/b": 0.9,
                "teachers/a~b/correlation": -0.6,
            }
        )
    assert set(found) == {"head a", "teachers a~b"}
    assert "teacher a no longer tells" in found["head a"]


# --- detection ---


def test_wrong_videos_are_detected(tmp_path: Path) -> None:
    write_folder(tmp_path / "t", "nuis", 200, 0, wrong=0.2)
    faults = json.loads((tmp_path / "t" / "faults.json").read_text())
    assert sum(map(bool, faults.values())) == 40
    files = listed(tmp_path / "t")
    assert files is not None
    found = detection(audit(read_all(files)).plain(), faults)
    assert set(found) == set(FAULTS)
    assert found["frozen"]["frozen"] >= 0.9
    assert found["watermark"]["overlay"] >= 0.9
    assert found["frozen"]["trust"] >= 0.9
    assert found["watermark"]["trust"] >= 0.9
