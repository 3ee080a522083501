"""Settings of the released Wan students."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from afd.config.base import Count, Positive
from afd.hub import fingerprint, missing_path, missing_source, pinned
from afd.models.config import Dtype, LoraConfig, StudentConfig
from afd.models.wan.sizes import DEFAULT_SIZE, LATENTS, SIZES, Latents, LatentsName, SizeName
from afd.registry import load
from afd.schedules import ShiftedFlow, check_steps

if TYPE_CHECKING:
    from afd.models.codec import Codec
    from afd.models.network import CausalNetwork
    from afd.models.student import Student
    from afd.models.wan.network import CausalWan
    from afd.models.wan.types import WanConfig
    from afd.video.config import VideoConfig


# `vae` for the tiny autoencoder.
TINY = "tiny"
# Parts that may come from a source other than `pretrained`, and their folders in it.
PARTS = {"text_encoder": ("text_encoder", "tokenizer"), "vae": ("vae",)}


class WanStudentConfig(StudentConfig):
    """A released causal student, its text encoder and its autoencoder."""

    kind: Literal["wan"] = Field(
        description="a causal student on a Wan network, as Self-Forcing, LongLive or Krea Realtime"
    )
    size: SizeName | None = Field(
        default=None,
        description="the network that the checkpoint must hold; null: any, and wan2.1-1.3b where "
        "there is none",
    )
    latents: LatentsName | None = Field(
        default=None,
        description="latents of the network: wan2.1 (16 channels, 8 pixels a row), wan2.2 (48, "
        "16); null: those of `size`, else wan2.1",
    )
    checkpoint: str | None = Field(
        default=None, description=".pt file, diffusers folder or .safetensors of the start weights"
    )
    dtype: Dtype = Field(
        default="bfloat16",
        description="dtype of the computation; trained weights are kept in float32",
    )
    lora: LoraConfig | None = Field(
        default=LoraConfig(), description="train low-rank adapters; null: every weight"
    )
    checkpoint_blocks: bool = Field(
        default=True,
        description="save only the residual between blocks and recompute the rest in the backward",
    )
    rollout_batch: Count | None = Field(
        default=1, description="videos per rollout batch; null: all"
    )
    ema: bool | None = Field(
        default=None,
        description="weights of a .pt file; true: generator_ema, false: generator, null: "
        "generator_ema if present",
    )
    adapter: str | None = Field(
        default=None,
        description="low-rank adapter file or PEFT folder merged into the weights, as LongLive's",
    )
    adapter_alpha: Positive | None = Field(
        default=None,
        description="alpha of `adapter`; null: as its folder's adapter_config.json says",
    )
    head_dim: Count | None = Field(
        default=None, description="channels of a head; null: from config.json, else 128"
    )
    pretrained: str = Field(
        default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        description="folder or hub name[@commit] with text_encoder/, tokenizer/, vae/",
    )
    text_encoder: str | None = Field(default=None, description="another source; null: pretrained")
    tokenizer: str | None = Field(
        default=None, description="folder of the tokenizer; null: that of the text encoder"
    )
    vae: str | None = Field(
        default=None, description="another source; tiny: tiny_vae; null: pretrained"
    )
    tiny_vae: str | None = Field(
        default=None,
        description="TAEHV's file for the student's latents (taew2_1 or taew2_2, .safetensors or "
        ".pth), for vae=tiny and video.decoder=tiny",
    )
    text_len: Count = Field(default=512, description="tokens of a prompt, padding included")
    chunk: Count = Field(default=3, description="latent frames denoised together; 1: framewise")
    denoising_steps: list[float] = Field(
        default=[1000, 750, 500, 250],
        description="denoising steps before the warp, decreasing from 1000",
    )
    shift: Positive = Field(default=5.0, description="shift of the table of noise levels")
    vae_dtype: Dtype = Field(
        default="bfloat16", description="dtype of the autoencoder's computation"
    )

    @model_validator(mode="after")
    def _consistent(self) -> WanStudentConfig:
        for steps in (self.denoising_steps, self.first_chunk_steps):
            if steps is not None:
                check_steps(steps, first=1000)
                ShiftedFlow(self.shift).warp(steps)
        if self.vae == TINY and self.tiny_vae is None:
            raise ValueError("tiny_vae: got null; needed: TAEHV's file, as vae=tiny")
        if self.size is not None and self.latents not in (None, SIZES[self.size].latents):
            raise ValueError(
                f"latents: got {self.latents}; needed: {SIZES[self.size].latents}, those of "
                f"size={self.size}, or null"
            )
        return self

    @property
    def latents_of(self) -> Latents:
        """The latents that the network works in."""
        return LATENTS[self.latents or SIZES[self.size or DEFAULT_SIZE].latents]

    @property
    def scale(self) -> tuple[int, int]:
        return self.latents_of.scale

    def build(self, *given: Any, **options: Any) -> tuple[Student, Codec]:
        found: tuple[Student, Codec] = load("afd.models.wan.loading:build")(self, *given, **options)
        return found

    def load_network(self) -> CausalWan:
        network: CausalWan = load("afd.models.wan.loading:load_network")(self)
        return network

    def sizes(self) -> WanConfig:
        """Network sizes from the checkpoint if it exists, else those of `size`."""
        found: WanConfig = load("afd.models.wan.loading:sizes")(self)
        return found

    def skeleton(self) -> CausalNetwork:
        network: CausalNetwork = load("afd.models.wan.loading:skeleton")(self)
        return network

    def save(self, network: CausalNetwork, folder: Path, dtype: torch.dtype, note: str) -> Path:
        path: Path = load("afd.models.wan.loading:save_network")(self, network, folder, dtype, note)
        return path

    @property
    def network(self) -> dict[str, Any]:
        """The fields of WanConfig that checkpoints do not store."""
        return {
            "chunk": self.chunk,
            "text_len": self.text_len,
            "window": self.window,
            "sink": self.sink,
        }

    def check_video(self, video: VideoConfig) -> None:
        time, space = self.scale
        height, width, frames = video.height, video.width, video.frames
        if video.decoder == TINY and self.tiny_vae is None:
            raise ValueError("video.decoder: got tiny; needed with it: student.tiny_vae")
        # A token spans two latent pixels per side.
        if height % (2 * space) or width % (2 * space):
            raise ValueError(
                f"video.height, video.width: got {height}, {width}; needed: multiples of "
                f"{2 * space}, as two latent pixels of {space} make a token"
            )
        latents = self.latent_frames(frames)
        if (frames - 1) % time or latents % self.chunk:
            whole = max(1, round(latents / self.chunk)) * self.chunk
            raise ValueError(
                f"video.frames: got {frames}; needed: 1 + {time} (n - 1) for n latent frames in "
                f"chunks of {self.chunk} (student.chunk), such as {1 + time * (whole - 1)}"
            )

    @property
    def chunk_frames(self) -> int:
        return self.chunk

    def with_weights(self, path: Path) -> Self:
        # A folder holds one network; `ema` only chooses between the two of a .pt file.
        merged = {"adapter": None, "adapter_alpha": None}
        return self.model_copy(update={"checkpoint": str(path), "ema": None, **merged})

    def fingerprint(self) -> str:
        """Changes with any file of weights: checkpoint, adapter, tiny autoencoder."""
        parts = [super().fingerprint()]
        files = [self.adapter, self.tiny_vae if self.vae == TINY else None]
        parts += [fingerprint(Path(file)) for file in files if file is not None]
        return "+".join(parts)

    def missing_weights(self) -> Iterator[str]:
        yield from super().missing_weights()
        if self.adapter is not None:
            yield from missing_path("student.adapter", self.adapter, "the adapter to merge")

    def pinned(self) -> Self:
        from_pipeline: tuple[str, ...] = ()
        update = {}
        for key, parts in PARTS.items():
            named = getattr(self, key)
            if named is None:
                from_pipeline += parts
            else:
                update[key] = pinned(named, parts)
        if from_pipeline:
            update["pretrained"] = pinned(self.pretrained, from_pipeline)
        return self.model_copy(update=update)

    def missing(self) -> Iterator[str]:
        yield from super().missing()
        yield from missing_source("student.text_encoder", self.text_encoder or self.pretrained)
        if self.tiny_vae is not None:
            yield from missing_path("student.tiny_vae", self.tiny_vae, "the tiny autoencoder")
        if self.vae != TINY:
            yield from missing_source("student.vae", self.vae or self.pretrained)
