"""How many videos are in progress: additive increase, multiplicative decrease."""

from __future__ import annotations

import asyncio
import time

from afd.teachers.paid.limiter import Limiter


def test_429_halves_what_is_under_way_once_and_success_adds_one_a_round() -> None:
    async def run() -> None:
        limiter = Limiter(8)
        for _ in range(8):
            await limiter.enter()
        for _ in range(5):
            limiter.throttled(0.05)
        assert limiter.limit == 4.0
        for _ in range(5):
            limiter.leave()
        began = time.monotonic()
        await limiter.enter()
        assert time.monotonic() >= began + 0.04
        waiting = asyncio.ensure_future(limiter.enter())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        for _ in range(5):
            limiter.accepted()
        assert 5.0 <= limiter.limit < 5.3
        await waiting
        assert limiter.under_way == 5

    asyncio.run(run())


def test_who_waits_longest_enters_first_and_who_leaves_the_queue_takes_no_place() -> None:
    async def run() -> None:
        limiter, entered = Limiter(1), []
        await limiter.enter()

        async def wait(name: int) -> None:
            await limiter.enter()
            entered.append(name)

        waiting = [asyncio.ensure_future(wait(name)) for name in range(4)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        for _ in range(3):
            limiter.leave()
            await asyncio.sleep(0.01)
        assert entered == [0, 2, 3]
        assert limiter.under_way == 1
        # Admitted and cancelled in the same moment: the place is free again.
        last = asyncio.ensure_future(wait(4))
        await asyncio.sleep(0)
        limiter.leave()
        last.cancel()
        await asyncio.gather(last, return_exceptions=True)
        assert limiter.under_way == 0

    asyncio.run(run())
