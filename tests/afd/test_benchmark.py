"""`afd benchmark` end to end with the toy student: the benchmarks' layouts, and what is rated."""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from afd.benchmarks import vbench, videophy
from afd.benchmarks.config import BenchmarkConfig, VBenchConfig, VideoPhyConfig
from afd.benchmarks.run import evaluate
from afd.benchmarks.suites import Clip, Score
from afd.cli import main
from afd.config.run import load_config, make_config
from afd.discriminators.videoalign.model import VideoAlign
from afd.errors import ConfigError
from afd.lab.student import ToyStudent
from afd.trainer.loop import train
from afd.video import check_video, read_comment, read_video
from tests.afd.released_models import overrides, write_models
from tests.afd.tiny_videoalign import write_released
from tests.afd.together import together

CONFIGS = Path(__file__).parents[2] / "python" / "afd" / "configs"
ENTRIES = [
    {"prompt_en": "a red ball, falling", "dimension": ["scene", "background_consistency"]},
    {"prompt_en": "In a still frame, a ball", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a ball.1990-5", "dimension": ["scene"], "auxiliary_info": {"scene": {}}},
]
CAPTIONS = ["a green ball falls", "a blue ball, thrown"]


@pytest.fixture(scope="module")
def rater(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_released(tmp_path_factory.mktemp("videoalign"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Prompt files as the benchmarks ship them."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "VBench_full_info.json").write_text(json.dumps(ENTRIES))
    longer = [f"{entry['prompt_en']} in great detail" for entry in ENTRIES]
    (folder / "augmented.txt").write_text("\n".join(longer) + "\n")
    rows = [[name, text, "x"] for text in CAPTIONS for name in ("wan", "sora")]
    with (folder / "videophy2.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["model", "caption", "other"], *rows])
    return folder


def make(prompts: Path, rater: Path, *overrides: str, **more: Any) -> BenchmarkConfig:
    data: dict[str, Any] = {
        "student": {"kind": "toy", "checkpoint": "base", "denoising_steps": [1.0, 0.833]},
        "out": str(prompts.parent / "samples"),
        **{"frames": 12, "height": 16, "width": 16, "fps": 8, "batch": 4},
        "device": "cpu",
        "vbench": {
            "prompts": str(prompts / "VBench_full_info.json"),
            "augmented": str(prompts / "augmented.txt"),
            "samples": 2,
            "flickering_samples": 3,
        },
        "videophy2": {"prompts": str(prompts / "videophy2.csv")},
        "videoalign_mq": {
            "checkpoint": str(rater / "root"),
            "base": str(rater / "base"),
            "dtype": "float32",
            "rotary": "exact",
        },
    }
    return make_config({**data, **more}, overrides, "test", BenchmarkConfig)


def quiet() -> Console:
    return Console(quiet=True)


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def prompt_by_vbench(name: str) -> str:
    """VBench's rule: the file's stem, without a last dash and number."""
    return re.sub(r"-\d+$", "", Path(name).stem)


def test_every_benchmark_finds_its_videos(prompts: Path, rater: Path) -> None:
    evaluate(make(prompts, rater), quiet())
    folder = prompts.parent / "samples" / "base" / "start"
    videos = folder / "videos"
    lines = manifest(folder)
    assert len(lines) == 2 * 2 + 3 + 2
    assert {path.name for path in videos.iterdir()} == {Path(line["file"]).name for line in lines}
    for line in lines:
        check_video(folder / line["file"], frames=12)
        made_of = json.loads(read_comment(folder / line["file"]) or "")
        assert (made_of["prompt"], made_of["seed"]) == (line["generated_with"], line["seed"])

    found = {d.name: sorted(p.name for p in d.iterdir()) for d in (folder / "vbench").iterdir()}
    first, still, third = (entry["prompt_en"] for entry in ENTRIES)
    assert found == {
        "scene": sorted(f"{prompt}-{i}.mp4" for prompt in (first, third) for i in range(2)),
        "background_consistency": [f"{first}-{i}.mp4" for i in range(2)],
        "temporal_flickering": [f"{still}-{i}.mp4" for i in range(3)],
    }
    for line in lines:
        for dimension in line["dimensions"]:
            linked = folder / "vbench" / dimension / f"{line['prompt']}-{line['sample']}.mp4"
            assert linked.samefile(folder / line["file"])
            assert prompt_by_vbench(linked.name) == line["prompt"]
            assert line["generated_with"] == f"{line['prompt']} in great detail"

    with (folder / "videophy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["caption"] for row in rows] == CAPTIONS
    assert all(Path(row["videopath"]).is_absolute() for row in rows)
    assert {Path(row["videopath"]).parent for row in rows} == {videos.resolve()}
    with (folder / "videoalign.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["prompt"], row["fps"], row["num_frames"]) for row in rows] == [
        (line["prompt"], "8", "12") for line in lines
    ]


def test_motion_quality_is_that_of_the_frozen_model_on_the_files(
    prompts: Path, rater: Path
) -> None:
    scores = evaluate(make(prompts, rater, suites=["videophy2", "videoalign_mq"]), quiet())
    folder = prompts.parent / "samples" / "base" / "start"
    model = VideoAlign.load(
        rater / "root", base=rater / "base", dtype=torch.float32, rotary="exact"
    )
    files = [folder / line["file"] for line in manifest(folder)]
    videos_BFCHW = torch.stack([read_video(f, frames=12, height=16, width=16) for f in files])
    expected = model.ratings(videos_BFCHW, CAPTIONS, video_fps=8)["MQ"].mean()
    (mq,) = [score for score in scores if score.metric == "VideoAlign MQ"]
    assert (mq.suite, mq.videos) == ("videophy2", 2)
    assert mq.value == pytest.approx(float(expected), rel=1e-5)
    held = json.loads((folder / "scores.json").read_text())
    assert Score(**held["scores"][0]) == mq
    with (folder / "scores.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["value"] == str(mq.value)


def test_what_is_there_is_neither_made_nor_rated_again(prompts: Path, rater: Path) -> None:
    model = Path(shutil.copytree(rater, prompts.parent / "model"))
    config = make(prompts, model, limit=1)
    scores = evaluate(config, quiet())
    shutil.rmtree(model)
    folder = prompts.parent / "samples" / "base" / "start"
    before = {p: p.stat().st_mtime_ns for p in (folder / "videos").iterdir()}
    left = folder / "videos" / "killed.mp4.partial"
    left.write_bytes(b"half")
    assert evaluate(config, quiet()) == scores
    more = make(prompts, rater, suites=["vbench", "videophy2"])
    evaluate(more, quiet())
    assert len(list((folder / "videos").iterdir())) == 9
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert not left.exists()


def test_a_part_of_a_benchmark_has_the_names_and_seeds_of_the_whole(
    prompts: Path, rater: Path
) -> None:
    evaluate(make(prompts, rater, suites=["vbench"]), quiet())
    folder = prompts.parent / "samples" / "base" / "start"
    whole = {line["file"]: line["seed"] for line in manifest(folder)}
    assert len(set(whole.values())) == len(whole)
    evaluate(make(prompts, rater, "vbench.dimensions=[scene]", suites=["vbench"]), quiet())
    part = manifest(folder)
    assert len(part) == 4
    assert all(whole[line["file"]] == line["seed"] for line in part)


def test_flickering_needs_25_videos_and_the_others_5(prompts: Path) -> None:
    found = vbench.read(VBenchConfig(prompts=prompts / "VBench_full_info.json"))
    assert [prompt.samples for prompt in found] == [5, 25, 5]
    names = [f"{prompt.text}-{n}.mp4" for prompt in found for n in range(prompt.samples)]
    texts = [prompt.text for prompt in found for _ in range(prompt.samples)]
    assert [prompt_by_vbench(name) for name in names] == texts
    scene = prompts / "temporal_flickering.txt"
    scene.write_text("one\n\ntwo \n")
    listed = vbench.read(VBenchConfig(prompts=scene))
    assert [(p.text, p.samples, p.dimensions[0]) for p in listed] == [
        ("one", 25, "temporal_flickering"),
        ("two", 25, "temporal_flickering"),
    ]


def test_longer_prompts_may_follow_the_order_of_another_list(prompts: Path) -> None:
    texts = [entry["prompt_en"] for entry in ENTRIES]
    lists = {"all_dimension": [*texts[::-1], "more"], "longer": ["3", "2", "1", "0"]}
    for name, lines in lists.items():
        (prompts / f"{name}.txt").write_text("\n".join(lines))
    given = {"augmented": prompts / "longer.txt", "originals": prompts / "all_dimension.txt"}
    info = prompts / "VBench_full_info.json"
    found = vbench.read(VBenchConfig(prompts=info, **given))
    assert [prompt.generate for prompt in found] == ["1", "2", "3"]
    (prompts / "all_dimension.txt").write_text("\n".join([*texts[:2], "a", "b"]))
    with pytest.raises(ConfigError, match=r"1 prompts of .* not in it, such as 'a ball.1990-5'"):
        vbench.read(VBenchConfig(prompts=info, **given))
    odd = prompts / "...txt"
    odd.write_text("a")
    with pytest.raises(ConfigError, match="it must be named after a dimension"):
        vbench.read(VBenchConfig(prompts=odd))


@pytest.mark.parametrize(
    "prompt", ["ends with -", "a 3-4", "x.mp4", "100% café, 全角", "-", "two  spaces "]
)
def test_names_round_trip_through_vbenchs_rule(prompt: str) -> None:
    for sample in (0, 4, 24):
        assert prompt_by_vbench(vbench.file_name(prompt, sample)) == prompt


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("a cat/dog", "it contains '/'"),
        ("x" * 250, "with -4.mp4 it is 256 bytes long, more than 255"),
        ("é" * 125, "256 bytes long"),
    ],
)
def test_a_prompt_that_is_no_file_name_is_refused_before_anything_is_made(
    tmp_path: Path, prompt: str, why: str
) -> None:
    path = tmp_path / "info.json"
    path.write_text(json.dumps([{"prompt_en": prompt, "dimension": ["scene"]}]))
    with pytest.raises(ConfigError, match="VBench finds videos by their prompt") as error:
        vbench.read(VBenchConfig(prompts=path))
    assert why in str(error.value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '[{"prompt_en": "\\ud800", "dimension": []}]'], ids=["deep", "half"]
)
def test_a_list_of_prompts_that_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "info.json").write_text(text)
    with pytest.raises(ConfigError, match=r"vbench\.prompts .*info\.json: not valid JSON"):
        vbench.read(VBenchConfig(prompts=tmp_path / "info.json"))


def test_prompts_that_differ_by_case_need_a_disk_that_tells_them_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scene.txt"
    path.write_text("A ball\na ball\n")
    found = vbench.read(VBenchConfig(prompts=path))
    with caplog.at_level(logging.WARNING, logger="afd"):
        vbench.check_disk(tmp_path, found)
    assert "differ by case only: do not copy" in caplog.text
    # No such disk is at hand here.
    monkeypatch.setattr(vbench, "_ignores_case", lambda folder: True)
    with pytest.raises(ConfigError, match=r"'A ball' and 'a ball' of scene differ by case only"):
        vbench.check_disk(tmp_path, found)


def test_results_of_vbench_and_videophy_come_into_the_same_table(
    prompts: Path, rater: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(prompts, rater, suites=["vbench", "videophy2"])
    console = Console(width=200)
    evaluate(config, console)
    said = capsys.readouterr().out
    folder = prompts.parent / "samples" / "base" / "start"
    assert f"--videos_path {folder}/vbench/DIMENSION" in said.replace("\n", "")
    assert "--task pc" in said
    results = folder / "vbench_results"
    results.mkdir()
    old, new = ([{"scene": [score, [{}] * 4]}] for score in (0.2, 0.25))
    for number, (held,) in enumerate((old, new)):
        (results / f"results_{number}_eval_results.json").write_text(json.dumps(held))
    names = [Path(line["file"]).name for line in manifest(folder) if line["suite"] == "videophy2"]
    for task, ratings in (("pc", (5, 4)), ("sa", (4, 3))):
        rows = [(0, f"/elsewhere/{n}", r) for n, r in zip(names, ratings, strict=True)]
        with (folder / f"videophy_{task}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["", "videopath", "score"], *rows])
    found = {(s.suite, s.metric): s for s in evaluate(config, console)}
    assert found["vbench", "scene"] == Score("vbench", "scene", 0.25, 4, 4)
    assert found["videophy2", "PC"].value == 4.5
    assert found["videophy2", "SA and PC >= 4"].value == 0.5
    said = capsys.readouterr().out
    assert "0.2500" in said
    assert "has not rated" not in said


def test_videophy_rows_of_other_videos_are_refused_and_unread_answers_left_out(
    tmp_path: Path,
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\none\n")
    found = videophy.read(VideoPhyConfig(prompts=path, samples=2))
    assert [prompt.text for prompt in found] == ["one", "two"]
    clips = [Clip("videophy2", p, i, 0, f"{p.text}-{i}") for p in found for i in range(2)]
    pc = tmp_path / "pc.csv"
    pc.write_text("videopath,score\nx/one-0.mp4,4\nx/one-1.mp4,0\n")
    (score,) = videophy.read_results(pc, tmp_path / "none.csv", clips)
    assert score == Score("videophy2", "PC", 4.0, 1, 4)
    pc.write_text("videopath,score\n../../secret.mp4,4\n")
    with pytest.raises(ConfigError, match=r"secret\.mp4 is not a video of this evaluation"):
        videophy.read_results(pc, tmp_path / "none.csv", clips)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("run=somewhere", "run, student.checkpoint: got both"),
        ("weights=ema", "weights: got ema; it is one of a run's weights"),
        ("crf=23", "crf is 23"),
        ("vbench.prompts=null", "vbench.prompts: not given"),
        ("vbench.prompts=/none.json", "vbench.prompts /none.json: cannot be read"),
        ("vbench.dimensions=[colour]", r"vbench.dimensions: got ['colour']"),
        ("videophy2.column=text", "no text in text; it has model, caption, other"),
        ("videoalign_mq.checkpoint=null", "videoalign_mq.checkpoint: not given"),
        ("videophy2.prompts={}/augmented.mp4", "cannot be read"),
        ("vbench.augmented={}/short.txt", "2 lines; needed: 3"),
        ("suites=[]", "suites: got []"),
        ("prompts=x", "unknown key 'prompts'"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_made(
    prompts: Path, rater: Path, override: str, told: str
) -> None:
    (prompts / "short.txt").write_text("one\ntwo\n")
    (prompts / "augmented.mp4").mkdir()
    with pytest.raises(ConfigError) as error:
        evaluate(make(prompts, rater, override.format(prompts)), quiet())
    assert told in str(error.value).replace("needs the ending", "cannot be read")
    assert not (prompts.parent / "samples").exists()


def test_weights_have_to_be_named(prompts: Path, rater: Path) -> None:
    config = make(prompts, rater, student={"kind": "wan"}, frames=13)
    with pytest.raises(ConfigError, match=r"run, student\.checkpoint: got neither"):
        evaluate(config, quiet())


def test_the_shipped_file_holds_known_keys_only_and_every_key_has_a_description() -> None:
    path = CONFIGS / "benchmark_self_forcing_480x832.yaml"
    config = make_config(
        yaml.safe_load(path.read_text("utf-8")), ["student.checkpoint=x"], "f", BenchmarkConfig
    )
    assert (config.height, config.width, config.frames, config.fps) == (480, 832, 81, 16)
    for section in (BenchmarkConfig, VBenchConfig, VideoPhyConfig, type(config.videoalign_mq)):
        for name, field in section.model_fields.items():
            assert field.description or hasattr(field.annotation, "model_fields"), name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run of one update."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    words = ["updates=1", "prompts_per_update=1", "teacher.count=2", "evaluation.kind=none"]
    words += ["logging.tensorboard=false", "discriminator.warmup_updates=0", "video.fps=8"]
    words += ["afd.samples_per_prompt=2", f"out={folder}", "name=mine"]
    train(make_config({}, words), console=quiet())
    return folder


def test_a_run_is_evaluated_by_its_exported_weights_and_its_own_settings(
    prompts: Path, rater: Path, run: Path
) -> None:
    given = {
        "run": str(run),
        "suites": ["videophy2"],
        "student": {"kind": "toy", "denoising_steps": [1.0]},
    }
    out = prompts.parent / "samples"
    evaluate(make(prompts, rater, **given), quiet())
    evaluate(make(prompts, rater, weights="theta", **given), quiet())
    assert sorted(p.name for p in (out / "mine").iterdir()) == [
        "update_000001",
        "update_000001-theta",
    ]
    seen = []
    for step, version in (("update_000001", "evaluated"), ("update_000001-theta", "theta")):
        folder = out / "mine" / step
        (line, _) = manifest(folder)
        made_of = json.loads(read_comment(folder / line["file"]) or "")["settings"]
        # Configured values stay; all others are the run's.
        assert (made_of["student"]["denoising_steps"], made_of["window"]) == ([1.0], None)
        assert line["student"] == made_of["student"]["checkpoint"]
        assert line["student"].startswith(f"mine update_000001 {version} ")
        student = ToyStudent.load(str(folder / "student" / "student.safetensors"))
        seen.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    start = torch.cat([p.detach().flatten() for p in ToyStudent.load().parameters()])
    # After one update the old policy has not moved yet with its student.
    assert not torch.equal(seen[1], start)
    assert evaluate(make(prompts, rater, **given), quiet()) == []


def test_samples_of_another_student_of_the_same_name_are_refused(
    prompts: Path, rater: Path, run: Path
) -> None:
    given = {"run": str(run), "student": {"kind": "toy"}, "suites": ["videophy2"], "limit": 1}
    evaluate(make(prompts, rater, **given), quiet())
    note = prompts.parent / "samples" / "mine" / "update_000001" / "student" / "afd.json"
    note.write_text(note.read_text().replace('"checkpoint_sha256": "', '"checkpoint_sha256": "0'))
    with pytest.raises(ConfigError, match="samples of another student of this name and checkpoint"):
        evaluate(make(prompts, rater, **given), quiet())
    with pytest.raises(ConfigError, match=r"run: .* has no config\.yaml; needed: the folder"):
        evaluate(make(prompts, rater, run=str(prompts), student={"kind": "toy"}), quiet())


def test_a_wan_run_brings_its_own_size_files_and_rater(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models")
    scorer = models / "checkpoints" / "VideoReward"
    words = [f"student.checkpoint={models}/checkpoints/self_forcing_dmd.pt", "updates=1"]
    words += ["evaluation.kind=none", "logging.tensorboard=false", "logging.videos_every=0"]
    # Unused by this method, but set by the run.
    words += ["discriminator={kind: videoalign}", f"discriminator.checkpoint={scorer}"]
    words += [f"discriminator.base={models}/videoalign/base", f"out={tmp_path / 'run'}"]
    small = overrides(models, "sft")
    train(load_config(CONFIGS / "sft_self_forcing_480x832.yaml", small + words), console=quiet())
    (tmp_path / "prompts.txt").write_text("the ball\n")
    given = [f"run={tmp_path / 'run'}", f"out={tmp_path / 'samples'}", "device=cpu"]
    given += ["suites=[videophy2, videoalign_mq]", "videoalign_mq.dtype=float32"]
    given += [f"videophy2.prompts={tmp_path / 'prompts.txt'}"]
    path = CONFIGS / "benchmark_self_forcing_480x832.yaml"
    scores = evaluate(load_config(path, given, BenchmarkConfig), quiet())
    assert scores[0].metric == "VideoAlign MQ"
    folder = tmp_path / "samples" / "sft_self_forcing_480x832" / "update_000001"
    (video,) = (folder / "videos").iterdir()
    check_video(video, frames=21)
    # A missing rater is reported before the next video is generated.
    shutil.rmtree(scorer)
    (tmp_path / "prompts.txt").write_text("the ball\na table\n")
    with pytest.raises(FileNotFoundError, match="VideoReward"):
        evaluate(load_config(path, given, BenchmarkConfig), quiet())
    assert list((folder / "videos").iterdir()) == [video]


def test_several_processes_share_videos_and_ratings(prompts: Path, rater: Path) -> None:
    given = {"suites": ["vbench", "videoalign_mq"], "limit": 1}
    alone = evaluate(make(prompts, rater, name="alone", **given), quiet())
    together(2, _evaluate_in_a_process, prompts, rater)
    one, two = (prompts.parent / "samples" / name / "start" for name in ("alone", "shared"))
    lines = manifest(two)
    assert lines == manifest(one)
    for line in lines:
        same = [(folder / line["file"]).read_bytes() for folder in (one, two)]
        assert same[0] == same[1]
    shared = json.loads((two / "scores.json").read_text())["scores"]
    assert [score["value"] for score in shared] == pytest.approx([s.value for s in alone], rel=1e-6)


def _evaluate_in_a_process(prompts: Path, rater: Path) -> None:
    given = {"suites": ["vbench", "videoalign_mq"], "limit": 1}
    evaluate(make(prompts, rater, name="shared", batch=1, **given), quiet())


def test_each_verb_names_the_other_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "benchmark.yaml").write_text("student: {kind: toy}\n")
    assert main(["benchmark", str(tmp_path), "limit=3"]) == 2
    assert "a directory; needed: CONFIG.yaml; afd eval RUN_DIR" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "benchmark.yaml"), "--videos", "3"]) == 2
    assert "a file; needed: a RUN_DIR; afd benchmark CONFIG.yaml" in capsys.readouterr().err
    assert main(["benchmark", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err
