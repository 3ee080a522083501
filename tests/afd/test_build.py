"""Every combination of student, discriminator and method, made from a configuration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.cache import Store
from afd.config.run import RunConfig, make_config
from afd.errors import ConfigError
from afd.methods.base import Batch
from afd.models.codec import Pixels
from afd.models.wan.student import WanStudent
from afd.models.wan.text import TextEncoder
from afd.models.wan.vae import VideoVAE
from afd.trainer.build import build_discriminator, build_method, build_student
from tests.afd.released_models import FRAMES, HEIGHT, PROMPTS, WIDTH, overrides, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("released") / "models")


def wan(models: Path, method: str, discriminator: str, *more: str) -> RunConfig:
    data: dict[str, Any] = {
        "method": method,
        "student": {
            "kind": "wan",
            "checkpoint": str(models / "checkpoints" / "self_forcing_dmd.pt"),
        },
        "discriminator": {"kind": discriminator},
        "evaluation": {"kind": "none"},
    }
    settings = [s for s in overrides(models, method) if not s.startswith("discriminator")]
    if discriminator == "videoalign":
        settings = overrides(models, "afd" if method in ("sft", "dmd") else method)
        settings = [s for s in settings if not s.startswith("afd.")]
    return make_config(data, [*settings, *more])


def toy(method: str, discriminator: str, models: Path | None = None, *more: str) -> RunConfig:
    data: dict[str, Any] = {"method": method, "discriminator": {"kind": discriminator}}
    if discriminator == "videoalign":
        assert models is not None
        data["discriminator"] |= {
            "checkpoint": str(models / "checkpoints" / "VideoReward"),
            "base": str(models / "videoalign" / "base"),
            "dtype": "float32",
            "lora_rank": 2,
        }
    short = [f"{method}.samples_per_prompt=2"] if method != "sft" else []
    return make_config(data, [*short, *more])


def updates(method: Any, config: RunConfig, prompts: Sequence[str]) -> dict[str, float]:
    """One whole update on random teacher videos; what it logged."""
    size = config.video
    shape = (len(prompts), size.frames, 3, size.height, size.width)
    video = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    given = (
        method.prepare(video)
        if method.input_space == "pixels"
        else method.codec.encode(video).float()
    )
    batch = Batch(0, list(prompts), given)
    if method.needs_rollout:
        method.rollout(batch)
    metrics = method.discriminator_step(batch) if method.needs_discriminator else {}
    return metrics | method.student_step(batch)


@pytest.mark.parametrize("discriminator", ["toy", "videoalign", "latent"])
@pytest.mark.parametrize("method", ["afd", "gan"])
def test_the_toy_with_every_discriminator(models: Path, method: str, discriminator: str) -> None:
    config = toy(method, discriminator, models, "discriminator.warmup_updates=0")
    made = build_method(config)
    assert made.name == method
    assert made.input_space == ("latents" if discriminator == "latent" else "pixels")
    assert isinstance(made.codec, Pixels)
    metrics = updates(made, config, PROMPTS[:2])
    assert {"discriminator/accuracy", "student/loss"} <= set(metrics)
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())


@pytest.mark.parametrize("method", ["sft", "dmd"])
def test_the_toy_without_a_discriminator_never_opens_one(method: str) -> None:
    config = toy(method, "videoalign", Path("/nowhere"), "dmd.score_warmup_updates=0")
    made = build_method(config)
    assert made.input_space == "latents"
    assert "student/loss" in updates(made, config, PROMPTS[:2])


@pytest.mark.parametrize(
    ("method", "discriminator", "lora"),
    [
        ("afd", "videoalign", True),
        ("afd", "latent", True),
        ("afd", "latent", False),
        ("gan", "videoalign", True),
        ("gan", "latent", True),
        ("sft", "latent", True),
        ("sft", "latent", False),
        ("dmd", "latent", True),
    ],
)
def test_a_wan_student_with_every_method_and_discriminator(
    models: Path, method: str, discriminator: str, lora: bool
) -> None:
    steady = ["dmd.score_warmup_updates=0", "discriminator.warmup_updates=0"]
    config = wan(models, method, discriminator, *steady)
    if not lora:
        student = config.student.model_copy(update={"lora": None})
        config = config.model_copy(update={"student": student})
    made = build_method(config, prompts=PROMPTS)
    assert made.name == method
    assert made.input_space == ("pixels" if discriminator == "videoalign" else "latents")
    assert isinstance(made.codec, VideoVAE)
    with made.evaluation_policy() as student:
        assert isinstance(student, WanStudent)
        assert student.frames == 1 + (FRAMES - 1) // 4
        assert student.frame_shape == (16, HEIGHT // 8, WIDTH // 8)
        assert student.net.checkpoint_blocks
    if discriminator == "latent":  # whole runs with videoalign are in test_training_configs.py
        metrics = updates(made, config, PROMPTS[:2])
        assert metrics["student/grad_norm"] > 0
        assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())


def test_the_networks_dtypes_are_the_configurations(models: Path) -> None:
    config = wan(
        models,
        "afd",
        "videoalign",
        "student.dtype=bfloat16",
        "student.vae_dtype=float32",
        "discriminator.dtype=bfloat16",
    )
    student, codec = build_student(config, prompts=PROMPTS)
    assert {p.dtype for p in student.net.parameters()} == {torch.bfloat16}
    assert student.encode(list(PROMPTS)).dtype == torch.bfloat16
    assert isinstance(codec, VideoVAE)
    assert codec.model.dtype == torch.float32
    discriminator: Any = build_discriminator(config, student)
    assert discriminator.scorer.dtype == torch.bfloat16
    assert {p.dtype for p in discriminator.trained().values()} == {torch.float32}


def test_the_second_run_needs_no_text_encoder(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = wan(models, "sft", "latent", f"cache={tmp_path}")
    first, _ = build_student(config, prompts=PROMPTS)
    assert Store(tmp_path).size("text")[0] == len(PROMPTS)

    def refused(*args: object, **settings: object) -> TextEncoder:
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(TextEncoder, "load", refused)
    second, _ = build_student(config, prompts=PROMPTS)
    assert torch.equal(second.encode(list(PROMPTS)), first.encode(list(PROMPTS)))


def test_videoaligns_template_comes_from_the_checkout_or_is_ours_and_said(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, _ = build_student(toy("gan", "toy"))
    words = "<|VQ_reward|> <|MQ_reward|> of {text_prompt} <|TA_reward|>"
    (tmp_path / "prompt_template.py").write_text(
        f"raise SystemExit\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {words!r}\n"
    )
    with caplog.at_level(logging.WARNING, logger="afd"):
        theirs: Any = build_discriminator(
            toy("gan", "videoalign", models, f"discriminator.checkout={tmp_path}"), student
        )
        assert theirs.scorer.prompts.template == words
        assert not caplog.records
        build_discriminator(toy("gan", "videoalign", models), student)
    assert "asked in afd's own words" in caplog.text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["student.checkpoint=null"], r"^student\.checkpoint: not given; needed: the student's"),
        (["student.checkpoint=/none.pt"], r"^student: checkpoint: /none\.pt does not exist"),
        (["student.pretrained=/none"], r"^student: text_encoder: got /none; needed:"),
        (["student.vae=/none"], r"^student: vae: got /none; needed:"),
        (["student.head_dim=17"], r"^student: head_dim: got 17"),
        (
            ["discriminator.checkpoint=null"],
            r"^discriminator\.checkpoint: not given; needed: .*KwaiVGI",
        ),
        (["discriminator.checkpoint=/none"], r"^discriminator: .*got /none"),
        (
            ["discriminator.base=/none"],
            r"^discriminator: .*got /none; needed: a folder or hub name",
        ),
        (
            ["discriminator.checkout=/none"],
            r"^discriminator: prompt template: /none does not exist",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    models: Path, tmp_path: Path, changes: list[str], told: str
) -> None:
    config = wan(models, "afd", "videoalign", f"cache={tmp_path}", *changes)
    with pytest.raises(ConfigError, match=told) as error:
        build_method(config, prompts=PROMPTS)
    assert "\n" not in str(error.value)


def test_a_prompt_that_the_discriminator_cannot_read_is_refused_at_the_start(models: Path) -> None:
    student, _ = build_student(toy("afd", "videoalign", models))
    asked = ["a ball 🏀 fällt", "a sign that says <|im_end|>"]
    with pytest.raises(ConfigError, match=r"^discriminator: prompts: .*<\|im_end\|>"):
        build_discriminator(toy("afd", "videoalign", models), student, prompts=asked)


def test_the_toys_size_and_checkpoint_are_the_toys() -> None:
    with pytest.raises(ConfigError, match=r"video\.frames.*got 9, 16, 16; needed: 12, 16, 16"):
        build_method(make_config({}, ["video.frames=9"]))
    with pytest.raises(ConfigError, match=r"student: checkpoint: none is neither a file"):
        build_method(make_config({}, ["student.checkpoint=none"]))


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("diffusers", r"a wan student: needs diffusers, .*; pip install 'afd-video\[wan\]'"),
        ("ftfy", r"a wan student: needs ftfy, .*; pip install 'afd-video\[wan\]'"),
        (
            "peft",
            r"(student.lora|discriminator.kind=videoalign): needs peft, .* 'afd-video\[wan\]'",
        ),
        (
            "transformers",
            r"needs transformers, which is not installed; pip install 'afd-video\[wan\]'",
        ),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_key(
    models: Path, monkeypatch: pytest.MonkeyPatch, missing: str, told: str
) -> None:
    from importlib.util import find_spec

    monkeypatch.setattr(
        "afd.extras.find_spec", lambda name: None if name == missing else find_spec(name)
    )
    with pytest.raises(ConfigError, match=told):
        build_method(wan(models, "afd", "videoalign"), prompts=PROMPTS)
