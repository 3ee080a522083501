"""Settings common to all students, and the interface for building one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, field_validator, model_validator
from safetensors.torch import save_file
from typing_extensions import Self

from afd.cache import Store
from afd.config.base import Count, Natural, Section
from afd.distributed import ALONE, Ranks
from afd.errors import ConfigError
from afd.files import replacing
from afd.hub import fingerprint, missing_path, trained

if TYPE_CHECKING:
    from afd.models.codec import Codec
    from afd.models.network import CausalNetwork
    from afd.models.student import Student
    from afd.models.wan.types import WanConfig
    from afd.video.config import VideoConfig

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class LoraConfig(Section):
    """Low-rank adapters on every linear layer of the blocks (PEFT)."""

    rank: Count = Field(default=256, description="rank of the adapters")
    alpha: Count = Field(default=256, description="an adapter's weight is alpha / rank")


class StudentConfig(Section):
    """Base class of every student's configuration section.

    A subclass implements `build` and `load_network` (docs/EXTENDING.md).
    """

    kind: str = Field(description="name of the student in the registry")
    checkpoint: str | None = Field(default=None, description="file or folder of the start weights")
    init: str | None = Field(
        default=None,
        description="what the run starts from instead of the checkpoint alone: a run folder, a "
        "checkpoint folder, or an exported LoRA (folded into the frozen weights) or whole weights",
    )
    init_weights: Literal["ema", "old", "theta"] | None = Field(
        default=None,
        description="init of a run: which version; null: ema if the run has it, else old, else "
        "theta",
    )
    parents: Literal["folded", "stacked"] = Field(
        default="folded",
        description="adapters of init: folded: into the frozen weights, rounded to dtype; stacked: "
        "kept as frozen adapters beside the released weights, which stay as they are",
    )
    dtype: Dtype = Field(
        default="float32",
        description="dtype of the computation; trained weights are kept in float32",
    )
    denoising_steps: list[float] = Field(
        default=[1.0], min_length=1, description="denoising steps, decreasing"
    )
    first_chunk_steps: list[float] | None = Field(
        default=None, description="denoising steps of the first chunk; null: denoising_steps"
    )
    context_noise: float = Field(default=0.0, ge=0, le=1000, description="time of the context pass")
    lora: LoraConfig | None = Field(
        default=None, description="train low-rank adapters; null: every weight"
    )
    checkpoint_blocks: bool = Field(
        default=False,
        description="save only the residual between blocks and recompute the rest in the backward",
    )
    rollout_batch: Count | None = Field(
        default=None, description="videos per rollout batch; null: all"
    )
    rollout_overlap: bool = Field(
        default=True,
        description="decode and rate the videos of a rollout batch while the next are generated; "
        "the numbers are the same",
    )
    window: Count | None = Field(
        default=None,
        description="training runs: latent frames a chunk attends to, including the sink and "
        "itself, in the rollout, the update and the evaluation; null: all",
    )
    sink: Natural = Field(
        default=0,
        description="training runs: first latent frames that always stay in the window",
    )

    @field_validator("checkpoint")
    @classmethod
    def _whole_weights(cls, path: str | None) -> str | None:
        found = None if path is None else trained(Path(path))
        if found is not None:
            raise ValueError(
                f"student.checkpoint: {path} is {found}; needed: whole weights of the student, and "
                "student.init for what begins from a run or its export"
            )
        return path

    @model_validator(mode="after")
    def _start(self) -> Self:
        if self.window is None and self.sink:
            raise ValueError(f"student.sink: got {self.sink}; needed: 0, as there is no window")
        if self.init is None and self.init_weights is not None:
            raise ValueError(
                f"student.init_weights: got {self.init_weights} without student.init; needed: both"
            )
        if self.parents == "stacked" and self.lora is None:
            raise ValueError(
                "student.parents: got stacked without student.lora; needed: folded, as a run that "
                "trains every weight has no adapters"
            )
        return self

    def build(
        self,
        video: VideoConfig,
        prompts: Sequence[str] = (),
        *,
        device: torch.device | str = "cpu",
        store: Store | None = None,
        ranks: Ranks = ALONE,
    ) -> tuple[Student, Codec]:
        """Build the frozen student, able to encode `prompts`, and its codec to pixels.

        Args:
            video: the size and training length of its videos.
            prompts: those it will receive; a text encoder embeds them before other parts load.
            device: the device of all parts.
            store: keeps embeddings for later runs; None: nothing is kept.
            ranks: with several processes the main one embeds first and the rest read the store.

        Raises ValueError, FileNotFoundError or ConfigError where a part cannot be loaded.
        """
        raise NotImplementedError

    def load_network(self) -> CausalNetwork:
        """Load only the network, with the start weights in float32; no text encoder or codec."""
        raise NotImplementedError

    def sizes(self) -> WanConfig:
        """The network's sizes; known sizes are returned even if the checkpoint is absent."""
        return self.load_network().config

    def skeleton(self) -> CausalNetwork:
        """The network for the names and shapes of its weights, which may be on the meta device."""
        return self.load_network()

    def parameters(self) -> int:
        """Number of the network's parameters, without adapters."""
        return sum(p.numel() for p in self.skeleton().parameters())

    def check_video(self, video: VideoConfig) -> None:
        """Raise ValueError if the student cannot generate videos of this size or length."""
        if video.decoder is not None:
            raise ValueError(
                f"video.decoder: got {video.decoder}; needed: null, as student.kind={self.kind} "
                "has no such decoder"
            )

    def video_size(self) -> tuple[int, int, int] | None:
        """The only frames, rows and columns it can be trained on; None: any size."""
        return None

    def missing_weights(self) -> Iterator[str]:
        """Yield one sentence if the start weights are missing."""
        yield from missing_path("student.checkpoint", self.checkpoint, "the student's weights")

    def require_weights(self) -> None:
        """Raise ConfigError if the start weights do not exist."""
        for sentence in self.missing_weights():
            raise ConfigError(sentence)

    def missing(self) -> Iterator[str]:
        """Yield a sentence for each file that a run would not find or would have to download."""
        yield from self.missing_weights()
        if self.init is not None:
            yield from missing_path("student.init", self.init, "what the run starts from")

    @property
    def scale(self) -> tuple[int, int]:
        """Video frames per latent frame after the first; pixels per latent row and column."""
        return 1, 1

    def latent_frames(self, frames: int) -> int:
        """Number of latent frames of a video with `frames` frames."""
        return 1 + (frames - 1) // self.scale[0]

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        return height // self.scale[1], width // self.scale[1]

    def save(self, network: CausalNetwork, folder: Path, dtype: torch.dtype, note: str) -> Path:
        """Save a network in a folder in the form `checkpoint` accepts; returns its path.

        By default a single safetensors file with the network's parameter names and `note` in its
        header.
        """
        path = folder / "network.safetensors"
        weights = {k: v.detach().to(dtype).contiguous() for k, v in network.state_dict().items()}
        with replacing(path) as partial:
            save_file(weights, partial, metadata={"afd": note})
        return path

    def check_window(self) -> None:
        """Raise ValueError if a chunk and the sink do not fit the window."""
        least = self.sink + self.chunk_frames
        if self.window is not None and self.window < least:
            raise ValueError(
                f"student.window: got {self.window}; needed: at least sink + chunk = {least}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """Compute dtype of the network."""
        return DTYPES[self.dtype]

    @property
    def chunk_frames(self) -> int:
        """Latent frames denoised together."""
        return self.sizes().chunk

    def with_weights(self, path: Path) -> Self:
        """A copy that starts from weights written by `save`."""
        return self.model_copy(update={"checkpoint": str(path)})

    def fingerprint(self) -> str:
        """A short string that changes with the start weights."""
        return fingerprint(Path(str(self.checkpoint)))
