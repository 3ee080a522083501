"""Every full-size training configuration from dry run to export, on tiny models in real layouts."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from afd.cli import main
from afd.config.run import RunConfig, load_config
from afd.errors import DONE, STOPPED
from afd.models.wan.checkpoints import load_checkpoint
from afd.trainer.loop import Trainer
from tests.afd.released_models import overrides, write_models
from tests.afd.test_text import LENGTH

CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[2] / "python" / "afd" / "configs").glob("*480x832.yaml")
    if "method:" in path.read_text(encoding="utf-8")
)


ASTROLABE = "astrolabe_self_forcing_480x832"
# Not the student for which settings are reported.
KREA = "krea_14b_480x832"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("released"))


def command(path: Path, models: Path, out: Path) -> list[str]:
    """The words after `afd`: the file as shipped, small by overrides alone."""
    config = load_config(path)
    assert config.student.kind == "wan"
    assert config.student.checkpoint is not None
    here = [f"student.checkpoint={models / config.student.checkpoint}", f"out={out}", "updates=2"]
    return ["train", str(path), *overrides(models, config.method, list(config.rewards)), *here]


def stop_in_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the first update is made."""
    update = Trainer._update

    def interrupted(*args: Any) -> Any:
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(Trainer, "_update", interrupted)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_full_size_run_is_planned_trained_stopped_resumed_exported_and_measured(
    path: Path,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    words = command(path, models, out)

    assert main([*words, "--dry-run"]) == DONE
    assert "GiB" in capsys.readouterr().out
    assert not out.exists()

    stop_in_first_update(monkeypatch)
    assert main(words) == STOPPED
    assert [line["update"] for line in lines(out / "metrics.jsonl")] == [1]
    assert main(["resume", str(out)]) == DONE
    assert (out / "DONE").exists()

    metrics = lines(out / "metrics.jsonl")
    assert [line["update"] for line in metrics] == [1, 2]
    for line in metrics:
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
        assert line["student/grad_norm"] > 0
    evaluations = lines(out / "evaluation.jsonl")
    assert [line["update"] for line in evaluations] == [0, 2]

    assert main(["export", str(out), f"out={tmp_path / 'export'}", "kind=self_forcing"]) == DONE
    student = load_config(path).student
    assert student.kind == "wan"
    sizes = {**student.network, "head_dim": 16, "text_len": LENGTH}
    start = load_checkpoint(student_file(words), ema=student.ema, **sizes)
    end = load_checkpoint(tmp_path / "export" / "model.pt", **sizes)
    moved = [(a - b).abs().max() for a, b in zip(start.parameters(), end.parameters(), strict=True)]
    assert 0 < max(moved) < 1e-3

    capsys.readouterr()
    assert main(["eval", str(out), "--videos", "2"]) == DONE
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"] == evaluations[-1]["metrics"]


def student_file(words: list[str]) -> Path:
    (word,) = (word for word in words if word.startswith("student.checkpoint="))
    return Path(word.partition("=")[2])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_as_shipped_is_planned_and_says_what_is_not_here(
    path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # the paths of the file are the user's own
    assert main(["train", str(path), "--dry-run"]) == DONE
    said = " ".join(capsys.readouterr().out.split())
    assert "21 latent frames" in said
    assert "GPU-hours" in said
    assert "student.checkpoint: checkpoints/" in said
    assert f"teacher.path: {load_config(path).teacher.path} is not there" in said
    assert list(tmp_path.iterdir()) == []


def test_the_settings_are_those_reported_for_the_student() -> None:
    """Luo et al., arXiv 2605.26105, as the authors' cards and others repeat them."""
    runs = [load_config(path) for path in CONFIGS if path.stem not in (ASTROLABE, KREA)]
    assert {run.method for run in runs} == {"afd", "sft", "gan", "dmd"}
    for run in runs:
        assert run.student.kind == "wan"
        assert run.student.lora is not None
        assert (run.student.lora.rank, run.student.lora.alpha) == (256, 256)
        assert (run.video.frames, run.video.height, run.video.width) == (81, 480, 832)
        assert (run.video.fps, run.updates) == (16, 300)
        assert run.student.dtype == "bfloat16"
        settings = getattr(run, run.method)
        assert settings.learning_rate == 1e-5
        assert (settings.weight_decay, settings.grad_clip) == (1e-4, 1.0)
        # Reported is a constant rate; AFD has the rise and fall of the laptop task.
        afd = run.method == "afd"
        assert (settings.warmup_updates, settings.cosine_updates) == (
            (20, 270) if afd else (0, None)
        )
        assert settings.ema_decay == 0.99
        assert batch_size(run) == 32
        if run.method in ("afd", "gan"):
            assert run.discriminator.kind == "videoalign"
            assert (run.discriminator.head, run.discriminator.lora_rank) == ("TA", 64)
            assert run.discriminator.learning_rate == 5e-6
            assert run.video.codec_match
        if run.method == "afd":
            assert run.discriminator.loss == "bt"
            assert (run.afd.nft_beta, run.afd.prior_weight, run.afd.adv_clip) == (0.1, 1e-4, 5.0)


def test_astrolabes_settings_are_those_of_its_code() -> None:
    """franklinz233/Astrolabe 35a5347, scripts/train_nft_wan.py and its configurations."""
    (run,) = (load_config(path) for path in CONFIGS if path.stem == ASTROLABE)
    assert run.discriminator is None
    assert {n: (r.head, r.grey, r.weight) for n, r in run.rewards.items()} == {
        "mq": ("MQ", True, 1),
        "vq": ("VQ", False, 1),
        "ta": ("TA", False, 1),
    }
    assert run.student.lora is not None
    assert (run.student.lora.rank, run.student.lora.alpha) == (256, 256)
    afd = run.afd
    assert (afd.learning_rate, afd.nft_beta, afd.adv_clip) == (1e-5, 0.1, 5.0)
    assert (afd.weighting, afd.prior_space, afd.context) == ("x0", "x0", "noisy")
    assert (afd.timestep_list, afd.timestep_per) == ([1.0, 0.75, 0.5, 0.25], "video")
    assert (afd.old_decay, afd.old_decay_slope, afd.normalize) == (0.5, 0.001, "global")
    toy = load_config(CONFIGS[0].parent / "astrolabe_toy.yaml")
    assert toy.discriminator is None
    same = ("nft_beta", "adv_clip", "weighting", "prior_space", "context", "timestep_list")
    same += ("timestep_per", "old_decay", "old_decay_slope", "normalize", "prior_weight")
    assert all(getattr(toy.afd, key) == getattr(afd, key) for key in same)


def batch_size(run: RunConfig) -> int:
    return run.prompts_per_update * getattr(getattr(run, run.method), "samples_per_prompt", 1)
