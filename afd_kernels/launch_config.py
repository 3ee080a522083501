"""Launch configurations from configs.json, chosen by hand and checked offline, never autotuned.

Tile sizes determine the summation order, so a configuration affects the numerical result.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

DEFAULT = "default"


@functools.cache
def _table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    table: dict[str, dict[str, dict[str, dict[str, int]]]] = json.loads(
        Path(__file__).with_name("configs.json").read_text()
    )
    return table


def launch_config(op: str, arch: str) -> dict[str, dict[str, int]]:
    """The launch parameters of each kernel of `op` on `arch` ("sm_90", "gfx942", ...).

    An architecture without an entry gets the op's default.

    Raises:
        ValueError: if the op has no entry.
    """
    table = _table()
    if op not in table:
        raise ValueError(f"op: got {op!r}; needed: one of {', '.join(table)}")
    return table[op].get(arch, table[op][DEFAULT])


@functools.cache
def device_arch(device: torch.device) -> str:
    """A device's name in configs.json; reads device properties, never synchronises."""
    if device.type != "cuda":
        return DEFAULT
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
