"""What a video run shows of itself: motion, evaluation, side by side videos, boards, progress."""

from __future__ import annotations

import io
import json
import logging
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from afd.config.run import RunConfig, make_config
from afd.discriminators.config import VideoAlignConfig
from afd.discriminators.videoalign.discriminator import VideoAlignDiscriminator
from afd.discriminators.videoalign.model import VideoAlign
from afd.errors import ConfigError
from afd.lab.report.page import write_report
from afd.methods.base import Shown
from afd.teachers.base import Request
from afd.trainer.evaluate import evaluation_prompts, make_evaluator, write_samples
from afd.trainer.logging import Timers, log_to, progress_bar
from afd.trainer.loop import Outcome, train
from afd.trainer.motion import displacements, motion
from afd.trainer.side_by_side import side_by_side, write_side_by_side
from afd.trainer.trackers import Boards
from afd.video import read_video
from afd.video.config import VideoConfig
from tests.afd.tiny_methods import toy_student
from tests.afd.tiny_videoalign import write_released

# --- motion ---


def moving(pixels: float, frames: int = 9, size: int = 128) -> Tensor:
    """A soft random texture that moves right by so many pixels a frame."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, size // 4, size, generator=draw) * 2 - 1
    texture = torch.nn.functional.interpolate(coarse, (size, 4 * size), mode="bilinear")[0]
    starts = [round(2 * size - pixels * frame) for frame in range(frames)]
    return torch.stack([texture[:, :, start : start + size] for start in starts])


def test_a_log_line_may_hold_letters_that_the_terminal_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for encoding, said in (("utf-8", r"caf\udce9 新"), ("ascii", r"caf\udce9 \u65b0")):
        screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with log_to(tmp_path / "train.log", Console(file=screen, width=200)):
            logging.getLogger("afd").info("teacher %s", "caf\udce9 新")
        screen.flush()
        assert said in screen.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert (tmp_path / "train.log").read_text().count(r"caf\udce9 新") == 2
    assert not capsys.readouterr().err


@pytest.mark.parametrize("pixels", [0, 1, 3, 8])
def test_blocks_are_seen_to_move_as_far_as_they_do(pixels: int) -> None:
    moved = displacements(moving(pixels), fps=8.0)
    inner = moved[:, 1:-1, 1:-1]
    assert (inner == 2 * pixels).all()  # in pixels at a short side of 256
    # At the border, where the picture ends, a block may find a likeness elsewhere.
    assert motion(moving(pixels), fps=8.0) == pytest.approx(2 * pixels, abs=2.0)


def test_motion_is_that_of_an_eighth_of_a_second_at_any_rate() -> None:
    assert motion(moving(2, frames=17), fps=16.0) == motion(moving(4), fps=8.0)


def test_the_little_that_moves_counts_and_what_a_codec_adds_does_not() -> None:
    still = moving(0)
    noise = 0.01 * torch.randn(still.shape, generator=torch.Generator().manual_seed(1))
    assert motion(still + noise, fps=8.0) == 0.0
    part = still.clone()
    part[:, :, :40, :40] = moving(4)[:, :, :40, :40]
    assert motion(part, fps=8.0) > 4.0


def test_motion_needs_two_frames_and_whole_blocks() -> None:
    with pytest.raises(ValueError, match="video_FCHW"):
        motion(torch.zeros(1, 3, 16, 16), fps=8.0)


# --- evaluation ---


def config_of(out: Path, **evaluation: Any) -> RunConfig:
    data = {"out": str(out), "video": {"fps": 8}, "student": {"rollout_batch": 2}}
    wanted = {"kind": "video", "samples": 2, "videos": 3, "curve_videos": 3}
    return make_config({**data, "evaluation": wanted | evaluation})


@pytest.fixture(scope="module")
def discriminator(tmp_path_factory: pytest.TempPathFactory) -> VideoAlignDiscriminator:
    """A tiny VideoAlign in the released layout."""
    folder = write_released(tmp_path_factory.mktemp("released"))
    scorer = VideoAlign.load(folder / "root", base=folder / "base", dtype=torch.float32)
    return VideoAlignDiscriminator(scorer, VideoAlignConfig(lora_rank=2), video=VideoConfig(fps=8))


def test_a_video_evaluation_is_the_same_every_time_and_keeps_the_first_samples(
    tmp_path: Path, discriminator: VideoAlignDiscriminator
) -> None:
    config, student = config_of(tmp_path), toy_student()
    prompts = evaluation_prompts(config, [Request("b"), Request("a"), Request("b", 1)])
    assert prompts == ["b", "a"]
    evaluate = make_evaluator(
        config, lambda: torch.empty(0), discriminator=discriminator, prompts=prompts
    )
    assert evaluate is not None
    first, again = evaluate(student, 3), evaluate(student, 3)
    assert first.metrics == again.metrics
    assert set(first.metrics) == {"motion", "dynamic", "VQ", "MQ", "TA", "Overall", "score"}
    assert first.prompts == ["b", "a", "b"]
    assert first.pictures_BFHWC.shape == (2, 12, 16, 16, 3)
    write_samples(tmp_path, first, 2)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["b", "a"]
    written = read_video(tmp_path / lines[1]["file"], frames=12, height=16, width=16)
    assert written.shape == (12, 3, 16, 16)


def test_with_codec_match_the_rating_is_of_what_the_codec_leaves(
    tmp_path: Path, discriminator: VideoAlignDiscriminator
) -> None:
    plain = config_of(tmp_path)
    matched = plain.model_copy(
        update={"video": plain.video.model_copy(update={"codec_match": True, "crf": 40})}
    )
    found = []
    for config in (plain, matched):
        evaluate = make_evaluator(
            config, lambda: torch.empty(0), discriminator=discriminator, prompts=["a"]
        )
        assert evaluate is not None
        found.append(evaluate(toy_student(), 1).metrics)
    assert found[0]["MQ"] != found[1]["MQ"]
    assert found[0]["motion"] == found[1]["motion"]


def test_what_the_discriminator_learns_changes_its_score_and_not_the_rating(
    tmp_path: Path, discriminator: VideoAlignDiscriminator
) -> None:
    student = toy_student()
    evaluate = make_evaluator(
        config_of(tmp_path), lambda: torch.empty(0), discriminator=discriminator, prompts=["a"]
    )
    assert evaluate is not None
    before = evaluate(student, 1).metrics
    with torch.no_grad():
        discriminator.head_OD.mul_(1.5)
    after = evaluate(student, 1).metrics
    assert after["score"] != before["score"]
    assert after["MQ"] == before["MQ"]


def test_without_videoalign_only_motion_is_measured(tmp_path: Path) -> None:
    evaluate = make_evaluator(config_of(tmp_path), lambda: torch.empty(0), prompts=["a"])
    assert evaluate is not None
    assert set(evaluate(toy_student(), 1).metrics) == {"motion", "dynamic"}


def test_held_out_prompts_come_from_their_file_or_the_teacher(tmp_path: Path) -> None:
    file = tmp_path / "held_out.txt"
    file.write_text("one\n\n two \n", encoding="utf-8")
    config = config_of(tmp_path, prompts=str(file))
    assert evaluation_prompts(config, [Request("teacher's")]) == ["one", "two"]
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"evaluation\.prompts: contains no prompt"):
        evaluation_prompts(config, [])
    file.unlink()
    with pytest.raises(ConfigError, match=r"held_out\.txt: cannot be read"):
        evaluation_prompts(config, [])


# --- a whole run ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy AFD run that is watched as a video run is."""
    out = tmp_path_factory.mktemp("watched") / "run"
    data = {
        "out": str(out),
        "updates": 4,
        "prompts_per_update": 2,
        "teacher": {"count": 36},
        "evaluation": {
            "kind": "video", "every": 2, "videos": 2, "curve_videos": 2, "samples": 2
        },
        "discriminator": {"warmup_updates": 1},
        "logging": {"videos_every": 2, "progress": False},
    }  # fmt: skip
    told: list[Shown] = []

    def kept(folder: Path, teacher: Any, student: Any, shown: Shown, *rest: Any) -> Any:
        told.append(shown)
        return write_side_by_side(folder, teacher, student, shown, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("afd.trainer.loop.write_side_by_side", kept)
        assert train(make_config(data)) is Outcome.FINISHED
    # Both sides have the discriminator's score.
    assert len(told) == 2
    assert all(None not in (one.score, one.r, one.teacher_score) for one in told)
    return out


def test_a_run_writes_teacher_and_student_side_by_side(run: Path) -> None:
    videos = sorted(path.name for path in (run / "videos").iterdir())
    assert videos == ["update_000002.mp4", "update_000004.mp4"]
    assert len(list((run / "samples").glob("*.mp4"))) == 2
    steps = [json.loads(line)["update"] for line in (run / "evaluation.jsonl").open()]
    assert steps == [0, 2, 4]
    events = b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    assert b"GIF89a" in events
    assert b"teacher | student" in events


def test_its_report_shows_alarms_videos_and_curves(run: Path) -> None:
    log = run / "train.log"
    kept = log.read_text(encoding="utf-8")
    log.write_text(kept + "2026 WARNING update 3: r is near 1: <raise> it\n", encoding="utf-8")
    html = write_report(run).read_text(encoding="utf-8")
    log.write_text(kept, encoding="utf-8")
    assert html.count("data:video/mp4;base64,") == 4
    assert "r is near 1: &lt;raise&gt; it (from update 3)" in html
    for title in ("Motion", "Discriminator accuracy", "r, the weight of the positive branch"):
        assert title in html
    assert "AFD, update 4 of 4" in html
    assert "https:" not in html


def test_the_report_of_a_run_that_has_only_begun_shows_no_numbers(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "AFD, update 0 of 4, unfinished" in html
    assert "AFD: no evaluation yet." in html


def test_the_report_shows_the_frozen_rating_beside_the_online_score(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    rated = [{"update": s, "metrics": {"MQ": 0.3 - s / 10, "motion": 5.0}} for s in (0, 2, 4)]
    margins = [{"update": s, "discriminator/margin": 2.0 - s / 4} for s in (1, 2, 3, 4)]
    for name, lines in (("evaluation", rated), ("metrics", margins)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Frozen rating and online score" in html
    assert "Motion quality by the frozen VideoAlign went from 0.300 (base) to -0.100" in html


# --- pictures ---


def test_small_and_large_videos_get_their_words_and_even_sides(tmp_path: Path) -> None:
    shown = Shown("a ball", torch.empty(0), score=1.234, r=0.62, teacher_score=2.0)
    small = np.zeros((3, 16, 16, 3), np.uint8)
    large = np.zeros((5, 241, 417, 3), np.uint8)
    for teacher, student in ((small, small), (large, large)):
        video = side_by_side(teacher, student, shown, 25)
        assert video.shape[0] == len(student)
        assert video.shape[1] % 2 == video.shape[2] % 2 == 0
        assert video[:, :20].max() > 200  # letters above
        assert video[:, -20:].max() > 200  # and below
    other = side_by_side(small, small, Shown("a ball", torch.empty(0), score=9.0), 25)
    assert (other[0, :20] != side_by_side(small, small, shown, 25)[0, :20]).any()
    path, video = write_side_by_side(tmp_path, small, large[:, :16, :16], shown, 7, 16.0)
    assert path.name == "update_000007.mp4"
    assert read_video(path, frames=5, height=video.shape[1], width=video.shape[2]).shape[0] == 5


# --- boards and progress ---


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_board_that_is_not_installed_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged = {"tensorboard": False, "wandb": "project"}
    with caplog.at_level(logging.WARNING, logger="afd"):
        boards = Boards(make_config({"out": str(tmp_path), "logging": logged}), 0)
    assert "wandb is not installed: pip install wandb" in caplog.text
    boards.scalars(1, {"a": 1.0})
    boards.close()


def test_the_display_has_a_time_left_for_every_phase() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with progress_bar("run", 100, 0, console, shown=True) as bar:
        timers = Timers(bar.begins)
        for _ in range(2):
            with timers("teacher"):
                time.sleep(0.002)
            with timers("rollout"):
                time.sleep(0.02)
            bar.advance(timers.take() | {"student": 0.0})
    text = screen.getvalue()
    assert "teacher wait" in text
    assert "rollout" in text
    assert "an update" in text
    assert "left" in text


def test_without_a_terminal_nothing_is_drawn() -> None:
    screen = io.StringIO()
    with progress_bar("run", 3, 0, Console(file=screen), shown=True) as bar:
        bar.begins("rollout")
        bar.advance({"rollout": 1.0})
    assert screen.getvalue() == ""
