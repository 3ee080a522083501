"""The baseline of the rollout benchmark is the same network, window and sink included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from afd.models.wan.types import WanConfig
from afd.schedules import ShiftedFlow
from benchmarks.eager_wan import EagerWan, denoised
from tests.tolerances import NETWORK_FORWARD


@pytest.mark.parametrize("name", ["rollout", "rollout_rolling", "rollout_window_nosink"])
@pytest.mark.parametrize("case", ["A_small", "B_hd128"])
def test_the_plain_composition_is_the_released_network(shared: Path, case: str, name: str) -> None:
    folder = shared / "golden" / case
    if not (folder / f"{name}.safetensors").is_file():
        pytest.skip(f"{case} has no {name}")
    sizes = json.loads((folder / "config.json").read_text())
    golden = load_file(folder / f"{name}.safetensors")
    names = ("dim", "num_heads", "ffn_dim", "num_layers", "freq_dim", "text_dim", "text_len")
    config = WanConfig(**{name: sizes[name] for name in names}, chunk=sizes["chunk"])
    net = EagerWan(config, load_file(folder / "weights.safetensors"))
    chunks = golden["noise"].split(config.chunk, 1)
    window = None if name == "rollout" else sizes["window"]
    sink = sizes["sink"] if name == "rollout_rolling" else 0
    cache = net.new_cache(
        golden["context"], golden["noise"].shape[1], sizes["tok"], window=window, sink=sink
    )
    steps = tuple(golden["denoising_step_list"].tolist())
    drawn = iter(sorted(name for name in golden if name.startswith("renoise.")))
    out = []
    for i, chunk in enumerate(chunks):
        noise = [chunk, *(golden[next(drawn)].view_as(chunk) for _ in steps[1:])]
        out.append(denoised(net, cache, noise, steps, i * config.chunk, ShiftedFlow()))
    video = torch.cat(out, 1)
    assert (video - golden["latents"]).norm() < NETWORK_FORWARD * golden["latents"].norm()
