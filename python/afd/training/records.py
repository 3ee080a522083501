"""What a run writes about its progress: lines of metrics and evaluations, boards. By the main
process only."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from afd.config import RunConfig
from afd.training.evaluate import Evaluation
from afd.training.logging import Lines

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger("afd")


class Records:
    """metrics.jsonl, evaluation.jsonl and TensorBoard of a run that continues after `step`.

    Lines of later updates, which a killed run has written after its last checkpoint, are dropped.
    """

    def __init__(self, config: RunConfig, step: int) -> None:
        self._config = config
        out = config.run_dir
        self._metrics = Lines(out / "metrics.jsonl", step)
        self._evaluations = Lines(out / "evaluation.jsonl", step)
        self._board = self._open_board(step) if config.logging.tensorboard else None

    @property
    def evaluated(self) -> set[int]:
        """Updates after which an evaluation is on file."""
        return self._evaluations.steps

    def update(
        self, step: int, metrics: dict[str, float], phase_s: dict[str, float], elapsed_s: float
    ) -> None:
        """One line of metrics.jsonl: `step` counts the updates made so far."""
        line: dict[str, Any] = {"step": step, "time_s": round(elapsed_s, 3), "phase_s": phase_s}
        self._metrics.write(line | metrics)
        self._show(step, metrics)
        self._show(step, {f"phase_s/{phase}": seconds for phase, seconds in phase_s.items()})
        every = self._config.logging.every
        if every and step % every == 0:
            shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
            _log.debug("update %d: %s", step, shown)

    def evaluation(self, step: int, result: Evaluation) -> None:
        """One line of evaluation.jsonl."""
        self._evaluations.write(
            {
                "step": step,
                "seed": self._config.seed,
                "method": self._config.method,
                "videos": result.count,
                "metrics": result.metrics,
            }
        )
        self._show(step, {f"evaluation/{key}": value for key, value in result.metrics.items()})
        shown = "  ".join(f"{key} {value:.3f}" for key, value in result.metrics.items())
        _log.info("evaluation after update %d: %s", step, shown)

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        self._metrics.sync()
        self._evaluations.sync()

    def close(self) -> None:
        self._metrics.close()
        self._evaluations.close()
        if self._board is not None:
            self._board.close()

    def _show(self, step: int, values: dict[str, float]) -> None:
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)

    def _open_board(self, step: int) -> SummaryWriter:
        # Imported here because it takes seconds, also of a run that does not want it.
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._config.run_dir / "tensorboard"), purge_step=step + 1)
