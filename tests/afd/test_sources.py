"""Parts from the hub: which commit a name resolves to, and that videos record it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afd.errors import ConfigError
from afd.hub import local_copy, pinned
from afd.sampling.sample import sample
from afd.video import read_comment
from tests.afd.hub import NAME, Hub
from tests.afd.test_sample import make, models, quiet

__all__ = ["models"]
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(models: Path) -> Hub:
    """The small pipeline as a hub's model, which has moved on since v1."""
    parts = [models / part for part in ("text_encoder", "tokenizer", "vae")]
    files = [file for part in parts for file in part.rglob("*") if file.is_file()]
    held = {file.relative_to(models).as_posix(): file.read_bytes() for file in files}
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
