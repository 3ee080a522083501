"""The tiny autoencoder in sampling, in training and in plans."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from afd.cache import Store
from afd.config.run import load_config, make_config
from afd.data.videos import Videos
from afd.errors import ConfigError
from afd.methods.inputs import InputPipeline
from afd.models.wan.sizes import LATENTS
from afd.models.wan.tiny_vae import TinyDecoded, TinyVAE, _Network
from afd.models.wan.vae import VideoVAE
from afd.planning.autoencoders import TINY, Autoencoder
from afd.planning.plan import make_plan
from afd.sampling import sample as sampling
from afd.sampling.sample import sample
from afd.testing.tiny_vae import drawn_weights
from afd.trainer.build import build_method
from afd.video import read_video
from afd.video.config import VideoConfig
from tests import tolerances
from tests.afd.released_models import PROMPTS
from tests.afd.test_build import models, updates, wan
from tests.afd.test_caches import folder_teacher
from tests.afd.test_plan import CONFIGS
from tests.afd.test_sample import make, quiet
from tests.afd.test_sample import models as sampled
from tests.afd.test_tiny_vae import WAN22, keys
from tests.afd.test_vae import model as vae_model

__all__ = ["models", "sampled"]
RELEASED = keys([64] * 4, [256, 128, 64, 64], memories=3)
RELEASED22 = keys([64] * 4, [256, 128, 64, 64], **WAN22)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "taew2_1.safetensors"
    save_file(drawn_weights(keys()), path)
    return path


# --- sampling ---


def test_a_video_is_decoded_by_the_tiny_decoder(sampled: Path, tiny: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"vae": "tiny", "tiny_vae": str(tiny)}
    config = make(sampled, tmp_path / "out", crf=1, **options)
    (path,) = sample(config, quiet()).written
    pipeline = sampling.load(config, ["a red ball falls"])
    assert isinstance(pipeline.codec, TinyVAE)
    full = make(sampled, tmp_path / "full", crf=1)
    (other,) = sample(full, quiet()).written
    made, plain = (read_video(one, frames=33, height=32, width=48) for one in (path, other))
    assert (made - plain).abs().mean() > 0.05
    # Another decoder under the same name is another video.
    changed = {k: v + 0.1 for k, v in drawn_weights(keys()).items()}
    elsewhere = tmp_path / "taew2_1.safetensors"
    save_file(changed, elsewhere)
    with pytest.raises(ConfigError, match="made from other inputs"):
        sample(make(sampled, tmp_path / "out", crf=1, vae="tiny", tiny_vae=str(elsewhere)), quiet())


def test_a_decoder_of_another_scale_or_none_is_refused(
    sampled: Path, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="tiny_vae: got null; needed: TAEHV's file, as vae=tiny"):
        make(sampled, tmp_path, vae="tiny")
    absent = make(sampled, tmp_path, vae="tiny", tiny_vae="none.pth")
    with pytest.raises(ConfigError, match=r"tiny_vae: none\.pth is not a file"):
        sample(absent, quiet())
    for sizes, found in (
        ({"pixels": 12}, "16 channels, 4 frames and 16 pixels"),
        ({"latent": 48}, "48 channels, 4 frames and 8 pixels"),
        ({"pixels": 12, "latent": 48}, "48 channels, 4 frames and 16 pixels"),
    ):
        save_file(drawn_weights(keys(**sizes)), tmp_path / "wide.safetensors")
        wide = make(sampled, tmp_path, vae="tiny", tiny_vae=str(tmp_path / "wide.safetensors"))
        with pytest.raises(ConfigError, match=f"has latents of {found}; needed: 16 .*taew2_1"):
            sample(wide, quiet())
    toy = {"student": {"kind": "toy"}, "video": {"decoder": "tiny"}}
    with pytest.raises(
        ConfigError, match=r"video\.decoder: got tiny; needed: null, as student\.ki"
    ):
        make_config(toy)
    with pytest.raises(ConfigError, match=r"needed with it: student\.tiny_vae"):
        load_config(CONFIGS / "afd_self_forcing_480x832.yaml", ["video.decoder=tiny"])


# --- training ---


class _Scorer:
    input_space = "pixels"

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        return video_BFCHW[:, ::2]


@pytest.mark.parametrize("codec_match", [False, True])
def test_teacher_and_student_of_one_content_look_the_same(
    tiny: Path, tmp_path: Path, codec_match: bool
) -> None:
    """Bit for bit: they differ in latents alone."""
    video = VideoConfig(
        frames=9, height=16, width=24, fps=8, codec_match=codec_match, decoder="tiny"
    )
    codec = TinyDecoded(VideoVAE(vae_model()), TinyVAE.load(tiny))
    teacher, store = folder_teacher(tmp_path / "clips"), Store(tmp_path / "cache")
    scorer: Any = _Scorer()
    videos = Videos(teacher, video, prepare=scorer.prepare, codec=codec, store=store)
    theirs = videos.fetch(teacher.requests)
    clips = torch.stack([videos.clip(request) for request in teacher.requests])
    latents = torch.cat([codec.encode(clip[None]) for clip in clips])
    with torch.no_grad():
        pipeline = InputPipeline(scorer, codec, video)
        ours = [pipeline(x0_FCHW[None]) for x0_FCHW in latents]
    assert torch.equal(theirs, torch.cat(ours))
    assert (theirs - scorer.prepare(clips)).abs().mean() > 0.1
    # The next run reads the latents.
    again = Videos(teacher, video, prepare=scorer.prepare, codec=codec, store=store)
    assert torch.equal(again.fetch(teacher.requests), theirs)
    assert (again._made, again._found) == (0, 3)


@pytest.mark.parametrize("method", ["afd", "gan"])
def test_a_method_trains_on_what_the_tiny_decoder_shows(
    models: Path, tiny: Path, method: str
) -> None:
    steady = ["discriminator.warmup_updates=0", "video.decoder=tiny", f"student.tiny_vae={tiny}"]
    config = wan(models, method, "videoalign", *steady)
    made = build_method(config, prompts=PROMPTS)
    assert isinstance(made.codec, TinyDecoded)
    metrics = updates(made, config, PROMPTS[:2])
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())


# --- plans ---


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def released(name: str) -> tuple[TinyVAE, Autoencoder]:
    """The network of released sizes on the meta device, and what a plan takes it for."""
    shapes = RELEASED if name == "wan2.1" else RELEASED22
    with torch.device("meta"):
        vae = TinyVAE(_Network({key: torch.Size(shape) for key, shape in shapes.items()}))
    return vae, TINY[LATENTS[name]]


@pytest.mark.parametrize("name", list(LATENTS))
def test_the_planned_work_is_that_of_the_released_layers(name: str) -> None:
    vae, planned = released(name)
    assert vae.latents == LATENTS[name]
    assert sum(p.numel() for p in vae.network.parameters()) == planned.parameters
    channels, _, space = vae.latents
    with FlopCounterMode(display=False) as decoded, torch.no_grad():
        vae.stream()(torch.zeros(1, 2, channels, 480 // space, 832 // space, device="meta"))
    with FlopCounterMode(display=False) as encoded:
        vae.encode(torch.zeros(1, 5, 3, 480, 832, device="meta"))
    size, near = (2, 480 * 832), tolerances.EXACT_COUNT
    assert decoded.get_total_flops() == pytest.approx(planned.decode_flop(*size), rel=near)
    assert encoded.get_total_flops() == pytest.approx(planned.encode_flop(*size), rel=near)


def test_the_planned_memory_is_what_the_layers_for_wan22_hold() -> None:
    vae, planned = released("wan2.2")
    near, pixels = tolerances.ACTIVATION_ESTIMATE, 480 * 832
    latents = torch.zeros(1, 3, 48, 30, 52, device="meta")
    with _Live() as live, torch.no_grad():
        vae.stream()(latents)
    assert live.peak == pytest.approx(planned.decode_bytes(1, pixels, 4), rel=near)
    with _Live() as live:
        vae.encode(torch.zeros(1, 5, 3, 480, 832, device="meta"))
    assert live.peak == pytest.approx(planned.encode_bytes(pixels, 4), rel=near)
    for frames in (3, 6):
        given = torch.zeros(1, frames, 48, 30, 52, device="meta", requires_grad=True)
        with _Live() as live:
            vae.decode(given).sum().backward()
        expected = planned.decode_gradient_bytes(frames, 1, pixels, 4)
        assert live.peak == pytest.approx(expected, rel=near)


def test_a_plan_counts_the_tiny_decoder() -> None:
    path, given = CONFIGS / "afd_self_forcing_480x832.yaml", ["student.tiny_vae=/none.pth"]
    plain = make_plan(load_config(path))
    shown = make_plan(load_config(path, [*given, "video.decoder=tiny"]))
    whole = make_plan(load_config(path, [*given, "student.vae=tiny"]))
    seconds = [{p.name: p.seconds for p in plan.phases} for plan in (plain, shown, whole)]
    # 8 of the teacher's videos are decoded beside 32 of the student's.
    assert seconds[1]["decode"] < 0.06 * seconds[0]["decode"]
    assert seconds[2]["decode"] == seconds[1]["decode"]
    assert 0 < seconds[2]["encode the teacher"] < 0.05 * seconds[1]["encode the teacher"]
    assert "encode the teacher" not in seconds[0]
    sizes = [{p.name: p.bytes for p in plan.memory} for plan in (plain, shown, whole)]
    assert sizes[1]["decode"] < 0.2 * sizes[0]["decode"]
    more = sizes[1]["autoencoder"] - sizes[0]["autoencoder"]
    assert more == sizes[2]["autoencoder"] == 2 * TINY[LATENTS["wan2.1"]].parameters
    assert any("student.tiny_vae: /none.pth is not there" in line for line in whole.missing)


def test_a_plan_of_wan22_counts_its_tiny_autoencoder() -> None:
    path, given = CONFIGS / "wan22_5b_704x1280.yaml", ["student.tiny_vae=/none.pth"]
    plain, shown, whole = (
        make_plan(load_config(path, words))
        for words in ([], [*given, "video.decoder=tiny"], [*given, "student.vae=tiny"])
    )
    decodes = [
        {p.name: p.flop + p.convolutions for p in x.phases}["decode"] for x in (shown, plain)
    ]
    assert 0 < decodes[0] < 0.02 * decodes[1]
    sizes = [{p.name: p.bytes for p in x.memory} for x in (plain, shown, whole)]
    assert sizes[1]["decode"] < 0.1 * sizes[0]["decode"]
    numbers = 2 * TINY[LATENTS["wan2.2"]].parameters
    assert sizes[1]["autoencoder"] - sizes[0]["autoencoder"] == numbers
    assert sizes[2]["autoencoder"] == numbers
