"""Rollouts of the next update, made while this one trains.

They come from the policy as it was before this update, kept as a version of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields
from threading import Event
from typing import Any

import torch
from torch import Generator, Tensor

from afd.methods.base import Batch
from afd.methods.rollouts import Rollouts
from afd.models.policies import BEHIND, Policies
from afd.models.student import Student

Roll = Callable[[Batch, Student, Generator], Rollouts]


class Ahead:
    """One update of delay between rollout and training.

    The rollouts of an update depend on the version BEHIND and on `seed` alone, which a checkpoint
    holds; a resumed run makes them again. On a GPU they have a stream of their own.

    Attributes:
        seed: that of the next update's rollouts; None before the first update.

    Args:
        source: the version that rolls out.
        generator: draws the seeds.
        roll: makes rollouts; it runs in a thread, and all that it uses is read only.
    """

    def __init__(self, policies: Policies, source: str, generator: Generator, roll: Roll) -> None:
        self.seed: int | None = None
        self._policies, self._source, self._roll = policies, source, roll
        self._generator = generator
        self._coming: Future[tuple[Rollouts, Any]] | None = None
        self._closing = Event()
        self._pool = ThreadPoolExecutor(1, "afd rollout")
        device = policies.student.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, batch: Batch) -> Rollouts:
        """The rollouts of this update; raises the thread's error. They are made now if they have
        not begun: in the first update, and after a resume."""
        if self.seed is None:
            self._keep_policy()
        coming, self._coming = self._coming, None
        rollouts, done = self._made(batch, None) if coming is None else coming.result()
        if self._stream is not None and done is not None:
            current = torch.cuda.current_stream(self._policies.student.device)
            current.wait_event(done)
            for x in tensors_of(rollouts):
                if x.device.type == "cuda":
                    # Its memory goes back to the rollouts' stream, which must not run ahead.
                    x.record_stream(current)
        return rollouts

    def begin(self, batch: Batch | None) -> None:
        """Keep the policy of now for the next update, and begin its rollouts; None: the run ends
        with this update, but may be continued."""
        self._keep_policy()
        if batch is not None:
            ready = None
            if self._stream is not None:
                device = self._policies.student.device
                ready = torch.cuda.current_stream(device).record_event()
            self._coming = self._pool.submit(self._made, batch, ready)

    def load(self, seed: int | None) -> None:
        """Restore `seed`; rollouts that have begun are dropped."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.exception()
        self.seed = seed

    def check(self) -> None:
        """Called between the parts of a rollout: raises CancelledError after `close`."""
        if self._closing.is_set():
            raise CancelledError

    def close(self) -> None:
        """Stop the thread after its present part; the run ends here."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)

    def _keep_policy(self) -> None:
        self._policies.average(BEHIND, self._source, 0.0)
        self.seed = int(torch.randint(2**62, (), generator=self._generator))

    @torch.no_grad()
    def _made(self, batch: Batch, ready: Any) -> tuple[Rollouts, Any]:
        """Rollouts, and the event of their completion if they were made in `_stream`."""
        assert self.seed is not None
        generator = Generator().manual_seed(self.seed)
        stream = self._stream if ready is not None else None
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            if stream is not None:
                stream.wait_event(ready)
            with self._policies.using(BEHIND) as student:
                rollouts = self._roll(batch, student, generator)
            return rollouts, None if stream is None else stream.record_event()


def tensors_of(found: Any) -> Iterator[Tensor]:
    """All tensors of rollouts."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for one in found:
            yield from tensors_of(one)
    elif isinstance(found, Rollouts):
        for field in fields(found):
            yield from tensors_of(getattr(found, field.name))
