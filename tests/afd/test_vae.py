"""The video autoencoder and its streaming decode, against diffusers' own, on small models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afd.models.wan.sizes import LATENTS
from afd.models.wan.vae import VideoVAE
from afd.models.wan.vae_files import WAN22
from tests.tolerances import NETWORK_GRADIENT, NETWORK_REORDERED

# The released statistics of Wan2.1's latents.
MEAN = """-.7571 -.7089 -.9113 .1075 -.1745 .9653 -.1517 1.5508
          .4134 -.0715 .5517 -.3632 -.1922 -.9497 .2503 -.2921"""
STD = """2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743
         3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.9160"""


def model(seed: int = 0, **settings: Any) -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    return AutoencoderKLWan(base_dim=8, **settings).eval()


def model22(seed: int = 0, **settings: Any) -> Any:
    """Wan2.2's autoencoder in its own layout, narrow."""
    return model(seed, **{"decoder_base_dim": 12, "z_dim": 48, **WAN22, **settings})


MODELS = pytest.mark.parametrize("make", [model, model22], ids=["wan2.1", "wan2.2"])


def latent(
    frames: int, batch: int = 2, height: int = 3, width: int = 2, channels: int = 16
) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, frames, channels, height, width, generator=generator)


def latent_of(vae: VideoVAE, frames: int, **sizes: int) -> Tensor:
    return latent(frames, channels=vae.latents.channels, **sizes)


@torch.no_grad()
def whole_decode(vae: Any, latent_BFCHW: Tensor) -> Tensor:
    """diffusers' own decode of the whole latent."""
    mean, std = (
        torch.tensor(v).view(-1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    z_BFCHW = (latent_BFCHW.float() * std + mean).to(vae.dtype)
    return vae.decode(z_BFCHW.transpose(1, 2)).sample.transpose(1, 2)


def test_two_threads_encode_as_one_does() -> None:
    """The network keeps the state of an encode on itself."""
    vae = VideoVAE(model())
    videos = [torch.randn(1, frames, 3, 16, 16) for frames in (5, 9)]
    alone = [vae.encode(video) for video in videos]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(vae.encode, videos * 8))
    assert all(torch.equal(one, alone[i % 2]) for i, one in enumerate(found))


def test_the_statistics_are_those_of_the_released_latents() -> None:
    config = model().config
    assert config.latents_mean == [float(x) for x in MEAN.split()]
    assert config.latents_std == [float(x) for x in STD.split()]
    assert VideoVAE(model()).latents == LATENTS["wan2.1"]
    assert VideoVAE(model()).scale == (4, 8)


def test_the_original_statistics_of_wan22_are_one_per_channel() -> None:
    vae = VideoVAE(model22())
    assert vae.latents == LATENTS["wan2.2"] == (48, 4, 16)
    assert vae.scale == (4, 16)
    mean, std = WAN22["latents_mean"], WAN22["latents_std"]
    assert (len(mean), len(std)) == (48, 48)
    assert (mean[0], mean[-1], std[0], std[-1]) == (-0.2289, -0.0667, 0.4765, 0.7744)
    with pytest.raises(ValueError, match=r"latents_mean, latents_std: got \[16, 48\]; needed: 48"):
        VideoVAE(model22(latents_mean=[0.0] * 16))


def in_chunks(vae: VideoVAE, latent_BFCHW: Tensor, chunks: list[int]) -> Tensor:
    decoder = vae.stream()
    video = [decoder(chunk_BFCHW) for chunk_BFCHW in latent_BFCHW.split(chunks, dim=1)]
    assert [v.shape[1] for v in video] == [4 * n - 3 * (i == 0) for i, n in enumerate(chunks)]
    return torch.cat(video, dim=1)


@MODELS
def test_a_decode_is_diffusers_decode(make: Any) -> None:
    vae = VideoVAE(make())
    latent_BFCHW = latent_of(vae, 5)
    whole, space = vae.decode(latent_BFCHW), vae.latents.space
    assert whole.shape == (2, 17, 3, 3 * space, 2 * space)
    torch.testing.assert_close(whole, whole_decode(vae.model, latent_BFCHW), **NETWORK_REORDERED)


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_decode_to_the_very_frames_of_one_whole_decode(
    make: Any, dtype: torch.dtype
) -> None:
    vae = VideoVAE(make().to(dtype))
    latent_BFCHW = latent_of(vae, 4, batch=1)
    whole = vae.decode(latent_BFCHW)
    for chunks in ([3, 1], [1, 3], [1, 1, 1, 1]):
        assert torch.equal(in_chunks(vae, latent_BFCHW, chunks), whole), chunks


def test_interleaved_streams_do_not_mix() -> None:
    vae = VideoVAE(model())
    one, other = latent(4), latent(5)[:, :4]
    decoders = vae.stream(), vae.stream()
    frames: tuple[list[Tensor], list[Tensor]] = ([], [])
    for f in range(4):
        for decoder, source, out in zip(decoders, (one, other), frames, strict=True):
            out.append(decoder(source[:, f : f + 1]))
            vae.encode(torch.zeros(1, 1, 3, 8, 8))  # diffusers' own cache is another one
    assert torch.equal(torch.cat(frames[0], 1), vae.decode(one))
    assert torch.equal(torch.cat(frames[1], 1), vae.decode(other))


@MODELS
def test_memory_does_not_grow_with_the_stream(make: Any) -> None:
    vae = VideoVAE(make())
    decoder = vae.stream()
    held = []
    for _ in range(6):
        decoder(latent_of(vae, 1))
        held.append(decoder.cache_bytes)
    assert len(set(held[2:])) == 1


@MODELS
def test_latents_are_the_normalised_posterior_mean(make: Any) -> None:
    vae = VideoVAE(make())
    config, (channels, _, space) = vae.model.config, vae.latents
    generator = torch.Generator().manual_seed(1)
    video_BFCHW = torch.rand(2, 9, 3, 2 * space, 3 * space, generator=generator) * 2 - 1
    got = vae.encode(video_BFCHW)
    assert got.shape == (2, 3, channels, 2, 3)
    posterior = vae.model.encode(video_BFCHW.transpose(1, 2)).latent_dist
    mean, std = (
        torch.tensor(numbers).view(-1, 1, 1)
        for numbers in (config.latents_mean, config.latents_std)
    )
    assert torch.equal(got, (posterior.mean.transpose(1, 2) - mean) / std)
    with pytest.raises(ValueError, match=f"multiples of {space}"):
        vae.encode(video_BFCHW[..., :-1])


def test_decoded_pixels_stay_in_range_and_pass_gradients_to_the_latent() -> None:
    vae = VideoVAE(model())
    latent_BFCHW = (20 * latent(3)).requires_grad_()
    video_BFCHW = vae.decode(latent_BFCHW)
    assert video_BFCHW.abs().max() <= 1
    video_BFCHW.square().mean().backward()
    assert latent_BFCHW.grad is not None
    assert latent_BFCHW.grad.abs().sum() > 0
    assert all(p.grad is None for p in vae.model.parameters())


@MODELS
def test_the_gradient_of_a_decode_is_that_of_diffusers_and_keeps_little(make: Any) -> None:
    vae = VideoVAE(make())
    space, generator = vae.latents.space, torch.Generator().manual_seed(3)
    weight_BFCHW = torch.randn(1, 13, 3, 3 * space, 2 * space, generator=generator)

    def gradient(decode: Any) -> tuple[Tensor, int]:
        latent_BFCHW, saved = latent_of(vae, 4, batch=1).requires_grad_(), {}

        def pack(x: Tensor) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = (decode(latent_BFCHW) * weight_BFCHW).sum()
        return torch.autograd.grad(loss, latent_BFCHW)[0], sum(saved.values())

    decoder = vae.stream()
    ours, kept = gradient(decoder)
    theirs, all_of_it = gradient(lambda x: whole_decode.__wrapped__(vae.model, x).clamp(-1, 1))
    assert (ours - theirs).norm() <= NETWORK_GRADIENT * theirs.norm()
    # Of a frame only the state of its input is kept.
    assert kept < 4 * decoder.cache_bytes < all_of_it / 2


def test_the_identity_tells_weights_dtypes_and_statistics_apart() -> None:
    same, other = VideoVAE(model()).identity, VideoVAE(model(seed=1)).identity
    half = VideoVAE(model().bfloat16()).identity
    moved = VideoVAE(model(latents_mean=[0.0] * 16)).identity
    assert VideoVAE(model()).identity == same
    assert len({same, other, half, moved}) == 4


@MODELS
@pytest.mark.parametrize("folder", ["wan/vae", "alone"])
def test_a_diffusers_folder_loads(tmp_path: Path, folder: str, make: Any) -> None:
    original = make()
    original.save_pretrained(tmp_path / folder)
    vae = VideoVAE.load(tmp_path / folder.split("/")[0])
    latent_BFCHW = latent_of(vae, 3)
    assert torch.equal(vae.decode(latent_BFCHW), VideoVAE(original).decode(latent_BFCHW))
    half = VideoVAE.load(tmp_path / folder, dtype=torch.bfloat16)
    assert half.decode(latent_BFCHW[:, :2]).dtype == torch.bfloat16


def test_what_a_file_lacks_is_not_drawn_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["decoder.conv_out.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"decoder\.conv_out\.weight.*needed: all weights"):
        VideoVAE.load(tmp_path)


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of Wan2.1_VAE.pth: numbered layers, where diffusers' have words."""
    norm = {
        "norm1": "residual.0",
        "conv1": "residual.2",
        "norm2": "residual.3",
        "conv2": "residual.6",
    }
    resnet = {**norm, "conv_shortcut": "shortcut"}
    fixed = {"quant_conv": "conv1", "post_quant_conv": "conv2", "conv_in": "conv1"}
    fixed |= {"norm_out": "head.0", "conv_out": "head.2"}
    named = {}
    for name, tensor in state.items():
        part, *rest = name.split(".")
        match rest:
            case [leaf]:
                new = f"{fixed[part]}.{leaf}"
            case ["mid_block", "attentions", "0", *tail]:
                new = ".".join([part, "middle.1", *tail])
            case ["mid_block", "resnets", i, layer, leaf]:
                new = f"{part}.middle.{2 * int(i)}.{norm[layer]}.{leaf}"
            case ["down_blocks", i, layer, leaf] if layer in resnet:
                new = f"{part}.downsamples.{i}.{resnet[layer]}.{leaf}"
            case ["down_blocks", i, *tail]:
                new = ".".join([part, "downsamples", i, *tail])
            case ["up_blocks", i, "resnets", j, layer, leaf]:
                new = f"{part}.upsamples.{4 * int(i) + int(j)}.{resnet[layer]}.{leaf}"
            case ["up_blocks", i, "upsamplers", "0", *tail]:
                new = ".".join([part, "upsamples", str(4 * int(i) + 3), *tail])
            case [layer, leaf]:
                new = f"{part}.{fixed[layer]}.{leaf}"
            case _:
                raise AssertionError(name)
        named[new] = tensor
    return named


def test_the_original_file_loads(tmp_path: Path) -> None:
    original = model()
    torch.save(original_names(original.state_dict()), tmp_path / "Wan2.1_VAE.pth")
    for source in (tmp_path, tmp_path / "Wan2.1_VAE.pth"):
        vae = VideoVAE.load(source)
        assert torch.equal(vae.decode(latent(2)), VideoVAE(original).decode(latent(2)))


def original_names22(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of Wan2.2_VAE.pth: numbered lists of numbered layers."""
    resnet = {
        "norm1": "residual.0",
        "conv1": "residual.2",
        "norm2": "residual.3",
        "conv2": "residual.6",
        "conv_shortcut": "shortcut",
    }
    named, others = {}, {}
    for name, tensor in state.items():
        match name.split("."):
            case [part, ("down_blocks" | "up_blocks") as blocks, i, "resnets", j, layer, leaf]:
                lists = blocks.replace("_blocks", "samples")
                named[f"{part}.{lists}.{i}.{lists}.{j}.{resnet[layer]}.{leaf}"] = tensor
            case [part, ("down_blocks" | "up_blocks") as blocks, i, _, *tail]:
                lists = blocks.replace("_blocks", "samples")
                last = 2 if blocks == "down_blocks" else 3
                named[".".join([part, lists, i, lists, str(last), *tail])] = tensor
            case _:
                others[name] = tensor
    return named | original_names(others)


def test_the_original_file_of_wan22_loads(tmp_path: Path) -> None:
    original = model22()
    state = original_names22(original.state_dict())
    # As in wan/modules/vae2_2.py of the released code.
    for name in (
        "encoder.downsamples.1.downsamples.0.shortcut.weight",
        "encoder.downsamples.2.downsamples.2.time_conv.weight",
        "decoder.upsamples.0.upsamples.3.resample.1.weight",
        "decoder.upsamples.3.upsamples.2.residual.6.bias",
        "decoder.middle.1.to_qkv.weight",
        "conv1.weight",
    ):
        assert name in state
    file = tmp_path / "Wan2.2_VAE.pth"
    torch.save(state, file)
    for source in (tmp_path, file):
        vae = VideoVAE.load(source)
        latent_BFCHW = latent_of(vae, 2)
        assert torch.equal(vae.decode(latent_BFCHW), VideoVAE(original).decode(latent_BFCHW))
        assert vae.identity == VideoVAE(original).identity
    del state["decoder.upsamples.3.upsamples.2.residual.6.bias"]
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"1 missing \(decoder\.up_blocks\.3\.resnets\.2\.conv2"):
        VideoVAE.load(file)


def test_bad_input_is_named() -> None:
    vae = VideoVAE(model())
    with pytest.raises(ValueError, match=r"video: got .*needed: \[B, 1 \+ a multiple of 4"):
        vae.encode(torch.zeros(1, 4, 3, 16, 16))
    with pytest.raises(ValueError, match=r"latent: got .*needed: \[B, F, 16, H, W\]"):
        vae.decode(torch.zeros(1, 4, 3, 16, 16))
    decoder = vae.stream()
    decoder(latent(1))
    with pytest.raises(ValueError, match=r"latent: got .*\[B, H, W\] = \(2, 3, 2\)"):
        decoder(latent(1, batch=1))


def test_unknown_sources_say_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="contains no autoencoder; needed: a diffusers Wan folder"
    ):
        VideoVAE.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such path"):
        VideoVAE.load(tmp_path / "absent")
