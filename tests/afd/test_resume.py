"""Stopping a run anywhere and continuing gives what never stopping gives, bit by bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.data.inputs import refuse_other_inputs
from afd.data.videos import Videos
from afd.distributed import ALONE
from afd.errors import ConfigError, TeacherError
from afd.methods.base import Batch
from afd.teachers.base import Request
from afd.teachers.folder import FolderTeacher
from afd.trainer import checkpoint, shards
from afd.trainer.loop import Outcome, load_run, train
from afd.video import write_video
from afd.video.config import VideoConfig
from tests.afd.tiny import Interrupted, TinyMethod, make_clips, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("teacher") / "clips")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """Six updates without a stop."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train(tiny_config(out, clips), method=TinyMethod()) is Outcome.FINISHED
    return out


def numbers(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("time_s", "phase_s")} for line in lines]


def final_state(out: Path) -> dict[str, Any]:
    path = checkpoint.latest(out / "checkpoints")
    assert path is not None
    assert path.name == "update_000006"
    return shards.read(path, ALONE)


def assert_same_run(out: Path, straight: Path) -> None:
    assert numbers(out) == numbers(straight)
    ours, theirs = final_state(out), final_state(straight)
    for key in ("method_state", "random", "sampler", "update"):
        assert_same(ours[key], theirs[key], key)


def assert_same(a: Any, b: Any, where: str) -> None:
    """Equal to the last bit, at every depth."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_stopped_run_continues_bit_by_bit(
    tmp_path: Path, clips: Path, straight: Path, after: int
) -> None:
    out = tmp_path / "run"
    assert train(tiny_config(out, clips), method=Interrupted(after, signal.SIGINT)) is (
        Outcome.STOPPED
    )
    assert len(numbers(out)) == after + 1
    assert train(load_run(out), method=TinyMethod(seed=5)) is Outcome.FINISHED
    assert_same_run(out, straight)


def test_a_killed_run_continues_bit_by_bit(tmp_path: Path, clips: Path, straight: Path) -> None:
    # Events are the syncs, renames and half-written shards of a run, in order: config and lines,
    # then three checkpoints (of 9 with their lines: 6 to 14 is the first), then the end.
    events = [1, 3, 5, 7, 8, 9, 10, 11, 12, 14, 17, 29, 34]
    said = subprocess.run(
        [sys.executable, "-m", "tests.afd.tiny", str(tmp_path), str(clips), *map(str, events)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    ends = [line.split() for line in said.stdout.splitlines() if line[:1].isdigit()]
    assert [(int(event), int(second)) for event, _, second in ends] == [(e, 0) for e in events]
    killed = [int(first) == -signal.SIGKILL for _, first, _ in ends]
    assert all(killed), "every event lies within the run"
    for event in events:
        assert_same_run(tmp_path / str(event), straight)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, clips: Path, straight: Path
) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, clips), method=Interrupted(4, signal.SIGINT))
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    assert newest.name == "update_000005"
    (shard,) = newest.glob("*.safetensors")
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    assert train(tiny_config(out, clips), method=TinyMethod()) is Outcome.FINISHED
    assert "update_000005 is skipped" in (out / "train.log").read_text()
    assert_same_run(out, straight)


def test_a_resumed_run_may_save_at_other_times_and_go_on_longer(
    tmp_path: Path, clips: Path, straight: Path
) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, clips), method=Interrupted(2, signal.SIGINT))
    config = load_run(out, ["updates=8", "checkpoint.every=1"])
    assert train(config, method=TinyMethod()) is Outcome.FINISHED
    assert numbers(out)[:6] == numbers(straight)
    assert len(numbers(out)) == 8


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """Six updates, finished, then nine."""
    out = tmp_path_factory.mktemp("longer") / "run"
    assert train(tiny_config(out, clips), method=TinyMethod()) is Outcome.FINISHED
    assert train(load_run(out, ["updates=9"]), method=TinyMethod(seed=5)) is Outcome.FINISHED
    return out


def test_a_finished_run_is_lengthened_to_the_bits_of_a_longer_run(
    tmp_path: Path, clips: Path, longer: Path
) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, clips, "updates=9"), method=TinyMethod())
    assert numbers(longer) == numbers(out)
    ours, theirs = (
        shards.read(folder / "checkpoints" / "update_000009", ALONE) for folder in (longer, out)
    )
    for key in ("method_state", "random", "sampler", "update"):
        assert_same(ours[key], theirs[key], key)
    assert (longer / "DONE").read_text().startswith("9 updates")
    assert "lengthened: 6 updates are done, 9 now" in (longer / "train.log").read_text()


def test_a_finished_run_is_never_shortened(clips: Path, longer: Path) -> None:
    with pytest.raises(ConfigError, match=r"updates: 9 there \(finished\), 4 now"):
        train(load_run(longer, ["updates=4"]), method=TinyMethod())
    assert train(load_run(longer), method=TinyMethod()) is Outcome.ALREADY_FINISHED


def test_a_resumed_run_may_not_change_what_it_learns(tmp_path: Path, clips: Path) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, clips), method=Interrupted(2, signal.SIGINT))
    with pytest.raises(ConfigError, match=r"afd\.nft_beta: 1\.0 there, 0\.5 now"):
        train(load_run(out, ["afd.nft_beta=0.5"]), method=TinyMethod())


def replace_clip(clips: Path, name: str, *, same_times: bool = False) -> None:
    """Another video under the name of one, of the same size and time where asked."""
    path = clips / name
    stat, size = path.stat(), path.stat().st_size
    write_video(path, torch.full((3, 3, 16, 16), 0.9), fps=8)
    if same_times:
        data = path.read_bytes()
        path.write_bytes(data[:size].ljust(size, b"\0"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def own_clips(tmp_path: Path) -> Path:
    return make_clips(tmp_path / "clips")


def test_a_teachers_video_that_was_replaced_is_refused_and_can_be_accepted(
    tmp_path: Path, own_clips: Path
) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, own_clips), method=Interrupted(3, signal.SIGINT))  # all five were seen
    replace_clip(own_clips, "2.mp4")
    with pytest.raises(TeacherError, match=r"2\.mp4: is not the one .*accept_changed_inputs=true"):
        train(load_run(out), method=TinyMethod())
    accepted = load_run(out, ["checkpoint.accept_changed_inputs=true"])
    assert train(accepted, method=TinyMethod()) is Outcome.FINISHED
    log = (out / "train.log").read_text()
    assert log.count("2.mp4: is not the one that this run was trained on") == 1
    assert "continuing with the new one" in log


def test_one_of_the_same_size_and_time_is_refused_when_it_is_decoded(
    tmp_path: Path, own_clips: Path
) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, own_clips), method=Interrupted(3, signal.SIGINT))
    for path in own_clips.glob("*.mp4"):
        replace_clip(own_clips, path.name, same_times=True)
    with pytest.raises(TeacherError, match="is not the one that this run was trained on"):
        train(load_run(out), method=TinyMethod())
    assert len(numbers(out)) == 4


def test_touched_and_copied_videos_are_the_same_videos(
    tmp_path: Path, own_clips: Path, straight: Path
) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, own_clips), method=Interrupted(3, signal.SIGINT))
    for path in own_clips.glob("*.mp4"):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    assert train(load_run(out), method=TinyMethod()) is Outcome.FINISHED
    assert numbers(out) == numbers(straight)


def test_a_video_that_is_replaced_while_a_run_goes_on_is_refused_when_decoded_again(
    own_clips: Path,
) -> None:
    teacher = FolderTeacher(own_clips)
    videos = Videos(teacher, VideoConfig(frames=3), memory=1)
    videos.fetch(teacher.requests)
    replace_clip(own_clips, "0.mp4")
    for look in (
        lambda: videos.fetch(teacher.requests[:1]),
        lambda: videos.clip(teacher.requests[0]),
    ):
        with pytest.raises(TeacherError, match=r"0\.mp4: is not the one"):
            look()
    (own_clips / "0.mp4").unlink()
    with pytest.raises(TeacherError, match=r"0\.mp4: no longer exists"):
        videos.clip(teacher.requests[0])
    videos.close()


def test_other_inputs_that_changed_are_named_and_can_be_accepted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    then, now = {"evaluation.prompts": "a", "student.vae": "b"}, {"student.vae": "b"}
    refuse_other_inputs(then, dict(then))
    with pytest.raises(ConfigError, match=r"evaluation\.prompts: has changed"):
        refuse_other_inputs(then, now)
    refuse_other_inputs(then, now, accept=True)
    assert "evaluation.prompts: has changed" in caplog.text


# What may befall the lines of a run that continues after update 4.
@pytest.mark.parametrize(
    ("damage", "said", "lost"),
    [
        (lambda text: text, None, 0),
        (lambda text: text + '{"update": 5, "cri', "its last line was truncated and is dropped", 0),
        (lambda text: text + '{"update": 5}\n{"update": 5}\n', None, 0),
        (lambda text: text[: text.index('"update": 4')], "its last line was truncated", 1),
        (
            lambda text: text.replace('"update": 2,', '"update": \0,'),
            "line 2 is damaged (not JSON",
            1,
        ),
        (
            lambda text: text.replace('"update": 2,', '"update": "2",'),
            "line 2 is damaged (update is",
            1,
        ),
        (
            lambda text: text.replace("loss", "lost"),
            "its lines differ from those that the run wrote",
            0,
        ),
        (
            lambda text: "",
            "its lines differ from those that the run wrote up to update 4 (4, now 0)",
            4,
        ),
    ],
)
def test_damaged_lines_are_named_and_what_is_whole_stays(
    tmp_path: Path, clips: Path, straight: Path, damage: Any, said: str | None, lost: int
) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, clips), method=Interrupted(3, signal.SIGINT))
    path = out / "metrics.jsonl"
    before = path.read_text()
    path.write_text(damage(before))
    (out / "train.log").unlink()
    assert train(load_run(out), method=TinyMethod()) is Outcome.FINISHED
    log = (out / "train.log").read_text()
    if said is None:
        assert "WARNING" not in log
        assert_same_run(out, straight)
    else:
        assert f"{path}: {said}" in log
        assert ("its lines differ" in log) == (lost > 0 or "lost" in path.read_text())
        assert len(numbers(out)) == 6 - lost
    aside = path.with_name("metrics.jsonl.damaged")
    assert aside.exists() == (said is not None and "is damaged" in said)
    if aside.exists():
        assert aside.read_text() == damage(before)


@pytest.mark.parametrize("held", [b"", b"\xff\xfe\0", b"- 1\n", b"steps: [1", b"a: &a [*a]\n"])
def test_a_damaged_config_of_a_run_is_named_or_written_again(
    tmp_path: Path, clips: Path, straight: Path, held: bytes
) -> None:
    out = tmp_path / "run"
    train(tiny_config(out, clips), method=Interrupted(3, signal.SIGINT))
    (out / "config.yaml").write_bytes(held)
    with pytest.raises(ConfigError):
        train(load_run(out, ["name=run"]), method=TinyMethod())
    assert train(tiny_config(out, clips), method=TinyMethod()) is Outcome.FINISHED
    assert_same_run(out, straight)
    assert load_run(out) == tiny_config(out, clips)


class _Gone(FolderTeacher):
    """A folder that has no answer any more from a number of questions on."""

    questions = 0

    def answer(self, request: Request) -> Path:
        self.questions += 1
        if self.questions > 14:
            raise TeacherError("the teacher's service does not exist any more")
        return super().answer(request)


def test_a_run_whose_teacher_fails_is_saved_between_two_updates(
    tmp_path: Path, clips: Path, straight: Path
) -> None:
    out = tmp_path / "run"
    config = tiny_config(out, clips, "checkpoint.every=0")
    with pytest.raises(TeacherError, match="does not exist any more"):
        train(config, method=TinyMethod(), teacher=_Gone(clips))
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    assert 0 < len(numbers(out)) < 6
    assert newest.name == f"update_{len(numbers(out)):06d}"
    assert train(load_run(out), method=TinyMethod(seed=5)) is Outcome.FINISHED
    assert_same_run(out, straight)


class _Impatient(TinyMethod):
    """Ctrl-C twice in the middle of the fourth update."""

    def discriminator_step(self, batch: Batch) -> dict[str, float]:
        if batch.update == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return super().discriminator_step(batch)


def test_a_second_sigint_ends_at_once_unsaved(tmp_path: Path, clips: Path, straight: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(out, clips), method=_Impatient())
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    assert (newest.name, len(numbers(out))) == ("update_000002", 3)
    assert train(load_run(out), method=TinyMethod(seed=5)) is Outcome.FINISHED
    assert_same_run(out, straight)
