"""The causal Wan student as a diffusers model.

Letters: B videos, C channels, F latent frames, H x W latent size, L text tokens, E text channels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from afd.hub import local_copy
from afd.integrations.diffusers.cache import RollingKVCache
from afd.models.wan.checkpoints import (
    CAUSAL,
    LAYOUTS,
    diffusers_sizes,
    load_checkpoint,
    save_diffusers,
)
from afd.models.wan.network import CausalWan
from afd.models.wan.types import WanConfig
from afd_kernels.contracts import require

# Options of diffusers' `from_pretrained` that change how, not what, is loaded. Its pipelines pass
# others, too, as None or False where they are not in use.
_LOADING = {"low_cpu_mem_usage", "use_safetensors", "cache_dir", "local_files_only", "token"}


class CausalWanTransformer3DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A `WanTransformer3DModel` whose frames attend to their chunk and the chunks before it.

    `net` is the network; `chunk` frames are denoised together, `window` and `sink` bound what a
    frame attends to, as in `afd.models.wan.types.WanConfig`. There are no attention processors:
    attention is `afd.ops.block_attention`. Parameters have the released network's names, those of
    the adapters that `afd export kind=peft` writes; files have diffusers' names.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        text_len: int = 512,
        chunk: int = 3,
        window: int | None = None,
        sink: int = 0,
        independent_first_frame: bool = False,
    ) -> None:
        super().__init__()
        require(patch_size[0] == 1, "patch_size", patch_size, "patches of one frame")
        self.gradient_checkpointing = False
        self.net = CausalWan(
            WanConfig(
                dim=num_attention_heads * attention_head_dim,
                num_heads=num_attention_heads,
                ffn_dim=ffn_dim,
                num_layers=num_layers,
                freq_dim=freq_dim,
                text_dim=text_dim,
                text_len=text_len,
                in_dim=in_channels,
                out_dim=out_channels,
                patch=(patch_size[1], patch_size[2]),
                chunk=chunk,
                window=window,
                sink=sink,
                independent_first_frame=independent_first_frame,
            )
        )

    # --- files ---

    @classmethod
    def from_network(cls, net: CausalWan) -> CausalWanTransformer3DModel:
        """The model around an existing network; its weights are not copied."""
        with torch.device("meta"):
            model = cls(**_settings(net.config))
        model.net = net
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **settings: Any,
    ) -> CausalWanTransformer3DModel:
        """Load a diffusers Wan folder, also an export of `afd export kind=diffusers`.

        Args:
            pretrained_model_name_or_path: a folder or a hub name; also a Self-Forcing or
                Causal-Forcing `.pt` file.
            subfolder: the folder in it, "transformer" of a pipeline.
            dtype: None keeps the file's.
            torch_dtype: the same, by its name in earlier releases of diffusers.
            settings: text_len, chunk, window, sink, independent_first_frame, where the folder was
                not written by afd or others are wanted. Options of diffusers that only concern how
                files are read, and unused ones (None, False), are accepted.

        Raises:
            FileNotFoundError, ValueError: as `afd.models.wan.checkpoints.load_checkpoint`.
        """
        causal = {name: settings.pop(name) for name in CAUSAL if name in settings}
        for name, value in settings.items():
            unused = name in _LOADING or value is None or value is False
            require(unused, name, value, f"nothing; the settings are {', '.join(CAUSAL)}")
        both = dtype is not None and torch_dtype not in (None, dtype)
        require(not both, "torch_dtype", torch_dtype, "nothing where dtype is given")
        path = local_copy(pretrained_model_name_or_path, (subfolder or "transformer",), LAYOUTS)
        path = path / subfolder if subfolder else path
        causal = _written(path) | causal
        net = load_checkpoint(path, dtype=dtype or torch_dtype, device=device, **causal)
        return cls.from_network(net).eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        safe_serialization: bool = True,
    ) -> None:
        """Write a folder that this class and diffusers' `WanTransformer3DModel` load.

        Args:
            save_directory: a new or empty folder.
            is_main_process: False writes nothing.
            safe_serialization: True; weights are safetensors.
        """
        require(safe_serialization, "safe_serialization", safe_serialization, "True")
        if is_main_process:
            save_diffusers(save_directory, self.net)

    # --- training ---

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any = None) -> None:
        """Recompute the blocks in the backward; the network's own checkpointing does it."""
        own = gradient_checkpointing_func is None
        name = "gradient_checkpointing_func"
        require(own, name, gradient_checkpointing_func, "None; blocks are checkpointed as one")
        self._checkpoint(True)

    def disable_gradient_checkpointing(self) -> None:
        self._checkpoint(False)

    def _checkpoint(self, enable: bool) -> None:
        self.gradient_checkpointing = self.net.checkpoint_blocks = enable

    # --- passes ---

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        frame_offset: int = 0,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The flow (noise minus video) of latents, [B, C, F, H, W].

        Without a cache all frames are predicted in one pass, each attending to its chunk and the
        noisy chunks before it, with gradients. With one, `hidden_states` is a chunk that attends to
        itself and to the cached frames; it is written to the cache, and there are no gradients.

        Args:
            hidden_states: noisy latents [B, C, F, H, W].
            timestep: times on the 0-1000 scale: a number's tensor, [B] or [B, F]. With a cache one
                time for the whole chunk; on an accelerator that is not checked, to avoid a
                synchronisation, and the first one counts.
            encoder_hidden_states: text embeddings [B, text_len, E].
            frame_offset: the chunk's first latent frame in the stream.
            attention_kwargs: {"kv_cache": RollingKVCache}, or None.

        Raises:
            ValueError: naming the argument, the value given and what is needed.
        """
        cache = _cache(attention_kwargs)
        given = {"hidden_states": hidden_states, "timestep": timestep}
        for name, value in (given | {"encoder_hidden_states": encoder_hidden_states}).items():
            require(isinstance(value, Tensor), name, value, "a tensor")
        require(hidden_states.ndim == 5, "hidden_states", hidden_states, "[B, C, F, H, W]")
        x_BFCHW = hidden_states.transpose(1, 2).contiguous()
        if cache is None:
            none = "0 where there is no kv_cache"
            require(frame_offset == 0, "frame_offset", frame_offset, none)
            out_BFCHW = self.net(x_BFCHW, _times(timestep, x_BFCHW), encoder_hidden_states)
        else:
            t_11 = _one_time(timestep)
            ring = cache.prepare(self.net, x_BFCHW, encoder_hidden_states, frame_offset)
            out_BFCHW = self.net.forward_cached(x_BFCHW, t_11, ring, frame_offset)
        sample = out_BFCHW.transpose(1, 2)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def write_kv_cache(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        kv_cache: RollingKVCache,
        *,
        frame_offset: int,
        timestep: float = 0.0,
    ) -> None:
        """Cache finished frames [B, C, F, H, W] for later chunks, without computing a prediction.

        They overwrite the newest chunk if the cache ends with it, else they are appended. The mode
        of the cache is left as it was.
        """
        x_BFCHW = hidden_states.transpose(1, 2).contiguous()
        t_11 = torch.full((1, 1), timestep, dtype=torch.float32, device=x_BFCHW.device)
        mode, ring = kv_cache.overwrite_newest, kv_cache.ring
        kv_cache.overwrite_newest = ring is not None and frame_offset < ring.end
        try:
            ring = kv_cache.prepare(self.net, x_BFCHW, encoder_hidden_states, frame_offset)
        finally:
            kv_cache.overwrite_newest = mode
        self.net.forward_cached(x_BFCHW, t_11, ring, frame_offset, context_only=True)

    def rewrite_kv_cache(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        kv_cache: RollingKVCache,
        *,
        new_sink: bool = False,
        chunks: Sequence[int] = (),
        timestep: float = 0.0,
    ) -> None:
        """Encode the cached frames again under another prompt (LongLive's KV recache).

        Args:
            hidden_states: the newest finished frames, [B, C, F, H, W], or the whole video so far.
            new_sink: replace the sink, too, by the oldest frames of the window.
            chunks: frames of the chunks in `hidden_states`, for block-causal attention; empty:
                full.
        """
        x_BFCHW = hidden_states.transpose(1, 2).contiguous()
        t_11 = torch.full((1, 1), timestep, dtype=torch.float32, device=x_BFCHW.device)
        ring = kv_cache.switch_text(self.net, encoder_hidden_states)
        self.net.recache(x_BFCHW, t_11, ring, new_sink=new_sink, chunks=chunks)


def _settings(config: WanConfig) -> dict[str, Any]:
    """The model's configuration for a network's."""
    causal = {name: value for name, value in asdict(config).items() if name in CAUSAL}
    return causal | diffusers_sizes(config)


def _written(path: Path) -> dict[str, Any]:
    """The causal settings in a folder's config.json; empty if it has none."""
    for file in (path / "config.json", path / "transformer" / "config.json"):
        if file.is_file():
            try:
                held = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                return {}  # load_checkpoint names the file and what is wrong
            settings = held.get("_afd", {}) if isinstance(held, dict) else {}
            ok = isinstance(settings, dict) and settings.keys() <= set(CAUSAL)
            ok = ok and all(v is None or isinstance(v, int) for v in settings.values())
            require(ok, f"{file}: _afd", settings, f"integers or null of {', '.join(CAUSAL)}")
            return dict(settings)
    return {}


def _cache(attention_kwargs: dict[str, Any] | None) -> RollingKVCache | None:
    given = dict(attention_kwargs or {})
    cache = given.pop("kv_cache", None)
    require(not given, "attention_kwargs", sorted(given), '{"kv_cache": RollingKVCache} or None')
    known = cache is None or isinstance(cache, RollingKVCache)
    require(known, 'attention_kwargs["kv_cache"]', cache, "a RollingKVCache")
    return cache


def _times(timestep: Tensor, x_BFCHW: Tensor) -> Tensor:
    """Times [B, F] or [B, 1], float32."""
    batch, frames = x_BFCHW.shape[:2]
    t = timestep.float()
    t = t.reshape(1, 1) if t.ndim == 0 else t[:, None] if t.ndim == 1 else t
    fits = t.ndim == 2 and t.shape[0] in (1, batch) and t.shape[1] in (1, frames)
    require(fits, "timestep", timestep, f"a number, [{batch}] or [{batch}, {frames}]")
    return t.expand(batch, -1)


def _one_time(timestep: Tensor) -> Tensor:
    """The chunk's time, float32 [1, 1], without a synchronisation."""
    require(timestep.numel() > 0, "timestep", timestep, "one time for the chunk")
    first = timestep.reshape(-1)[:1]
    if timestep.device.type == "cpu":
        same = bool((timestep == first).all())
        require(same, "timestep", timestep.tolist(), "one time for the chunk, given a kv_cache")
    return first.float().view(1, 1)
