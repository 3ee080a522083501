"""How every method changes a student's weights: AdamW on the fp32 masters."""

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
    """Decay of an exponential moving average after `updates` earlier updates: 0.02 per update up to
    `largest`, so that an average over a young run forgets the start weights."""
    return min(largest, 0.02 * updates)


def cosine_rate(step: int, steps: int | None, floor: float = 0.05) -> float:
    """Learning-rate factor: a cosine from 1 to `floor` over `steps`, then flat; None: always 1."""
    if steps is None:
        return 1.0
    done = min(1.0, step / steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


class StudentOptimizer:
    """AdamW with a linear warmup, then a cosine or constant rate, and clipped gradients.

    `add` each part of an update's loss, then `step`: gradients add up in fp32 over the parts, then
    over the processes. Parts must be sums over their videos divided by the count of all videos of
    all processes, so that an update does not depend on how it was cut.

    Args:
        weights: a trained version's.
        name: what the metrics begin with.
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
        """Backward of one part of the update's loss."""
        total = self._begun()
        loss.backward()
        self._loss = total + loss.detach()

    def _begun(self) -> Tensor:
        """The loss so far; at an update's first part, without gradients of anything before."""
        if self._loss is None:
            self.adam.zero_grad()
            return torch.zeros((), device=self.weights.masters[0].device)
        return self._loss

    def step(self, loss: Tensor | None = None) -> dict[str, float]:
        """One update from the parts added since the last, and `loss` if given.

        Returns loss (of all processes), gradient norm before clipping, and rate. Raises
        TrainingError where a gradient is not finite; the weights are then as they were.
        """
        if loss is not None:
            self.add(loss)
        total = self._begun()
        for master in self.weights.masters:
            # A process may have had no part, and all must sum the same tensors.
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        gradients = [master.grad for master in self.weights.masters]
        # What FSDP shares out it has summed already.
        self.ranks.sum_([g for g in gradients if g is not None and not isinstance(g, DTensor)])
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
        """Adam's tensors themselves, not copied: in a sharded run its shares."""
        for master in self.weights.masters:
            # What Adam's first step would make; a checkpoint is then read straight into it.
            if not self.adam.state[master]:
                moments = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
                self.adam.state[master] = {"step": torch.tensor(0.0), **moments}
        return {"adam": self.adam.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave, or the same whole, from a run of any number of processes."""
        ours, theirs = self.state_dict()["adam"]["state"], state["adam"]["state"]
        same = theirs.keys() == ours.keys()
        require(same, "state", f"{len(theirs)} moments", f"those of {len(ours)} weights")
        for index, held in theirs.items():
            for key, value in held.items():
                fill(ours[index][key], value)
        self.updates = state["updates"]
