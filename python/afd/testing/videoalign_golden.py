"""VideoAlign's golden files: the model in every precision, and comparison results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd.discriminators.videoalign.model import Rotary, VideoAlign
from afd.discriminators.videoalign.prompt import FIELD

# Largest absolute differences. Rewards and hidden states have magnitude 1 to 10.
REWARDS = 1e-4
VISION = 2e-5
# In bfloat16, reordering the operations changes results by this much at these sizes.
LOOSE = 0.2
PIXELS = 1e-5
# Tensor-name suffix, dtype and rotary tables of each mode the original was run in.
MODES: dict[str, tuple[torch.dtype, Rotary]] = {
    "": (torch.float32, "exact"),
    ".fp32_bf16rope": (torch.float32, "rounded"),
    ".bf16": (torch.bfloat16, "released"),
}

# Ratio of an error to its limit, the error, the limit, and the tensor's name.
Worst = tuple[float, float, float, str]


@dataclass
class Line:
    """The comparison of one file.

    Attributes:
        name: the file.
        wrong: descriptions of exact-match failures and of what could not be run.
        notes: what this file alone cannot show.
    """

    name: str
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    count: int = 0
    worst: dict[str, Worst] = field(default_factory=dict)

    def near(self, what: str, actual: Tensor, expected: Tensor, limit: float) -> None:
        """Checks the largest absolute difference against a limit; infinite if shapes differ."""
        error = float("inf")
        if actual.shape == expected.shape:
            error = float((actual.detach().double().cpu() - expected.double().cpu()).abs().max())
        error = float("inf") if error != error else error
        self.count += 1
        kind = "bf16" if limit >= LOOSE and "bf16" in what else "fp32"
        found = (error / limit, error, limit, what)
        self.worst[kind] = max(self.worst.get(kind, found), found)

    def exact(self, what: str, actual: object, expected: object) -> None:
        self.count += 1
        if actual != expected:
            shown, needed = (str(value)[:80] for value in (actual, expected))
            self.wrong.append(f"{what}: got {shown}; needed: {needed}")

    def equal(self, what: str, actual: Tensor, expected: Tensor) -> None:
        self.exact(what, actual.tolist(), expected.tolist())

    def unknown(self, names: Iterable[str]) -> None:
        self.wrong += [f"unknown: {name}" for name in sorted(names)]

    @property
    def ok(self) -> bool:
        within = all(ratio <= 1 for ratio, *_ in self.worst.values())
        return self.count > 0 and within and not self.wrong

    def text(self) -> str:
        """One line: verdict, worst error and tensor per precision, and how much was compared."""
        parts = [
            f"{kind} {error:.1e} of {limit:.0e} ({what})"
            for kind, (_, error, limit, what) in sorted(self.worst.items(), reverse=True)
        ] or ["exact"]
        verdict = "ok" if self.ok else "FAILED"
        counted = f"{self.count} compared"
        return "  ".join(
            [f"{self.name:<35}", f"{verdict:<6}", *parts, counted, *self.wrong, *self.notes]
        )


class Folder:
    """The golden files' model, loaded once per precision."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self._models: dict[tuple[str, bool], VideoAlign] = {}

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    @cached_property
    def template(self) -> str:
        """The original's prompt template: the common part of its requests."""
        for entry in self.read("prompts.json"):
            prompt, text = entry["prompt"], entry["user_text"]
            if prompt.strip() and text.count(prompt) == 1:
                before, after = (
                    part.replace("{", "{{").replace("}", "}}") for part in text.split(prompt)
                )
                return f"{before}{{{FIELD}}}{after}"
        raise ValueError("prompts.json: no prompt that occurs once in its request")

    def model(self, mode: str, lora: bool = True) -> VideoAlign:
        if (mode, lora) not in self._models:
            dtype, rotary = MODES[mode]
            self._models[mode, lora] = VideoAlign.load(
                self.path / "checkpoint_root",
                base=self.path / "tiny_base",
                template=self.template,
                dtype=dtype,
                device=self.device,
                rotary=rotary,
                lora=lora,
            )
        return self._models[mode, lora]
