"""What a golden file was compared with, and how far off the worst tensor was."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Relative L2 errors of a float32 (or float64) run against the released code's float32 values.
VALUES = 1e-5
GRADIENTS = 1e-4
# Gradients this much smaller than the largest are compared against this share of it.
GRADIENT_FLOOR = 1e-4
# One rounding to bfloat16, of the reference and of this code each.
BF16_ROUNDINGS = 2 * torch.finfo(torch.bfloat16).eps


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """|actual - expected| / |expected| in float64 (L2), infinite where shapes or numbers differ."""
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
    """The largest error of one kind and the tensor it was seen in."""

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
    """One golden file's comparison.

    Attributes:
        name: the file.
        values: forward values, rollouts, units.
        gradients: gradients and their norms.
        wrong: what must agree exactly and does not, and what could not be run, in words.
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
        """Every `gradnorm.<name>` and `grad.<name>` of the file against the gradients at hand."""
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
        """One line: the worst error of each kind, in which tensor, and the verdict."""
        parts = [
            f"{label} {worst.error:.1e} ({worst.tensor})"
            for label, worst in (("values", self.values), ("gradients", self.gradients))
            if worst.count
        ]
        verdict = "ok" if self.ok else "FAILED"
        return "  ".join([f"{self.name:<46}", f"{verdict:<6}", *parts, *self.wrong])
