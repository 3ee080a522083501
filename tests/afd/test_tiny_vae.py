"""The tiny autoencoder: its goldens, other sizes against a plain network, streams, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from afd.models.wan.sizes import LATENTS
from afd.models.wan.tiny_vae import TinyVAE
from afd.testing.parity import main
from afd.testing.tiny_vae import drawn_weights
from tests.tolerances import NETWORK_FORWARD, NETWORK_GRADIENT

Shapes = dict[str, list[int]]


def keys(
    encoder: list[int] = [4, 6, 6, 8],  # noqa: B006
    decoder: list[int] = [12, 8, 6, 4],  # noqa: B006
    pools: tuple[int, ...] = (2, 2, 1),
    grows: tuple[int, ...] = (1, 2, 2),
    memories: int = 2,
    latent: int = 16,
    pixels: int = 3,
    bend: int = 0,
) -> Shapes:
    """A keys.json of these widths, in TAEHV's places; a stage changes width in its convolution.

    `bend`: channels that the decoder's first memory block takes in addition to those it gives.
    """
    shapes: Shapes = {}

    def conv(place: int, out: int, inputs: int, bias: bool = True) -> None:
        shapes[f"{part}.{place}.weight"] = [out, inputs, 3, 3]
        if bias:
            shapes[f"{part}.{place}.bias"] = [out]

    def memory(place: int, width: int, more: int = 0) -> None:
        if more:
            shapes[f"{part}.{place}.skip.weight"] = [width, width + more, 1, 1]
        for i, inputs in ((0, 2 * (width + more)), (2, width), (4, width)):
            shapes[f"{part}.{place}.conv.{i}.weight"] = [width, inputs, 3, 3]
            shapes[f"{part}.{place}.conv.{i}.bias"] = [width]

    part, place = "encoder", 2
    conv(0, encoder[0], pixels)
    for width, (inputs, stride) in zip(encoder[1:], zip(encoder, pools, strict=False), strict=True):
        shapes[f"encoder.{place}.conv.weight"] = [inputs, stride * inputs, 1, 1]
        conv(place + 1, width, inputs, bias=False)
        for i in range(memories):
            memory(place + 2 + i, width)
        place += 2 + memories
    conv(place, latent, encoder[-1])
    part, place = "decoder", 3
    conv(1, decoder[0] + bend, latent)
    for width, (inputs, stride) in zip(decoder[1:], zip(decoder, grows, strict=False), strict=True):
        for i in range(memories):
            memory(place + i, inputs, bend if place + i == 3 else 0)
        place += memories + 1
        shapes[f"decoder.{place}.conv.weight"] = [stride * inputs, inputs, 1, 1]
        conv(place + 1, width, inputs, bias=False)
        place += 2
    conv(place + 1, pixels, decoder[-1])
    return shapes


class Plain:
    """The network by its description, over all frames of one video at once, float64."""

    def __init__(self, weights: dict[str, Tensor], pools: Any, grows: Any, memories: int) -> None:
        self.w = {name: x.double() for name, x in weights.items()}
        self.pools, self.grows, self.memories = pools, grows, memories

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.w[f"{name}.weight"]
        padding = weight.shape[-1] // 2
        return F.conv2d(x, weight, self.w.get(f"{name}.bias"), stride, padding)

    def memory(self, name: str, x_FCHW: Tensor) -> Tensor:
        past = torch.cat([torch.zeros_like(x_FCHW[:1]), x_FCHW[:-1]])
        y = torch.cat([x_FCHW, past], 1)
        for i in (0, 2, 4):
            y = self.conv(f"{name}.conv.{i}", y)
            y = y.relu() if i < 4 else y
        skipped = self.conv(f"{name}.skip", x_FCHW) if f"{name}.skip.weight" in self.w else x_FCHW
        return (y + skipped).relu()

    def decode(self, latent_FCHW: Tensor, patch: int = 1) -> Tensor:
        """Before clamp and trim."""
        x, place = 3 * torch.tanh(latent_FCHW.double() / 3), 3
        x = self.conv("decoder.1", x).relu()
        for stride in self.grows:
            for i in range(self.memories):
                x = self.memory(f"decoder.{place + i}", x)
            place += self.memories + 1
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            width = x.shape[1]
            weight = self.w[f"decoder.{place}.conv.weight"][-stride * width :]
            frames = F.conv2d(x, weight).split(width, 1)
            x = torch.stack(frames, 1).flatten(0, 1)
            x = self.conv(f"decoder.{place + 1}", x)
            place += 2
        return F.pixel_shuffle(self.conv(f"decoder.{place + 1}", x.relu()), patch)

    def encode(self, video_FCHW: Tensor, patch: int = 1) -> Tensor:
        x, place = F.pixel_unshuffle(video_FCHW.double(), patch), 2
        x = self.conv("encoder.0", x).relu()
        for stride in self.pools:
            x = torch.cat([x[i::stride] for i in range(stride)], 1)
            x = self.conv(f"encoder.{place}.conv", x)
            x = self.conv(f"encoder.{place + 1}", x, stride=2)
            for i in range(self.memories):
                x = self.memory(f"encoder.{place + 2 + i}", x)
            place += 2 + self.memories
        return self.conv(f"encoder.{place}", x)


def make(**sizes: Any) -> TinyVAE:
    return TinyVAE.of(drawn_weights(keys(**sizes)))


def latent(frames: int, batch: int = 2, channels: int = 16) -> Tensor:
    return torch.randn(
        batch, frames, channels, 3, 2, generator=torch.Generator().manual_seed(frames)
    )


def test_the_released_network_agrees(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(shared / "golden" / "taehv")]) == 0
    assert "1 files, 0 failed" in capsys.readouterr().out


SIZES: dict[str, dict[str, Any]] = {
    "narrow": {},
    "one_memory_two_stages": {
        "encoder": [6, 4, 4],
        "decoder": [8, 8, 4],
        "pools": (2, 1),
        "grows": (1, 2),
        "memories": 1,
        "latent": 5,
    },
    "patches_of_four_pixels": {"pixels": 12, "latent": 48, "grows": (2, 2, 1), "pools": (1, 2, 2)},
    "a_block_that_changes_the_width": {"bend": 5},
    "wider_growth_than_used": {"grows": (2, 4, 2)},
    # taew2_2: 48 latent channels, blocks of 2 x 2 pixels, strides as in taew2_1.
    "wan22": {"pixels": 12, "latent": 48, "memories": 3},
}


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_agree_with_a_plain_network(name: str) -> None:
    sizes = SIZES[name]
    weights = drawn_weights(keys(**sizes))
    vae = TinyVAE.of(weights)
    pools = sizes.get("pools", (2, 2, 1))
    used = (1, 2, 2) if name == "wider_growth_than_used" else sizes.get("grows", (1, 2, 2))
    plain = Plain(weights, pools, used, sizes.get("memories", 2))
    patch = 2 if sizes.get("pixels") == 12 else 1
    channels, time, space = vae.latents
    assert channels == sizes.get("latent", 16)
    assert (time, space) == (2 if len(pools) == 2 else 4, patch * 2 ** len(pools))
    latents = latent(3, channels=sizes.get("latent", 16))
    raw = torch.stack([plain.decode(one, patch) for one in latents])
    error = (vae.stream().raw(latents) - raw).norm() / raw.norm()
    assert error < NETWORK_FORWARD
    video = vae.decode(latents)
    assert video.shape == (2, 1 + 2 * time, 3, 3 * space, 2 * space)
    expected = raw[:, time - 1 :].clamp(0, 1)
    assert ((video + 1) / 2 - expected).norm() / expected.norm() < NETWORK_FORWARD
    frames = torch.rand(1, 1 + time, 3, 2 * space, 3 * space)
    padded = torch.cat([frames[0], *[frames[0, -1:]] * (time - 1)])
    encoded = plain.encode(padded, patch)
    assert encoded.shape[0] == 2
    assert (vae.encode(2 * frames - 1)[0] - encoded).norm() / encoded.norm() < NETWORK_FORWARD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_decode_to_the_very_frames_of_one_whole_decode(dtype: torch.dtype) -> None:
    vae = TinyVAE.of(drawn_weights(keys()), dtype=dtype)
    latents = latent(5)
    whole = vae.decode(latents)
    assert whole.dtype == dtype
    assert whole.abs().max() <= 1
    for chunks in ([3, 2], [1, 3, 1], [1] * 5):
        decoder = vae.stream()
        parts = [decoder(chunk) for chunk in latents.split(chunks, 1)]
        assert [part.shape[1] for part in parts] == [
            4 * n - 3 * (not i) for i, n in enumerate(chunks)
        ]
        assert torch.equal(torch.cat(parts, 1), whole), chunks


def test_memory_does_not_grow_with_the_stream() -> None:
    decoder = make().stream()
    held = []
    for _ in range(5):
        decoder(latent(1))
        held.append(decoder.cache_bytes)
    # A frame at each of the two blocks of three stages.
    assert set(held) == {2 * 2 * 4 * (12 * 6 + 8 * 24 + 6 * 96)}


def test_a_gradient_reaches_the_latent_and_is_that_of_the_plain_network() -> None:
    weights = drawn_weights(keys())
    vae, plain = TinyVAE.of(weights), Plain(weights, (2, 2, 1), (1, 2, 2), 2)
    ours = latent(3, batch=1).requires_grad_()
    theirs = latent(3, batch=1).requires_grad_()
    weight = torch.randn(1, 9, 3, 24, 16, generator=torch.Generator().manual_seed(1))
    (vae.decode(ours) * weight).sum().backward()
    (2 * plain.decode(theirs[0])[3:].clamp(0, 1) * weight[0]).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert (ours.grad - theirs.grad).norm() <= NETWORK_GRADIENT * theirs.grad.norm()
    assert all(p.grad is None for p in vae.network.parameters())


def test_both_released_layouts_load(tmp_path: Path) -> None:
    weights = drawn_weights(keys())
    expected = TinyVAE.of(weights)
    save_file(weights, tmp_path / "taew2_1.safetensors")
    torch.save(weights, tmp_path / "other.pth")
    (tmp_path / "folder").mkdir()
    torch.save(weights, tmp_path / "folder" / "taew2_1.pth")
    for source in ("taew2_1.safetensors", "other.pth", "folder", "."):
        vae = TinyVAE.load(tmp_path / source)
        assert torch.equal(vae.decode(latent(2)), expected.decode(latent(2)))
        assert vae.identity == expected.identity
    assert TinyVAE.load(tmp_path, dtype=torch.bfloat16).identity != expected.identity


class _Harm:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm"),))


def test_an_unsuitable_file_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights: dict[str, Any] = dict(drawn_weights(keys()))
    torch.save(weights | {"harm": _Harm()}, "harmful.pth")
    with pytest.raises(ValueError, match="damaged, or contains objects other than tensors"):
        TinyVAE.load("harmful.pth")
    assert not Path("harm").exists()
    torch.save({"conv1.weight": torch.zeros(3, 3)}, "other.pth")
    with pytest.raises(ValueError, match=r"tiny_vae: got '1 tensors'; needed: TAEHV's file for"):
        TinyVAE.load("other.pth")
    with pytest.raises(FileNotFoundError, match=r"tiny_vae: none\.pth is not a file; needed: TAE"):
        TinyVAE.load("none.pth")
    for name, change in (("decoder.3.conv.2.bias", "missing"), ("decoder.99.bias", "extra")):
        changed = {k: v for k, v in weights.items() if k != name}
        if change == "extra":
            changed[name] = torch.zeros(3)
        torch.save(changed, "changed.pth")
        with pytest.raises(ValueError, match=rf"1 {change} \({name}\)"):
            TinyVAE.load("changed.pth")
    decoder_only = {k: v for k, v in weights.items() if k.startswith("decoder")}
    vae = TinyVAE.of(decoder_only)
    assert vae.decode(latent(2)).shape[1] == 5
    with pytest.raises(ValueError, match="no encoder"):
        vae.encode(torch.zeros(1, 1, 3, 8, 8))


def test_bad_input_is_named() -> None:
    vae = make()
    with pytest.raises(ValueError, match=r"latent: got .*needed: \[B, F, 16, H, W\]"):
        vae.decode(torch.zeros(1, 4, 3, 16, 16))
    with pytest.raises(ValueError, match=r"video: got .*needed: \[B, F, 3, multiples of 8\]"):
        vae.encode(torch.zeros(1, 4, 3, 16, 12))
    decoder = vae.stream()
    decoder(latent(1))
    with pytest.raises(ValueError, match=r"latent: got .*\[B, H, W\] = \(2, 3, 2\)"):
        decoder(latent(1, batch=1))


def test_parity_notices_a_wrong_number(tmp_path: Path) -> None:
    shapes = keys()
    (tmp_path / "keys.json").write_text(json.dumps(shapes))
    vae = TinyVAE.of(drawn_weights(shapes))
    golden = {"latents": latent(2), "decoded": (vae.decode(latent(2)) + 1) / 2}
    save_file(golden, tmp_path / "small.safetensors")
    assert main([str(tmp_path)]) == 0
    golden["decoded"][0, 0, 0, 0, 0] += 1
    save_file(golden, tmp_path / "small.safetensors")
    assert main([str(tmp_path)]) == 1


# --- Wan2.2 ---

WAN22: dict[str, Any] = {"pixels": 12, "latent": 48, "memories": 3}


def test_the_layout_for_wan22_has_the_shapes_of_the_released_code() -> None:
    """The ends of TAEHV's two halves with patch_size=2 and latent_channels=48."""
    shapes = keys([64] * 4, [256, 128, 64, 64], **WAN22)
    ends = {
        "encoder.0.weight": [64, 12, 3, 3],
        "encoder.17.weight": [48, 64, 3, 3],
        "decoder.1.weight": [256, 48, 3, 3],
        "decoder.7.conv.weight": [256, 256, 1, 1],
        "decoder.13.conv.weight": [256, 128, 1, 1],
        "decoder.19.conv.weight": [128, 64, 1, 1],
        "decoder.22.weight": [12, 64, 3, 3],
    }
    assert {name: shapes[name] for name in ends} == ends


def test_chunks_and_prefixes_of_wan22_are_those_of_the_whole_video() -> None:
    weights = drawn_weights(keys(**WAN22))
    vae, plain = TinyVAE.of(weights), Plain(weights, (2, 2, 1), (1, 2, 2), 3)
    assert vae.latents == (48, 4, 16)
    video = torch.rand(1, 9, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([video[0], *[video[0, -1:]] * 3])
    latents, whole = vae.encode(2 * video - 1), plain.encode(padded, 2)
    assert latents.shape == (1, 3, 48, 2, 3)
    assert (latents[0] - whole).norm() <= NETWORK_FORWARD * whole.norm()
    # An encoder sees no later frames: the first five alone have the same first latent.
    assert torch.equal(vae.encode(2 * video[:, :5] - 1)[:, :1], latents[:, :1])
    decoded = vae.decode(latents)
    decoder = vae.stream()
    assert torch.equal(torch.cat([decoder(x) for x in latents.split(1, 1)], 1), decoded)
    expected = plain.decode(latents[0], 2)[3:].clamp(0, 1)
    assert decoded.shape == video.shape
    assert ((decoded[0] + 1) / 2 - expected).norm() <= NETWORK_FORWARD * expected.norm()
    # A frame of memory at each of three blocks a stage.
    assert decoder.cache_bytes == 3 * 4 * (12 * 6 + 8 * 24 + 6 * 96)


def test_a_folder_with_both_files_gives_that_of_the_latents(tmp_path: Path) -> None:
    save_file(drawn_weights(keys()), tmp_path / "taew2_1.safetensors")
    torch.save(drawn_weights(keys(**WAN22)), tmp_path / "taew2_2.pth")
    for latents in LATENTS.values():
        assert TinyVAE.load(tmp_path, latents=latents).latents == latents
    (tmp_path / "taew2_2.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"taew2_1 or taew2_2"):
        TinyVAE.load(tmp_path, latents=LATENTS["wan2.2"])


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("change", ["moved", "last moved", "another block", "no last"])
def test_layers_at_other_places_are_refused(part: str, change: str) -> None:
    """Layers without weights stand between: another spacing is another network."""
    weights = dict(drawn_weights(keys(**WAN22)))
    places = sorted({int(k.split(".")[1]) for k in weights if k.startswith(part)})
    of = {"moved": places[3], "another block": places[3]}.get(change, places[-1])
    moved = {k: v for k, v in weights.items() if k.startswith(f"{part}.{of}.")}
    for name in moved:
        del weights[name]
    if change == "another block":
        # A block that is a plain convolution.
        weights[f"{part}.{of}.weight"] = torch.zeros(8, 8, 3, 3)
    elif change != "no last":
        shift = 40 if change == "last moved" else 30
        for name, x in moved.items():
            weights[name.replace(f"{part}.{of}.", f"{part}.{of + shift}.")] = x
    with pytest.raises(ValueError, match=r"tiny_vae: got .*needed: the places of TAEHV's layers"):
        TinyVAE.of(weights)
