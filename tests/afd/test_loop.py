"""The trainer: what a run writes, warns of, refuses and how it stops."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from afd.data.sampler import Sampler
from afd.errors import ConfigError, TeacherError, TrainingError
from afd.methods.base import Batch
from afd.teachers.base import Request
from afd.trainer.health import Signs, signs
from afd.trainer.logging import Lines
from afd.trainer.loop import Outcome, train
from tests.afd.tiny import Interrupted, TinyMethod, make_clips, tiny_config


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("teacher") / "clips")


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_the_files_of_the_layout(tmp_path: Path, clips: Path) -> None:
    out = tmp_path / "run"
    config = tiny_config(out, clips, "logging.tensorboard=true")
    assert train(config, method=TinyMethod()) is Outcome.FINISHED
    lines = metrics(out)
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert set(line["phase_s"]) == {
            "teacher",
            "rollout",
            "discriminator",
            "student",
            "evaluate",
        }
        assert line["phase_s"]["student"] > 0
        assert line["time_s"] > 0
        assert {"discriminator/margin", "student/loss"} <= set(line)
    assert yaml.safe_load((out / "config.yaml").read_text())["updates"] == 6
    assert "ops" in json.loads((out / "doctor.json").read_text())
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == [
        "update_000004",
        "update_000006",
    ]
    assert list((out / "tensorboard").glob("events.*"))
    assert (out / "DONE").read_text().startswith("6 updates")


def test_the_log_names_the_backend_of_every_op(tmp_path: Path, clips: Path) -> None:
    train(tiny_config(tmp_path / "run", clips), method=TinyMethod())
    log = (tmp_path / "run" / "train.log").read_text()
    assert "op nft_loss runs on backend " in log
    assert "op forward_noise runs on backend " in log


def test_two_runs_of_one_configuration_are_equal(tmp_path: Path, clips: Path) -> None:
    for name in ("one", "two"):
        train(tiny_config(tmp_path / name, clips), method=TinyMethod())
    timeless = [
        [{k: v for k, v in line.items() if k not in ("time_s", "phase_s")} for line in lines]
        for lines in (metrics(tmp_path / "one"), metrics(tmp_path / "two"))
    ]
    assert timeless[0] == timeless[1]


def test_a_finished_run_is_never_run_again(tmp_path: Path, clips: Path) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, clips), method=TinyMethod())
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert train(tiny_config(out, clips), method=TinyMethod()) is Outcome.ALREADY_FINISHED
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("override", ["seed=1", "afd.nft_beta=0.5", "updates=5"])
def test_a_finished_run_of_another_configuration_is_refused(
    tmp_path: Path, clips: Path, override: str
) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, clips), method=TinyMethod())
    with pytest.raises(ConfigError) as error:
        train(tiny_config(out, clips, override), method=TinyMethod())
    assert override.split("=")[0] in str(error.value)
    assert "choose another out=" in str(error.value)


class Broken(TinyMethod):
    """Fails before the first number."""

    def rollout(self, batch: Batch) -> None:
        raise RuntimeError("no memory")


def test_a_run_that_wrote_no_number_yet_may_be_corrected(tmp_path: Path, clips: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="no memory"):
        train(tiny_config(out, clips, "evaluation.every=0"), method=Broken())
    corrected = tiny_config(out, clips, "evaluation.every=0", "seed=1")
    assert train(corrected, method=TinyMethod()) is Outcome.FINISHED


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_update_and_saves(tmp_path: Path, clips: Path, number: int) -> None:
    out = tmp_path / "run"
    config = tiny_config(out, clips)
    assert train(config, method=Interrupted(2, number)) is Outcome.STOPPED
    assert [line["update"] for line in metrics(out)] == [1, 2, 3]
    assert (out / "checkpoints" / "update_000003" / "meta.json").is_file()
    assert f"continue: afd resume {out}" in (out / "train.log").read_text()
    assert not (out / "DONE").exists()
    assert train(config, method=TinyMethod()) is Outcome.FINISHED


def test_handlers_of_signals_are_put_back(tmp_path: Path, clips: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(tiny_config(tmp_path / "run", clips), method=TinyMethod())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_number_that_is_not_finite_stops_the_run(tmp_path: Path, clips: Path) -> None:
    class Broken(TinyMethod):
        def discriminator_step(self, batch: Batch) -> dict[str, float]:
            return {"discriminator/margin": float("nan") if batch.update == 3 else 0.0}

    with pytest.raises(TrainingError, match=r"update 4: discriminator/margin = nan.*update_000002"):
        train(tiny_config(tmp_path / "run", clips), method=Broken())
    assert [line["update"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


def test_two_processes_cannot_write_one_run(tmp_path: Path, clips: Path) -> None:
    class Nested(TinyMethod):
        def discriminator_step(self, batch: Batch) -> dict[str, float]:
            with pytest.raises(TrainingError, match="another process is training here"):
                train(tiny_config(tmp_path / "run", clips), method=TinyMethod())
            return super().discriminator_step(batch)

    assert train(tiny_config(tmp_path / "run", clips), method=Nested()) is Outcome.FINISHED


def test_the_sampler_asks_everything_once_before_anything_again() -> None:
    sampler = Sampler([Request(str(i)) for i in range(7)], seed=3)
    drawn = [request.prompt for request in sampler.draw(21)]
    for start in (0, 7, 14):
        assert sorted(drawn[start : start + 7]) == [str(i) for i in range(7)]
    assert drawn[:7] != drawn[7:14]


def test_the_sampler_goes_on_from_its_cursor() -> None:
    requests = [Request(str(i)) for i in range(5)]
    sampler = Sampler(requests, seed=1)
    sampler.draw(7)
    other = Sampler(requests, seed=1)
    other.load_state_dict(sampler.state_dict())
    assert other.draw(9) == sampler.draw(9)
    with pytest.raises(TeacherError, match="made with 5 teacher videos, the folder contains 4"):
        Sampler(requests[:4], seed=1).load_state_dict(sampler.state_dict())
    with pytest.raises(TeacherError, match="made with other prompts, or with these in another o"):
        Sampler(requests[::-1], seed=1).load_state_dict(sampler.state_dict())


@pytest.mark.parametrize(
    ("values", "sign"),
    [
        ({"discriminator/margin": 5.5}, "margin"),
        ({"discriminator/accuracy": 1.0}, "accuracy"),
        ({"student/r_mean": 0.95}, "r high"),
        ({"student/r_at_1": 0.6}, "r high"),
        ({"student/r_mean": 0.05}, "r low"),
        ({"student/r_at_0": 0.6}, "r low"),
        ({"student/zero_std_groups": 0.25}, "zero std"),
    ],
)
def test_a_sign_of_trouble_is_named(values: dict[str, float], sign: str) -> None:
    assert [name for name, _ in signs(values)] == [sign]


def test_a_healthy_update_has_no_sign() -> None:
    healthy = {"discriminator/margin": 2.0, "discriminator/accuracy": 0.9, "student/r_mean": 0.5}
    assert list(signs(healthy)) == []
    assert list(signs({})) == []


def test_a_sign_is_logged_once_until_it_goes_away(caplog: pytest.LogCaptureFixture) -> None:
    watch = Signs()
    with caplog.at_level(logging.WARNING, logger="afd"):
        for step, margin in enumerate([9.0, 9.0, 1.0, 9.0]):
            watch.updated(step, {"discriminator/margin": margin})
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "update 0",
        "update 3",
    ]


def test_one_perfect_batch_is_no_sign_but_a_hundred_are(caplog: pytest.LogCaptureFixture) -> None:
    watch = Signs()
    with caplog.at_level(logging.WARNING, logger="afd"):
        for step, accuracy in enumerate([1.0, 0.9] * 50 + [1.0] * 100):
            watch.updated(step, {"discriminator/accuracy": accuracy})
    assert len(caplog.records) == 1
    assert int(caplog.records[0].getMessage().split()[1].rstrip(":")) > 100


def test_a_score_that_stops_ranking_by_physics_is_told(caplog: pytest.LogCaptureFixture) -> None:
    watch = Signs()
    with caplog.at_level(logging.WARNING, logger="afd"):
        for step, value in enumerate([0.6] * 5 + [0.0] * 20):
            watch.updated(step, {"agreement/phys": value})
    assert len(caplog.records) == 1
    assert "fell from 0.60" in caplog.text


def test_lines_after_the_resumed_update_and_torn_lines_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\n{"update": 2}\n{"update": 3}\n{"st')
    lines = Lines(path, resumed_at=2)
    lines.write({"update": 3, "new": True})
    lines.close()
    assert path.read_text() == '{"update": 1}\n{"update": 2}\n{"update": 3, "new": true}\n'


def test_the_default_random_state_is_restored_on_resume(tmp_path: Path, clips: Path) -> None:
    config = tiny_config(tmp_path / "run", clips)
    train(config, method=Interrupted(2, signal.SIGINT))
    after_stop = torch.get_rng_state()
    torch.manual_seed(999)
    train(config.model_copy(update={"updates": 3}), method=TinyMethod())
    assert torch.equal(torch.get_rng_state(), after_stop)
