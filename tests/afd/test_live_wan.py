"""`afd live` with a Wan student in the released layout: decoding, typed prompts, recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from afd.config.run import load_config, make_config
from afd.live import engine as engines
from afd.live import take as takes
from afd.live.config import LiveConfig
from afd.models.wan.text import TextEncoder
from afd.sampling import sample as sampling
from afd.sampling.config import SampleConfig
from afd.video import to_uint8
from tests.afd.live_server import client, viewer
from tests.afd.recorded import recorded
from tests.afd.test_sample import make, models, quiet

__all__ = ["models"]


def live(models: Path, out: Path, **more: Any) -> LiveConfig:
    config = make(models, out, window=7, sink=1, fps=16).model_dump(mode="json")
    return make_config(config | {"threads": 1} | more, (), "x", LiveConfig)


def test_sample_makes_the_recorded_frames_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[torch.Tensor] = []
    again = recorded(monkeypatch)

    class Take(takes.Take):
        def next(self) -> takes.Chunk:
            chunk = super().next()
            shown.append(chunk.frames_FHWC[0].clone())
            return chunk

    monkeypatch.setattr(engines, "Take", Take)
    out = tmp_path / "out"
    with client(live(models, out, fps=200)) as opened, viewer(opened) as watching:
        watching.send("record", on=True)
        watching.send("switch", prompt="the table", mode="recache")
        watching.until(lambda: len(watching.chunks) >= 5)
        watching.send("pause")
        watching.send("record", on=False)
        watching.event("recorded")
    headers = [header for header, _ in watching.chunks]
    # The first latent frame is one video frame, every other one four.
    assert [(h.start, h.frames) for h in headers[:3]] == [(0, 9), (9, 12), (21, 12)]
    assert all(h.cache[0] == h.cache[1] and h.times.decode > 0 for h in headers)
    (listed,) = out.glob("*.yaml")
    sampling.sample(load_config(listed, [f"out={tmp_path / 'again'}"], SampleConfig), quiet())
    assert len(again) >= 5
    for one, other in zip(shown, again, strict=True):
        assert torch.equal(one, to_uint8(other[0]))


@pytest.mark.parametrize("keep", [False, True])
def test_the_text_encoder_is_loaded_for_each_new_prompt_or_kept(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    loads = 0
    whole = TextEncoder.load

    def counted(*given: Any, **options: Any) -> TextEncoder:
        nonlocal loads
        loads += 1
        return whole(*given, **options)

    monkeypatch.setattr(TextEncoder, "load", counted)
    config = live(models, tmp_path, keep_text_encoder=keep)
    with client(config) as opened, viewer(opened) as watching:
        watching.send("pause")
        for number in (1, 2, 3, 1):
            watching.send("switch", prompt=f"a red ball {number}", mode="plain")
            watching.send("step")
            watching.event("switched")
    # Once for the prompts of the configuration.
    assert loads == (2 if keep else 4)
