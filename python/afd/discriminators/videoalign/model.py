"""VideoAlign's reward model on transformers >= 5, loaded from the released `model.pth`.

Qwen2-VL without its language-model head, and one linear head on the hidden state of three reward
tokens. The released code calls the text model without positions, so positions are sequential: no
M-RoPE. Right padding needs no mask, as attention is causal.
Shape letters: B videos, L tokens, D channels, P patches, V video tokens of the whole batch.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from afd.discriminators.config import BASE_FILES, CHECKPOINT_FILES
from afd.discriminators.pairs import matched_pieces
from afd.discriminators.videoalign.preprocess import MERGE, PATCH, TEMPORAL, Preprocessing
from afd.discriminators.videoalign.prompt import REWARDS, PromptEncoder, Tokens, read_template
from afd.hub import local_copy, named_errors
from afd.listing import counted
from afd.models.wan.checkpoints import fill, read_pickle
from afd_kernels.contracts import require

_log = logging.getLogger("afd")
LAYOUTS = (
    "the released VideoReward folder or its name on the hub: model_config.json beside one "
    "checkpoint-*/model.pth"
)
BASE = "a folder or hub name of the base model: Qwen2-VL's config.json and its tokenizer"
_PREFIX = "base_model.model."
# The released model's mean and standard deviation of each rating over its authors' videos.
NORMS = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
Rotary = Literal["released", "rounded", "exact"]


# --- the released file ---


@dataclass(frozen=True)
class Settings:
    """Settings from model_config.json.

    Attributes:
        base: name of the base model.
        lora_alpha: LoRA's scale is alpha / r.
        lora_rank: r, if given.
        rslora: the scale is alpha / sqrt(r) instead.
        preprocessing: frame rate and size.
        template: kind of prompt template.
        norms: mean and standard deviation by rating.
    """

    base: str = "Qwen/Qwen2-VL-2B-Instruct"
    lora_alpha: float = 128.0
    lora_rank: int | None = None
    rslora: bool = False
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    template: str = "detailed_special"
    norms: Mapping[str, tuple[float, float]] = field(default_factory=lambda: dict(NORMS))

    @classmethod
    def read(cls, file: Path) -> Settings:
        """Read model_config.json; rejects a model whose rewards are not at special tokens."""
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}: not valid JSON ({error})") from error
        data, model, lora, scores = (
            held.get(part, {})
            for part in ("data_config", "model_config", "peft_lora_config", "inference_config")
        )
        kind = model.get("reward_token", "special")
        require(kind == "special", f"{file}: reward_token", kind, "'special'")
        order = list(data.get("eval_dim", REWARDS))
        require(order == list(REWARDS), f"{file}: eval_dim", order, str(list(REWARDS)))
        require("lora_alpha" in lora, f"{file}: peft_lora_config", lora, "lora_alpha")
        return cls(
            base=model.get("model_name_or_path", cls.base),
            lora_alpha=float(lora["lora_alpha"]),
            lora_rank=lora.get("lora_r"),
            rslora=bool(lora.get("use_rslora", False)),
            preprocessing=Preprocessing(
                fps=float(data.get("fps") or 2.0),
                count=data.get("num_frames"),
                max_pixels=int(data.get("max_frame_pixels", Preprocessing.max_pixels)),
            ),
            template=data.get("prompt_template_type", cls.template),
            norms={
                name: (
                    float(scores.get(f"{name}_mean", NORMS[name][0])),
                    float(scores.get(f"{name}_std", NORMS[name][1])),
                )
                for name in REWARDS
            },
        )


def find_files(checkpoint: str | Path) -> tuple[Path, Path]:
    """Find model.pth and model_config.json from a released or checkpoint folder, or a model.pth."""
    path = local_copy(checkpoint, CHECKPOINT_FILES, LAYOUTS)
    if path.is_dir():
        found = sorted([*path.glob("model.pth"), *path.glob("checkpoint-*/model.pth")])
        if not found and [*path.rglob("adapter_model.safetensors")]:
            raise ValueError(
                f"checkpoint {path}: it holds adapter_model.safetensors; needed: {LAYOUTS} (save a "
                "self-trained model with its full state dict)"
            )
        require(len(found) == 1, f"checkpoint {path}", [str(f) for f in found] or "none", LAYOUTS)
        path = found[0]
    for folder in (path.parent, path.parent.parent):
        if (folder / "model_config.json").is_file():
            return path, folder / "model_config.json"
    raise FileNotFoundError(f"checkpoint {path}: no model_config.json beside it; needed: {LAYOUTS}")


def remap(
    held: Mapping[str, Tensor],
    *,
    alpha: float,
    rslora: bool = False,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    lora: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    """Rename released tensors for transformers 5's Qwen2VLModel and merge LoRA; also the head.

    Every key is accounted for: only the language-model head is dropped, and an unknown key is an
    error. `rank`: rank of every LoRA, if known. With `lora=False` the released LoRA is not merged.
    """
    weights: dict[str, Tensor] = {}
    pairs: dict[str, dict[str, Tensor]] = {}
    head, odd, wrapped = None, [], set()
    for key, tensor in held.items():
        name = key.removeprefix(_PREFIX)
        if name == key or not isinstance(tensor, Tensor):
            odd.append(key)
        elif name == "rm_head.weight":
            head = tensor.float().clone()
        elif name == "lm_head.weight":
            continue
        elif match := re.fullmatch(r"model\.(.+)\.lora_([AB])\.default\.weight", name):
            pairs.setdefault(f"language_model.{match[1]}.weight", {})[match[2]] = tensor
        elif name.startswith(("visual.", "model.")):
            ours = re.sub(r"^model\.", "language_model.", name).replace(".base_layer", "")
            if ours in weights:
                odd.append(key)
            if name.endswith(".base_layer.weight"):
                wrapped.add(ours)
            weights[ours] = tensor
        else:
            odd.append(key)
    # Every wrapped linear must have a LoRA pair, and every LoRA pair a wrapped linear.
    odd += sorted(wrapped ^ pairs.keys())
    odd += [name for name, pair in pairs.items() if not _is_lora(pair, weights.get(name))]
    if head is None:
        odd.append("no rm_head.weight")
    if odd or head is None:
        raise ValueError(
            f"checkpoint: keys not understood: {odd[:4]} ({len(odd)}); needed: {LAYOUTS}"
        )
    require(head.ndim == 2 and len(head) in (1, 3), "rm_head.weight", head, "[1 or 3, D]")
    for name, pair in pairs.items() if lora else ():
        found = len(pair["A"])
        agrees = rank is None or found == rank
        require(
            agrees, f"checkpoint: rank of LoRA at {name}", found, f"lora_r of the config, {rank}"
        )
        scale = alpha / (math.sqrt(found) if rslora else found)
        added = scale * (pair["B"].float() @ pair["A"].float())
        weights[name] = (weights[name].float() + added).to(dtype)
    return weights, head


def _is_lora(pair: Mapping[str, Tensor], weight: Tensor | None) -> bool:
    """Whether both LoRA factors are present and their product has the weight's shape."""
    if pair.keys() != {"A", "B"} or weight is None:
        return False
    down, up = pair["A"], pair["B"]
    fits = down.ndim == up.ndim == 2 and len(down) == up.shape[1] > 0
    return fits and (len(up), down.shape[1]) == tuple(weight.shape)


# --- the network ---


class _ReleasedVisionRotary(nn.Module):
    """Rotary tables of the vision tower, in bfloat16 throughout as in the released code.

    It has the interface of later transformers 5 versions, in which a tower's rotary module computes
    the tables; in earlier ones it computes the angles, in its frequencies' dtype.
    """

    def __init__(self, inv_freq: Tensor) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.inv_freq: Tensor

    def forward(self, x: Tensor, position_N2: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_N2.to(self.inv_freq.device, torch.bfloat16)[..., None] * self.inv_freq
        half = angles.flatten(1)
        both = torch.cat([half, half], 1).to(x.device)
        return both.cos().float(), both.sin().float()


def _frequencies(width: int, theta: float) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))


def set_rotary(network: Any, rotary: Rotary, device: torch.device | str) -> None:
    """Set both towers' rotary frequencies, which checkpoints do not store, at a chosen precision.

    "released": frequencies rounded to bfloat16, as well as the vision tower's angles and tables,
    as `model.to(bfloat16)` does in the released code. "rounded": rounded frequencies, everything
    after them in float32. "exact": float32 throughout; at distance 2000 its angles are up to 2.3
    rad from those that the released weights were trained with. Call it once per network.
    """
    known = rotary in ("released", "rounded", "exact")
    require(known, "rotary", rotary, "'released', 'rounded' or 'exact'")
    text, vision = network.language_model, network.visual
    heads = text.config.hidden_size // text.config.num_attention_heads
    # Half of a head's channels for rows, half for columns.
    half = vision.config.embed_dim // vision.config.num_heads // 2
    frequencies = {
        text.rotary_emb: _frequencies(heads, text.config.rope_parameters["rope_theta"]),
        vision.rotary_pos_emb: _frequencies(half, 1e4),
    }
    for module, exact in frequencies.items():
        module.inv_freq = (exact if rotary == "exact" else exact.bfloat16().float()).to(device)
        if hasattr(module, "original_inv_freq"):
            module.original_inv_freq = module.inv_freq.clone()
    if rotary == "released":
        module = vision.rotary_pos_emb
        module.inv_freq = module.inv_freq.bfloat16()
        if "x" in inspect.signature(module.forward).parameters:
            vision.rotary_pos_emb = _ReleasedVisionRotary(module.inv_freq)


def build_network(config: Any, rows: int, attention: str = "sdpa") -> Any:
    """Qwen2VLModel of a base configuration on the meta device, with `rows` embedding rows."""
    from transformers import Qwen2VLModel

    vision = config.vision_config
    sizes = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    ours = (PATCH, MERGE, TEMPORAL)
    require(sizes == ours, "config.json: patch, merge and temporal patch", sizes, str(ours))
    config.text_config.vocab_size = rows
    config._attn_implementation = attention
    with torch.device("meta"):
        return Qwen2VLModel(config)


class VideoAlign(nn.Module):
    """VideoAlign reward model: rates videos with prompts by VQ, MQ and TA."""

    def __init__(
        self,
        network: Any,
        head_OD: Tensor,
        prompts: PromptEncoder,
        settings: Settings,
    ) -> None:
        """`network`: a Qwen2VLModel; `head_OD`: weights of the reward head, one row for all three
        ratings or one each."""
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("head_OD", head_OD.float())
        self.head_OD: Tensor
        self.prompts, self.settings = prompts, settings

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        base: str | Path | None = None,
        videoalign: str | Path | None = None,
        template: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        rotary: Rotary = "released",
        lora: bool = True,
        attention: str = "sdpa",
    ) -> VideoAlign:
        """Load the released model.

        Args:
            checkpoint: its folder, a `model.pth` with model_config.json nearby, or a hub name.
            base: folder or hub name of Qwen2-VL, for config.json and the tokenizer only; None takes
                the one named in model_config.json.
            videoalign: checkout of VideoAlign's code, for its prompt template (never executed).
            template: the template text itself, instead of `videoalign`.
            dtype: compute dtype of both towers; the head is float32.
            rotary: precision of the rotary tables (see `set_rotary`).
            lora: whether to merge the released LoRA.
            attention: transformers' name of the attention implementation.

        Raises FileNotFoundError for an unknown path, ValueError for an unsuitable file: every key
        must be known, and every weight present with the right shape.
        """
        from transformers import Qwen2VLConfig

        weights_file, settings_file = find_files(checkpoint)
        settings = Settings.read(settings_file)
        folder = local_copy(settings.base if base is None else base, BASE_FILES, BASE)
        if template is None:
            template = read_template(videoalign, settings.template)
        prompts = PromptEncoder.load(folder, template)
        weights, head_OD = remap(
            read_pickle(weights_file),
            alpha=settings.lora_alpha,
            rslora=settings.rslora,
            rank=settings.lora_rank,
            dtype=dtype,
            lora=lora,
        )
        rows = len(weights.get("language_model.embed_tokens.weight", ()))
        require(
            rows == prompts.rows,
            f"{folder}: tokenizer",
            f"{prompts.rows} tokens",
            f"the {rows} of {weights_file}",
        )
        with named_errors("base model", folder):
            base_config = Qwen2VLConfig.from_pretrained(folder)
        network = build_network(base_config, rows, attention)
        fill(network, weights, weights_file, dtype=dtype, device=device)
        set_rotary(network, rotary, device)
        _log.info(
            "videoalign %s: %s, %s, %s rotary tables",
            weights_file,
            counted(len(head_OD), "head"),
            dtype,
            rotary,
        )
        return cls(network, head_OD, prompts, settings).to(device)

    @property
    def device(self) -> torch.device:
        return self.head_OD.device

    @property
    def dtype(self) -> torch.dtype:
        weight: Tensor = self.network.language_model.norm.weight
        return weight.dtype

    # --- one pass ---

    def see(self, pixels_PK: Tensor, grid_B3: Tensor) -> Tensor:
        """Video tokens [V, D] of normalised patches (see `patchify`), in the network's dtype."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and pixels_PK.requires_grad):
            pixels_PK = pixels_PK.to(self.device, self.dtype)
            # `last_hidden_state` would be the tokens before each four are merged.
            seen = self.network.visual(pixels_PK, grid_thw=grid_B3.to(self.device))
            return seen.pooler_output

    def read(self, tokens: Tokens, seen_VD: Tensor) -> Tensor:
        """Hidden states at the reward tokens, float32 [B, 3, D]."""
        ids_BL = tokens.ids_BL.to(self.device)
        text = self.network.language_model
        embedded_BLD = text.embed_tokens(ids_BL)
        at_BL1 = (ids_BL == self.prompts.video_id)[..., None]
        # Counted on the ids' original device, which avoids a synchronisation.
        count = int((tokens.ids_BL == self.prompts.video_id).sum())
        require(count == len(seen_VD), "tokens", f"{count} of video", f"{len(seen_VD)}")
        embedded_BLD = embedded_BLD.masked_scatter(at_BL1, seen_VD.to(embedded_BLD.dtype))
        B, length = ids_BL.shape
        counted_3BL = torch.arange(length, device=self.device).expand(3, B, length)
        half = self.dtype if self.dtype in (torch.bfloat16, torch.float16) else None
        # The trained LoRA is float32; autocast runs its matmuls in the network's dtype.
        with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            hidden_BLD = text(
                inputs_embeds=embedded_BLD, position_ids=counted_3BL, use_cache=False
            ).last_hidden_state
        at_B3D = tokens.places_B3.to(self.device)[..., None].expand(-1, -1, hidden_BLD.shape[-1])
        return hidden_BLD.gather(1, at_B3D).float()

    def states(self, chosen_BNCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Hidden states at the reward tokens, float32 [B, 3, D], for sampled frames in [-1, 1]."""
        patches = self.settings.preprocessing.patches
        pixels_PK, grid_B3 = patches(chosen_BNCHW.to(self.device))
        tokens = self.prompts.encode(prompts, (grid_B3.prod(1) // MERGE**2).tolist())
        return self.read(tokens, self.see(pixels_PK, grid_B3))

    def ratings(
        self,
        video_BFCHW: Tensor,
        prompts: Sequence[str],
        *,
        video_fps: float = 16.0,
        normalised: bool = True,
        micro_batch: int | None = None,
    ) -> dict[str, Tensor]:
        """VQ, MQ, TA and their sum Overall, float64 [B] each, of videos in [-1, 1].

        `normalised`: z-scores by the checkpoint's own mean and standard deviation, as the released
        evaluation reports them. `micro_batch`: videos per pass; None: all in one pass.
        """
        seen_BNCHW = self.settings.preprocessing.choose(video_BFCHW, video_fps)
        return self.ratings_of(seen_BNCHW, prompts, normalised=normalised, micro_batch=micro_batch)

    @torch.no_grad()
    def ratings_of(
        self,
        seen_BNCHW: Tensor,
        prompts: Sequence[str],
        *,
        normalised: bool = True,
        micro_batch: int | None = None,
    ) -> dict[str, Tensor]:
        """`ratings` of videos already reduced to the sampled frames."""
        hidden_B3D = torch.cat(
            [
                self.states(seen_BNCHW[part], prompts[part])
                for part in matched_pieces(seen_BNCHW, prompts, micro_batch)
            ]
        )
        norms = self.settings.norms if normalised else None
        return named_ratings(rewards(hidden_B3D, self.head_OD), norms)


def rewards(hidden_B3D: Tensor, head_OD: Tensor) -> Tensor:
    """VQ, MQ and TA, float32 [B, 3], from one head for all three tokens or one head each."""
    each_B3O = hidden_B3D @ head_OD.t()
    return each_B3O[..., 0] if len(head_OD) == 1 else each_B3O.diagonal(dim1=1, dim2=2)


def named_ratings(
    rewards_B3: Tensor, norms: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, Tensor]:
    """Ratings by name, float64 [B] each, and their sum "Overall"; z-scores with `norms`."""
    named = dict(zip(REWARDS, rewards_B3.double().unbind(1), strict=True))
    if norms is not None:
        named = {name: (value - norms[name][0]) / norms[name][1] for name, value in named.items()}
    return named | {"Overall": sum(named.values(), torch.zeros(()).to(rewards_B3.device))}
