"""Compares rewards, hidden states, rotary tables and weight layout with the original's."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from afd.discriminators.videoalign.model import (
    VideoAlign,
    build_network,
    find_files,
    named_ratings,
    remap,
    rewards,
    set_rotary,
)
from afd.discriminators.videoalign.preprocess import MERGE
from afd.discriminators.videoalign.prompt import Tokens
from afd.models.wan.checkpoints import fill, read_pickle
from afd.testing.videoalign_golden import LOOSE, MODES, REWARDS, VISION, Folder, Line

# Tolerance between VQ and MQ of one video under two prompts, on which they do not depend.
SAME = 1e-6
# Sines and cosines of angles up to thousands, in float32.
TABLES = 1e-6
HEAD_DIM = 128


def compare_case(line: Line, path: Path, folder: Folder) -> None:
    """Compares one batch in every precision, from prompts and patches to rewards."""
    golden = load_file(path)
    case = folder.read("forward.json")[path.stem.removeprefix("forward_")]
    tokens = _tokens(line, golden, case, folder)
    for mode in MODES:
        _compare_mode(line, mode, golden, tokens, folder)
    grid_B3, pixels = golden["video_grid_thw"], golden["pixel_values_videos"]
    plain = folder.model("")
    if "rewards.lora_disabled" in golden:
        bare = folder.model("", lora=False)
        found = rewards(_states(bare, golden, tokens), bare.head_OD)
        line.near("rewards.lora_disabled", found, golden.pop("rewards.lora_disabled"), REWARDS)
    if "rewards.output_dim3" in golden:
        head_OD = golden.pop("rm_head.weight.output_dim3").to(folder.device)
        found = rewards(_states(plain, golden, tokens), head_OD)
        line.near("rewards.output_dim3", found, golden.pop("rewards.output_dim3"), REWARDS)
    alone = [
        Tokens(tokens.ids_BL[i : i + 1, :length], (length,), tokens.places_B3[i : i + 1])
        for i, length in enumerate(tokens.lengths)
    ]
    patches = pixels.split(grid_B3.prod(1).tolist())
    for i, one in enumerate(alone):
        with torch.no_grad():
            hidden = plain.read(one, plain.see(patches[i], grid_B3[i : i + 1]))
        expected = golden["rewards"][i : i + 1]
        line.near("rewards one at a time", rewards(hidden, plain.head_OD), expected, REWARDS)
    used = ("input_ids", "attention_mask", "reward_positions", "video_grid_thw")
    for name in (*used, "pixel_values_videos", *(f"rewards{mode}" for mode in MODES)):
        golden.pop(name)
    line.unknown(golden)


def _tokens(line: Line, golden: dict[str, Tensor], case: dict[str, Any], folder: Folder) -> Tokens:
    """This code's tokens of a case, compared with the original's."""
    counts = (golden["video_grid_thw"].prod(1) // MERGE**2).tolist()
    tokens = folder.model("").prompts.encode(case["prompts"], counts)
    line.equal("input_ids", tokens.ids_BL, golden["input_ids"])
    line.equal("attention_mask", tokens.mask(), golden["attention_mask"])
    line.equal("reward_positions", tokens.places_B3, golden["reward_positions"])
    return tokens


def _states(model: VideoAlign, golden: dict[str, Tensor], tokens: Tokens) -> Tensor:
    with torch.no_grad():
        seen_VD = model.see(golden["pixel_values_videos"], golden["video_grid_thw"])
        return model.read(tokens, seen_VD)


def _compare_mode(
    line: Line, mode: str, golden: dict[str, Tensor], tokens: Tokens, folder: Folder
) -> None:
    model, loose = folder.model(mode), mode == ".bf16"
    with _taps(model, tokens) as taps:
        hidden = _states(model, golden, tokens)
    found = rewards(hidden, model.head_OD)
    line.near(f"rewards{mode}", found, golden[f"rewards{mode}"], LOOSE if loose else REWARDS)
    for name, limit in (
        ("hidden_at_reward_tokens", REWARDS),
        ("layer_out_at_reward_tokens", REWARDS),
        ("vision_premerger_first16", VISION),
        ("vision_tokens", VISION),
    ):
        if f"{name}{mode}" not in golden:
            continue
        expected = golden.pop(f"{name}{mode}")
        actual = hidden if name.startswith("hidden") else taps[name]
        line.near(f"{name}{mode}", actual[: len(expected)], expected, LOOSE if loose else limit)
    grids, ids = golden["video_grid_thw"], golden["input_ids"]
    if len(grids) == 2 and torch.equal(*golden["pixel_values_videos"].chunk(2)):
        line.near(f"VQ and MQ of two prompts{mode}", found[0, :2], found[1, :2], SAME)
        heard = not torch.equal(ids[0], ids[1]) and float((found[0, 2] - found[1, 2]).abs()) > 0.1
        line.exact(f"TA hears the prompt{mode}", heard, True)


@contextmanager
def _taps(model: VideoAlign, tokens: Tokens) -> Iterator[dict[str, Tensor]]:
    """Records a pass's intermediates under their golden names."""
    seen: dict[str, Tensor] = {}
    layers: list[Tensor] = []

    def keep_layer(_module: Any, _inputs: Any, output: Any) -> None:
        hidden_BLD = output[0] if isinstance(output, tuple) else output
        at_B3D = tokens.places_B3.to(hidden_BLD.device)[..., None].expand(
            -1, -1, hidden_BLD.shape[2]
        )
        layers.append(hidden_BLD.gather(1, at_B3D))
        seen["layer_out_at_reward_tokens"] = torch.stack(layers)

    def keep_vision(_module: Any, _inputs: Any, output: Any) -> None:
        seen["vision_tokens"] = output.pooler_output
        seen["vision_premerger_first16"] = output.last_hidden_state[:16]

    network = model.network
    hooks = [layer.register_forward_hook(keep_layer) for layer in network.language_model.layers]
    hooks.append(network.visual.register_forward_hook(keep_vision))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def compare_api(line: Line, path: Path, folder: Folder) -> None:
    """Compares the ratings of the original's public call, raw and normalised."""
    modes = {"fp32": "", "fp32_bf16rope": ".fp32_bf16rope", "bf16": ".bf16"}
    for name, case in folder.read(path.name).items():
        golden = load_file(folder.path / f"forward_{name}.safetensors")
        tokens = _tokens(line, golden, case, folder)
        line.exact(f"{name} lengths", list(tokens.lengths), case["lengths"])
        line.exact(f"{name} seq_len", tokens.ids_BL.shape[1], case["seq_len"])
        line.exact(f"{name} grid", golden["video_grid_thw"].tolist(), case["video_grid_thw"])
        line.exact(f"{name} positions", tokens.places_B3.tolist(), case["reward_positions"])
        for shown, answers in case["api"].items():
            model = folder.model(modes[shown])
            found = rewards(_states(model, golden, tokens), model.head_OD)
            for kind, norms in (("use_norm_true", model.settings.norms), ("use_norm_false", None)):
                ratings = named_ratings(found, norms)
                for key, values in ratings.items():
                    expected = torch.tensor([row[key] for row in answers[kind]])
                    # Overall is the sum of three ratings, so errors add up.
                    limit = (LOOSE if shown == "bf16" else REWARDS) * (3 if key == "Overall" else 1)
                    line.near(f"{name} {shown} {kind} {key}", values, expected, limit)


def compare_keys(line: Line, path: Path, folder: Folder) -> None:
    """Compares names and shapes with the folder's file, or with a full-size one after remapping."""
    held = folder.read(path.name)
    if path.name.startswith("tiny"):
        weights = read_pickle(find_files(folder.path / "checkpoint_root")[0])
        found = {
            k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in weights.items()
        }
        line.exact("keys, shapes and dtypes", found, held)
        return
    shapes = {key: torch.empty(shape, device="meta") for key, shape in held.items()}
    named, head_OD = remap(shapes, alpha=1.0)
    network = build_network(_config(named), len(named["language_model.embed_tokens.weight"]))
    fill(network, named, path, dtype=torch.float32, device="meta")
    hidden = network.config.text_config.hidden_size
    line.exact("head", tuple(head_OD.shape), (1, hidden))
    line.exact("nothing left over", named, {})


def _config(named: dict[str, Tensor]) -> Any:
    """The configuration implied by the shapes of a full-size state dict."""
    from transformers import Qwen2VLConfig

    text, vision = "language_model.layers.0.", "visual.blocks.0."
    queries, keys = (named[f"{text}self_attn.{n}_proj.weight"].shape[0] for n in "qk")
    inner, hidden = named[f"{text}mlp.gate_proj.weight"].shape
    width = named[f"{vision}attn.proj.weight"].shape[0]

    def depth(prefix: str) -> int:
        at = prefix.count(".")
        return 1 + max(int(name.split(".")[at]) for name in named if name.startswith(prefix))

    return Qwen2VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": depth("language_model.layers."),
            "num_attention_heads": queries // HEAD_DIM,
            "num_key_value_heads": keys // HEAD_DIM,
        },
        vision_config={
            "embed_dim": width,
            "depth": depth("visual.blocks."),
            "hidden_size": hidden,
            "mlp_ratio": named[f"{vision}mlp.fc1.weight"].shape[0] // width,
            "num_heads": width // 80,
        },
    )


def compare_rotary(line: Line, path: Path, folder: Folder) -> None:
    """Compares rotary tables at the released size, exact and with rounded frequencies."""
    golden = load_file(path)
    named, _ = remap(
        {k: torch.empty(s, device="meta") for k, s in folder.read("full_size_keys.json").items()},
        alpha=1.0,
    )
    config = _config(named)
    config.text_config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    }
    positions_31L = golden.pop("llm_positions").expand(3, 1, -1)
    for kind, rotary in (("fp32", "exact"), ("bf16", "rounded"), ("bf16", "released")):
        network = build_network(config, 8)
        set_rotary(network, rotary, "cpu")  # type: ignore[arg-type]
        text, vision = network.language_model.rotary_emb, network.visual.rotary_pos_emb
        inv_freq = golden[f"llm_inv_freq_{kind}_headdim128_theta1e6"]
        line.equal(f"llm inv_freq {rotary}", text.inv_freq, inv_freq.float())
        inv_freq = golden[f"vision_inv_freq_{kind}_dim40_theta1e4"]
        line.equal(f"vision inv_freq {rotary}", vision.inv_freq.float(), inv_freq.float())
        for table, found in zip(("cos", "sin"), text(torch.zeros(1), positions_31L), strict=True):
            expected = golden[f"llm_{table}_{kind}buf"]
            # One table, or three equal ones if the axes are merged later.
            found = found.reshape(-1, *expected.shape)
            line.near(f"llm {table} {rotary}", found, expected.expand_as(found), TABLES)
        if rotary == "rounded":
            continue  # the original has no vision tables in float32 from rounded frequencies
        angles_32F = golden[f"vision_freqs_{kind}buf_seq32"]
        for table, found in zip(("cos", "sin"), _vision_tables(vision), strict=True):
            expected = getattr(torch, table)(angles_32F).float().repeat(1, 4)
            line.near(f"vision {table} {rotary}", found, expected, TABLES)
    known = ("llm_inv", "llm_cos", "llm_sin", "vision_inv", "vision_freqs")
    line.unknown(name for name in golden if not name.startswith(known))


def _vision_tables(rotary: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines at (i, i) for i < 32, from the rotary module of any transformers 5.x."""
    grid_32x2 = torch.arange(32)[:, None].expand(32, 2)
    takes = inspect.signature(rotary.forward).parameters
    if "x" in takes:
        cos, sin = rotary(torch.zeros(1), grid_32x2)
        return cos, sin
    angles = rotary(32)[grid_32x2].flatten(1) if "seqlen" in takes else rotary(grid_32x2)
    both = torch.cat([angles, angles], 1)
    return both.cos().float(), both.sin().float()
