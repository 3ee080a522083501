"""The text encoder on a small random UMT5, in the layouts of the released folders."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from afd.models.wan.text import TextEncoder, clean_prompt

PIECES = ["▁", "▁a", "▁ball", "▁red", "▁falls", "▁on", "▁the", "▁table", "1", "b", "l", "."]
VOCABULARY = ["<pad>", "</s>", "<unk>", *PIECES]
LENGTH = 16
PROMPTS = ["a red ball falls on the table", "the ball", ""]


def save_tokenizer(folder: Path) -> Path:
    """A small tokenizer in the layout of google/umt5-xxl: unigrams, normalised, ended by </s>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    scores = [(piece, -float(i)) for i, piece in enumerate(VOCABULARY)]
    words = Tokenizer(models.Unigram(scores, unk_id=2))
    words.normalizer = normalizers.NFKC()
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    words.add_special_tokens(VOCABULARY[:3])
    folder.mkdir(parents=True, exist_ok=True)
    words.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


@cache
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    with TemporaryDirectory() as folder:
        return PreTrainedTokenizerFast.from_pretrained(save_tokenizer(Path(folder)))


def model(seed: int = 0) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=len(VOCABULARY), d_model=24, d_kv=4, d_ff=40, num_layers=3, num_heads=5
    )
    return UMT5EncoderModel(config).eval()


def encoder(**settings: Any) -> TextEncoder:
    return TextEncoder(model(), tokenizer(), text_len=LENGTH, **settings)


def diffusers_folder(folder: Path) -> Path:
    model().save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")
    return folder


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  two \n\t words  ", "two words"),
        ("Tom &amp;amp; Jerry &lt;3", "Tom & Jerry <3"),
        ("schÃ¶n â€” itâ€™s", "schön — it's"),
        ("全角　空白", "全角 空白"),
    ],
)
def test_prompts_are_cleaned_as_the_released_pipelines_do(raw: str, clean: str) -> None:
    assert clean_prompt(raw) == clean


def test_rows_past_the_prompt_are_zero_and_the_rest_is_the_encoders() -> None:
    text = encoder()
    out_BLE = text.encode(PROMPTS)
    assert out_BLE.shape == (3, LENGTH, text.text_dim)
    assert not out_BLE.requires_grad
    for row_LE, words in zip(out_BLE, (7, 2, 0), strict=True):
        length = words + 1  # and </s>
        assert torch.all(row_LE[length:] == 0)
        assert torch.all(row_LE[:length].abs().sum(-1) > 0)
    ids = torch.tensor([[9, 5, 1]])
    with torch.no_grad():
        alone_LE = text.model(ids).last_hidden_state[0]
    torch.testing.assert_close(out_BLE[1, :3], alone_LE)


def test_a_prompts_embedding_does_not_depend_on_its_batch() -> None:
    together = encoder().encode(PROMPTS)
    for row_LE, prompt in zip(together, PROMPTS, strict=True):
        torch.testing.assert_close(encoder().encode([prompt])[0], row_LE)
    assert torch.equal(encoder(batch=3).encode(PROMPTS), together)
    torch.testing.assert_close(encoder(batch=2).encode(PROMPTS), together)


def test_long_prompts_are_cut_and_keep_their_end_mark() -> None:
    text = encoder()
    out_BLE = text.encode(["ball " * 100, "ball " * (LENGTH - 1)])
    assert torch.equal(out_BLE[0], out_BLE[1])
    assert torch.all(out_BLE.abs().sum(-1) > 0)


def test_the_output_has_the_dtype_asked_for() -> None:
    assert encoder().encode(["a"], dtype=torch.bfloat16).dtype == torch.bfloat16
    assert encoder().encode(["a"]).dtype == torch.float32


def test_a_diffusers_folder_loads(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path)
    text = TextEncoder.load(folder, dtype=torch.float32, text_len=LENGTH)
    assert torch.equal(text.encode(PROMPTS), encoder().encode(PROMPTS))
    assert TextEncoder.load(folder, text_len=LENGTH).encode(PROMPTS).dtype == torch.bfloat16


def test_the_tokenizer_file_is_run_as_it_is_written(tmp_path: Path) -> None:
    text = TextEncoder.load(diffusers_folder(tmp_path), text_len=LENGTH)
    ids = text.tokenizer("a ① ball.")["input_ids"]
    assert [VOCABULARY[i] for i in ids] == ["▁a", "▁", "1", "▁ball", ".", "</s>"]


def test_a_transformers_folder_loads_with_its_tokenizer_inside_or_apart(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "umt5")
    save_tokenizer(tmp_path / "words")
    options: Any = {"dtype": torch.float32, "text_len": LENGTH}
    apart = TextEncoder.load(tmp_path / "umt5", tokenizer=tmp_path / "words", **options)
    save_tokenizer(tmp_path / "umt5")
    inside = TextEncoder.load(tmp_path / "umt5", **options)
    expected = encoder().encode(PROMPTS)
    assert torch.equal(apart.encode(PROMPTS), expected)
    assert torch.equal(inside.encode(PROMPTS), expected)


def test_the_original_wan_folder_loads(tmp_path: Path) -> None:
    leaves = {
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.0.SelfAttention": "attn",
        "layer.0.layer_norm": "norm1",
        "layer.1.layer_norm": "norm2",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2",
        "encoder.block": "blocks",
        "encoder.final_layer_norm": "norm",
        "shared": "token_embedding",
    }
    held = {}
    for name, tensor in model().state_dict().items():
        if name != "encoder.embed_tokens.weight":
            for ours, theirs in leaves.items():
                name = name.replace(ours, theirs)
            held[name] = tensor
    torch.save(held, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    save_tokenizer(tmp_path / "google" / "umt5-xxl")
    text = TextEncoder.load(tmp_path, dtype=torch.float32, text_len=LENGTH)
    assert torch.equal(text.encode(PROMPTS), encoder().encode(PROMPTS))
    assert text.model.shared.weight is text.model.encoder.embed_tokens.weight
    del held["blocks.2.ffn.fc1.weight"]
    torch.save(held, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(ValueError, match=r"1 missing \(encoder\.block\.2"):
        TextEncoder.load(tmp_path)


def test_what_a_folder_lacks_is_not_drawn_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = diffusers_folder(tmp_path)
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    del state["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"block\.1.*needed: all weights of the encoder"):
        TextEncoder.load(folder)


def test_a_hub_name_is_read_from_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, as on a machine whose cache was filled before."""
    from huggingface_hub import constants

    cached = tmp_path / "models--someone--Wan"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    diffusers_folder(cached / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = TextEncoder.load("someone/Wan", dtype=torch.float32, text_len=LENGTH)
    assert torch.equal(text.encode(PROMPTS), encoder().encode(PROMPTS))
    with pytest.raises(
        FileNotFoundError, match=r"text_encoder: got someone/Else.*the hub answered"
    ):
        TextEncoder.load("someone/Else")


def test_bad_input_is_named(tmp_path: Path) -> None:
    for prompts in ("one string", []):
        with pytest.raises(ValueError, match=r"prompts: got .*needed: a list of at least one"):
            encoder().encode(prompts)
    with pytest.raises(
        FileNotFoundError, match=r"contains no text encoder; needed: .*models_t5_umt5-xxl"
    ):
        TextEncoder.load(tmp_path)
    model().save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(FileNotFoundError, match=r"tokenizer: .* is not a directory"):
        TextEncoder.load(tmp_path)
    left = copy(tokenizer())
    left.padding_side = "left"
    with pytest.raises(ValueError, match="pads at the right"):
        TextEncoder(model(), left)


def test_importing_the_models_loads_neither_transformers_nor_diffusers() -> None:
    heavy = "{'transformers', 'diffusers', 'ftfy', 'huggingface_hub'}"
    modules = "sys, afd.models.wan.text, afd.models.wan.vae"
    code = f"import {modules}; sys.exit(str({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
