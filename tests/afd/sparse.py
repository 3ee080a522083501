"""Safetensors files of full-size networks with real headers and no data: sparse zeros on disk."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from afd.models.wan.network import CausalWan
from afd.models.wan.sizes import SIZES
from afd.models.wan.types import WanConfig

Shapes = Mapping[str, tuple[int, ...]]
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published network's weights, by the released names."""
    with torch.device("meta"):
        net = CausalWan(WanConfig(**SIZES[size].network))
    return {name: tuple(x.shape) for name, x in net.state_dict().items()}


def write(path: Path, held: Shapes, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A file whose header states these tensors; its data is a hole."""
    header, end = {}, 0
    for name, shape in held.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def write_shards(
    folder: Path, held: Shapes, count: int, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A folder of `count` such files, named and indexed as diffusers and Wan do."""
    folder.mkdir(parents=True, exist_ok=True)
    table: dict[str, str] = {}
    for i, names in enumerate(_parts(list(held), count), start=1):
        file = f"diffusion_pytorch_model-{i:05d}-of-{count:05d}.safetensors"
        write(folder / file, {name: held[name] for name in names}, dtype)
        table |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": table}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _parts(names: list[str], count: int) -> Iterable[list[str]]:
    each = -(-len(names) // count)
    return (names[i : i + each] for i in range(0, len(names), each))
