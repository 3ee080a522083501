"""Typed settings that all students have, and the interface by which one is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from typing_extensions import Self

from afd.cache import Store
from afd.config.base import Count, Section
from afd.distributed import ALONE, Ranks
from afd.files import replacing
from afd.hub import fingerprint, missing_path

if TYPE_CHECKING:
    from afd.models.codec import Codec
    from afd.models.student import Student
    from afd.models.wan.network import CausalWan
    from afd.models.wan.types import WanConfig
    from afd.video.config import VideoConfig

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class LoraConfig(Section):
    """Low-rank adapters on every linear layer of the blocks (PEFT)."""

    rank: Count = Field(default=256, description="rank of the adapters")
    alpha: Count = Field(default=256, description="an adapter's weight is alpha / rank")


class StudentConfig(Section):
    """Base of every student's section.

    A subclass has a `build` and a `load_network` of its own (docs/EXTENDING.md).
    """

    # Video frames per latent frame after the first; pixels per latent row and column.
    scale: ClassVar[tuple[int, int]] = (1, 1)

    kind: str = Field(description="name of the student in the registry")
    checkpoint: str | None = Field(default=None, description="file or folder of the start weights")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="float32",
        description="what the network computes in; trained weights are kept in float32",
    )
    denoising_steps: list[float] = Field(
        default=[1.0], min_length=1, description="denoising steps, falling from the first one"
    )
    first_chunk_steps: list[float] | None = Field(
        default=None, description="those of the first chunk; null: denoising_steps"
    )
    context_noise: float = Field(
        default=0.0, ge=0, le=1000, description="time that the context pass is given"
    )
    lora: LoraConfig | None = Field(
        default=None, description="train low-rank adapters; null: every weight"
    )
    checkpoint_blocks: bool = Field(
        default=False,
        description="keep only what lies between blocks and compute the rest again in the backward",
    )
    rollout_batch: Count | None = Field(
        default=None, description="videos streamed together in a rollout; null: all at once"
    )

    def build(
        self,
        video: VideoConfig,
        prompts: Sequence[str] = (),
        *,
        device: torch.device | str = "cpu",
        store: Store | None = None,
        ranks: Ranks = ALONE,
    ) -> tuple[Student, Codec]:
        """The student, frozen, which can encode the prompts, and its codec to pixels.

        Args:
            video: the size and training length of its videos.
            prompts: those it will be given; a text encoder embeds them before other parts load.
            device: where everything goes.
            store: keeps embeddings for later runs; None: nothing is kept.
            ranks: of several processes the main one embeds first, the others read the store.

        Raises ValueError, FileNotFoundError or ConfigError where a part cannot be loaded.
        """
        raise NotImplementedError

    def load_network(self) -> CausalWan:
        """The network of the start weights, in float32, without text and codec."""
        raise NotImplementedError

    def sizes(self) -> WanConfig:
        """The network's sizes, also where the checkpoint is not there yet, if they are known."""
        return self.load_network().config

    def check_video(self, video: VideoConfig) -> None:
        """Raise ValueError where the student cannot make videos of this size or length."""

    def video_size(self) -> tuple[int, int, int] | None:
        """Frames, rows and columns of the only videos it is trained on; None: of any size."""
        return None

    def missing_weights(self) -> Iterator[str]:
        """One sentence where the start weights are not there."""
        yield from missing_path("student.checkpoint", self.checkpoint, "the student's weights")

    def missing(self) -> Iterator[str]:
        """Files that a run would not find, or would have to download, one sentence each."""
        yield from self.missing_weights()

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a video."""
        return 1 + (frames - 1) // self.scale[0]

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        return height // self.scale[1], width // self.scale[1]

    def save(self, network: CausalWan, folder: Path, dtype: torch.dtype, note: str) -> Path:
        """Write a network into a folder as this student's `checkpoint`; returns that path.

        Here one safetensors file with the network's own names; `note` is kept in its header.
        """
        path = folder / "network.safetensors"
        weights = {k: v.detach().to(dtype).contiguous() for k, v in network.state_dict().items()}
        with replacing(path) as partial:
            save_file(weights, partial, metadata={"afd": note})
        return path

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the network computes in."""
        return DTYPES[self.dtype]

    @property
    def chunk_frames(self) -> int:
        """Latent frames denoised together."""
        return self.sizes().chunk

    def pinned(self) -> Self:
        """The same with the commits that its hub names stand for now."""
        return self

    def with_weights(self, path: Path) -> Self:
        """The same student with weights that `save` wrote."""
        return self.model_copy(update={"checkpoint": str(path)})

    def fingerprint(self) -> str:
        """A short text that changes with the start weights."""
        return fingerprint(Path(str(self.checkpoint)))
