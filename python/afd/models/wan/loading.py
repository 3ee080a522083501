"""A released student as a configuration names it: network, text embeddings and autoencoder.

The one way to load them, for `afd train` and `afd sample`. The text encoder is the largest part: it
comes first, embeds what the cache lacks, and is let go before the network comes.
Shape letters: B prompts, L text tokens, E text channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from afd.cache import Facts, Store, files_identity
from afd.distributed import ALONE, Ranks
from afd.hub import need
from afd.models.config import DTYPES
from afd.models.wan.checkpoints import load_checkpoint
from afd.models.wan.student import WanStudent
from afd.models.wan.text import TextEncoder
from afd.models.wan.vae import VideoVAE
from afd.schedules import ShiftedFlow

_log = logging.getLogger("afd")


class WanFiles(Protocol):
    """What `WanStudentConfig` and `SampleConfig` both say: where the parts are, their dtypes."""

    @property
    def checkpoint(self) -> str | Path | None: ...
    @property
    def ema(self) -> bool | None: ...
    @property
    def head_dim(self) -> int | None: ...
    @property
    def pretrained(self) -> str: ...
    @property
    def text_encoder(self) -> str | None: ...
    @property
    def tokenizer(self) -> str | None: ...
    @property
    def vae(self) -> str | None: ...
    @property
    def text_len(self) -> int: ...
    @property
    def shift(self) -> float: ...
    @property
    def dtype(self) -> str: ...
    @property
    def vae_dtype(self) -> str: ...
    @property
    def network(self) -> dict[str, Any]: ...


class Texts:
    """Prompts to embeddings, each made once; a cache keeps them for later runs."""

    def __init__(
        self, files: WanFiles, device: torch.device | str = "cpu", store: Store | None = None
    ) -> None:
        self._files, self._device, self._store = files, device, store
        self._known: dict[str, Tensor] = {}  # [rows up to the prompt's end, E], on the CPU
        self._facts: Facts | None = None

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, L, E] on the CPU, zero past each prompt's end.

        A prompt that was not embedded before brings the text encoder back for it.
        """
        self.embed(prompts)
        rows = [self._known[prompt] for prompt in prompts]
        text_BLE = rows[0].new_zeros(len(rows), self._files.text_len, rows[0].shape[1])
        for text_LE, row in zip(text_BLE, rows, strict=True):
            text_LE[: len(row)] = row
        return text_BLE

    def embed(self, prompts: Sequence[str]) -> None:
        """Know these prompts: from the cache, and the rest by the text encoder."""
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
            told = store.told("text")
            _log.info("text: %d prompts, %d of them from the cache; %s", len(wanted), kept, told)

    def _make(self, prompts: Sequence[str]) -> None:
        files = self._files
        encoder = TextEncoder.load(
            files.text_encoder or files.pretrained,
            tokenizer=files.tokenizer,
            dtype=DTYPES[files.dtype],
            device=self._device,
            text_len=files.text_len,
        )
        for prompt in prompts:  # by itself, so that no bit depends on the others
            text_LE = encoder.encode([prompt])[0].cpu()
            self._known[prompt] = text_LE[: _used(text_LE)].clone()
            if self._store is not None:
                self._store.put("text", self._of(prompt), self._known[prompt])

    @property
    def identity(self) -> str:
        """What the encoder's files hold (`files_identity`)."""
        return str(self._of("")["encoder"])

    def _of(self, prompt: str) -> Facts:
        """What a prompt's embedding depends on."""
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
    """Rows up to the last that is not zero."""
    rows = text_LE.any(-1).nonzero()
    return int(rows[-1]) + 1 if len(rows) else 0


def load_wan(
    files: WanFiles,
    prompts: Sequence[str],
    *,
    height: int,
    width: int,
    frames: int = 21,
    device: torch.device | str = "cpu",
    store: Store | None = None,
    ranks: Ranks = ALONE,
) -> tuple[WanStudent, VideoVAE]:
    """The student of a checkpoint, frozen, and its autoencoder; the prompts' embeddings are known.

    Args:
        files: which parts, and their dtypes.
        prompts: what `student.encode` will be asked; others are embedded when they come.
        height: rows of a latent frame.
        width: columns of a latent frame.
        frames: latent frames of a video of the training length.
        device: where everything goes.
        store: keeps embeddings for later runs; None: nothing is kept.
        ranks: of several processes the main one embeds first, the others read the cache.

    Raises FileNotFoundError for an unknown path or layout, ValueError where a file is not what is
    needed, ConfigError where a package is missing.
    """
    need("a wan student", "diffusers", "transformers", "ftfy")
    assert files.checkpoint is not None
    if not Path(files.checkpoint).exists():
        raise FileNotFoundError(f"checkpoint: {files.checkpoint} does not exist")
    texts = Texts(files, device, store)
    if ranks.main:
        texts.embed(prompts)
    ranks.barrier()
    texts.embed(prompts)
    net = load_checkpoint(
        files.checkpoint,
        ema=files.ema,
        dtype=DTYPES[files.dtype],
        device=device,
        head_dim=files.head_dim,
        **files.network,
    )
    student = WanStudent(
        net.requires_grad_(False),
        height=height,
        width=width,
        frames=frames,
        schedule=ShiftedFlow(files.shift),
        encoder=texts,
    )
    codec = VideoVAE.load(
        files.vae or files.pretrained, dtype=DTYPES[files.vae_dtype], device=device
    )
    return student, codec
