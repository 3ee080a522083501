"""Wan's text encoder: UMT5 through transformers, with the released pipelines' prompt cleaning.

Shape letters: B prompts, L text_len, E text channels.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd.hub import local_copy, named_errors
from afd.models.wan.checkpoints import fill, read_pickle
from afd_kernels.contracts import require

LAYOUTS = (
    "a diffusers Wan folder or hub name (text_encoder/ and tokenizer/), a transformers folder of a "
    "UMT5 encoder with its tokenizer, or the original Wan folder (models_t5_umt5-xxl-enc-bf16.pth "
    "and google/umt5-xxl/)"
)
_ORIGINAL = "models_t5_umt5-xxl-enc-bf16.pth"
# Maps the original file's names to transformers'; the first two are outside the blocks.
_NAMES = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
    **{
        f"attn.{leaf}.weight": f"layer.0.SelfAttention.{leaf}.weight"
        for leaf in ("q", "k", "v", "o")
    },
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm1.weight": "layer.0.layer_norm.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}


def clean_prompt(prompt: str) -> str:
    """Fix Unicode, unescape HTML entities (twice, as some are escaped twice), collapse spaces."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class TextEncoder:
    """Encodes prompts as embeddings [B, L, E]; rows past a prompt's length are zero."""

    def __init__(self, model: Any, tokenizer: Any, *, text_len: int = 512, batch: int = 8) -> None:
        """`model`: a UMT5EncoderModel; `tokenizer`: its tokenizer; `batch`: prompts per forward."""
        side = tokenizer.padding_side
        require(
            side == "right", "tokenizer", f"padding side {side!r}", "one that pads at the right"
        )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.text_len, self.batch = text_len, batch

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        text_len: int = 512,
        batch: int = 8,
    ) -> TextEncoder:
        """Load from a local folder or a hub name; `tokenizer` names a separate tokenizer folder.

        `dtype` is the encoder's compute dtype. Raises FileNotFoundError for an unknown layout,
        ValueError if weights are missing.
        """
        weights, words = cls.files(source, tokenizer)
        read = _load_original if weights.is_file() else _load_transformers
        model = read(weights, dtype, device)
        return cls(model, _load_tokenizer(words), text_len=text_len, batch=batch)

    @staticmethod
    def files(source: str | Path, tokenizer: str | Path | None = None) -> tuple[Path, Path]:
        """Paths that `load` would read: the encoder's folder or file, and the tokenizer's folder.

        Raises FileNotFoundError for an unknown layout.
        """
        weights, words = _find(local_copy(source, ("text_encoder", "tokenizer"), LAYOUTS))
        words = words if tokenizer is None else Path(tokenizer)
        if not words.is_dir():
            raise FileNotFoundError(f"tokenizer: {words} is not a directory; needed: {LAYOUTS}")
        return weights, words

    @property
    def text_dim(self) -> int:
        return int(self.model.config.d_model)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, dtype: torch.dtype | None = None) -> Tensor:
        """Embeddings [B, L, E] on the encoder's device, in `dtype` (None: the encoder's).

        A prompt's embedding depends on that prompt only, as all are padded or truncated to L.
        """
        listed = not isinstance(prompts, str) and len(prompts) > 0
        require(listed, "prompts", prompts, "a list of at least one prompt")
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        starts = range(0, len(cleaned), self.batch)
        return torch.cat([self._encode(cleaned[i : i + self.batch], dtype) for i in starts])

    def _encode(self, prompts: list[str], dtype: torch.dtype | None) -> Tensor:
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.text_len,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.model.device)
        mask_BL = tokens["attention_mask"]
        hidden_BLE = self.model(tokens["input_ids"], attention_mask=mask_BL).last_hidden_state
        return hidden_BLE.masked_fill(mask_BL[..., None] == 0, 0).to(dtype or hidden_BLE.dtype)


def _find(path: Path) -> tuple[Path, Path]:
    """The encoder's folder or file, and the tokenizer's folder."""
    if (path / "text_encoder").is_dir():
        return path / "text_encoder", path / "tokenizer"
    if (path / _ORIGINAL).is_file():
        path = path / _ORIGINAL
    if path.is_file():
        return path, path.parent / "google" / "umt5-xxl"
    if (path / "config.json").is_file():
        return path, path
    raise FileNotFoundError(f"text_encoder: {path} contains no text encoder; needed: {LAYOUTS}")


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Use tokenizer.json as written: transformers 5 rebuilds a T5 tokenizer from its vocabulary and
    # drops the normalisation that the file specifies.
    exact = (folder / "tokenizer.json").is_file()
    kind = PreTrainedTokenizerFast if exact else AutoTokenizer
    with named_errors("tokenizer", folder):
        return kind.from_pretrained(folder, trust_remote_code=False)


def _load_transformers(folder: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    from transformers import UMT5EncoderModel

    read: Any = UMT5EncoderModel.from_pretrained
    with named_errors("text_encoder", folder):
        model, info = read(folder, dtype=dtype, output_loading_info=True)
    # transformers initialises missing weights at random and only warns.
    lacking = [*info["missing_keys"], *info["mismatched_keys"]]
    require(not lacking, f"text_encoder {folder}", lacking[:4], "all weights of the encoder")
    return model.to(device)


def _load_original(file: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    weights = _renamed(read_pickle(file))
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    feed = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    lacking = [name for name in ("shared.weight", first, feed, query) if name not in weights]
    require(not lacking, f"text_encoder {file}", f"no {lacking}", LAYOUTS)
    (vocabulary, width), (buckets, heads) = weights["shared.weight"].shape, weights[first].shape
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=weights[query].shape[0] // heads,
        d_ff=weights[feed].shape[1],
        num_layers=len({name.split(".")[2] for name in weights if ".block." in name}),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    fill(model, weights, file, dtype=dtype, device=device)
    model.tie_weights()  # one embedding table again, not two
    return model


def _renamed(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in held.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        known = _NAMES.get(match[2] if match else name, name)
        weights[f"encoder.block.{match[1]}.{known}" if match else known] = tensor
    # transformers lists the embedding table a second time, under the encoder.
    if "shared.weight" in weights:
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    return weights
