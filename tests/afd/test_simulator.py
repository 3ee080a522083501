"""The bouncing-ball simulator and the folder that the black-box teacher writes."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Generator

from afd.lab.config import SimulatorConfig
from afd.lab.physics import measure
from afd.lab.simulator import (
    ATTRIBUTES,
    DOMAINS,
    FAULTS,
    LOOKS,
    PROMPTS,
    TARGET_GRAVITY,
    attribute_table,
    drift,
    fall,
    main,
    sample_videos,
    source_gravity,
    trajectories,
)


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_there_are_36_sentences_and_each_is_read_back() -> None:
    assert len(PROMPTS) == 36
    rows = [(a.colour, a.side, a.direction, a.start) for a in ATTRIBUTES]
    assert attribute_table([a.prompt for a in ATTRIBUTES]).tolist() == [list(r) for r in rows]
    with pytest.raises(ValueError, match=r"prompts: 'a purple ball' is not one of the 36"):
        attribute_table(["a purple ball"])


def test_a_ball_falls_on_a_parabola_and_loses_a_tenth_of_its_speed_at_the_floor() -> None:
    heights = fall(torch.tensor(5.0), torch.tensor(0.0), torch.tensor(0.2), torch.tensor(0.9), 30)
    t = torch.arange(9.0)
    torch.testing.assert_close(heights[:9], 5 + 0.1 * t**2)
    assert heights.max() <= 14
    # The rebound is e² as high as the drop of 9 px.
    assert float(14 - heights[10:25].min()) == pytest.approx(0.81 * 9, abs=0.05)


def test_a_ball_bounces_off_the_walls() -> None:
    places = drift(torch.tensor([12.0]), torch.tensor([1.0]), torch.tensor([1.0]), 8)
    assert places.tolist() == [[12, 13, 14, 13, 12, 11, 10, 9]]


def test_the_source_domain_is_half_a_beta_1_2() -> None:
    gravity = source_gravity(20_000, Generator().manual_seed(0))
    assert float(gravity.mean()) == pytest.approx(0.5 / 3, abs=0.003)
    assert float(gravity.std()) == pytest.approx(0.5 * (1 / 18) ** 0.5, abs=0.003)


@pytest.mark.parametrize("look", LOOKS)
def test_every_look_shows_the_same_motion(look: str) -> None:
    table = attribute_table(list(PROMPTS))
    videos, tracks = sample_videos(table, "target", look, Generator().manual_seed(3))
    clean, same = sample_videos(table, "target", "clean", Generator().manual_seed(3))
    assert videos.shape == (36, 12, 3, 16, 16)
    assert videos.abs().max() <= 1
    assert torch.equal(tracks, same)
    assert torch.equal(videos, clean) == (look == "clean")


def test_endless_videos_are_clips_of_motion_that_never_ends() -> None:
    table = attribute_table(list(PROMPTS) * 5)
    gravity, generator = torch.full((180,), TARGET_GRAVITY), Generator().manual_seed(0)
    whole = trajectories(table, gravity, generator, bounce=1.0, frames=240)
    # As high in the last 40 frames as in the first: no energy is lost.
    torch.testing.assert_close(
        whole[:, -40:, 1].amin(1), whole[:, :40, 1].amin(1), rtol=0, atol=0.2
    )
    videos, tracks = sample_videos(table, "endless", "clean", Generator().manual_seed(0))
    assert videos.shape == (180, 12, 3, 16, 16)
    # Cut anywhere: a ball that its prompt drops is as often on its way up.
    dropped = table[:, 3] == 0
    rising = (tracks[dropped, 1, 1] < tracks[dropped, 0, 1]).float().mean()
    assert 0.3 < rising < 0.7
    weak, _ = sample_videos(table, "endless source", "clean", Generator().manual_seed(0))
    prompts = [ATTRIBUTES[i % 36].prompt for i in range(180)]
    right, wrong = (measure(made, prompts, domain=DOMAINS["endless"]) for made in (videos, weak))
    assert right["phys"] < 0.03
    assert right["adh"] == wrong["adh"] == 1
    assert wrong["phys"] > 0.5


def test_drag_slows_a_ball_and_leaves_the_domain_s_gravity() -> None:
    start, table = torch.tensor([3.0]), attribute_table(list(PROMPTS))
    steps = drift(start, torch.tensor([0.5]), torch.tensor([0.9]), drag=0.1).diff()
    torch.testing.assert_close(steps[..., 1:] / steps[..., :-1], torch.full((1, 10), 0.9))
    tracks = {
        name: sample_videos(table, name, "clean", Generator().manual_seed(0))[1]
        for name in ("source", "gravity", "drag", "both")
    }
    assert torch.equal(tracks["drag"][..., 1], tracks["source"][..., 1])
    assert torch.equal(tracks["both"][..., 1], tracks["gravity"][..., 1])
    assert torch.equal(tracks["both"][..., 0], tracks["drag"][..., 0])
    assert not torch.equal(tracks["drag"][..., 0], tracks["source"][..., 0])


def test_wrong_videos_are_of_the_domain_and_noted_apart(tmp_path: Path) -> None:
    options = ["--domain", "all", "--count", "30", "--style", "clean"]
    main([*options, "--out", str(tmp_path / "sound")])
    main([*options, "--wrong", "0.5", "--out", str(tmp_path / "wrong")])
    assert not (tmp_path / "sound" / "faults.json").exists()
    faults = json.loads((tmp_path / "wrong" / "faults.json").read_text())
    assert {fault: list(faults.values()).count(fault) for fault in FAULTS} == dict.fromkeys(
        FAULTS, 3
    )
    prompts = [(tmp_path / name / "prompts.jsonl").read_text() for name in ("sound", "wrong")]
    assert prompts[0] == prompts[1]
    # The first domain's sound videos are the same; later ones come after other random numbers.
    for name in list(faults)[:10]:
        pictures = [decode(tmp_path / folder / name) for folder in ("sound", "wrong")]
        assert np.array_equal(*pictures) == (not faults[name])


def test_a_teacher_s_folder_is_named_and_asked_for_by_what_is_not_usual() -> None:
    usual, other = SimulatorConfig(), SimulatorConfig(domain="drag", wrong=0.2, seed=1)
    assert usual.asked == {"style": "nuis", "count": 200, "seed": 0}
    assert usual.folder_name == "nuis"
    assert other.asked == usual.asked | {"seed": 1, "domain": "drag", "wrong": 0.2}
    assert other.folder_name == "nuis-drag-0.2"


def test_an_unknown_look_or_domain_is_refused() -> None:
    table = attribute_table([ATTRIBUTES[0].prompt])
    with pytest.raises(ValueError, match="style: 'dark' came, one of clean, nuis"):
        sample_videos(table, "target", "dark", Generator())
    with pytest.raises(ValueError, match="domain: 'sun' came"):
        sample_videos(table, "sun", "clean", Generator())


def test_the_folder_holds_finished_videos_and_prompts_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "teacher"
    main(["--style", "nuis", "--count", "5", "--seed", "7", "--out", str(out)])
    lines = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"file", "prompt"}] * 5
    names = {line["file"] for line in lines} | {"prompts.jsonl"}
    assert {p.name for p in out.iterdir()} == names
    assert list(tmp_path.iterdir()) == [out]
    table = attribute_table([line["prompt"] for line in lines])
    videos, _ = sample_videos(table, "target", "nuis", Generator().manual_seed(7))
    for line, video in zip(lines, videos, strict=True):
        decoded = torch.from_numpy(decode(out / line["file"])).permute(0, 3, 1, 2) / 127.5 - 1
        assert (decoded - video).abs().max() <= 1.01 / 255
    with pytest.raises(FileExistsError, match=r"out: .* exists"):
        main(["--count", "1", "--out", str(out)])
