"""`afd sample` end to end: small random models in the released layouts, and the toy student."""

from __future__ import annotations

import json
import threading
import weakref
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

from afd.cli import main
from afd.config.run import make_config, sections_of
from afd.errors import ConfigError
from afd.models.student import Student
from afd.models.wan.checkpoints import save_self_forcing
from afd.models.wan.config import WanStudentConfig
from afd.models.wan.network import CausalWan
from afd.models.wan.types import WanConfig
from afd.rollout import counted_noise, stream, stream_layout
from afd.sampling import sample as sampling
from afd.sampling.config import SampleConfig
from afd.sampling.jobs import read_jobs
from afd.sampling.sample import dry_run, memory, sample
from afd.video import VideoWriter, read_comment, read_video, write_video
from afd.video.recorder import Recorder
from tests.afd.released_models import STUDENT
from tests.afd.test_text import LENGTH, diffusers_folder
from tests.afd.test_vae import model as vae_model

CONFIGS = Path(__file__).parents[2] / "python" / "afd" / "configs"
# Nine latent frames; a chunk is three of them, twelve video frames.
FRAMES, SIZE = 33, {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Self-Forcing .pt beside a diffusers pipeline folder."""
    folder = tmp_path_factory.mktemp("models")
    diffusers_folder(folder)
    vae_model().save_pretrained(folder / "vae")
    torch.manual_seed(0)
    for name in ("generator", "generator_ema"):
        net = CausalWan(WanConfig(**STUDENT))
        save_self_forcing(folder / f"{name}.pt", **{name: net})
    return folder


def make(models: Path, folder: Path, **more: Any) -> SampleConfig:
    student = {
        "kind": "wan",
        "checkpoint": str(models / "generator_ema.pt"),
        "pretrained": str(models),
        "head_dim": 16,
        "text_len": LENGTH,
        "denoising_steps": [1000, 500],
        "dtype": "float32",
        "vae_dtype": "float32",
    }
    data: dict[str, Any] = {
        "prompts": ["a red ball falls"],
        "out": str(folder),
        "frames": FRAMES,
        "device": "cpu",
        **SIZE,
    }
    keys = WanStudentConfig.model_fields.keys() - SampleConfig.model_fields.keys()
    own = student | {key: more.pop(key) for key in [*more] if key in keys}
    return make_config({**data, **more, "student": own}, (), "test", SampleConfig)


def quiet() -> Console:
    return Console(quiet=True)


def video_of(path: Path, frames: int = FRAMES) -> Tensor:
    return read_video(path, frames=frames, **SIZE)


def test_a_prompt_becomes_an_mp4_of_the_length_asked_for(models: Path, tmp_path: Path) -> None:
    result = sample(make(models, tmp_path), quiet())
    (path,) = result.written
    assert path.name == "0000-a-red-ball-falls-0.mp4"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert len(result.chunk_seconds) == 3
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.width, stream.height) == (FRAMES, 48, 32)
        assert stream.average_rate == 16
    assert video_of(path).std() > 0.01


def test_frames_are_those_of_the_decoded_stream(models: Path, tmp_path: Path) -> None:
    """What is in the file is what rollout and autoencoder give, but for h264."""
    config = make(models, tmp_path, crf=1)
    (path,) = sample(config, quiet()).written
    pipeline = sampling.load(config, ["a red ball falls"])
    assert isinstance(pipeline.student, Student)
    text = pipeline.text(["a red ball falls"])
    layout = stream_layout(pipeline.student, config.latent_frames)
    noise = counted_noise([0], layout, 2, pipeline.student.frame_shape)
    chunks = list(
        stream(
            pipeline.student, text, noise, frames=9, denoising_steps=config.student.denoising_steps
        )
    )
    expected = pipeline.codec.stream()(torch.cat(chunks, 1))[0]
    assert expected.shape == (FRAMES, 3, 32, 48)
    # 4:2:0 keeps brightness and halves colour.
    error = (video_of(path) - expected).mean(1).abs().mean()
    assert error < 0.05


def test_the_file_grows_and_can_be_played_while_the_stream_runs(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    written = threading.Semaphore(0)
    append = VideoWriter.append

    def appended(self: VideoWriter, video_FHWC: Tensor) -> None:
        append(self, video_FHWC)
        with av.open(str(self.partial), format="mp4") as container:
            count = sum(1 for _ in container.decode(video=0))
        seen.append((self.partial.stat().st_size, count))
        assert not self.path.exists()
        written.release()

    remember = Student.remember

    def remembered(self: Student, *args: Any) -> None:
        # The first chunk is on disk before the second one is made: the stream is still running.
        assert written.acquire(timeout=60)
        remember(self, *args)

    monkeypatch.setattr(VideoWriter, "append", appended)
    monkeypatch.setattr(Student, "remember", remembered)
    sample(make(models, tmp_path), quiet())
    sizes, counts = zip(*seen, strict=True)
    assert list(sizes) == sorted(set(sizes))
    # 9, 21 and 33 frames were given; how long the newest is shown, only the next one tells.
    assert counts == (8, 20, 32)


def test_a_batch_makes_the_videos_that_one_after_another_makes(
    models: Path, tmp_path: Path
) -> None:
    prompts = ["a red ball", "the table", "a ball on the table"]
    together = make(models, tmp_path / "a", prompts=prompts, batch=2, crf=1)
    alone = make(models, tmp_path / "b", prompts=prompts, crf=1)
    for a, b in zip(sample(together, quiet()).written, sample(alone, quiet()).written, strict=True):
        assert a.name == b.name
        assert (video_of(a) - video_of(b)).abs().max() < 0.05
    assert (video_of(a) - video_of(tmp_path / "a" / "0000-a-red-ball-0.mp4")).abs().mean() > 0.01


def test_a_smaller_last_batch_holds_one_cache_not_two(models: Path, tmp_path: Path) -> None:
    pipeline = sampling.load(make(models, tmp_path), ["a red ball", "the table"])
    both = pipeline.text(["a red ball", "the table"])
    cache = weakref.ref(pipeline.cache(both, 9))
    assert pipeline.cache(both, 9) is cache()
    assert pipeline.cache(both[:1], 9).self_kv[0][0].shape[0] == 1
    assert cache() is None


def test_what_is_there_is_skipped_and_the_rest_is_made(models: Path, tmp_path: Path) -> None:
    prompts = ["a red ball", "the table"]
    sample(make(models, tmp_path, prompts=prompts[:1]), quiet())
    before = (tmp_path / "0000-a-red-ball-0.mp4").stat().st_mtime_ns
    result = sample(make(models, tmp_path, prompts=prompts, batch=3), quiet())
    assert (len(result.written), result.skipped) == (1, 1)
    assert (tmp_path / "0000-a-red-ball-0.mp4").stat().st_mtime_ns == before
    assert sample(make(models, tmp_path, prompts=prompts), quiet()).written == []


def test_a_folder_of_other_settings_is_not_mixed(models: Path, tmp_path: Path) -> None:
    sample(make(models, tmp_path), quiet())
    with pytest.raises(ConfigError, match=r"made from other inputs .*window: None there, 6 now"):
        sample(make(models, tmp_path, window=6), quiet())


def test_a_stream_that_fails_leaves_no_half_written_file(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = VideoWriter.append

    def broken(self: VideoWriter, video_FHWC: Tensor) -> None:
        if self.frames:
            raise OSError("no space left")
        append(self, video_FHWC)

    monkeypatch.setattr(VideoWriter, "append", broken)
    with pytest.raises(OSError, match="no space left"):
        sample(make(models, tmp_path), quiet())
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_too_small_is_told_with_what_takes_less(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Student, *args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(Student, "remember", full)
    with pytest.raises(ConfigError, match=r"memory \(CUDA out of memory\.\); --dry-run .*batch"):
        sample(make(models, tmp_path), quiet())
    assert list(tmp_path.iterdir()) == []


def test_a_window_with_sink_streams_beyond_the_training_length(
    models: Path, tmp_path: Path
) -> None:
    config = make(models, tmp_path, frames=105, window=6, sink=2, denoising_steps=[1000])
    (path,) = sample(config, quiet()).written
    assert video_of(path, 105).shape[0] == 105
    # A longer stream begins like a shorter one until the window moves on.
    (short,) = sample(
        make(models, tmp_path / "b", denoising_steps=[1000], frames=21), quiet()
    ).written
    assert (video_of(path, 21) - video_of(short, 21)).abs().mean() < 0.02


def test_prompts_seeds_switches_and_prefixes_come_from_a_jsonl(
    models: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    with av.open(str(picture), "w", format="image2") as container:
        pixels = torch.randint(256, (32, 48, 3), dtype=torch.uint8).numpy()
        still: Any = container.add_stream("png", width=48, height=32, pix_fmt="rgb24")
        container.mux(still.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    lines = [
        {"prompt": "a red ball", "name": "plain", "seed": 5},
        {"prompt": "a red ball", "name": "switched", "seed": 5, "switches": [[2, "the table"]]},
        {"prompt": "a red ball", "name": "began", "seed": 5, "image": str(picture)},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    # An image is a separate frame before whole chunks: 1 + 3 + 3 latent frames.
    with pytest.raises(ConfigError, match=r"got 33, which is 9 .*one frame and chunks of 3"):
        sample(make(models, tmp_path / "out", prompts=str(path)), quiet())
    path.write_text("\n".join(map(json.dumps, lines[:2])), encoding="utf-8")
    out = tmp_path / "out"
    sample(make(models, out, prompts=str(path), batch=2, crf=1), quiet())
    plain, switched = (video_of(out / f"{name}.mp4") for name in ("plain", "switched"))
    assert (plain[:21] - switched[:21]).abs().max() < 0.05
    assert (plain[21:] - switched[21:]).abs().mean() > 1e-3
    path.write_text(json.dumps(lines[2]), encoding="utf-8")
    sample(make(models, out, prompts=str(path), frames=25, crf=1), quiet())
    began = video_of(out / "began.mp4", 25)
    assert began.shape[0] == 25
    recorded = json.loads(read_comment(out / "began.mp4") or "")
    assert (recorded["seed"], recorded["prefix"]) == (5, str(picture))


def test_a_video_goes_on(models: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_video(clip, torch.rand(12, 3, 32, 48) * 2 - 1, fps=16)
    config = make(models, tmp_path / "out", video=str(clip), frames=21)
    (path,) = sample(config, quiet()).written
    assert video_of(path, 21).shape[0] == 21
    with pytest.raises(ConfigError, match=r"prefix_frames: got 2 latent frames .* one of"):
        sample(make(models, tmp_path / "b", video=str(clip), prefix_frames=5), quiet())


def test_one_and_two_step_lists_with_a_longer_first_chunk(models: Path, tmp_path: Path) -> None:
    config = make(models, tmp_path, denoising_steps=[1000], first_chunk_steps=[1000, 750, 500, 250])
    assert len(sample(config, quiet()).written) == 1


def test_the_toy_student_is_sampled_by_the_same_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", str(CONFIGS / "sample_toy.yaml"), f"out={tmp_path}"]
    assert main([*words, "samples=2", "batch=2", "device=cpu"]) == 0
    assert "frames a second" in capsys.readouterr().out
    paths = sorted(tmp_path.iterdir())
    assert [path.name[-6:] for path in paths] == ["-0.mp4", "-1.mp4"]
    videos = [read_video(path, frames=12, height=16, width=16) for path in paths]
    assert (videos[0] - videos[1]).abs().max() > 0.1
    assert main([*words, "samples=2", "device=cpu"]) == 0
    assert "2 of 2 videos exist already" in capsys.readouterr().out
    assert main([*words, "frames=24", "window=9", "sink=3", "name=x"]) == 2
    alone = f"out={tmp_path / 'alone'}"
    assert main([*words, alone, "frames=7", "independent_first_frame=true", "device=cpu"]) == 0


@pytest.mark.parametrize(
    "path",
    sorted(CONFIGS.glob("self_forcing_*.yaml")) + sorted(CONFIGS.glob("causal_forcing_*.yaml")),
    ids=lambda path: path.stem,
)
def test_full_size_files_run_dry(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    chunks = 21 if "framewise" in path.name else 7
    assert f"21 latent frames in {chunks} chunks, {5 * chunks - 1} passes" in said
    assert "1,418,996,800 parameters, 2.643 GiB" in said
    # 30 layers of keys and values of 21 frames of 1560 tokens and 512 of text, 1536 channels, bf16.
    assert f"{2 * 30 * (21 * 1560 + 512) * 1536 * 2 / 2**30:.3f} GiB: 21 frames" in said


def test_a_dry_run_knows_the_sizes_of_a_checkpoint_that_is_there(
    models: Path, tmp_path: Path
) -> None:
    config = make(models, tmp_path, window=6, sink=3, batch=2)
    held = dry_run(config, quiet())
    assert held == memory(config)
    assert held.parameters == sum(p.numel() for p in CausalWan(WanConfig(**STUDENT)).parameters())
    pipeline = sampling.load(config, ["a ball", "the table"])
    cache = pipeline.cache(pipeline.text(["a ball", "the table"]), config.latent_frames)
    assert cache.bytes == held.cache
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "damaged.pt").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="damaged, or contains objects other than tensors"):
        dry_run(make(models, tmp_path, checkpoint=str(tmp_path / "damaged.pt")), quiet())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"out": None}, "out: not given"),
        ({"checkpoint": None}, "student.checkpoint is not given"),
        ({"checkpoint": "/none.pt"}, "student.checkpoint: /none.pt is not there"),
        ({"head_dim": 5}, "head_dim: got 5; needed: a divisor of the width 32"),
        ({"cuda_graphs": True}, "cuda_graphs: got 'cpu'"),
        ({"device": "cuda:99"}, "device: got cuda:99; "),
        ({"prompts": None}, "prompts: not given"),
        ({"prompts": "/none.txt"}, "prompts /none.txt: cannot be read"),
        ({"frames": 29}, "frames: got 29, which is 8 latent frames; needed: chunks of 3"),
        ({"frames": 29}, "such as frames=33"),
        ({"image": "/none.png", "frames": 37}, "image: got /none.png for "),
    ],
)
def test_what_is_missing_is_named(
    models: Path, tmp_path: Path, more: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        sample(make(models, tmp_path, **more), quiet())
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("frames=80", "frames: got 80; needed: 1 + a multiple of 4"),
        ("width=830", "height, width: got 480x830; needed: multiples of 16"),
        ("sink=3", "sink: got 3; needed: 0"),
        ("window=4", None),
        (
            "student.denoising_steps=[750, 500]",
            "steps: got [750.0, 500.0]; needed: times decreasing from 1000",
        ),
        ("student.denoising_steps=[]", "steps: got []"),
        ("student.first_chunk_steps=[1000, 333.3]", "steps: got 333.3; needed: whole numbers"),
        ("window=2", "window: got 2; needed: at least sink + chunk = 3"),
        ("framez=81", "unknown key 'framez'; did you mean frames"),
        ("steps=[1000]", "unknown key 'steps'; it is student.denoising_steps now"),
        ("device=tpu", "device is 'tpu'"),
        ("crf=52", "crf is 52"),
    ],
)
def test_settings_that_do_not_go_together_are_named(override: str, told: str | None) -> None:
    if told is None:
        make_config({}, [override], "x", SampleConfig)
        return
    with pytest.raises(ConfigError) as error:
        make_config({}, [override], "x", SampleConfig)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", r":2: not valid JSON"),
        ('{"promt": "a"}', r":2: .*known are prompt, name, seed"),
        ('{"prompt": "a", "name": "../x"}', r":2: name: String should match"),
        ('{"prompt": "a", "image": "x", "video": "y"}', r":2: got image and video"),
        ('{"prompt": "a", "name": "one"}', r"two videos have the name one"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "name": "one"}\n' + line, encoding="utf-8")
    config = make_config({"prompts": str(path)}, (), "x", SampleConfig)
    with pytest.raises(ConfigError, match=told):
        read_jobs(config)


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("first one\n\n  Zweiter, mit Umlaut: ü  \n全角\n", encoding="utf-8")
    config = make_config({"prompts": str(path), "samples": 2, "seed": 7}, (), "x", SampleConfig)
    jobs = read_jobs(config)
    assert [job.prompt for job in jobs[::2]] == ["first one", "Zweiter, mit Umlaut: ü", "全角"]
    assert [job.seed for job in jobs] == [7, 8, 9, 10, 11, 12]
    assert [job.name for job in jobs][-2:] == ["0002-11", "0002-12"]


def test_every_value_has_a_description_and_every_shipped_key_exists() -> None:
    for name, field in SampleConfig.model_fields.items():
        assert field.description or sections_of(field), name
    shipped = [yaml.safe_load(path.read_text("utf-8")) for path in CONFIGS.glob("*.yaml")]
    sampled = [data for data in shipped if "batch" in data and "suites" not in data]
    assert len(sampled) >= 3
    for data in sampled:
        make_config(data, (), "shipped", SampleConfig)


def test_a_recorder_tells_an_error_of_its_thread_and_keeps_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="video_FHWC"),
        Recorder([tmp_path / "a.mp4"], ["x"], 16, 18) as recorder,
    ):
        recorder.put(torch.zeros(1, 2, 3, 15, 16))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_finished_leaves_no_half_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: VideoWriter) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(VideoWriter, "_finish", full)
    with (
        pytest.raises(OSError, match="no space left"),
        Recorder([tmp_path / f"{n}.mp4" for n in "ab"], ["x", "y"], 16, 18) as recorder,
    ):
        recorder.put(torch.zeros(2, 2, 3, 16, 16))
    assert list(tmp_path.iterdir()) == []
