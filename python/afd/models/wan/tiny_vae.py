"""The tiny autoencoder of Wan latents (TAEHV): streaming decode and encode in constant memory.

All convolutions are two-dimensional; a memory block also sees its input of the frame before.
Source: madebyollin/taehv (MIT). Shape letters: B videos, F frames (of video or latent), T frames
of one latent frame inside the network, C channels, H x W size. Videos are in [-1, 1]; latents are
in the diffusion model's normalised space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from afd.hub import weights_digest
from afd.models.codec import Codec
from afd.models.wan.checkpoints import fill, read_pickle
from afd.models.wan.sizes import LATENTS, Latents
from afd_kernels.contracts import require

# TAEHV's files by the latents they are for.
NAMES = {LATENTS["wan2.1"]: "taew2_1", LATENTS["wan2.2"]: "taew2_2"}
LAYOUTS = (
    f"TAEHV's file for Wan ({' or '.join(NAMES.values())}, .safetensors or .pth), or a folder with "
    "it"
)
# Video frames per latent frame of Wan; a file without encoder does not determine it.
TIME = 4
# Bound of latents in the decoder.
LIMIT = 3.0

Shapes = Mapping[str, torch.Size]
# The last input frame of each memory block, [B, C, H, W]; None before the first.
State = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class _Layer:
    """A layer of a file: its place, what it is ("conv", "time" or "memory") and its sizes."""

    place: int
    kind: str
    shape: torch.Size
    bias: bool = False
    skip: bool = False


def _layers(shapes: Shapes, part: str) -> list[_Layer]:
    """The layers of `encoder` or `decoder` in order; empty if the file has no such part."""
    own = {name.removeprefix(f"{part}."): s for name, s in shapes.items() if name.startswith(part)}
    places = {int(name.split(".")[0]) for name in own if re.match(r"\d+\.", name)}
    layers = []
    for place in sorted(places):
        for kind, name in (
            ("conv", "weight"),
            ("time", "conv.weight"),
            ("memory", "conv.0.weight"),
        ):
            shape = own.get(f"{place}.{name}")
            if shape is not None:
                require(
                    len(shape) == 4, f"tiny_vae: {part}.{place}.{name}", tuple(shape), "4 sizes"
                )
                bias, skip = f"{place}.bias" in own, f"{place}.skip.weight" in own
                layers.append(_Layer(place, kind, shape, bias, skip))
                break
    if layers:
        _check_places(part, layers)
    return layers


def _check_places(part: str, layers: list[_Layer]) -> None:
    """Raise ValueError unless the layers stand where TAEHV has them: in another layout of the same
    kinds of layers, those without weights would be others, too."""
    grows = part == "decoder"
    kinds = "".join(layer.kind[0] for layer in layers)
    stage = "m*tc" if grows else "tcm*"
    # The decoder's clamp precedes its first convolution, a ReLU follows that, ...
    needed, last = [int(grows)], len(layers) - 1
    for i, layer in enumerate(layers[1:], 1):
        # ... a doubling of the size precedes growth in time, and a ReLU the convolution to pixels.
        skipped = i == 1 or (grows and (layer.kind == "time" or i == last))
        needed.append(needed[-1] + 1 + skipped)
    right = re.fullmatch(f"c({stage})*c", kinds) and [x.place for x in layers] == needed
    found = [f"{part}.{layer.place}" for layer in layers]
    require(bool(right), "tiny_vae", found, f"the places of TAEHV's layers, as in {LAYOUTS}")


class _Memory(nn.Module):
    """A memory block: its input beside that of the frame before; a residual."""

    def __init__(self, layer: _Layer) -> None:
        super().__init__()
        out, both = layer.shape[:2]
        even = both % 2 == 0 and layer.skip == (both != 2 * out)
        needed = "twice the block's input channels, and a skip weight where it changes them"
        require(even, f"tiny_vae: layer {layer.place}", tuple(layer.shape), needed)
        self.conv = nn.Sequential(
            nn.Conv2d(both, out, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1),
        )
        self.skip = nn.Conv2d(both // 2, out, 1, bias=False) if layer.skip else nn.Identity()

    def forward(self, x_BTCHW: Tensor, before_BCHW: Tensor | None) -> Tensor:
        if before_BCHW is None:
            before_BCHW = torch.zeros_like(x_BTCHW[:, 0])
        past_BTCHW = torch.cat([before_BCHW[:, None], x_BTCHW[:, :-1]], 1)
        both = torch.cat([x_BTCHW, past_BTCHW], 2).flatten(0, 1)
        y = F.relu(self.conv(both) + self.skip(x_BTCHW.flatten(0, 1)))
        return y.unflatten(0, x_BTCHW.shape[:2])


class _Time(nn.Module):
    """A 1 x 1 convolution that makes `stride` frames of one, or one of `stride`."""

    def __init__(self, layer: _Layer, stride: int, *, grows: bool) -> None:
        super().__init__()
        out, inputs = layer.shape[:2]
        out = stride * inputs if grows else out
        self.conv = nn.Conv2d(inputs, out, 1, bias=False)
        self.stride, self.grows = stride, grows

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        batch, frames = x_BTCHW.shape[:2]
        if not self.grows:
            x_BTCHW = x_BTCHW.unflatten(1, (-1, self.stride)).flatten(2, 3)
        y = self.conv(x_BTCHW.flatten(0, 1))
        if self.grows:
            y = y.unflatten(1, (self.stride, -1)).flatten(0, 1)
            return y.unflatten(0, (batch, frames * self.stride))
        return y.unflatten(0, (batch, -1))


class _Half(nn.ModuleDict):
    """Encoder or decoder: layers named by their place, run for one latent frame at a time.

    Attributes:
        time: video frames per latent frame.
        patch: side of the pixel blocks that the image convolution sees as channels.
        stages: changes of resolution, by two each.
    """

    def __init__(self, layers: list[_Layer], strides: list[int], *, grows: bool) -> None:
        modules: dict[str, nn.Module] = {}
        left = iter(strides)
        before = ""
        for layer in layers:
            out, inputs, kernel = layer.shape[:3]
            made: nn.Module
            if layer.kind == "memory":
                made = _Memory(layer)
            elif layer.kind == "time":
                made = _Time(layer, next(left), grows=grows)
            else:
                stride = 2 if before == "time" and not grows else 1
                padding = kernel // 2
                made = nn.Conv2d(inputs, out, kernel, stride, padding, bias=layer.bias)
            modules[str(layer.place)] = made
            before = layer.kind
        super().__init__(modules)
        pixels = layers[-1].shape[0] if grows else layers[0].shape[1]
        self.patch = round((pixels / 3) ** 0.5)
        require(3 * self.patch**2 == pixels, "tiny_vae", pixels, "3 times a square of channels")
        self.latent_channels = layers[0].shape[1] if grows else layers[-1].shape[0]
        self.time, self.stages, self.grows = prod(strides), len(strides), grows
        self.memories = sum(layer.kind == "memory" for layer in layers)

    @property
    def space(self) -> int:
        """Pixels per latent row and column."""
        return int(self.patch * 2**self.stages)

    def run(self, x_BTCHW: Tensor, state: State) -> tuple[Tensor, State]:
        """One latent frame to its `time` video frames (decoder), or back; and the new state."""
        places = list(self.values())
        after: list[Tensor | None] = []
        if self.grows:
            x_BTCHW = LIMIT * torch.tanh(x_BTCHW / LIMIT)
        else:
            x_BTCHW = F.pixel_unshuffle(x_BTCHW, self.patch)
        for i, layer in enumerate(places):
            if isinstance(layer, _Memory):
                last = x_BTCHW[:, -1]
                x_BTCHW = layer(x_BTCHW, state[len(after)])
                after.append(last)
                continue
            if isinstance(layer, _Time) and self.grows:
                x_BTCHW = _each(x_BTCHW, lambda x: F.interpolate(x, scale_factor=2, mode="nearest"))
            if isinstance(layer, _Time):
                x_BTCHW = layer(x_BTCHW)
                continue
            if self.grows and i + 1 == len(places):
                x_BTCHW = F.relu(x_BTCHW)
            x_BTCHW = _each(x_BTCHW, layer)
            if i == 0:
                x_BTCHW = F.relu(x_BTCHW)
        if self.grows:
            x_BTCHW = F.pixel_shuffle(x_BTCHW, self.patch)
        return x_BTCHW, tuple(after)


def _each(x_BTCHW: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a function of images to every frame."""
    return function(x_BTCHW.flatten(0, 1)).unflatten(0, x_BTCHW.shape[:2])


class _Network(nn.Module):
    """The network of a file, its sizes inferred from the shapes."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        found = {part: _layers(shapes, part) for part in ("encoder", "decoder")}
        require(bool(found["decoder"]), "tiny_vae", f"{len(shapes)} tensors", LAYOUTS)
        pools = [x.shape[1] // x.shape[0] for x in found["encoder"] if x.kind == "time"]
        grows = [x.shape[0] // x.shape[1] for x in found["decoder"] if x.kind == "time"]
        right = min([*pools, *grows], default=0) >= 1
        require(right, "tiny_vae", f"time strides {pools}, {grows}", LAYOUTS)
        time = prod(pools) if pools else TIME
        # A file may hold wider growth layers than the decoder uses, at first those of early stages.
        for stage, stride in enumerate(grows):
            if prod(grows) > time:
                grows[stage] = max(1, stride * time // prod(grows))
        self.encoder = _Half(found["encoder"], pools, grows=False) if found["encoder"] else None
        self.decoder = _Half(found["decoder"], grows, grows=True)
        fits = self.decoder.time == time
        require(fits, "tiny_vae", self.decoder.time, f"{time} frames per latent frame")


class TinyVAE:
    """Encodes video into Wan's normalised latents and decodes them; frozen, inputs get gradients.

    Attributes:
        network: its parameters have the file's names.
        latents: what it encodes to, by the file's shapes.
        redecodes: see `afd.models.codec`.
    """

    redecodes = True

    def __init__(self, network: _Network) -> None:
        self.network = network.eval().requires_grad_(False)
        half = network.decoder
        self.latents = Latents(half.latent_channels, half.time, half.space)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        latents: Latents = LATENTS["wan2.1"],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> TinyVAE:
        """Load from a file or a folder with it, to compute in `dtype`. Pickles run no code.

        `latents`: those of the student, for which a folder's file is selected. Raises
        FileNotFoundError for an unknown path, ValueError for an unsuitable file.
        """
        path = Path(source)
        if path.is_dir():
            name = NAMES.get(latents, "")
            named = [path / f"{name}{end}" for end in (".safetensors", ".pth")]
            path = next((file for file in named if file.is_file()), path)
        if not path.is_file():
            raise FileNotFoundError(f"tiny_vae: {path} is not a file; needed: {LAYOUTS}")
        if path.suffix == ".safetensors":
            try:
                weights = dict(load_file(path))
            except SafetensorError as error:
                raise ValueError(f"tiny_vae {path}: it cannot be read ({error})") from error
        else:
            weights = dict(read_pickle(path))
        return cls.of(weights, path, dtype=dtype, device=device)

    @classmethod
    def of(
        cls,
        weights: Mapping[str, Any],
        path: str | Path = "weights",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> TinyVAE:
        """From tensors by the file's names; `path` is for messages."""
        held = {name: x for name, x in weights.items() if isinstance(x, Tensor)}
        require(len(held) == len(weights), f"tiny_vae {path}", "other objects", "only tensors")
        with torch.device("meta"):
            network = _Network({name: x.shape for name, x in held.items()})
        for name, like in network.named_parameters():
            if name in held and re.fullmatch(r"decoder\.\d+\.conv\.weight", name):
                # The last rows are those of the growth that is used.
                held[name] = held[name][-len(like) :]
        fill(network, held, path, dtype=dtype, device=device)
        return cls(network)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @cached_property
    def identity(self) -> str:
        """Digest of everything latents depend on besides the video."""
        return weights_digest(self.network.state_dict(), "taehv")

    @torch.no_grad()
    def encode(self, video_BFCHW: Tensor) -> Tensor:
        """Latents [B, ceil(F / 4), C, H / s, W / s] in the network's dtype; s is `latents.space`.

        The end is padded with the last frame to a multiple of 4. Four frames at a time, so memory
        does not grow with the video.
        """
        encoder = self.network.encoder
        require(encoder is not None, "tiny_vae", "no encoder", "a file with one, to encode video")
        assert encoder is not None
        time, space = encoder.time, encoder.space
        right = video_BFCHW.ndim == 5 and video_BFCHW.shape[1] > 0 and video_BFCHW.shape[2] == 3
        right = right and all(size % space == 0 for size in video_BFCHW.shape[3:])
        require(right, "video", video_BFCHW, f"[B, F, 3, multiples of {space}]")
        short = -video_BFCHW.shape[1] % time
        last = video_BFCHW[:, -1:].expand(-1, short, -1, -1, -1)
        state: State = (None,) * encoder.memories
        latents = []
        for frames_BTCHW in torch.cat([video_BFCHW, last], 1).split(time, 1):
            unit = (frames_BTCHW.to(self.device, self.dtype) + 1) / 2
            latent, state = encoder.run(unit, state)
            latents.append(latent)
        return torch.cat(latents, 1)

    def decode(self, latent_BFCHW: Tensor) -> Tensor:
        """Video [B, 1 + 4(F-1), 3, s H, s W] in [-1, 1], in the network's dtype.

        Differentiable with respect to latents that require a gradient; the backward recomputes each
        latent frame.
        """
        return self.stream()(latent_BFCHW)

    def stream(self) -> TinyStream:
        """A chunk-by-chunk decoder for one batch of streams."""
        return TinyStream(self)


class TinyDecoded:
    """An autoencoder whose decoder is replaced by the tiny one, for training (`video.decoder`)."""

    redecodes = True

    def __init__(self, vae: Codec, tiny: TinyVAE) -> None:
        self.vae, self.tiny = vae, tiny

    @property
    def identity(self) -> str:
        """Of both: a resumed run compares it, and it keys the cached latents."""
        return f"{self.vae.identity} {self.tiny.identity}"

    def encode(self, video_BFCHW: Tensor) -> Tensor:
        """As the full autoencoder."""
        return self.vae.encode(video_BFCHW)

    def decode(self, latent_BFCHW: Tensor) -> Tensor:
        """As `TinyVAE.decode`."""
        return self.tiny.decode(latent_BFCHW)

    def stream(self) -> TinyStream:
        """As `TinyVAE.stream`."""
        return self.tiny.stream()


class TinyStream:
    """Decodes a stream chunk by chunk; the concatenated chunks equal one full decode, bit for bit.

    Each memory block keeps its last input frame. A new stream needs a new decoder.
    """

    def __init__(self, vae: TinyVAE) -> None:
        self._vae, self._decoder = vae, vae.network.decoder
        self._state: State = (None,) * self._decoder.memories
        self._stream: tuple[int, ...] | None = None

    def __call__(self, latent_BFCHW: Tensor) -> Tensor:
        """Video frames of the chunk: four per latent frame, one for the stream's first."""
        first = self._stream is None
        raw_BFCHW = self.raw(latent_BFCHW)
        # The frames before the first latent frame's own one have no latent behind them.
        kept = raw_BFCHW[:, self._decoder.time - 1 :] if first else raw_BFCHW
        return 2 * kept.clamp(0, 1) - 1

    def raw(self, latent_BFCHW: Tensor) -> Tensor:
        """The network's output for the chunk, all frames, in [0, 1] but for overshoot."""
        channels = self._decoder.latent_channels
        right = latent_BFCHW.ndim == 5 and latent_BFCHW.shape[2] == channels
        require(right, "latent", latent_BFCHW, f"[B, F, {channels}, H, W]")
        stream = (latent_BFCHW.shape[0], *latent_BFCHW.shape[3:])
        same = self._stream in (None, stream) and latent_BFCHW.shape[1] > 0
        require(same, "latent", latent_BFCHW, f"frames of streams of [B, H, W] = {self._stream}")
        self._stream = stream
        again = torch.is_grad_enabled() and latent_BFCHW.requires_grad
        pieces = []
        # Always frame by frame, so that the result does not depend on chunking.
        for frame_B1CHW in latent_BFCHW.to(self._vae.device, self._vae.dtype).split(1, 1):
            args = frame_B1CHW, self._state
            piece, self._state = (
                _again(self._decoder.run, *args) if again else self._decoder.run(*args)
            )
            pieces.append(piece)
        return torch.cat(pieces, 1)

    @property
    def cache_bytes(self) -> int:
        """Bytes held between chunks."""
        return sum(x.numel() * x.itemsize for x in self._state if x is not None)


def _again(function: Callable[..., Any], *args: Any) -> Any:
    """Activation checkpointing: keeps only inputs and outputs and recomputes in the backward."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
