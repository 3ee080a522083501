"""The interface of a causal student's network, of whatever architecture.

Shape letters: B batch, F frames, C latent channels, H x W latent size, L text tokens, E text
channels, h heads, d head channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from afd.models.wan.kv_cache import KVCache
from afd.models.wan.sequence import SequenceGroup
from afd.models.wan.types import AdapterSet, LayerKV, WanConfig
from afd_kernels.contracts import require


class CausalNetwork(nn.Module, ABC):
    """A network that denoises videos chunk by chunk: the passes that rollouts and updates make.

    A chunk attends to itself and to earlier ones only. What later chunks attend to are keys and
    values per layer, [B, tokens, h, d], kept in a `KVCache`. `CausalWan` is one; docs/EXTENDING.md
    has another.

    Attributes:
        adapted: names of the linear layers that get low-rank adapters, a regular expression.
        config: its sizes, chunk, window and sink.
        checkpoint_blocks: recompute activations in the backward.
        adapters: low-rank adapters on the weights, if any.
        compute_dtype: dtype of passes if the weights are stored in another one (sharding).
        sequence: processes that compute each pass together (`parallel.sequence`).
    """

    adapted: ClassVar[str] = r"blocks\.\d+\.((self_attn|cross_attn)\.[qkvo]|ffn\.[02])"
    config: WanConfig
    checkpoint_blocks: bool = False
    adapters: AdapterSet | None = None
    compute_dtype: torch.dtype | None = None
    sequence: SequenceGroup | None = None

    # --- passes ---

    @abstractmethod
    def forward(
        self,
        x_BFCHW: Tensor,
        t_BF: Tensor,
        text: Tensor | list[LayerKV],
        context: list[LayerKV] | None = None,
        *,
        x0_BFCHW: Tensor | None = None,
        clean_t_BF: Tensor | None = None,
        chunks_BN: Tensor | None = None,
        start_frame: int = 0,
    ) -> Tensor:
        """Prediction for all frames in one pass; arguments as in `CausalWan.forward`.

        With `context` (of `clean_context`) or `x0_BFCHW`, a chunk attends to clean earlier chunks;
        else to noisy ones. A network may raise ValueError for options it does not have.
        """

    @abstractmethod
    def clean_context(
        self,
        x_BFCHW: Tensor,
        text: Tensor | list[LayerKV],
        t_BF: Tensor | None = None,
        *,
        past: list[LayerKV] | None = None,
        start_frame: int = 0,
    ) -> list[LayerKV]:
        """Keys and values of clean frames for every layer, to which later chunks attend."""

    @abstractmethod
    def text_kv(self, text_BLE: Tensor) -> list[LayerKV]:
        """What the layers keep of the prompt, for `KVCache`; at least one pair."""

    @abstractmethod
    def new_cache(
        self, text: Tensor | list[LayerKV], frames: int | None, height: int, width: int
    ) -> KVCache:
        """An empty cache for streams of `frames` frames with these prompts."""

    @abstractmethod
    def forward_cached(
        self,
        x_BFCHW: Tensor,
        t_BF: Tensor,
        cache: KVCache,
        start_frame: int,
        context_only: bool = False,
    ) -> Tensor | None:
        """One chunk over the cache of all earlier ones, whose keys and values it writes there.

        `context_only`: only update the cache, and return None. No gradients.
        """

    # --- what a network may have ---

    def recache(
        self,
        x_BFCHW: Tensor,
        t_BF: Tensor,
        cache: KVCache,
        *,
        new_sink: bool = False,
        chunks: Sequence[int] = (),
        context_only: bool = True,
    ) -> Tensor | None:
        """Encode cached frames again under the cache's present prompt; here a ValueError."""
        raise ValueError(f"switches: recache is not supported by {type(self).__name__}")

    def compile_blocks(self, enabled: bool = True, **options: Any) -> None:
        """Compile the parts around attention; here a ValueError if enabled."""
        require(
            not enabled, "compile", enabled, f"false, as {type(self).__name__} has no such code"
        )

    def fuse_projections(self) -> None:
        """Compute projections together where no gradient is needed; here nothing."""

    @property
    def fused(self) -> bool:
        """Whether `fuse_projections` is in effect."""
        return False

    @property
    def groups(self) -> list[nn.Module]:
        """Modules, in the order in which a pass calls them, that are sharded each on their own;
        empty if a pass needs all weights at once."""
        return []

    @property
    def shares_sequences(self) -> bool:
        """Whether its passes are divided over the processes of `sequence`."""
        return False

    @property
    def first_weight(self) -> Tensor:
        """A weight whose device and dtype are those of the network."""
        return next(self.parameters())
