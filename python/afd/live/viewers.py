"""The viewers of a stream: bounded mailboxes, and the controls that one of them holds."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from contextlib import suppress

from afd.live import protocol

# Chunks that a viewer may have been sent without confirming them, and as many that wait for it.
AHEAD = 4
EVENTS = 64
# Seconds without a command after which another viewer may take the controls.
IDLE_S = 30.0
MAX_VIEWERS = 32


class Viewer:
    """What is to be sent to one viewer: events, the newest state, the newest chunks.

    A viewer that does not keep up loses the oldest of each; nothing grows.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._events: deque[str] = deque(maxlen=EVENTS)
        self._state: protocol.State | None = None
        self._chunks: deque[protocol.Packed] = deque(maxlen=AHEAD)
        self._unseen: deque[tuple[int, int]] = deque()
        self._woken = False
        self.lost = 0

    def post(self, message: protocol.Outgoing | protocol.Packed) -> None:
        """Add a message; callable from any thread, never waits."""
        with self._lock:
            if isinstance(message, protocol.Packed):
                self.lost += len(self._chunks) == AHEAD
                self._chunks.append(message)
            elif isinstance(message, protocol.State):
                self._state = message
            else:
                self._events.append(message.model_dump_json())
            if self._woken:
                return
            self._woken = True
        # The viewer may have left in this moment, with its loop.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ready.set)

    def seen(self, take: int, chunk: int) -> None:
        """The viewer has this chunk, and so all that were sent before it."""
        if (take, chunk) in self._unseen:
            while self._unseen.popleft() != (take, chunk):
                pass
            self._ready.set()

    async def next(self) -> str | bytes:
        """The next message to send."""
        while True:
            await self._ready.wait()
            with self._lock:
                if self._events:
                    return self._events.popleft()
                if self._state is not None:
                    state, self._state = self._state, None
                    return state.model_dump_json()
                if self._chunks and len(self._unseen) < AHEAD:
                    take, chunk, message = self._chunks.popleft()
                    self._unseen.append((take, chunk))
                    return message
                self._woken = False
                self._ready.clear()


class Viewers:
    """All viewers; methods without a note are called on the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[Viewer] = []
        self._holder: Viewer | None = None
        self._active = 0.0
        self._state: protocol.State | None = None

    def __len__(self) -> int:
        return len(self._all)

    def publish(self, message: protocol.Outgoing | protocol.Packed) -> None:
        """Send a message to every viewer; callable from any thread."""
        if isinstance(message, protocol.State):
            self._state = message
            self._send_state()
            return
        with self._lock:
            everyone = list(self._all)
        for viewer in everyone:
            viewer.post(message)

    def join(self, viewer: Viewer) -> None:
        """Add a viewer; the first one gets the controls."""
        with self._lock:
            self._all.append(viewer)
        if self._holder is None:
            self.take_controls(viewer)
        self._send_state()

    def leave(self, viewer: Viewer) -> None:
        """Remove a viewer with everything that waits for it."""
        with self._lock:
            self._all.remove(viewer)
        if self._holder is viewer:
            self._holder = None
        self._send_state()

    def holds(self, viewer: Viewer) -> bool:
        """Whether a viewer may steer; its command counts as activity."""
        if self._holder is not viewer:
            return False
        self._active = time.monotonic()
        return True

    def take_controls(self, viewer: Viewer) -> bool:
        """Give a viewer the controls, if they are free or their holder is idle."""
        free = self._holder in (None, viewer) or time.monotonic() - self._active > IDLE_S
        if free:
            self._holder, self._active = viewer, time.monotonic()
            self._send_state()
        return free

    def release_controls(self, viewer: Viewer) -> None:
        """Take the controls from a viewer that has them."""
        if self._holder is viewer:
            self._holder = None
            self._send_state()

    def _send_state(self) -> None:
        with self._lock:
            everyone, state, holder = list(self._all), self._state, self._holder
        if state is None:
            return
        for viewer in everyone:
            own = {"controls": holder is viewer, "held": holder is not None}
            viewer.post(state.model_copy(update={"viewers": len(everyone), **own}))
