"""Krea 14B, Wan2.1 14B, Wan2.2 5B and LongLive 2.0 5B: their files' layouts, at full size by header
and tiny with weights, what is refused, and streams of 48 latent channels."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from afd.cli import main
from afd.config.run import RunConfig, load_config, make_config
from afd.errors import DONE, MISTAKE
from afd.hub import CONFIGS
from afd.models.adapters import Adapters
from afd.models.config import LoraConfig
from afd.models.wan.checkpoints import load_checkpoint, to_diffusers
from afd.models.wan.config import WanStudentConfig
from afd.models.wan.loading import build, load_network
from afd.models.wan.network import CausalWan
from afd.models.wan.sizes import SIZES
from afd.models.wan.tiny_vae import TinyDecoded, TinyVAE
from afd.models.wan.types import WanConfig
from afd.planning.cost_model import Net, kv_bytes
from afd.planning.plan import make_plan, setups, where_it_fits
from afd.sampling.config import SampleConfig
from afd.testing.tiny_vae import drawn_weights
from afd.video import read_video, write_video
from tests.afd import sparse
from tests.afd.recorded import recorded
from tests.afd.released_models import write_clips
from tests.afd.test_text import LENGTH, diffusers_folder
from tests.afd.test_tiny_vae import WAN22 as TINY22
from tests.afd.test_tiny_vae import keys
from tests.afd.test_vae import model as vae21
from tests.afd.test_vae import model22 as vae22
from tests.tolerances import NETWORK_FORWARD

# The proportions of a published network, narrow: heads of 8 channels instead of 128.
NARROW: dict[str, dict[str, Any]] = {
    "wan2.1-14b": {"dim": 40, "num_heads": 5, "ffn_dim": 108, "num_layers": 3},
    "wan2.2-5b": {
        "dim": 48,
        "num_heads": 6,
        "ffn_dim": 224,
        "num_layers": 2,
        "in_dim": 48,
        "out_dim": 48,
    },
}
REST: dict[str, Any] = {"head_dim": 8, "text_len": LENGTH}


def narrow(size: str, seed: int = 0) -> CausalWan:
    torch.manual_seed(seed)
    return CausalWan(WanConfig(**NARROW[size], freq_dim=16, text_dim=24, text_len=LENGTH))


def wan(**settings: Any) -> WanStudentConfig:
    return WanStudentConfig(kind="wan", **settings)


def renamed(held: dict[str, Any], layout: str) -> dict[str, Any]:
    """Weights by the names of a layout: the original code's, the released wrapper's, diffusers'."""
    if layout == "diffusers":
        return {to_diffusers(name): x for name, x in held.items()}
    return {("model." if layout == "wrapper" else "") + name: x for name, x in held.items()}


# --- the published sizes ---


def test_the_sizes_are_the_published_ones() -> None:
    numbers = {
        name: sum(math.prod(shape) for shape in sparse.shapes(name).values()) for name in SIZES
    }
    assert numbers == {
        "wan2.1-1.3b": 1_418_996_800,
        "wan2.1-14b": 14_288_491_584,  # in bfloat16 28.58 GB, as Krea's file
        "wan2.2-5b": 4_999_787_712,
    }
    for size in SIZES.values():
        config = WanConfig(**size.network)
        assert (config.head_dim, config.patch, config.text_dim) == (128, (2, 2), 4096)


@pytest.mark.parametrize("layout", ["original", "wrapper", "diffusers"])
@pytest.mark.parametrize("size", ["wan2.1-14b", "wan2.2-5b"])
def test_full_size_files_are_recognised_by_their_headers(
    tmp_path: Path, size: str, layout: str
) -> None:
    held = renamed(sparse.shapes(size), layout)
    file = sparse.write(tmp_path / "one.safetensors", held)
    folder = sparse.write_shards(tmp_path / "many", held, 6, torch.float32)
    heads = WanConfig(**SIZES[size].network).num_heads
    written = {"num_attention_heads" if layout == "diffusers" else "num_heads": heads}
    (folder / "config.json").write_text(json.dumps(written))
    for path in (file, folder):
        found = wan(size=size, checkpoint=str(path)).sizes()
        assert found == WanConfig(**SIZES[size].network)
        (other,) = set(NARROW) - {size}
        with pytest.raises(ValueError, match=f"holds {size} .*; needed: {other} .*size={other}"):
            wan(size=other, checkpoint=str(path)).sizes()


def test_a_checkpoint_of_another_size_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = sparse.write(tmp_path / "small.safetensors", sparse.shapes("wan2.1-1.3b"))
    sample = ["sample", "sample_krea_14b_480x832", "prompts=a ball"]
    for words in (["train", "krea_14b_480x832"], sample):
        given = [f"student.checkpoint={small}", f"out={tmp_path / 'out'}", "device=cpu"]
        for more in ([], ["--dry-run"]):
            assert main([*words, *given, *more]) == MISTAKE
            said = capsys.readouterr().err
            assert "small.safetensors holds wan2.1-1.3b (30 layers of width 1536" in said
            assert "needed: wan2.1-14b (40 layers of width 5120" in said
    with pytest.raises(ValueError, match=r"holds wan2\.1-1\.3b"):
        load_network(wan(size="wan2.1-14b", checkpoint=str(small)))


def test_latents_of_another_autoencoder_are_refused(tmp_path: Path) -> None:
    file = sparse.write(tmp_path / "five.safetensors", sparse.shapes("wan2.2-5b"))
    with pytest.raises(ValueError, match=r"48 latent channels; needed: 16, or .*latents=wan2\.2"):
        wan(checkpoint=str(file)).sizes()
    assert wan(checkpoint=str(file), latents="wan2.2").sizes().in_dim == 48
    with pytest.raises(ValueError, match=r"latents: got wan2\.1; needed: wan2\.2"):
        wan(size="wan2.2-5b", latents="wan2.1")
    assert wan(size="wan2.2-5b").scale == (4, 16)
    assert wan(size="wan2.1-14b").scale == (4, 8)


# --- tiny networks in the layouts of the files ---


def krea(net: CausalWan, folder: Path) -> Path:
    file = folder / "krea-realtime-video-14b.safetensors"
    save_file(renamed(net.state_dict(), "wrapper"), file)
    return file


def longlive2(net: CausalWan, folder: Path) -> Path:
    torch.save({"generator": renamed(net.state_dict(), "wrapper")}, folder / "model_bf16.pt")
    return folder / "model_bf16.pt"


def sharded(net: CausalWan, folder: Path, layout: str) -> Path:
    """Shards with an index: the folder of the original code, or diffusers' transformer/."""
    held, config = renamed(net.state_dict(), layout), net.config
    folder = folder / ("transformer" if layout == "diffusers" else ".")
    folder.mkdir(exist_ok=True)
    names, table = list(held), {}
    for i in range(3):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: held[name] for name in names[i::3]}, folder / file)
        table |= dict.fromkeys(names[i::3], file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    heads = "num_attention_heads" if layout == "diffusers" else "num_heads"
    written = {heads: config.num_heads, "eps": 1e-6, "text_len": config.text_len}
    (folder / "config.json").write_text(json.dumps(written))
    return folder.parent if layout == "diffusers" else folder


WRITERS: dict[str, Callable[[CausalWan, Path], Path]] = {
    "krea": krea,
    "longlive2": longlive2,
    "original shards": lambda net, folder: sharded(net, folder, "original"),
    "diffusers shards": lambda net, folder: sharded(net, folder, "diffusers"),
    "wrapper shards": lambda net, folder: sharded(net, folder, "wrapper"),
}


@pytest.mark.parametrize("size", list(NARROW))
@pytest.mark.parametrize("layout", list(WRITERS))
def test_a_tiny_network_computes_the_same_from_every_layout(
    tmp_path: Path, size: str, layout: str
) -> None:
    net = narrow(size)
    path = WRITERS[layout](net, tmp_path)
    loaded = load_checkpoint(path, **REST)
    assert loaded.config == net.config
    channels = net.config.in_dim
    x, text = torch.randn(1, 6, channels, 4, 6), torch.randn(1, LENGTH, 24)
    t = torch.tensor([[937.5] * 3 + [250.0] * 3])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, text), net(x, t, text))


def test_a_stream_of_48_channels_is_the_teacher_forced_pass() -> None:
    """Chunks of eight frames as LongLive 2.0's, each over clean earlier ones."""
    net = narrow("wan2.2-5b")
    net.config = WanConfig(**{**net.config.__dict__, "chunk": 8})
    x, clean = torch.randn(2, 1, 16, 48, 4, 6).unbind()
    t, text = torch.full((1, 1), 625.0), torch.randn(1, LENGTH, 24)
    with torch.no_grad():
        whole = net(x, t, text, net.clean_context(clean, text))
        cache, parts, zero = net.new_cache(text, 16, 4, 6), [], torch.zeros(1, 1)
        for start in (0, 8):
            chunk = slice(start, start + 8)
            parts.append(net.forward_cached(x[:, chunk], t, cache, start))
            net.forward_cached(clean[:, chunk], zero, cache, start, context_only=True)
    streamed = torch.cat([part for part in parts if part is not None], 1)
    assert float((streamed - whole).norm() / whole.norm()) <= NETWORK_FORWARD


# --- the student and its autoencoder ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of each autoencoder with a text encoder, and a network of each size."""
    home = tmp_path_factory.mktemp("students")
    for name, vae in (("wan2.1", vae21), ("wan2.2", vae22)):
        diffusers_folder(home / name)
        vae().save_pretrained(home / name / "vae")
    for size in NARROW:
        (home / size).mkdir()
        krea(narrow(size), home / size)
    return home


def files(home: Path, size: str, latents: str) -> dict[str, Any]:
    return {
        "kind": "wan",
        "latents": SIZES[size].latents,
        "checkpoint": str(home / size / "krea-realtime-video-14b.safetensors"),
        "pretrained": str(home / latents),
        "dtype": "float32",
        "vae_dtype": "float32",
        **REST,
    }


@pytest.mark.parametrize("size", list(NARROW))
def test_a_student_encodes_and_decodes_with_its_own_autoencoder(folders: Path, size: str) -> None:
    latents, other = SIZES[size].latents, {"wan2.1": "wan2.2", "wan2.2": "wan2.1"}
    config = WanStudentConfig(**files(folders, size, latents))
    video = make_config({"video": {"frames": 9, "height": 64, "width": 96}}).video
    student, codec = build(config, video)
    space = config.scale[1]
    assert student.frame_shape == (config.latents_of.channels, 64 // space, 96 // space)
    pixels: Tensor = torch.rand(1, 9, 3, 64, 96) * 2 - 1
    latent = codec.encode(pixels)
    assert latent.shape == (1, student.frames, *student.frame_shape)
    assert codec.decode(latent).shape == pixels.shape
    wrong = WanStudentConfig(**files(folders, size, other[latents]))
    with pytest.raises(ValueError, match=r"student\.vae: .* channels.*; needed: .* of the student"):
        build(wrong, video)


def test_a_wan22_student_streams_through_its_tiny_autoencoder(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the shipped configuration, from a picture: encoded, streamed and decoded by taew2_2."""
    weights = drawn_weights(keys(**TINY22))
    save_file(weights, tmp_path / "taew2_2.safetensors")
    save_file(drawn_weights(keys()), tmp_path / "taew2_1.safetensors")
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_video(tmp_path / "picture.mp4", picture, fps=24, crf=1)
    held = {k: v for k, v in files(folders, "wan2.2-5b", "wan2.2").items() if k != "kind"}
    words = [f"student.{key}={value}" for key, value in held.items()]
    words += ["student.size=null", "student.chunk=3", "student.denoising_steps=[1000,500]"]
    words += ["height=64", "width=96", "frames=25", "window=null", "sink=0", "device=cpu", "crf=1"]
    words += [f"image={tmp_path / 'picture.mp4'}", "prompts=a ball", f"out={tmp_path / 'out'}"]
    sampled = ["sample", "sample_wan22_5b_704x1280", *words, "student.vae=tiny"]
    shown = recorded(monkeypatch)
    assert main([*sampled, f"student.tiny_vae={tmp_path}"]) == DONE
    assert [video.shape[1] for video in shown] == [1, 12, 12]
    # The first frame is the picture through the tiny autoencoder.
    vae = TinyVAE.of(weights)
    given = read_video(tmp_path / "picture.mp4", frames=1, height=64, width=96)
    assert torch.equal(shown[0], vae.decode(vae.encode(given[None])))
    other = [f"student.tiny_vae={tmp_path / 'taew2_1.safetensors'}", f"out={tmp_path / 'other'}"]
    assert main([*sampled, *other]) == MISTAKE
    said = capsys.readouterr().err
    assert "has latents of 16 channels, 4 frames and 8 pixels; needed: 48" in said
    # In training: Wan2.2's encoder and the tiny decoder.
    config = WanStudentConfig(
        **files(folders, "wan2.2-5b", "wan2.2"), tiny_vae=str(tmp_path / "taew2_2.safetensors")
    )
    video = {"frames": 9, "height": 64, "width": 96, "decoder": "tiny"}
    _, codec = build(config, make_config({"video": {"frames": 9}}).video.model_copy(update=video))
    assert isinstance(codec, TinyDecoded)
    latent = codec.encode(torch.rand(1, 9, 3, 64, 96) * 2 - 1)
    assert codec.decode(latent).shape == (1, 9, 3, 64, 96)


def test_frames_of_wan22_are_multiples_of_32_pixels() -> None:
    student = {"kind": "wan", "size": "wan2.2-5b"}
    assert SampleConfig(student=student, height=480, width=832).latent_frames == 21
    with pytest.raises(ValueError, match="got 720x1280; needed: multiples of 32"):
        SampleConfig(student=student, height=720, width=1280)


def test_a_wan22_student_trains_from_its_shipped_configuration(
    folders: Path, tmp_path: Path
) -> None:
    """On latents, tiny, by overrides alone: two updates, and the discriminator has 48 channels."""
    held = {k: v for k, v in files(folders, "wan2.2-5b", "wan2.2").items() if k != "kind"}
    words = [f"student.{key}={value}" for key, value in held.items()]
    write_clips(tmp_path / "teacher")
    words += [
        "student.size=null",
        "student.chunk=3",
        "student.denoising_steps=[1000,500]",
        "student.lora.rank=4",
        "discriminator={kind: latent, warmup_updates: 0}",
        "afd.samples_per_prompt=2",
        "device=cpu",
        "updates=2",
        "prompts_per_update=2",
        f"teacher.path={tmp_path / 'teacher'}",
        "video={frames: 21, height: 64, width: 96, fps: 24}",
        "evaluation.kind=none",
        "logging.progress=false",
        f"cache={tmp_path / 'cache'}",
        f"out={tmp_path / 'run'}",
    ]
    assert main(["train", "wan22_5b_704x1280", *words]) == DONE
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["update"] for line in lines] == [1, 2]
    assert all(line["student/grad_norm"] > 0 for line in lines)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_float32_shards_load_in_bfloat16_without_a_copy_in_float32(tmp_path: Path) -> None:
    with torch.device("meta"):
        big = CausalWan(WanConfig(dim=512, num_heads=4, ffn_dim=4096, num_layers=4, text_dim=64))
    held = {name: tuple(x.shape) for name, x in big.state_dict().items()}
    folder = sparse.write_shards(tmp_path / "big", held, 4, torch.float32)
    (folder / "config.json").write_text('{"num_heads": 4}')
    krea(narrow("wan2.1-14b"), tmp_path)
    code = """
import re, sys, torch
from afd.models.adapters import Adapters
from afd.models.config import LoraConfig
from afd.models.wan.checkpoints import load_checkpoint
def kib(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
load_checkpoint(sys.argv[2], head_dim=8, dtype=torch.bfloat16)
before = kib("RssAnon")
net = load_checkpoint(sys.argv[1], dtype=torch.bfloat16)
print(kib("RssAnon") - before)
"""
    small = str(tmp_path / "krea-realtime-video-14b.safetensors")
    words = [sys.executable, "-c", code, str(folder), small]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    whole = 4 * sum(math.prod(shape) for shape in held.values())
    assert whole > 100e6
    assert 1024 * int(done.stdout) <= 0.6 * whole


# --- plans ---


def planned(name: str, *words: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", list(words))


@pytest.mark.parametrize("size", list(NARROW))
def test_the_plans_formulas_are_the_bytes_of_a_narrow_network(size: str) -> None:
    net = narrow(size)
    wan = net.config
    sizes = (wan.dim, wan.ffn_dim, wan.num_layers, wan.text_len)
    planned_net = Net(*sizes, 0, 6, wan.chunk, 6, lora=4, channels=wan.in_dim)
    cache = net.new_cache(torch.zeros(1, LENGTH, 24), 6, 4, 6)
    assert kv_bytes(planned_net, 1, 4) == cache.bytes
    adapters = Adapters(net, ("theta",), LoraConfig(rank=4, alpha=4), 0).parameters("theta")
    assert planned_net.lora_parameters == sum(x.numel() for x in adapters.values())


def test_a_14b_fits_one_h200_and_says_so() -> None:
    plan = make_plan(planned("krea_14b_480x832"))
    parts = {part.name: part.bytes for part in plan.memory}
    assert parts["network"] == 2 * 14_288_491_584
    # Keys and values of 21 frames and the prompt, in 40 layers of width 5120.
    assert parts["cache"] == 2 * 40 * (21 * 1560 + 512) * 5120 * 2
    said = list(where_it_fits(plan))
    assert len(said) == 5
    assert said[1].startswith("on an H200 (131 GiB): fits with 1 process; ")
    assert "on an RTX 4090 (22 GiB): does not fit; the least is " in said[-1]
    assert {one.processes for one in setups(plan)} == {1, 2, 4, 8}
    hours = [float(line.split()[-2].replace(",", "")) for line in said[:2]]
    assert hours[0] < hours[1] / 2


def test_the_plan_of_wan22_has_its_latents_and_its_autoencoder() -> None:
    plan = make_plan(planned("wan22_5b_704x1280"))
    parts = {part.name: part.bytes for part in plan.memory}
    assert (plan.net.tokens, plan.net.frames, plan.net.channels) == (44 * 80 // 4, 32, 48)
    assert parts["rollouts"] == torch.empty(32, 32, 48, 44, 80, device="meta").nbytes
    assert parts["autoencoder"] == 2 * 704_688_668
    assert any(
        line.startswith("on an H100 (75 GiB): fits with 1 process") for line in where_it_fits(plan)
    )


def test_shards_make_room_where_one_process_has_none() -> None:
    """A whole 14B network, trained: masters, moments and gradients in float32 are sharded."""
    plan = make_plan(planned("krea_14b_480x832", "student.lora=null", "afd.ema_decay=null"))
    peaks = {(one.parallel, one.processes): one.peak for one in setups(plan)}
    assert peaks["fsdp", 8] < peaks["fsdp", 2] < peaks["ddp", 1]
    said = list(where_it_fits(plan))
    assert not any("fits with 1 process" in line for line in said)
    assert "processes and parallel=fsdp; " in said[0]
