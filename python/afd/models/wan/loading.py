"""Loads a released student from its configuration: network, text embeddings and autoencoder.

Used by both `afd train` and `afd sample`. The text encoder is the largest part: it is loaded first,
embeds the prompts that are not cached, and is freed before the network is loaded.
Shape letters: B prompts, L text tokens, E text channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afd.cache import Facts, Store, files_identity
from afd.distributed import ALONE, Ranks
from afd.errors import ConfigError
from afd.extras import need
from afd.listing import counted
from afd.models.config import DTYPES
from afd.models.network import CausalNetwork
from afd.models.wan.checkpoints import infer_config, load_checkpoint, read_weights, save_diffusers
from afd.models.wan.config import TINY, WanStudentConfig
from afd.models.wan.lora import merge_lora
from afd.models.wan.network import CausalWan
from afd.models.wan.sizes import DEFAULT_SIZE, LATENTS, SIZES, Latents
from afd.models.wan.student import WanStudent
from afd.models.wan.text import TextEncoder
from afd.models.wan.tiny_vae import LAYOUTS as TINY_LAYOUTS
from afd.models.wan.tiny_vae import NAMES as TINY_NAMES
from afd.models.wan.tiny_vae import TinyDecoded, TinyVAE
from afd.models.wan.types import WanConfig
from afd.models.wan.vae import VideoVAE
from afd.schedules import ShiftedFlow

if TYPE_CHECKING:
    from afd.models.codec import Codec
    from afd.video.config import VideoConfig

_log = logging.getLogger("afd")
# Embeddings held where the encoder is, too.
KEPT = 256


class Texts:
    """Text embeddings, each computed once; a cache keeps them for later runs."""

    def __init__(
        self,
        files: WanStudentConfig,
        device: torch.device | str = "cpu",
        store: Store | None = None,
    ) -> None:
        self._files, self._device, self._store = files, device, store
        self._known: dict[str, Tensor] = {}  # [rows up to the prompt's end, E], on the CPU
        self._facts: Facts | None = None
        self._keeps = False
        self._encoder: TextEncoder | None = None

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, L, E] on the CPU, zero past each prompt's end.

        The text encoder is reloaded for prompts that have not been embedded yet.
        """
        self.embed(prompts)
        rows = [self._known[prompt] for prompt in prompts]
        text_BLE = rows[0].new_zeros(len(rows), self._files.text_len, rows[0].shape[1])
        for text_LE, row in zip(text_BLE, rows, strict=True):
            text_LE[: len(row)] = row
        while self._keeps and len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return text_BLE

    def keep(self) -> None:
        """Keep the text encoder in memory from its next use on, and only the newest embeddings."""
        self._keeps = True

    def embed(self, prompts: Sequence[str]) -> None:
        """Embed these prompts: from the cache if possible, else with the text encoder."""
        wanted = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if not wanted:
            return
        store = self._store
        if store is not None:
            found = {prompt: store.get("text", self._of(prompt)) for prompt in wanted}
            self._known.update((k, held) for k, held in found.items() if held is not None)
        missing = [prompt for prompt in wanted if prompt not in self._known]
        if missing:
            self._make(missing)
        if store is not None:
            kept = len(wanted) - len(missing)
            held = store.summary("text")
            _log.info("text: %s, %d from the cache; %s", counted(len(wanted), "prompt"), kept, held)

    def _make(self, prompts: Sequence[str]) -> None:
        files = self._files
        encoder = self._encoder or TextEncoder.load(
            files.text_encoder or files.pretrained,
            tokenizer=files.tokenizer,
            dtype=DTYPES[files.dtype],
            device=self._device,
            text_len=files.text_len,
        )
        self._encoder = encoder if self._keeps else None
        for prompt in prompts:  # one at a time: bitwise independent of the rest of the batch
            text_LE = encoder.encode([prompt])[0].cpu()
            self._known[prompt] = text_LE[: _used(text_LE)].clone()
            if self._store is not None:
                self._store.put("text", self._of(prompt), self._known[prompt])

    @property
    def identity(self) -> str:
        """Identity of the encoder's files (`files_identity`)."""
        return str(self._of("")["encoder"])

    def _of(self, prompt: str) -> Facts:
        """Cache key: everything a prompt's embedding depends on."""
        if self._facts is None:
            files = self._files
            found = TextEncoder.files(files.text_encoder or files.pretrained, files.tokenizer)
            self._facts = {
                "encoder": files_identity(found, self._store),
                "text_len": files.text_len,
                "dtype": files.dtype,
            }
        return {**self._facts, "prompt": prompt}


def _used(text_LE: Tensor) -> int:
    """Number of rows up to and including the last nonzero one."""
    rows = text_LE.any(-1).nonzero()
    return int(rows[-1]) + 1 if len(rows) else 0


def build(
    config: WanStudentConfig,
    video: VideoConfig,
    prompts: Sequence[str] = (),
    *,
    device: torch.device | str = "cpu",
    store: Store | None = None,
    ranks: Ranks = ALONE,
) -> tuple[WanStudent, Codec]:
    """Build the frozen student of a checkpoint and its autoencoder, with `prompts` embedded.

    Args:
        config: the files, and the dtypes of their parts.
        video: the size and training length of its videos.
        prompts: those `student.encode` will receive; any other is embedded on first use.
        device: the device of all parts.
        store: keeps embeddings for later runs; None: nothing is kept.
        ranks: with several processes the main one embeds first and the rest read the cache.

    Raises FileNotFoundError for an unknown path or layout, ValueError for an unsuitable file,
    ConfigError for a missing package.
    """
    need("a wan student", "diffusers", "transformers", "ftfy")
    path = _checkpoint(config)
    sizes(config)  # by the shapes alone, before the text encoder or 57 GB of a 14B are read
    texts = Texts(config, device, store)
    if ranks.main:
        texts.embed(prompts)
    ranks.barrier()
    texts.embed(prompts)
    net = _load(config, path, DTYPES[config.dtype], device)
    height, width = config.latent_size(video.height, video.width)
    student = WanStudent(
        net.requires_grad_(False),
        height=height,
        width=width,
        frames=config.latent_frames(video.frames),
        schedule=ShiftedFlow(config.shift),
        encoder=texts,
    )
    return student, _codec(config, video, device)


def _codec(config: WanStudentConfig, video: VideoConfig, device: torch.device | str) -> Codec:
    """The autoencoder, or the tiny one, or both: the one's encoder and the other's decoder."""
    dtype, tiny = DTYPES[config.vae_dtype], None
    if TINY in (config.vae, video.decoder):
        if config.tiny_vae is None:
            raise ConfigError(f"student.tiny_vae: not given; needed: {TINY_LAYOUTS}")
        wanted = config.latents_of
        tiny = TinyVAE.load(config.tiny_vae, latents=wanted, dtype=dtype, device=device)
        if tiny.latents != wanted:
            raise ConfigError(
                f"student.tiny_vae: {config.tiny_vae} has latents of {_shape(tiny.latents)}; "
                f"needed: {_shape(wanted)}, those of the student, as in {TINY_NAMES[wanted]}"
            )
        if config.vae == TINY:
            return tiny
    source = config.vae or config.pretrained
    vae = VideoVAE.load(source, dtype=dtype, device=device)
    if vae.latents != config.latents_of:
        raise ConfigError(
            f"student.vae: {source} has latents of {_shape(vae.latents)}; needed: "
            f"{_shape(config.latents_of)}, those of the student"
        )
    return vae if tiny is None else TinyDecoded(vae, tiny)


def _shape(latents: Latents) -> str:
    return f"{latents.channels} channels, {latents.time} frames and {latents.space} pixels"


def sizes(config: WanStudentConfig) -> WanConfig:
    """Network sizes from the checkpoint if it exists, else those of `student.size`.

    Raises ValueError if the checkpoint's are not those of `student.size`, or its latents not those
    of the student.
    """
    if config.checkpoint is None or not Path(config.checkpoint).exists():
        wanted = WanConfig(**SIZES[config.size or DEFAULT_SIZE].network)
        channels = config.latents_of.channels
        return replace(wanted, in_dim=channels, out_dim=channels, **config.network)
    weights, written = read_weights(config.checkpoint, ema=config.ema)
    found = infer_config(weights, written, head_dim=config.head_dim)
    if config.size is not None:
        wanted = replace(
            WanConfig(**SIZES[config.size].network), text_len=found.text_len, chunk=found.chunk
        )
        if found != wanted:
            raise ValueError(
                f"student.checkpoint: {config.checkpoint} holds {_described(found)}; needed: "
                f"{_described(wanted)}, as student.size={config.size}"
            )
    others = [name for name, one in LATENTS.items() if one.channels == found.in_dim]
    if others and found.in_dim != config.latents_of.channels:
        raise ValueError(
            f"student.checkpoint: {config.checkpoint} holds a network of {found.in_dim} latent "
            f"channels; needed: {config.latents_of.channels}, or student.latents={others[0]}"
        )
    return replace(found, **config.network)


def skeleton(config: WanStudentConfig) -> CausalWan:
    """A network of these sizes on the meta device; nothing is allocated."""
    with torch.device("meta"):
        return CausalWan(sizes(config))


def _described(found: WanConfig) -> str:
    """A network's size in words, with its name if it is a published one."""
    plain = replace(found, text_len=WanConfig.text_len)
    names = [name for name, size in SIZES.items() if WanConfig(**size.network) == plain]
    return (
        f"{names[0] if names else 'a network'} ({found.num_layers} layers of width {found.dim}, "
        f"{found.num_heads} heads, feed-forward {found.ffn_dim}, {found.in_dim} latent channels)"
    )


def load_network(config: WanStudentConfig) -> CausalWan:
    """Load the network with the start weights, in float32."""
    path = _checkpoint(config)
    sizes(config)
    return _load(config, path, torch.float32, "cpu")


def _load(
    config: WanStudentConfig, path: Path, dtype: torch.dtype, device: torch.device | str
) -> CausalWan:
    """The network of a checkpoint, with the adapter file merged, if there is one."""
    adapter, alpha = config.adapter, config.adapter_alpha
    merge = None if adapter is None else partial(merge_lora, path=adapter, alpha=alpha)
    return load_checkpoint(
        path,
        ema=config.ema,
        dtype=dtype,
        device=device,
        head_dim=config.head_dim,
        change=merge,
        **config.network,
    )


def save_network(
    config: WanStudentConfig, network: CausalNetwork, folder: Path, dtype: torch.dtype, note: str
) -> Path:
    """Save a network as folder/transformer, which diffusers and `student.checkpoint` can load."""
    path = folder / "transformer"
    save_diffusers(path, network.to(dtype), note=note)
    return path


def _checkpoint(config: WanStudentConfig) -> Path:
    if config.checkpoint is None:
        raise ConfigError("student.checkpoint: not given; needed: the student's weights")
    path = Path(config.checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: {config.checkpoint} does not exist")
    return path
