"""The video autoencoders of Wan2.1 and Wan2.2 (diffusers' AutoencoderKLWan), with streaming decode.

Shape letters: B videos, F frames (of video or latent), C channels, H x W size, S pixels per latent
row and column (8, or 16 in Wan2.2). Videos are in [-1, 1]; latents are normalised by the mean and
deviation in the autoencoder's configuration. The first latent frame is one video frame, every later
one is four.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from afd.hub import local_copy, weights_digest
from afd.models.wan.sizes import Latents
from afd.models.wan.vae_files import load_diffusers, load_original
from afd_kernels.contracts import require

LAYOUTS = (
    "a diffusers Wan folder or hub name (vae/), a folder with its config.json and weights, or the "
    "original Wan folder (Wan2.1_VAE.pth or Wan2.2_VAE.pth)"
)
_ORIGINAL = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
_ENCODING = threading.Lock()


class VideoVAE:
    """Encodes video into normalised latents and decodes them. Frozen; inputs get gradients."""

    def __init__(self, model: Any) -> None:
        """`model`: an AutoencoderKLWan of Wan2.1 or Wan2.2."""
        config = model.config
        given = [len(config.latents_mean), len(config.latents_std)]
        right = given == [config.z_dim, config.z_dim]
        require(right, "vae: latents_mean, latents_std", given, f"{config.z_dim} numbers each")
        self.model = model.eval().requires_grad_(False)
        time, space = int(config.scale_factor_temporal), int(config.scale_factor_spatial)
        self.latents = Latents(int(config.z_dim), time, space)
        # Moved to the device once, so that a stream does not wait for a copy at every chunk.
        statistics = [config.latents_mean, config.latents_std]
        self._mean_std = torch.tensor(statistics, device=model.device).view(2, -1, 1, 1)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> VideoVAE:
        """Load from a local folder, an original file or a hub name, to compute in `dtype`.

        Raises FileNotFoundError for an unknown layout, ValueError if weights are missing.
        """
        path = local_copy(source, ("vae",), LAYOUTS)
        held = (path / name for name in ("vae", *_ORIGINAL))
        path = next((p for p in held if p.exists()), path)
        if path.is_file():
            return cls(load_original(path, dtype, device, LAYOUTS))
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"vae: {path} contains no autoencoder; needed: {LAYOUTS}")
        return cls(load_diffusers(path, dtype, device))

    @property
    def scale(self) -> tuple[int, int]:
        """Video frames per latent frame after the first; pixels per latent row and column."""
        return self.latents.scale

    @cached_property
    def identity(self) -> str:
        """Digest of everything latents depend on besides the video: weights, dtype, statistics."""
        return weights_digest(self.model.state_dict(), *self._mean_std.flatten().tolist())

    @torch.no_grad()
    def encode(self, video_BFCHW: Tensor) -> Tensor:
        """Normalised posterior mean [B, 1 + (F-1)/4, C, H/S, W/S], in the autoencoder's dtype."""
        time, space = self.scale
        require(
            video_BFCHW.ndim == 5
            and (video_BFCHW.shape[1] - 1) % time == 0
            and all(size % space == 0 for size in video_BFCHW.shape[3:]),
            "video",
            video_BFCHW,
            f"[B, 1 + a multiple of {time}, C, multiples of {space}]",
        )
        video_BCFHW = video_BFCHW.to(self.model.device, self.model.dtype).transpose(1, 2)
        # The network keeps the state of an encode on itself, and rollouts ahead cut their clips in
        # a thread while the teacher's videos are encoded.
        with _ENCODING:
            latent_BFCHW = self.model.encode(video_BCFHW).latent_dist.mode().transpose(1, 2)
        mean, std = self._statistics(latent_BFCHW)
        return ((latent_BFCHW.float() - mean) / std).to(self.model.dtype)

    def decode(self, latent_BFCHW: Tensor) -> Tensor:
        """Video [B, 1 + 4(F-1), 3, SH, SW] in [-1, 1], in the autoencoder's dtype.

        Differentiable with respect to latents that require a gradient. The backward then recomputes
        each latent frame from the state before it; at 480x832 a state of Wan2.1's takes 1.8 GiB in
        bfloat16 and one frame's activations 15.6 GiB.
        """
        return self.stream()(latent_BFCHW)

    def stream(self) -> StreamingDecoder:
        """A chunk-by-chunk decoder for one batch of streams."""
        return StreamingDecoder(self)

    def denormalise(self, latent_BFCHW: Tensor) -> Tensor:
        """Undo the normalisation: inputs of the decoder network, in the autoencoder's dtype."""
        mean, std = self._statistics(latent_BFCHW)
        return (latent_BFCHW.float() * std + mean).to(self.model.dtype)

    def _statistics(self, latent_BFCHW: Tensor) -> tuple[Tensor, Tensor]:
        channels = self._mean_std.shape[1]
        right = latent_BFCHW.ndim == 5 and latent_BFCHW.shape[2] == channels
        require(right, "latent", latent_BFCHW, f"[B, F, {channels}, H, W]")
        mean_C11, std_C11 = self._mean_std
        return mean_C11, std_C11


class StreamingDecoder:
    """Decodes a stream chunk by chunk; the concatenated chunks equal one full decode.

    Every causal convolution keeps the last two frames of its input, so memory does not grow with
    the stream. A decoder serves one batch of streams; a new stream needs a new decoder.
    """

    def __init__(self, vae: VideoVAE) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

        self._vae, self._unpatchify = vae, unpatchify
        modules = vae.model.decoder.modules()
        count = sum(isinstance(module, WanCausalConv3d) for module in modules)
        self._cache: list[Any] = [None] * count
        self._stream: tuple[int, ...] | None = None

    def __call__(self, latent_BFCHW: Tensor) -> Tensor:
        """Video frames of the chunk: four per latent frame, one for the stream's first."""
        latent_BCFHW = self._vae.denormalise(latent_BFCHW).transpose(1, 2)
        stream = (latent_BFCHW.shape[0], *latent_BFCHW.shape[3:])
        same = self._stream in (None, stream) and latent_BFCHW.shape[1] > 0
        require(same, "latent", latent_BFCHW, f"frames of streams of [B, H, W] = {self._stream}")
        first, self._stream = self._stream is None, stream
        again = torch.is_grad_enabled() and latent_BFCHW.requires_grad
        pieces = []
        # Frame by frame, as in a full decode: the convolutions' state is defined that way. This
        # includes the first convolution, so that the result is bitwise independent of chunking.
        for frame_BC1HW in latent_BCFHW.split(1, dim=2):
            args = (frame_BC1HW, first, *self._cache)
            piece, *self._cache = _again(self._frame, *args) if again else self._frame(*args)
            pieces.append(piece)
            first = False
        return torch.cat(pieces, dim=2).clamp_(-1, 1).transpose(1, 2)

    def _frame(self, frame_BC1HW: Tensor, first: bool, *cache: Any) -> tuple[Any, ...]:
        """Decode one latent frame; returns its video frames and the new state."""
        model, after = self._vae.model, list(cache)
        frame_BC1HW = model.post_quant_conv(frame_BC1HW)
        video_BCFHW = model.decoder(frame_BC1HW, feat_cache=after, feat_idx=[0], first_chunk=first)
        patch = model.config.patch_size
        if patch is not None:  # Wan2.2's last layer makes patches of pixels
            video_BCFHW = self._unpatchify(video_BCFHW, patch_size=patch)
        return video_BCFHW, *after

    @property
    def cache_bytes(self) -> int:
        """Bytes held between chunks."""
        held = [x for x in self._cache if isinstance(x, Tensor)]
        return sum(x.numel() * x.itemsize for x in held)


def _again(function: Callable[..., Any], *args: Any) -> Any:
    """Activation checkpointing: keeps only inputs and outputs and recomputes in the backward."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
