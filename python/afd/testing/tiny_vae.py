"""Runs the tiny autoencoder on golden files of TAEHV: a folder with keys.json and tensor files.

keys.json maps every parameter to its shape; its values are drawn from a generator seeded by its
name.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from afd.models.wan.tiny_vae import TinyVAE
from afd.testing.measure import Report


def drawn_weights(shapes: dict[str, Sequence[int]]) -> dict[str, Tensor]:
    """float32 weights: normals scaled by sqrt(0.9 / fan_in), or by 0.05 for vectors."""
    weights = {}
    for name, shape in shapes.items():
        draw = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        scale = (0.9 / prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.05
        values = (draw.standard_normal(shape) * scale).astype(np.float32)
        weights[name] = torch.from_numpy(values)
    return weights


def compare_tiny(
    where: Path, prefix: str, device: torch.device, dtype: torch.dtype
) -> Iterator[Report]:
    """A report for every .safetensors file of the folder."""
    for path in sorted(where.glob("*.safetensors")):
        report = Report(prefix + path.stem)
        try:
            shapes = json.loads((where / "keys.json").read_text(encoding="utf-8"))
            vae = TinyVAE.of(drawn_weights(shapes), where, dtype=dtype, device=device)
            _compare(report, vae, load_file(path))
        except (KeyError, RuntimeError, ValueError, OSError) as error:
            report.wrong.append(f"{type(error).__name__}: {error}")
        yield report


@torch.no_grad()
def _compare(report: Report, vae: TinyVAE, golden: dict[str, Tensor]) -> None:
    """Whole and chunked decode, the output before clamp and trim, and the encoder."""
    if "latents" in golden:
        latents = golden["latents"]
        decoder = vae.stream()
        chunks = torch.cat([decoder(chunk) for chunk in latents.split(1, 1)], 1)
        report.value("decoded", (vae.decode(latents) + 1) / 2, golden["decoded"])
        report.value("decoded in chunks", (chunks + 1) / 2, golden["decoded"])
        if "decoder_raw" in golden:
            report.value("decoder_raw", vae.stream().raw(latents), golden["decoder_raw"])
    if "frames" in golden:
        report.value("encoded", vae.encode(2 * golden["frames"] - 1), golden["encoded"])
