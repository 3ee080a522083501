"""The thread between the generator and the sockets: pictures, recordings, messages."""

from __future__ import annotations

import io
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from afd.live import protocol
from afd.live.recording import Recording
from afd.live.take import Chunk

# Chunks that wait for the encoder at most.
WAITING = 2
_log = logging.getLogger("afd")


@dataclass(frozen=True)
class Made:
    """A chunk on its way to the viewers.

    Attributes:
        order: which student each column shows.
        begun: time.perf_counter() at which its take began.
    """

    take: int
    chunk: Chunk
    order: tuple[int, ...]
    begun: float
    recording: Recording | None


@dataclass(frozen=True)
class Ended:
    """The end of a recording after so many chunks and latent frames of its take."""

    recording: Recording
    chunks: int
    frames: int


class Encoder:
    """Encodes chunks in the order they come and publishes them.

    Attributes:
        skipped: chunks not shown because the queue was full.
    """

    def __init__(
        self,
        picture: str,
        quality: int,
        publish: Callable[[protocol.Packed], None],
        finished: Callable[[Recording, str | None], None],
    ) -> None:
        """`publish` gets each chunk's message; `finished` a recording that has ended, and what was
        wrong with it or None. Both are called on the encoder's thread."""
        self._picture, self._quality = picture, quality
        self._publish, self._finished = publish, finished
        self._queue: queue.Queue[Made | Ended | None] = queue.Queue(WAITING)
        self._first: tuple[int, float] = (0, 0.0)
        self._broken: set[int] = set()
        self.skipped = 0
        self._thread = threading.Thread(target=self._run, name="afd-live-encoder", daemon=True)
        self._thread.start()

    def put(self, item: Made | Ended, *, wait: bool) -> None:
        """Hand over a chunk or a recording's end; with a full queue wait, or skip it."""
        try:
            self._queue.put(item, block=wait)
        except queue.Full:
            self.skipped += 1

    def close(self) -> None:
        """Encode what waits, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Ended):
                self._finished(item.recording, self._end(item))
                continue
            try:
                self._publish(self._message(item))
            except Exception:
                _log.exception("a chunk could not be encoded")
            if item.recording is not None and item.recording.number not in self._broken:
                try:
                    item.recording.append(item.chunk.frames_FHWC)
                except Exception:  # a full disk; the stream goes on
                    _log.exception("the recording has failed")
                    self._broken.add(item.recording.number)
                    item.recording.abort()

    def _end(self, item: Ended) -> str | None:
        if item.recording.number in self._broken:
            return "record: the recording has failed; the log has the reason"
        try:
            item.recording.close(item.chunks, item.frames)
        except Exception as error:
            if not isinstance(error, ValueError):
                _log.exception("the recording has failed")
            item.recording.abort()
            return str(error) if isinstance(error, ValueError) else "record: it could not be saved"
        return None

    def _message(self, made: Made) -> protocol.Packed:
        chunk, seconds = made.chunk, made.chunk.seconds
        begun = time.perf_counter()
        pictures = [
            [self._encoded(frame.numpy()) for frame in chunk.frames_FHWC[student]]
            for student in made.order
        ]
        now = time.perf_counter()
        if self._first[0] != made.take:
            self._first = made.take, 1000 * (now - made.begun)
        times = protocol.Times(
            context=1000 * seconds.context,
            switch=1000 * seconds.switch,
            denoise=1000 * seconds.denoise,
            decode=1000 * seconds.decode,
            encode=1000 * (now - begun),
        )
        header = protocol.ChunkHeader(
            take=made.take,
            chunk=chunk.index,
            start=chunk.start,
            frames=len(pictures[0]),
            sizes=[[len(picture) for picture in row] for row in pictures],
            prompt=chunk.prompt,
            switched=chunk.switched,
            times=times,
            cache=chunk.cache,
            first_ms=self._first[1],
        )
        return protocol.pack(header, pictures)

    def _encoded(self, frame_HWC: np.ndarray) -> bytes:
        return encoded(frame_HWC, self._picture, self._quality)


def encoded(frame_HWC: np.ndarray, picture: str, quality: int) -> bytes:
    """A uint8 frame as JPEG or WebP."""
    held = io.BytesIO()
    image = Image.fromarray(frame_HWC)
    if picture == "webp":
        image.save(held, "WEBP", quality=quality, method=0)
    else:
        # Full colour resolution: a small picture is shown enlarged.
        image.save(held, "JPEG", quality=quality, subsampling=0 if image.width < 256 else 2)
    return held.getvalue()
