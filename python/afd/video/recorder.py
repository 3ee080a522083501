"""Writes the videos of a running stream on a thread of its own, so that the stream never waits."""

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

# Chunks that may wait to be encoded; a slower encoder then slows the stream, and memory is bounded.
WAITING = 2


class Recorder:
    """Appends chunks of B videos to B files as they come. Use it as a context manager.

    Frames leave the device through pinned memory and the thread waits for them, so the caller goes
    on launching. Leaving the block waits for the encoder and gives the files their names; an error
    in it or in the thread leaves no file.

    Attributes:
        paths: the files.
        times: time.monotonic() at which each chunk was in its files.
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
        """Take a decoded chunk, floats in [-1, 1] on any device."""
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
                continue  # the caller may be waiting for room
            try:
                frames_BFHWC, arrived = item
                if arrived is not None:
                    arrived.synchronize()
                for writer, frames_FHWC in zip(self._writers, frames_BFHWC, strict=True):
                    writer.append(frames_FHWC)
                    self._advance()
                self.times.append(time.monotonic())
            except BaseException as error:  # told to the caller, on its own thread
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
            except BaseException as broken:  # the files after it are not left half-written either
                failed = broken
        if error is None and failed is not None:
            raise failed
