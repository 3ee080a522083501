"""The audit of clips: a made clip per fault, clean ones near every limit, the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from afd.audit import checks
from afd.audit.audit import SCORED, Audit, audit, read_trust
from afd.audit.clip import Clip, of_tensor, read
from afd.audit.probe import auc, balance, separability, statistics
from afd.audit.scored import prompt_mismatch, worse_than_student
from afd.cli import main
from afd.errors import MISTAKE, ConfigError
from afd.lab.detection import detection
from afd.lab.physics import measure_each
from afd.lab.simulator import ATTRIBUTES, Attributes, attribute_table, sample_videos
from afd.video import write_video

CLIPS = 40


def ball(seed: int = 0, style: str = "nuis", count: int = CLIPS) -> Tensor:
    """Clean clips [N, 12, 3, 16, 16]."""
    prompts = [ATTRIBUTES[i % len(ATTRIBUTES)].prompt for i in range(count)]
    generator = torch.Generator().manual_seed(seed)
    return sample_videos(attribute_table(prompts), "target", style, generator)[0]


def clips(videos: Iterable[Tensor]) -> list[Clip]:
    return [of_tensor(video, str(i % 36), f"{i}.mp4", 8.0) for i, video in enumerate(videos)]


def faulty(number: int, make: Callable[[Tensor], Tensor]) -> Audit:
    videos = list(ball())
    videos[number] = make(videos[number].clone())
    return audit(clips(videos))


def cut_to_white(video: Tensor) -> Tensor:
    video[6:] = -video[6:]
    return video


def bars(rows: int) -> Callable[[Tensor], Tensor]:
    def make(video: Tensor) -> Tensor:
        video = video.clamp_min(-0.5)
        video[:, :, :rows], video[:, :, 16 - rows :] = -1, -1
        return video

    return make


def still_share(frames: int) -> Callable[[Tensor], Tensor]:
    def make(video: Tensor) -> Tensor:
        video[:frames] = video[:1]
        return video

    return make


def dark(frames: int) -> Callable[[Tensor], Tensor]:
    def make(video: Tensor) -> Tensor:
        video[:frames] = -1
        return video

    return make


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "short": lambda video: video[:9],
    "frozen": still_share(12),
    "black": dark(12),
    "cut": cut_to_white,
    "letterbox": bars(2),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_in_the_clip_that_has_it_alone(name: str) -> None:
    found = faulty(7, FAULTS[name])
    assert name in dict(found.findings(7))
    assert {i for i in range(CLIPS) if name in dict(found.findings(i))} == {7}
    assert found.worst()[0] == 7
    assert found.trusted[7] < 0.01 < 0.9 < np.median(found.trusted)
    assert any(
        line.startswith(f"{name}: 1 of {CLIPS} clips, such as 7.mp4") for line in found.sentences()
    )


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("frozen", still_share(8)),  # moves in the last third
        ("black", dark(2)),  # fades in
        ("cut", lambda video: video + torch.linspace(-0.4, 0.4, 12).view(12, 1, 1, 1)),
        ("letterbox", lambda video: video.clamp_min(-0.5)),
        ("short", lambda video: video[:11]),
    ],
)
def test_a_clean_clip_near_the_limit_is_not_reported(
    name: str, make: Callable[[Tensor], Tensor]
) -> None:
    assert name not in dict(faulty(7, make).findings(7))


def test_a_slow_clip_at_a_high_rate_is_not_frozen() -> None:
    video = ball(count=1)[0].repeat_interleave(8, 0)
    assert checks.frozen(of_tensor(video, "", "a", 64.0)) < 0.5


def test_duplicates_are_found_when_encoded_again_and_not_merely_alike(tmp_path: Path) -> None:
    videos = ball(style="clean")
    alike = audit(clips(videos))
    assert not any(name == "duplicate" for i in range(CLIPS) for name, _ in alike.findings(i))
    videos[9] = (videos[3] + 0.004 * torch.randn(videos[3].shape)).clamp(-1, 1)
    found = audit(clips(videos))
    assert {i for i in range(CLIPS) if "duplicate" in dict(found.findings(i))} == {3, 9}
    assert checks.duplicate(found.clips)[1][9] == 3


@pytest.mark.parametrize("style", ["clean", "nuis", "noise"])
def test_a_mark_is_found_in_few_clips_and_in_all(style: str) -> None:
    videos = ball(style=style)
    marked = [5, 17, 30]
    videos[marked, :, :, 1:4, 12:15] = 0.8
    found = audit(clips(videos))
    values = found.values["overlay"]
    rest = [values[i] for i in range(CLIPS) if i not in marked]
    assert {i for i in range(CLIPS) if "overlay" in dict(found.findings(i))} >= set(marked)
    assert auc([values[i] for i in marked], rest) > 0.95
    everywhere = audit(clips(ball(style="mark")))
    assert everywhere.common > 1
    assert any("in most clips" in line for line in everywhere.sentences())
    assert audit(clips(ball(style=style))).common == 0


@pytest.mark.parametrize("style", ["clean", "nuis"])
def test_a_mark_of_four_cells_is_not_reported(style: str) -> None:
    videos = ball(style=style)
    videos[[5, 17], :, :, 1:3, 12:14] = 0.8
    found = audit(clips(videos))
    assert min(found.values["overlay"][i] for i in (5, 17)) >= 3
    assert not any(name == "overlay" for i in range(CLIPS) for name, _ in found.findings(i))


def test_black_clips_and_duplicates_are_told_from_the_others() -> None:
    videos, draw = ball(count=72), torch.Generator().manual_seed(5)
    faults = dict.fromkeys((f"{i}.mp4" for i in range(72)), "")
    for i in range(0, 12, 2):  # dim sensor noise instead of a picture
        videos[i] = (-1 + 0.02 * torch.randn(videos[i].shape, generator=draw)).clamp_min(-1)
        faults[f"{i}.mp4"] = "black"
    for i in range(20, 32, 2):  # the same clip, encoded once more
        videos[i + 1] = videos[i] + 0.004 * torch.randn(videos[i].shape, generator=draw)
        faults[f"{i}.mp4"] = faults[f"{i + 1}.mp4"] = "duplicate"
    found = detection(audit(clips(videos)).plain(), faults)
    assert found["black"]["black"] >= 0.99
    assert found["duplicate"]["duplicate"] >= 0.99
    assert min(found[fault]["trust"] for fault in found) >= 0.9


def test_files_that_cannot_be_read_or_are_short_are_found(tmp_path: Path) -> None:
    for i, video in enumerate(ball(count=5)):
        frames = video if i != 2 else video[:6]
        large = frames.repeat_interleave(4, 2).repeat_interleave(4, 3)
        write_video(tmp_path / f"{i}.mp4", large, fps=8)
    (tmp_path / "1.mp4").write_bytes(b"no video")
    read_clips = [read(tmp_path / f"{i}.mp4", "a ball") for i in range(5)]
    found = audit(read_clips, needed_s=1.5)
    assert "unreadable" in dict(found.findings(1))
    assert "short" in dict(found.findings(2))
    assert [read_clips[0].frames, read_clips[0].height, read_clips[0].codec] == [12, 64, "h264"]
    assert read_clips[0].fps == pytest.approx(8)
    assert "short" not in {name for i in (0, 3, 4) for name, _ in found.findings(i)}


# --- the look ---


def test_the_probe_finds_a_look_and_nothing_between_equals() -> None:
    same = separability(*(statistics(clips(ball(seed, count=72))) for seed in (0, 1)))
    other = separability(
        statistics(clips(ball(0, count=72))), statistics(clips(ball(1, "clean", 72)))
    )
    assert same["probe"] < 0.65
    assert other["probe"] > 0.95
    bright = ball(2, "clean", 72) * 0.9 + 0.1
    only = separability(statistics(clips(bright)), statistics(clips(ball(3, "clean", 72))))
    assert only["brightness"] > only["change"]


def test_balance_draws_the_clips_whose_statistics_are_the_students() -> None:
    student = statistics(clips(ball(1, "clean", 72)))
    videos = ball(0, "clean", 72)
    videos[:36] = (videos[:36] + 0.3).clamp(-1, 1)
    weights = balance(statistics(clips(videos)), student)
    assert weights.mean() == pytest.approx(1)
    assert weights[36:].mean() > 2 * weights[:36].mean()


def test_auc_counts_ties_half() -> None:
    assert auc([2, 3], [1, 2]) == 0.875
    assert auc([1], [1]) == 0.5


# --- by a discriminator ---

# Clips whose prompt is another one's.
SWAPPED = [3, 17, 30, 44, 58, 71]


def judge(videos: Tensor, knows: float, seed: int = 0) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """A score of these videos, all at once: `knows` for each attribute of the prompt that the video
    shows, with offsets of clips and prompts and with noise."""
    shown_N4 = measure_each(videos).attributes
    draw = torch.Generator().manual_seed(seed)
    clip_N, prompt_M = torch.randn(len(videos), generator=draw), torch.randn(36, generator=draw)
    noise_NM = torch.randn(len(videos), 36, generator=draw)
    names = [a.prompt for a in ATTRIBUTES]

    def score(given: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(given) == len(videos)
        column_N = torch.tensor([names.index(prompt) for prompt in prompts])
        fits_N = (shown_N4 == attribute_table(list(prompts))).float().sum(1)
        noise_N = noise_NM[torch.arange(len(given)), column_N]
        return knows * fits_N + 3 * clip_N + 2 * prompt_M[column_N] + noise_N

    return score


def prompts_of_72(swapped: Sequence[int] = ()) -> list[str]:
    """The prompts of ball(count=72); for those in `swapped`, ones with other attributes."""
    prompts = []
    for i in range(72):
        a = ATTRIBUTES[i % len(ATTRIBUTES)]
        if i in swapped:
            a = Attributes((a.colour + 1) % 3, 1 - a.side, (a.direction + 1) % 3, 1 - a.start)
        prompts.append(a.prompt)
    return prompts


@pytest.mark.parametrize("knows", [0.0, 0.5, 2.0])
def test_a_set_without_swapped_prompts_is_clean_whatever_the_discriminator_knows(
    knows: float,
) -> None:
    videos, limit = ball(count=72), SCORED["prompt"].limit
    for seed in range(5):
        values = prompt_mismatch(judge(videos, knows, seed), videos, prompts_of_72())
        assert max(values) < limit
        assert np.mean(checks.trust({"prompt": values}, SCORED)) > 0.995


def test_swapped_prompts_are_found_by_a_discriminator_that_reads_them() -> None:
    videos = ball(count=72)
    values = prompt_mismatch(judge(videos, 2.0), videos, prompts_of_72(SWAPPED))
    assert [i for i, value in enumerate(values) if value > SCORED["prompt"].limit] == SWAPPED
    trusted = checks.trust({"prompt": values}, SCORED)
    assert max(trusted[i] for i in SWAPPED) < 0.1
    # One that knows little finds few for sure, and still ranks them first.
    weak = prompt_mismatch(judge(videos, 0.7), videos, prompts_of_72(SWAPPED))
    rest = [value for i, value in enumerate(weak) if i not in SWAPPED]
    assert auc([weak[i] for i in SWAPPED], rest) > 0.9
    assert max(rest) < SCORED["prompt"].limit


def test_two_prompts_are_enough_and_one_says_nothing() -> None:
    videos = ball(count=72)
    left, right = ATTRIBUTES[0].prompt, ATTRIBUTES[35].prompt
    shown = [left if a % 36 < 18 else right for a in range(72)]
    told = [right if i in SWAPPED and shown[i] == left else shown[i] for i in range(72)]

    def score(given: Tensor, prompts: Sequence[str]) -> Tensor:
        fits = [1.0 if a == b else 0.0 for a, b in zip(prompts, shown, strict=True)]
        return torch.tensor(fits) + 0.05 * torch.arange(72).sin()

    values = prompt_mismatch(score, videos, told)
    wrong = [i for i in range(72) if told[i] != shown[i]]
    assert [i for i, value in enumerate(values) if value > SCORED["prompt"].limit] == wrong
    assert prompt_mismatch(score, videos, [left] * 72) == [0.0] * 72


@pytest.mark.parametrize("lead", [0.0, 3.0])
def test_only_clips_unlike_the_others_are_worse_than_the_student(lead: float) -> None:
    """`lead`: how far the discriminator has the teacher above the student; 0 once both are equal,
    where half of all clips score below the student's."""
    draw = torch.Generator().manual_seed(0)
    videos, prompts, limit = torch.zeros(72, 1), prompts_of_72(), SCORED["worse"].limit
    own = lead + torch.randn(72, generator=draw)
    made = [torch.randn(72, generator=draw) for _ in range(4)]

    def values() -> list[float]:
        def score(given: Tensor, prompts: Sequence[str]) -> Tensor:
            return own if given is videos else given

        return worse_than_student(score, videos, prompts, lambda prompts: made)

    assert max(values()) < limit
    own[SWAPPED] -= 2 * lead + 8
    assert [i for i, value in enumerate(values()) if value > limit] == SWAPPED
    assert worse_than_student(lambda v, p: own, videos, prompts, lambda prompts: []) == [0.0] * 72


# --- the command and the start of a run ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of six clips, the third frozen."""
    made = tmp_path / "clips"
    made.mkdir()
    with (made / "prompts.jsonl").open("w") as lines:
        for i, video in enumerate(ball(count=6)):
            frames = video[:1].expand_as(video) if i == 2 else video
            write_video(made / f"{i}.mp4", frames, fps=8)
            lines.write(json.dumps({"file": f"{i}.mp4", "prompt": ATTRIBUTES[i].prompt}) + "\n")
    return made


def test_the_command_writes_a_page_with_pictures_and_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["teacher", "audit", str(folder), f"out={folder.parent / 'page'}"]) == 0
    shown = capsys.readouterr().out
    assert "frozen: 1 of 6 clips, such as 2.mp4" in shown
    html = (folder.parent / "page" / "audit.html").read_text()
    assert "2.mp4" in html
    assert "data:image/png;base64," in html
    trust = read_trust(folder.parent / "page" / "audit.json")
    assert len(trust) == 6
    assert min(trust, key=lambda name: trust[name]) == "2.mp4"
    with pytest.raises(ConfigError, match=r"is no audit\.json"):
        read_trust(folder / "prompts.jsonl")


def test_the_command_audits_a_configuration_against_its_student(
    folder: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("teacher: {kind: simulator, style: nuis, count: 12}\n")
    out = tmp_path / "page"
    words = ["teacher", "audit", str(config), f"out={out}", "videos=12"]
    assert main([*words, f"teacher.path={tmp_path / 'simulated'}"]) == 0
    found = json.loads((out / "audit.json").read_text())
    assert found["probe"]["probe"] > 0.9
    assert main([*words, "teacher={kind: folder, path: " + str(folder) + "}"]) == 0


def test_mistakes_are_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teacher", "audit", str(folder), "teacher.style=nuis"]) == MISTAKE
    assert "needed: a CONFIG.yaml to override" in capsys.readouterr().err
    empty = folder.parent / "empty"
    empty.mkdir()
    assert main(["teacher", "audit", str(empty)]) == MISTAKE
    assert "holds no clip" in capsys.readouterr().err
    for odd in (empty, folder.parent / "none"):
        assert main(["teacher", "audit", str(folder), f"student={odd}"]) == MISTAKE
        assert f"student: {odd} holds no clip; needed" in " ".join(capsys.readouterr().err.split())
