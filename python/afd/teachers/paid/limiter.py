"""Adaptive limit on the number of concurrent requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

_log = logging.getLogger("afd")


class Limiter:
    """Limits the videos in flight: additive increase, halved when the provider returns 429."""

    def __init__(self, ceiling: int) -> None:
        self.ceiling, self.limit = ceiling, float(ceiling)
        self.under_way = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._paused_until = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self) -> None:
        """Wait for a slot; first come, first served."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        self.under_way -= 1
        self._admit()

    def accepted(self) -> None:
        """Record an accepted submit, which raises the limit by one slot per full round."""
        self.limit = min(float(self.ceiling), self.limit + 1.0 / self.limit)
        self._admit()

    def throttled(self, pause_s: float) -> None:
        """Handle a 429: halve the limit (once per pause), and admit nobody for `pause_s`."""
        now = time.monotonic()
        if now >= self._paused_until:
            self.limit = max(1.0, min(self.limit, self.under_way) / 2)
            _log.info("the provider throttles: at most %d videos in progress", int(self.limit))
        self._paused_until = max(self._paused_until, now + pause_s)

    def _admit(self) -> None:
        pause_s = self._paused_until - time.monotonic()
        if pause_s > 0:
            if self._timer is None:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(pause_s, self._resume)
            return
        while self._waiting and self.under_way < int(self.limit):
            place = self._waiting.popleft()
            if not place.done():
                self.under_way += 1
                place.set_result(None)

    def _resume(self) -> None:
        self._timer = None
        self._admit()
