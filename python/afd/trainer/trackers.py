"""Experiment trackers: TensorBoard, and Weights & Biases if it is installed."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from afd.config.run import RunConfig, plain
from afd.files import what_failed

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# TensorBoard shows videos as GIFs, which are large: it gets every second frame, at most this high.
GIF_HEIGHT = 240
_log = logging.getLogger("afd")


class Boards:
    """The trackers enabled in `config.logging`, for a run that continues after `update`.

    They are not essential: if one cannot be written, the run continues without it.
    """

    def __init__(self, config: RunConfig, update: int) -> None:
        self._tensorboard: SummaryWriter | None = None
        self._excepthook = threading.excepthook
        if config.logging.tensorboard:
            with self._or_without():
                self._tensorboard = _tensorboard(config, update)
                # Its writer runs on a thread, and the next call raises that thread's error again.
                threading.excepthook = self._raised
        self._wandb = _wandb(config) if config.logging.wandb is not None else None

    def scalars(self, update: int, values: dict[str, float]) -> None:
        with self._or_without():
            if self._tensorboard is not None:
                for key, value in values.items():
                    self._tensorboard.add_scalar(key, value, update)
        if self._wandb is not None:
            self._wandb.log({**values, "update": update})

    def video(self, update: int, name: str, path: Path, video_FHWC: np.ndarray, fps: float) -> None:
        """Log the video at `path`, whose pictures are uint8."""
        with self._or_without():
            if self._tensorboard is not None:
                _add_gif(self._tensorboard, update, name, video_FHWC, fps)
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Video(str(path), format="mp4"), "update": update})

    def close(self) -> None:
        with self._or_without():
            if self._tensorboard is not None:
                self._tensorboard.close()
        threading.excepthook = self._excepthook
        if self._wandb is not None:
            self._wandb.finish()

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._tensorboard = None
            _log.warning(
                "tensorboard: cannot be written, continuing without it (%s)", what_failed(error)
            )

    def _raised(self, raised: threading.ExceptHookArgs) -> None:
        if not isinstance(raised.exc_value, OSError) or self._tensorboard is None:
            self._excepthook(raised)


def _tensorboard(config: RunConfig, update: int) -> SummaryWriter | None:
    folder = str(config.run_dir / "tensorboard")
    if os.fsencode(folder) != folder.encode("utf-8", "replace"):
        _log.warning(
            "tensorboard: %s is not UTF-8, which its writer needs; continuing without it", folder
        )
        return None
    # Imported lazily because it takes seconds.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=update + 1)


def _wandb(config: RunConfig) -> Any:
    """Start the run on Weights & Biases; on failure log one line and return None."""
    if find_spec("wandb") is None:
        _log.warning("logging.wandb is set and wandb is not installed: pip install wandb")
        return None
    import wandb

    folder = config.run_dir.resolve()
    try:
        run = wandb.init(
            project=config.logging.wandb,
            name=config.name,
            dir=str(folder),
            # A stable id, so that a resumed run continues the same W&B run.
            id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
            resume="allow",
            config=plain(config),
        )
    except wandb.Error as error:  # not logged in, for instance
        _log.warning("logging.wandb is set and wandb cannot start: %s", error)
        return None
    # Use the training update rather than W&B's own counter: a resumed run logs some updates again.
    run.define_metric("*", step_metric="update")
    return run


def _add_gif(
    board: SummaryWriter, update: int, name: str, video_FHWC: np.ndarray, fps: float
) -> None:
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    shrink = -(-video_FHWC.shape[1] // GIF_HEIGHT)
    small = video_FHWC[::2, ::shrink, ::shrink]
    pictures = [Image.fromarray(np.ascontiguousarray(picture)) for picture in small]
    file = io.BytesIO()
    pictures[0].save(
        file,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=round(2000 / fps),
        loop=0,
    )
    image = Summary.Image(
        height=small.shape[1],
        width=small.shape[2],
        colorspace=3,
        encoded_image_string=file.getvalue(),
    )
    summary = Summary(value=[Summary.Value(tag=name, image=image)])
    board._get_file_writer().add_summary(summary, update)
