"""Parts from the hub: which commit a name resolves to, and that videos record it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afd.config.run import RunConfig, load_config, make_config, read_yaml
from afd.discriminators.config import VideoAlignConfig
from afd.errors import ConfigError
from afd.hub import local_copy, pinned
from afd.planning.plan import dry_run
from afd.sampling.sample import sample
from afd.trainer.loop import Outcome, train
from afd.trainer.run_folder import with_commits
from afd.video import read_comment
from tests.afd.hub import NAME, Hub
from tests.afd.released_models import overrides, write_models
from tests.afd.test_sample import make, models, quiet

__all__ = ["models"]
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(models: Path) -> Hub:
    """The small pipeline as a hub's model, which has moved on since v1."""
    return hub_of(models)


def hub_of(pipeline: Path) -> Hub:
    parts = [pipeline / part for part in ("text_encoder", "tokenizer", "vae")]
    files = [file for part in parts for file in part.rglob("*") if file.is_file()]
    held = {file.relative_to(pipeline).as_posix(): file.read_bytes() for file in files}
    return Hub(held, {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW})


def test_a_hub_name_is_pinned_to_the_commit_it_stands_for(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ("vae",)
    with hub.running(monkeypatch, str(tmp_path)):
        assert pinned(NAME, parts) == f"{NAME}@{NEW}"
        assert {path.partition("/")[0] for path in hub.given} == {"vae"}
        assert pinned(f"{NAME}@v1", parts) == pinned(f"{NAME}@{OLD}", parts) == f"{NAME}@{OLD}"
        assert pinned(f"{NAME}@v2", parts) == f"{NAME}@v2"
    # The hub is gone: what its cache holds under a name still has a commit.
    assert pinned(f"{NAME}@v1", parts) == f"{NAME}@{OLD}"
    assert local_copy(pinned(NAME, parts), parts, "x").name == NEW
    for other in (str(tmp_path), "no/such/path", "someone/Else"):
        assert pinned(other, parts) == other


def test_a_video_says_which_commit_its_parts_are_of(
    models: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(models, tmp_path / "out", pretrained=NAME, denoising_steps=[1000], frames=9)
    with hub.running(monkeypatch, str(tmp_path / "cache")):
        (path,) = sample(config, quiet()).written
        assert (
            json.loads(read_comment(path) or "")["settings"]["student"]["pretrained"]
            == f"{NAME}@{NEW}"
        )
        assert sample(config, quiet()).skipped == 1
        hub.revisions["main"] = OLD
        with pytest.raises(ConfigError, match=rf"pretrained: '{NAME}@{NEW}' there, '{NAME}@{OLD}'"):
            sample(config, quiet())
        there = config.student.model_copy(update={"pretrained": f"{NAME}@{NEW}"})
        here = config.model_copy(update={"student": there})
        assert sample(here, quiet()).skipped == 1


def test_a_run_records_the_commit_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = write_models(tmp_path)
    hub = hub_of(released / "wan")
    short = ["updates=1", "evaluation.kind=none", "evaluation.every=0", "logging.videos_every=0"]
    words = [*overrides(released, "sft"), *short, f"student.pretrained={NAME}"]
    words.append(f"student.checkpoint={released / 'checkpoints' / 'self_forcing_dmd.pt'}")

    def config(out: str) -> RunConfig:
        return load_config("sft_self_forcing_480x832", [*words, f"out={tmp_path / out}"])

    def recorded(out: str) -> str:
        return str(read_yaml(tmp_path / out / "config.yaml")["student"]["pretrained"])

    with hub.running(monkeypatch, str(tmp_path / "cache")):
        assert train(config("run"), console=quiet()) is Outcome.FINISHED
        assert recorded("run") == f"{NAME}@{NEW}"
        hub.revisions["main"] = OLD
        assert train(config("run"), console=quiet()) is Outcome.ALREADY_FINISHED
        dry_run(config("run"), 1, quiet())
        assert with_commits(config("run")).student.pretrained == f"{NAME}@{NEW}"
        assert with_commits(config("other")).student.pretrained == f"{NAME}@{OLD}"
        # Another name, or another commit given, is another run.
        words.append(f"student.pretrained={NAME}@{OLD}")
        with pytest.raises(ConfigError, match=r"contains another run:\n.*pretrained"):
            train(config("run"), console=quiet())
        # A folder of a version of afd that did not record it.
        words.append(f"student.pretrained={NAME}")
        text = (tmp_path / "run" / "config.yaml").read_text().replace(f"{NAME}@{NEW}", NAME)
        (tmp_path / "run" / "config.yaml").write_text(text)
        assert train(config("run"), console=quiet()) is Outcome.ALREADY_FINISHED


@pytest.mark.parametrize("method", ["afd", "sft"])
def test_the_scorers_of_a_run_are_pinned_where_it_has_them(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": b"{}", "model_config.json": b"{}"}
    videoalign = Hub(files, {"main": NEW, NEW: NEW})
    settings = [f"method={method}", f"out={tmp_path / 'run'}", "student.kind=wan"]
    settings += ["video={frames: 81, height: 480, width: 832}", "evaluation.kind=none"]
    settings += [f"discriminator={{kind: videoalign, checkpoint: {NAME}, base: {NAME}}}"]
    config = make_config({}, settings)
    with videoalign.running(monkeypatch, str(tmp_path / "cache")):
        found = with_commits(config).discriminator
    assert isinstance(found, VideoAlignConfig)
    expected = f"{NAME}@{NEW}" if method == "afd" else NAME
    assert (str(found.checkpoint), found.base) == (expected, expected)
