"""`afd sample` of prompts that change: modes, batches, records, mistakes, LongLive's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from afd.cli import main
from afd.config.run import make_config
from afd.errors import ConfigError
from afd.models.wan.checkpoints import save_self_forcing
from afd.models.wan.lora import merge_lora, read_lora
from afd.models.wan.network import CausalWan
from afd.models.wan.types import WanConfig
from afd.rollout import Switch, SwitchMode, counted_noise, stream, stream_layout
from afd.sampling import sample as sampling
from afd.sampling.config import SampleConfig
from afd.sampling.jobs import PromptSwitch, read_jobs
from afd.sampling.sample import sample
from afd.video import read_comment
from tests.afd.longlive_writer import LAYERS
from tests.afd.released_models import STUDENT
from tests.afd.test_sample import CONFIGS, make, models, quiet, video_of

__all__ = ["models"]
# With chunks of three, three frames that were encoded again are read by the next chunk.
WINDOW = {"window": 7, "sink": 1}
RECACHE = [[1, "the table"], [2, "a red ball", "recache"]]


def prompts(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(path)


def test_a_video_with_a_recache_is_that_of_the_stream(models: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a red ball", "name": mode, "seed": 5, "switches": [[3, "the table", mode]]}
        for mode in get_args(SwitchMode)
    ]
    lines += [{"prompt": "a table", "name": "other", "seed": 6}]
    given = prompts(tmp_path / "lines.jsonl", *lines)
    config = make(models, tmp_path / "a", prompts=given, batch=4, crf=1, frames=45, **WINDOW)
    videos = {path.stem: video_of(path, 45) for path in sample(config, quiet()).written}
    pipeline = sampling.load(config, ["a red ball", "the table"])
    first, second = pipeline.text(["a red ball"]), pipeline.text(["the table"])
    noise = counted_noise([5], stream_layout(pipeline.student, 12), 2, pipeline.student.frame_shape)
    made = {}
    for mode in get_args(SwitchMode):
        chunks = stream(
            pipeline.student,
            first,
            noise,
            frames=12,
            denoising_steps=[1000, 500],
            switches={3: Switch(second, mode)},
        )
        made[mode] = pipeline.codec.stream()(torch.cat(list(chunks), 1))[0]
        assert (videos[mode] - made[mode]).mean(1).abs().mean() < 0.05, mode
    assert torch.equal(made["plain"][:33], made["recache"][:33])
    for one, other in (("plain", "recache"), ("recache", "new_sink")):
        assert (made[one][33:] - made[other][33:]).abs().max() > 1e-4


def test_a_recache_does_not_touch_the_other_videos_of_a_batch(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a red ball", "name": "still"},
        {"prompt": "a red ball", "name": "one", "switches": RECACHE},
        {"prompt": "a red ball", "name": "two", "switches": [[2, "x", "recache"], [3, "y"]]},
        {"prompt": "a red ball", "name": "three", "switches": [[2, "x", "new_sink"]]},
    ]
    given = prompts(tmp_path / "lines.jsonl", *lines)
    toy = {"kind": "toy", "checkpoint": "base", "denoising_steps": [1.0, 0.5]}
    config = make_config(
        {"prompts": given, "frames": 12, "batch": 4, "student": toy}, (), "x", SampleConfig
    )
    batches = [
        [job.name for job in batch] for batch in sampling._batches(read_jobs(config), config)
    ]
    assert batches == [["still"], ["one", "two"], ["three"]]


def test_the_mode_is_recorded_and_a_plain_one_as_before(models: Path, tmp_path: Path) -> None:
    line = {"prompt": "a red ball", "name": "x", "switches": RECACHE}
    config = make(models, tmp_path / "out", prompts=prompts(tmp_path / "x.jsonl", line))
    (path,) = sample(config, quiet()).written
    assert json.loads(read_comment(path) or "")["switches"] == RECACHE
    assert sample(config, quiet()).skipped == 1
    line["switches"] = [[1, "the table"], [2, "a red ball", "plain"]]
    config = make(models, tmp_path / "out", prompts=prompts(tmp_path / "x.jsonl", line))
    with pytest.raises(ConfigError, match=r"made from other inputs \(switches: "):
        sample(config, quiet())
    (job,) = read_jobs(config)
    assert job.switches == (PromptSwitch(1, "the table"), PromptSwitch(2, "a red ball"))


@pytest.mark.parametrize(
    ("switches", "told"),
    [
        ([[1, "x", "rechache"]], r"got \[1, 'x', 'rechache'\]; needed: \[chunk, prompt\] or .*"),
        ([[1, "x", None]], "mode one of plain, recache, recache_causal, new_sink"),
        ([["x", 1]], r"got \['x', 1\]; needed: \[chunk, prompt\]"),
        ([[1]], r"got \[1\]; needed"),
        ([[1, "x", "recache", 2]], "needed: "),
        ([[1.0, "x"]], r"got \[1\.0, 'x'\]"),
        ([[True, "x"]], "a chunk that counts from 0"),
        ([[-1, "x"]], "a chunk that counts from 0"),
        ([[1, " "]], "a prompt that is not blank"),
        ([[1, "x"], [1, "y"]], "got two switches at chunk 1; needed: at most one"),
        ({"1": "x"}, r"got \{'1': 'x'\}; needed: a list of \[chunk, prompt\]"),
        ([5], "got 5; needed: "),
        ([[9, "x"]], "x switches at chunk 9; it has 3"),
    ],
    ids=str,
)
def test_a_bad_switch_is_one_sentence(
    models: Path, tmp_path: Path, switches: object, told: str
) -> None:
    line = {"prompt": "a red ball", "name": "x", "switches": switches}
    given = prompts(tmp_path / "x.jsonl", line)
    with pytest.raises(ConfigError, match=told) as raised:
        sample(make(models, tmp_path / "out", prompts=given), quiet())
    assert "\n" not in str(raised.value)


# --- LongLive's files ---


@pytest.fixture(scope="module")
def longlive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """longlive_base.pt and lora.pt as its trainer writes them: a critic beside the student."""
    folder = tmp_path_factory.mktemp("longlive")
    torch.manual_seed(3)
    net = CausalWan(WanConfig(**STUDENT))
    save_self_forcing(folder / "longlive_base.pt", generator=net)
    weights = net.state_dict()
    lora = {}
    for layer in LAYERS:
        for i in range(2):
            o, n = weights[f"blocks.{i}.{layer}.weight"].shape
            name = f"base_model.model.blocks.{i}.{layer}"
            lora[f"{name}.lora_A.weight"] = torch.randn(3, n) / n**0.5
            lora[f"{name}.lora_B.weight"] = torch.randn(o, 3)
    critic = {name: -tensor for name, tensor in lora.items()}
    torch.save({"generator_lora": lora, "critic_lora": critic, "step": 3000}, folder / "lora.pt")
    torch.save(lora, folder / "bare.pt")
    return folder


def test_the_shipped_file_runs_dry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(CONFIGS / "longlive_480x832.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "477 frames of 480x832; 120 latent frames in 40 chunks, 199 passes" in said
    assert f"{2 * 30 * (12 * 1560 + 512) * 1536 * 2 / 2**30:.3f} GiB: 12 frames" in said


def test_the_shipped_file_streams_longlive_s_files(
    models: Path, longlive: Path, tmp_path: Path
) -> None:
    line = {"prompt": "a red ball", "switches": [[5, "the table", "recache"]]}
    base = {"pretrained": models, "head_dim": 16, "text_len": STUDENT["text_len"]}
    base |= {"dtype": "float32", "vae_dtype": "float32", "denoising_steps": "[1000,500]"}
    files = {"checkpoint": longlive / "longlive_base.pt", "adapter": longlive / "lora.pt"}
    words = [f"student.{key}={value}" for key, value in (base | files).items()]
    words += ["frames=69", "height=32", "width=48", "device=cpu", f"out={tmp_path / 'out'}"]
    words += [f"prompts={prompts(tmp_path / 'x.jsonl', line)}"]
    config = str(CONFIGS / "longlive_480x832.yaml")
    assert main(["sample", config, *words]) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert json.loads(read_comment(path) or "")["switches"] == [[5, "the table", "recache"]]
    # The adapter counts as a part of the weights.
    other = [*words, f"student.adapter={longlive / 'bare.pt'}"]
    assert main(["sample", config, *other]) == 2
    absent = [*words, f"student.adapter={longlive / 'none.pt'}"]
    assert main(["sample", config, *absent]) == 2


def test_an_adapter_is_merged_by_its_alpha_over_its_rank(longlive: Path, tmp_path: Path) -> None:
    weights = torch.load(longlive / "longlive_base.pt", weights_only=True)["generator"]
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    pairs, alpha = read_lora(longlive / "lora.pt")
    assert (len(pairs), alpha) == (20, None)
    merged = merge_lora(weights, longlive / "lora.pt", alpha=6)
    for name, tensor in weights.items():
        a, b = pairs.get(name, (torch.zeros(1), torch.zeros(1)))
        expected = tensor if name not in pairs else tensor.double() + 2 * b.double() @ a.double()
        torch.testing.assert_close(merged[name], expected.float())
    again = merge_lora(weights, longlive / "bare.pt", alpha=6)
    assert all(torch.equal(again[name], merged[name]) for name in merged)
    with pytest.raises(
        ValueError, match=r"adapter_alpha: got None; needed: the alpha that .*lora\.pt"
    ):
        merge_lora(weights, longlive / "lora.pt")
    del weights["blocks.1.ffn.0.weight"]
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.0\.weight: .*needed: a weight of the"):
        merge_lora(weights, longlive / "lora.pt", alpha=6)
    with pytest.raises(ValueError, match=r"got 'patch_embedding\.weight'; needed: matrices"):
        read_lora(_saved(tmp_path / "network.pt", {"patch_embedding.weight": torch.zeros(2, 2)}))
    only = {"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 32)}
    with pytest.raises(ValueError, match=r"ffn\.0\.weight: only lora_A'; needed: lora_A and"):
        read_lora(_saved(tmp_path / "half.pt", only))


def test_the_student_that_is_loaded_and_trained_has_the_adapter_merged(
    models: Path, longlive: Path, tmp_path: Path
) -> None:
    files = {"checkpoint": str(longlive / "longlive_base.pt"), "adapter": str(longlive / "lora.pt")}
    config = make(models, tmp_path, adapter_alpha=6, **files).student
    weights = torch.load(longlive / "longlive_base.pt", weights_only=True)["generator"]
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    expected = merge_lora(weights, longlive / "lora.pt", alpha=6)
    held = config.load_network().state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())
    alone = config.model_copy(update={"adapter": None})
    assert alone.fingerprint() != config.fingerprint()
    # What a run saves holds the sum already.
    assert config.with_weights(tmp_path).adapter is None  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"student\.adapter: /none\.pt is not there"):
        config.model_copy(update={"adapter": "/none.pt"}).require_weights()


def _saved(path: Path, held: dict[str, Any]) -> Path:
    torch.save(held, path)
    return path


def test_a_peft_folder_brings_its_alpha(longlive: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    held = torch.load(longlive / "bare.pt", weights_only=True)
    save_file(held, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": 3}))
    pairs, alpha = read_lora(tmp_path)
    assert (len(pairs), alpha) == (20, 6.0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "use_dora": True}))
    with pytest.raises(ValueError, match=r"got \['use_dora'\]; needed: a plain LoRA"):
        read_lora(tmp_path)
