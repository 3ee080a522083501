"""A tiny random VideoAlign in the released layout, made from nothing but transformers.

Two decoder layers of width 32, one vision block, byte tokens: every test runs on a CPU in seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from afd.discriminators.videoalign.preprocess import Preprocessing
from afd.discriminators.videoalign.prompt import REWARD_TOKENS

PROMPTS = ["a red ball falls", "two cats on a very long wall, at night"]
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
)
LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
HIDDEN, LAYERS, RANK, ALPHA = 32, 2, 4, 12


def write_base(folder: Path) -> Path:
    """config.json and a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"pad_token": SPECIAL[0], "eos_token": SPECIAL[2], "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config: dict[str, Any] = {
        "model_type": "qwen2_vl",
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": 512,
        "bos_token_id": len(alphabet),
        "eos_token_id": len(alphabet) + 2,
        "torch_dtype": "bfloat16",
        "video_token_id": len(alphabet) + 5,
        "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": HIDDEN},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def released_state(base: Path, heads: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Random weights by the released names: LoRA on every linear of the decoder, lm_head apart."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = len(SPECIAL) + 256 + len(REWARD_TOKENS)
    draw = Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in Qwen2VLModel(config).state_dict().items()}

    def random(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=draw) * scale).bfloat16()

    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        name = name.replace("language_model.", "model.")
        norm = "norm" in name or "ln_q" in name
        tensor = random(*shape, scale=0.1 if norm or len(shape) < 2 else 0.3)
        tensor = tensor + 1 if norm and name.endswith("weight") else tensor
        module, leaf = name.rsplit(".", 1)
        if name.startswith("model.layers.") and module.endswith("_proj"):
            state[f"base_model.model.{module}.base_layer.{leaf}"] = tensor
            if leaf == "weight":
                down, up = random(RANK, shape[1], scale=0.2), random(shape[0], RANK, scale=0.2)
                state[f"base_model.model.{module}.lora_A.default.weight"] = down
                state[f"base_model.model.{module}.lora_B.default.weight"] = up
        else:
            state[f"base_model.model.{name}"] = tensor
    state["base_model.model.lm_head.weight"] = (
        state["base_model.model.model.embed_tokens.weight"] + 0
    )
    state["base_model.model.rm_head.weight"] = random(heads, HIDDEN, scale=1.0)
    return state


def write_settings(root: Path, **sections: dict[str, Any]) -> None:
    """model_config.json with a low `max_frame_pixels`; `sections` change its fields."""
    held: dict[str, dict[str, Any]] = {
        "data_config": {
            "max_frame_pixels": 56 * 56,
            "num_frames": None,
            "fps": 2.0,
            "eval_dim": ["VQ", "MQ", "TA"],
            "prompt_template_type": "detailed_special",
        },
        "model_config": {"reward_token": "special", "output_dim": 1},
        "peft_lora_config": {"lora_r": RANK, "lora_alpha": ALPHA, "use_rslora": False},
        "inference_config": {"MQ_mean": 1.0, "MQ_std": 2.0},
    }
    for name, changes in sections.items():
        held[name].update(changes)
    (root / "model_config.json").write_text(json.dumps(held))


def write_released(folder: Path, heads: int = 1) -> Path:
    """A folder with base/ and root/ (model_config.json and checkpoint-7/model.pth)."""
    base, root = write_base(folder / "base"), folder / "root"
    (root / "checkpoint-7").mkdir(parents=True)
    torch.save(released_state(base, heads), root / "checkpoint-7" / "model.pth")
    write_settings(root)
    return folder


def clips(seed: int = 0, count: int = 2, frames: int = 17) -> Tensor:
    """Random videos [count, frames, 3, 48, 72] of large soft blobs in [-1, 1]."""
    draw = Generator().manual_seed(seed)
    coarse = torch.rand(count * frames, 3, 4, 6, generator=draw) * 2 - 1
    video = torch.nn.functional.interpolate(coarse, (48, 72), mode="bilinear")
    return video.view(count, frames, 3, 48, 72)


def seen(seed: int = 0, count: int = 2) -> Tensor:
    """The four frames of such videos that are looked at."""
    return Preprocessing().choose(clips(seed, count), video_fps=16.0)
