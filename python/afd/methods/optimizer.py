"""The student's optimizer, used by every method: AdamW on the fp32 master weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from afd.distributed import ALONE, Ranks
from afd.errors import TrainingError
from afd.methods.config import StudentOptimizerConfig
from afd.models.weights import Weights, fill, local
from afd_kernels.contracts import require


def ramped_decay(largest: float, updates: int) -> float:
    """EMA decay after `updates` earlier updates: 0.02 per update up to `largest`, so that the
    average quickly forgets the start weights early in a run."""
    return min(largest, 0.02 * updates)


def cosine_rate(step: int, steps: int | None, floor: float = 0.05) -> float:
    """Learning-rate factor: cosine from 1 to `floor` over `steps`, then constant; None: 1."""
    if steps is None:
        return 1.0
    done = min(1.0, step / steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


class StudentOptimizer:
    """AdamW with linear warmup, then a cosine or constant rate, and gradient clipping.

    `add` each part of an update's loss, then `step`: gradients are summed in fp32 over the parts,
    then over the processes. Parts must be sums over their videos divided by the number of videos of
    all processes, so that an update does not depend on how it is split.

    Args:
        weights: those of a trained version.
        name: prefix of the metrics.
    """

    def __init__(
        self,
        weights: Weights,
        config: StudentOptimizerConfig,
        ranks: Ranks = ALONE,
        name: str = "student",
    ) -> None:
        self.weights, self.config, self.ranks, self.name = weights, config, ranks, name
        self.updates = 0
        self.adam = torch.optim.AdamW(
            weights.masters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self._loss: Tensor | None = None

    def rate(self) -> float:
        """Learning rate of the next update."""
        warmup = self.config.warmup_updates
        after = max(0, self.updates - warmup)
        rate = self.config.learning_rate * cosine_rate(after, self.config.cosine_updates)
        return rate if after or not warmup else rate * min(1.0, (self.updates + 1) / warmup)

    def add(self, loss: Tensor) -> None:
        """Run the backward of one part of the update's loss."""
        total = self._begun()
        loss.backward()
        self._loss = total + loss.detach()

    def _begun(self) -> Tensor:
        """The loss accumulated so far; clears old gradients at an update's first part."""
        if self._loss is None:
            self.adam.zero_grad()
            return torch.zeros((), device=self.weights.masters[0].device)
        return self._loss

    def step(self, loss: Tensor | None = None) -> dict[str, float]:
        """Update the weights from the parts added since the last step, and `loss` if given.

        Returns loss (of all processes), gradient norm before clipping, and rate. Raises
        TrainingError if a gradient is not finite; the weights are then unchanged.
        """
        if loss is not None:
            self.add(loss)
        total = self._begun()
        for master in self.weights.masters:
            # A process may have had no part, but all must sum the same tensors.
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        gradients = [master.grad for master in self.weights.masters]
        # FSDP has already summed the gradients that it shards.
        whole = [g for g in gradients if g is not None and not isinstance(g, DTensor)]
        self.ranks.sum_(whole, over_parts=True)
        self.ranks.sum_([total])
        rate = self.adam.param_groups[0]["lr"] = self.rate()
        norm = torch.nn.utils.clip_grad_norm_(self.weights.masters, self.config.grad_clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        metrics = {
            f"{self.name}/loss": float(total),
            f"{self.name}/grad_norm": float(norm),
            f"{self.name}/learning_rate": rate,
        }
        self._loss = None
        if not math.isfinite(metrics[f"{self.name}/grad_norm"]):
            raise TrainingError(self._complaint(metrics))
        self.adam.step()
        self.weights.publish()
        self.updates += 1
        return metrics

    def _complaint(self, metrics: Mapping[str, float]) -> str:
        shown = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        bad = [
            name
            for name, master in zip(self.weights.names, self.weights.masters, strict=True)
            if master.grad is not None and not bool(local(master.grad).isfinite().all())
        ]
        where = f"gradient of {bad[0]} and {len(bad) - 1} more" if bad else "norm of the gradient"
        return f"{self.name}: update {self.updates + 1}: the {where} is not finite ({shown})"

    def state_dict(self) -> dict[str, Any]:
        """Adam's state and the update count; tensors are not copied, DTensors if sharded."""
        for master in self.weights.masters:
            # The state that Adam's first step would create, so that a checkpoint can be read into
            # it directly.
            if not self.adam.state[master]:
                moments = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
                self.adam.state[master] = {"step": torch.tensor(0.0), **moments}
        return {"adam": self.adam.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`, sharded or full, from a run of any number of processes."""
        ours, theirs = self.state_dict()["adam"]["state"], state["adam"]["state"]
        same = theirs.keys() == ours.keys()
        require(same, "state", f"{len(theirs)} moments", f"those of {len(ours)} weights")
        for index, held in theirs.items():
            for key, value in held.items():
                fill(ours[index][key], value)
        self.updates = state["updates"]
