"""Low-rank adapter files of released students (PEFT's names), merged into the weights on loading.

Shape letters: O output channels, I input channels, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from afd.models.wan.checkpoints import clean_name, read_pickle
from afd_kernels.contracts import require

LAYOUTS = (
    "LongLive's lora.pt, a .safetensors file with PEFT's names, or a PEFT folder "
    "(adapter_config.json and adapter_model.safetensors)"
)
# The student's part of a .pt file, beside which a trainer stores its critic's.
_PART = "generator_lora"
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")


def read_lora(path: str | Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float | None]:
    """Read A [R, I] and B [O, R] of every adapted weight by its network name, and alpha.

    Alpha is None unless the file is in a PEFT folder, whose adapter_config.json has it.

    Raises FileNotFoundError for an unknown path, ValueError for an unsuitable file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"adapter: {path} does not exist; needed: {LAYOUTS}")
    alpha = None
    if path.is_dir():
        alpha = _peft_alpha(path / "adapter_config.json")
        path = path / "adapter_model.safetensors"
        require(path.is_file(), "adapter", str(path), LAYOUTS)
    tensors = _tensors(path)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, letter = _split(name)
        right = letter is not None and isinstance(tensor, Tensor) and tensor.ndim == 2
        require(right, f"adapter {path}", name, "matrices <layer>.lora_A.weight and lora_B.weight")
        assert letter is not None
        found.setdefault(f"{stem}.weight", {})[letter] = tensor
    require(bool(found), f"adapter {path}", "no tensors", LAYOUTS)
    pairs = {}
    for name, parts in found.items():
        whole = parts.keys() == {"A", "B"}
        require(whole, f"adapter {path}", f"{name}: only lora_{min(parts)}", "lora_A and lora_B")
        a_RI, b_OR = parts["A"], parts["B"]
        require(len(a_RI) == b_OR.shape[1], f"adapter {path}: {name}", b_OR, f"[O, {len(a_RI)}]")
        pairs[name] = a_RI, b_OR
    return pairs, alpha


def merge_lora(
    weights: dict[str, Tensor], path: str | Path, *, alpha: float | None = None
) -> dict[str, Tensor]:
    """Weights with an adapter file merged: W + alpha / R · B A, summed in float32.

    Args:
        weights: a network's tensors by the released names; not modified.
        path: the adapter file (`read_lora`).
        alpha: None takes that of a PEFT folder.

    Raises:
        ValueError: if alpha is unknown, or a matrix has no weight of its size.
    """
    pairs, stored = read_lora(path)
    alpha = stored if alpha is None else alpha
    require(
        alpha is not None,
        "adapter_alpha",
        None,
        f"the alpha that {path} was trained with, as the file does not store it",
    )
    assert alpha is not None
    merged = dict(weights)
    for name, (a_RI, b_OR) in pairs.items():
        weight = weights.get(name)
        shape = [len(b_OR), a_RI.shape[1]]
        fits = weight is not None and list(weight.shape) == shape
        require(fits, f"adapter {path}: {name}", shape, _needed(weight))
        assert weight is not None
        update_OI = b_OR.float() @ a_RI.float()
        merged[name] = (weight.float() + alpha / len(a_RI) * update_OI).to(weight.dtype)
    return merged


def _needed(weight: Tensor | None) -> str:
    return "a weight of the network" if weight is None else f"its size, {list(weight.shape)}"


def _split(name: str) -> tuple[str, str | None]:
    """A tensor's layer, and A or B."""
    for letter in "AB":
        # PEFT inserts the adapter's name when it does not write the file itself.
        for end in (f".lora_{letter}.weight", f".lora_{letter}.default.weight"):
            if name.endswith(end):
                stem = name.removesuffix(end)
                for prefix in _PREFIXES:
                    stem = stem.removeprefix(prefix)
                return clean_name(stem), letter
    return name, None


def _tensors(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"adapter {path}: it cannot be read ({error})") from error
    held = read_pickle(path)
    part = held.get(_PART, held)
    require(isinstance(part, Mapping), f"adapter {path}: {_PART}", type(part).__name__, LAYOUTS)
    return {str(name): tensor for name, tensor in part.items()}


def _peft_alpha(path: Path) -> float:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"adapter: {path} does not exist; needed: {LAYOUTS}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    alpha = held.get("lora_alpha") if isinstance(held, dict) else None
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    require(number, f"{path}: lora_alpha", alpha, "a number")
    assert isinstance(alpha, int | float)
    odd = [
        key for key in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if held.get(key)
    ]
    require(not odd, str(path), odd, "a plain LoRA, scaled by lora_alpha / rank")
    return float(alpha)
