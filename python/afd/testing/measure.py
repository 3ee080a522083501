"""Error measurement: the comparison of a golden file and its worst tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Limits on relative L2 errors of a float32 (float64) run against the released float32 values.
VALUES = 1e-5
GRADIENTS = 1e-4
# Floor for the norm of gradients in relative errors, as a fraction of the largest.
GRADIENT_FLOOR = 1e-4
# One rounding to bfloat16 each in the reference and in this code.
BF16_ROUNDINGS = 2 * torch.finfo(torch.bfloat16).eps


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """|actual - expected| / |expected| in float64 (L2); infinite if shapes or NaNs differ."""
    if actual.shape != expected.shape:
        return float("inf")
    wanted = expected.detach().double().cpu()
    scale = max(float(wanted.norm()), floor)
    off = float((actual.detach().double().cpu() - wanted).norm())
    if off == 0:
        return 0.0
    return off / scale if scale > 0 and off == off else float("inf")


@dataclass
class Worst:
    """The largest error of a kind and the tensor in which it occurs."""

    limit: float
    error: float = 0.0
    tensor: str = ""
    count: int = 0

    def add(self, tensor: str, error: float) -> None:
        self.count += 1
        if error >= self.error:
            self.error, self.tensor = error, tensor

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


@dataclass
class Report:
    """The comparison of one golden file.

    Attributes:
        name: the file.
        values: forward values, rollouts, units.
        gradients: gradients and their norms.
        wrong: descriptions of exact-match failures and of what could not be run.
    """

    name: str
    values: Worst = field(default_factory=lambda: Worst(VALUES))
    gradients: Worst = field(default_factory=lambda: Worst(GRADIENTS))
    wrong: list[str] = field(default_factory=list)

    def value(self, tensor: str, actual: Tensor, expected: Tensor, floor: float = 0.0) -> None:
        self.values.add(tensor, relative_error(actual, expected, floor))

    def gradient(self, tensor: str, actual: Tensor, expected: Tensor) -> None:
        self.gradients.add(tensor, relative_error(actual, expected))

    def exact(self, what: str, actual: object, expected: object) -> None:
        if actual != expected:
            self.wrong.append(f"{what}: got {actual}; needed: {expected}")

    def parameter_gradients(
        self, named: dict[str, Tensor | None], golden: dict[str, Tensor]
    ) -> None:
        """Compares every `gradnorm.<name>` and `grad.<name>` of the file with `named` gradients."""
        norms = {k[len("gradnorm.") :]: float(v) for k, v in golden.items() if "gradnorm." in k}
        floor = GRADIENT_FLOOR * max(norms.values(), default=0.0)
        missing = sorted(norms.keys() - named.keys())
        if missing or not norms:
            self.wrong.append(f"parameters: no {', '.join(missing) or 'gradnorm.*'}")
        for name, norm in norms.items():
            grad = named.get(name)
            if grad is None:
                grad = torch.zeros(())
            self.gradients.add(
                f"gradnorm.{name}",
                relative_error(grad.double().norm(), torch.tensor(norm), floor),
            )
            if f"grad.{name}" in golden:
                expected = golden[f"grad.{name}"]
                self.gradients.add(f"grad.{name}", relative_error(grad, expected, floor))

    @property
    def ok(self) -> bool:
        compared = self.values.count + self.gradients.count > 0
        return self.values.ok and self.gradients.ok and compared and not self.wrong

    def line(self) -> str:
        """One line: the worst error of each kind with its tensor, and the verdict."""
        parts = [
            f"{label} {worst.error:.1e} ({worst.tensor})"
            for label, worst in (("values", self.values), ("gradients", self.gradients))
            if worst.count
        ]
        verdict = "ok" if self.ok else "FAILED"
        return "  ".join([f"{self.name:<46}", f"{verdict:<6}", *parts, *self.wrong])
