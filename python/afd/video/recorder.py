"""Writes the videos of a running stream on a background thread, so that encoding overlaps it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd.video import VideoWriter

# Chunks queued for encoding at most: bounds memory, at the price of a slow encoder slowing the
# stream.
WAITING = 2


class Recorder:
    """Appends chunks of B videos to B files as they are produced. Use it as a context manager.

    Frames are copied from the device through pinned memory, and only the thread waits for them, so
    the caller can keep launching kernels. Leaving the block waits for the encoder and gives the
    files their final names; an error in the block or the thread leaves no files.

    Attributes:
        paths: the files.
        times: time.monotonic() when each chunk had been written to its files.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        comments: Sequence[str],
        fps: float,
        crf: int,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        """`advance` is called once per video and chunk written."""
        self.paths = list(paths)
        self.times: list[float] = []
        self._advance = advance
        self._writers = [
            VideoWriter(path, fps=fps, crf=crf, comment=comment)
            for path, comment in zip(paths, comments, strict=True)
        ]
        self._queue: queue.Queue[tuple[Tensor, Any] | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="afd-recorder", daemon=True)
        self._thread.start()

    def put(self, video_BFCHW: Tensor) -> None:
        """Enqueue a decoded chunk, floats in [-1, 1] on any device."""
        if self._error is not None:
            raise self._error
        levels = ((video_BFCHW.detach().float() + 1) * 127.5).round().clamp(0, 255)
        levels_BFHWC = levels.to(torch.uint8).movedim(2, -1).contiguous()
        if levels_BFHWC.device.type != "cuda":
            self._queue.put((levels_BFHWC.cpu(), None))
            return
        host = torch.empty_like(levels_BFHWC, device="cpu", pin_memory=True)
        host.copy_(levels_BFHWC, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(levels_BFHWC.device))
        self._queue.put((host, arrived))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # keep draining: the caller may be waiting for space in the queue
            try:
                frames_BFHWC, arrived = item
                if arrived is not None:
                    arrived.synchronize()
                for writer, frames_FHWC in zip(self._writers, frames_BFHWC, strict=True):
                    writer.append(frames_FHWC)
                    self._advance()
                self.times.append(time.monotonic())
            except BaseException as error:  # re-raised on the caller's thread
                self._error = error

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._queue.put(None)
        self._thread.join()
        failed = error or self._error
        for writer in self._writers:
            if failed is not None:
                writer.abort()
                continue
            try:
                writer.close()
            except BaseException as broken:  # keep going, to clean up the other files
                failed = broken
        if error is None and failed is not None:
            raise failed
