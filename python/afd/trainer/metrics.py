"""Records of a run's progress, written by the main process only: metrics, evaluations, warnings,
experiment trackers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from afd.config.run import RunConfig
from afd.trainer.evaluate import Evaluation
from afd.trainer.health import Signs
from afd.trainer.logging import Lines
from afd.trainer.trackers import Boards

_log = logging.getLogger("afd")


class Records:
    """metrics.jsonl, evaluation.jsonl, warnings and trackers of a run resumed after `update`.

    Lines of later updates, written by a killed run after its last checkpoint, are dropped.
    """

    def __init__(
        self, config: RunConfig, update: int, promised: Mapping[str, Any] | None = None
    ) -> None:
        """`promised`: the `state_dict` of the checkpoint that the run continues from."""
        self._config = config
        of = promised or {"metrics": None, "evaluation": None}
        metrics, evaluation = (config.run_dir / f"{name}.jsonl" for name in of)
        self._metrics = Lines(metrics, update, promised=of["metrics"])
        self._evaluations = Lines(evaluation, update, needs=["metrics"], promised=of["evaluation"])
        self._boards = Boards(config, update)
        self._signs = Signs()
        self._signs.replay(self._metrics.kept, self._evaluations.kept)

    @property
    def evaluated(self) -> set[int]:
        """Updates with a recorded evaluation."""
        return self._evaluations.updates

    def update(
        self, update: int, metrics: dict[str, float], phase_s: dict[str, float], elapsed_s: float
    ) -> None:
        """Append a line to metrics.jsonl; `update` counts the updates made so far."""
        line: dict[str, Any] = {"update": update, "time_s": round(elapsed_s, 3), "phase_s": phase_s}
        self._metrics.write(line | metrics)
        phases = {f"phase_s/{phase}": seconds for phase, seconds in phase_s.items()}
        self._boards.scalars(update, {**metrics, **phases})
        every = self._config.logging.every
        if every and update % every == 0:
            shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
            _log.debug("update %d: %s", update, shown)
        self._signs.updated(update, metrics)

    def evaluation(self, update: int, result: Evaluation) -> None:
        """Append a line to evaluation.jsonl."""
        self._evaluations.write(
            {
                "update": update,
                "seed": self._config.seed,
                "method": self._config.method,
                "videos": result.count,
                "metrics": result.metrics,
            }
        )
        named = {f"evaluation/{key}": value for key, value in result.metrics.items()}
        self._boards.scalars(update, named)
        shown = "  ".join(f"{key} {value:.3f}" for key, value in result.metrics.items())
        _log.info("evaluation after update %d: %s", update, shown)
        self._signs.evaluated(update, result.metrics)

    def video(self, update: int, path: Path, video_FHWC: np.ndarray, fps: float) -> None:
        """Log the side-by-side video of teacher and student that was written to `path`."""
        self._boards.video(update, "teacher | student", path, video_FHWC, fps)

    def state_dict(self) -> dict[str, Any]:
        """Digests of the files' contents, which a resumed run verifies."""
        return {
            "metrics": self._metrics.state_dict(),
            "evaluation": self._evaluations.state_dict(),
        }

    def sync(self) -> None:
        """Flush every line to disk."""
        self._metrics.sync()
        self._evaluations.sync()

    def close(self) -> None:
        self._metrics.close()
        self._evaluations.close()
        self._boards.close()
