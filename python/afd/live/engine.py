"""The generator: one thread that owns the device, follows commands and makes chunks in time."""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from afd.errors import AfdError
from afd.live import protocol
from afd.live.config import DEFAULT_OUT, LiveConfig
from afd.live.encoder import Encoder, Ended, Made
from afd.live.recording import Recording
from afd.live.take import Compared, Take
from afd.live.votes import save_vote

# Commands that wait for the generator at most; a viewer's next one then waits in its socket.
WAITING = 64
# Recordings whose last frame a take can start from.
KEPT_RECORDINGS = 16
# Switches of the take that a new viewer is sent.
KEPT_SWITCHES = 32
_log = logging.getLogger("afd")


class _Stop:
    """Ends the thread."""


@dataclass(frozen=True)
class Picture:
    """A PNG of the students' size that a viewer has sent."""

    png: bytes


# None: something besides the commands has changed.
_Given = protocol.Command | Picture | _Stop | None
Publish = Callable[[protocol.Outgoing | protocol.Packed], None]


class Engine:
    """Streams the students for as long as somebody watches.

    All methods may be called from any thread.

    Attributes:
        state: the present state, replaced as a whole.
        last: the newest chunk's message, for viewers that join while the stream is paused.
        switched: the newest switches of the take, for viewers that join.
    """

    def __init__(
        self,
        config: LiveConfig,
        students: Sequence[Compared],
        prompt: str,
        seed: int,
        publish: Publish,
        picture: bytes | None = None,
    ) -> None:
        """`publish` gets every message to all viewers, on either of two threads.

        `picture`: PNG that the takes can start from, as the first one does; None: noise.
        """
        self._config, self._students, self._publish = config, list(students), publish
        self._prompt, self._seed = prompt, seed
        # The picture sent last, and the one with which the takes begin.
        self._picture = self._first = picture
        self._start = "noise" if picture is None else "picture"
        self._folder = config.out or DEFAULT_OUT
        self._commands: queue.Queue[_Given] = queue.Queue(WAITING)
        self._watched = self._blind = self._voted = self._hidden = False
        self._playing, self._steps = True, 0
        self._take: Take | None = None
        self._number, self._votes = 0, 0
        self._pending: protocol.SwitchPrompt | None = None
        self._order = tuple(range(len(students)))
        self._due = self._begun = 0.0
        self._recording: Recording | None = None
        self._recordings: dict[int, Recording] = {}
        self._recorded = 0
        self.last: protocol.Packed | None = None
        self.switched: deque[protocol.Switched] = deque(maxlen=KEPT_SWITCHES)
        self.state = self._snapshot()
        self._thread = threading.Thread(target=self._run, name="afd-live-device", daemon=True)
        self._encoder = Encoder(config.picture, config.quality, self._shown, self._finished)
        self._thread.start()

    # --- called by the server ---

    def command(self, command: protocol.Command | Picture) -> bool:
        """Hand over a command; False if as many as allowed are waiting."""
        try:
            self._commands.put_nowait(command)
        except queue.Full:
            return False
        return True

    def watch(self, watched: bool) -> None:
        """Generate or rest: whether anybody watches."""
        self._watched = watched
        self._wake()

    def recorded(self, number: int, student: int) -> Path | None:
        """The mp4 of a student's recording; None if there is none, or columns are hidden."""
        recording = self._recordings.get(number)
        if recording is None or self.state.columns.hidden or student >= len(recording.videos):
            return None
        return recording.videos[student]

    def close(self) -> None:
        """End both threads; a recording is completed."""
        self._commands.put(_Stop())
        self._thread.join()
        self._encoder.close()

    def _wake(self) -> None:
        try:
            self._commands.put_nowait(None)
        except queue.Full:
            return  # it is awake

    # --- the generator's thread ---

    def _run(self) -> None:
        device = self._students[0].config.torch_device
        if device.index is not None:
            torch.cuda.set_device(device)
        if self._config.threads:
            torch.set_num_threads(self._config.threads)
        while True:
            rest = self._rest()
            # A chunk that is due waits for the commands already there, not for those that follow.
            waiting = self._commands.qsize() if rest == 0.0 else 1
            try:
                for _ in range(waiting):
                    command = self._commands.get(timeout=rest)
                    if isinstance(command, _Stop):
                        self._end_recording()
                        return
                    self._obey(command)
            except queue.Empty:
                pass
            if self._rest() == 0.0:
                self._advance()

    def _rest(self) -> float | None:
        """Seconds until the next chunk is due; None: there is none."""
        if not self._watched or not (self._playing or self._steps):
            return None
        return 0.0 if self._steps else max(0.0, self._due - time.monotonic())

    def _obey(self, command: protocol.Command | Picture | None) -> None:
        """Follow a command; what it asks for in vain is a sentence to the viewers."""
        try:
            if command is not None:
                self._follow(command)
            if not self._watched:
                self._end_recording()
            self._changed()
        except (AfdError, ValueError, OSError) as error:
            self._publish(protocol.Problem(text=str(error)[:500]))
            self._changed()
        except Exception as error:
            self._fail(error)

    def _advance(self) -> None:
        try:
            self._make()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """End the take and pause; `play` begins another one."""
        if not isinstance(error, AfdError | ValueError):
            _log.exception("the stream has failed")
        self._end_recording()
        self._take, self._playing, self._steps = None, False, 0
        # The next take allocates its caches again.
        for student in self._students:
            student.pipeline.kept = None
        self._publish(protocol.Problem(text=f"the stream has failed: {error}"[:500]))
        self._changed()

    def _make(self) -> None:
        take = self._take or self._begin()
        self._steps = max(0, self._steps - 1)
        self._switch(take)
        chunk = take.next()
        if chunk.switched or not self._playing:
            self._changed()
        made = Made(self._number, chunk, self._order, self._begun, self._recording)
        # A recording lacks no chunk.
        wait = self._config.full == "wait" or self._recording is not None
        self._encoder.put(made, wait=wait)
        # In time with the frames' rate; what is late is not caught up with.
        seconds = len(chunk.frames_FHWC[0]) / self._config.fps
        self._due = max(self._due + seconds, time.monotonic())

    def _switch(self, take: Take) -> None:
        """Make the switch that was asked for last; a prompt that cannot be encoded is a problem."""
        asked, self._pending = self._pending, None
        if asked is None:
            return
        try:
            made = take.switch(asked.prompt, asked.mode)
        except (AfdError, ValueError) as error:
            self._publish(protocol.Problem(text=str(error)[:500]))
            return
        self._prompt = made.prompt
        switched = protocol.Switched(
            take=self._number, chunk=made.chunk, prompt=made.prompt, mode=made.mode
        )
        self.switched.append(switched)
        self._publish(switched)

    def _begin(self) -> Take:
        """A new take, from the present prompt, seed and start."""
        self._end_recording()
        if self._take is not None:
            self._take.close()
            self._take = None
        self._begun, self._due = time.perf_counter(), time.monotonic()
        self._order = tuple(range(len(self._students)))
        if self._blind:
            self._order = tuple(random.sample(self._order, len(self._order)))
        self._hidden, self._voted = self._blind, False
        self._number += 1
        self.switched.clear()
        self._take = Take(self._students, self._prompt, self._seed, self._first)
        self._changed()
        return self._take

    def _follow(self, command: protocol.Command | Picture) -> None:
        match command:
            case protocol.Play():
                self._playing, self._due = True, time.monotonic()
            case protocol.Pause():
                self._playing = False
            case protocol.Step():
                self._playing, self._steps = False, self._steps + 1
            case protocol.SwitchPrompt():
                self._pending = command
            case Picture():
                self._picture = command.png
            case protocol.Restart():
                self._restart(command)
            case protocol.Record():
                self._record(command.on)
            case protocol.Blind():
                self._hide(command.on)
            case protocol.Vote():
                self._vote(command.choice)

    def _restart(self, asked: protocol.Restart) -> None:
        start = str(asked.start)
        if start == "picture" and self._picture is None:
            raise ValueError("restart: no picture has been sent; needed: one to start from")
        if start not in ("noise", "picture") and int(start) not in self._recordings:
            raise ValueError(f"restart: got the recording {start}; needed: a number of the list")
        self._start, self._first = start, None
        if start != "noise":
            sent = start == "picture"
            self._first = self._picture if sent else self._recordings[int(start)].last_png
        self._prompt = asked.prompt or (self._pending or self).prompt
        self._seed = self._seed if asked.seed is None else asked.seed
        self._pending = None
        self._begin()
        if not self._playing:
            self._steps = 1

    @property
    def prompt(self) -> str:
        """The present prompt."""
        return self._prompt

    def _record(self, on: bool) -> None:
        if not on:
            self._end_recording()
        elif self._recording is None:
            take = self._take or self._begin()
            self._recorded += 1
            self._recording = Recording(self._folder, self._recorded, take, self._students)

    def _end_recording(self) -> None:
        if self._recording is not None and self._take is not None:
            self._encoder.put(
                Ended(self._recording, self._take.chunk, self._take.frames), wait=True
            )
        self._recording = None

    def _hide(self, on: bool) -> None:
        if on and len(self._students) == 1:
            raise ValueError("blind: one student streams; needed: compare=, with another")
        self._blind = on
        self._hidden = self._hidden and on

    def _vote(self, choice: int | None) -> None:
        count = len(self._students)
        if self._take is None or count == 1:
            raise ValueError("vote: one student streams; needed: compare=, with another")
        if self._voted:
            raise ValueError("vote: this take has its vote; needed: a restart")
        if choice is not None and choice >= count:
            raise ValueError(f"vote: got {choice}; needed: a column below {count}")
        columns = [self._students[i] for i in self._order]
        path = self._folder / "votes.jsonl"
        save_vote(path, self._take, columns, choice, blind=self._hidden)
        self._votes += 1
        self._voted, self._hidden = True, False
        self._publish(protocol.Voted(choice=choice, votes=self._votes))

    # --- the encoder's thread ---

    def _shown(self, message: protocol.Packed) -> None:
        self.last = message
        self._publish(message)

    def _finished(self, recording: Recording, problem: str | None) -> None:
        if problem is not None:
            self._publish(protocol.Problem(text=problem))
            return
        kept = self._recordings | {recording.number: recording}
        self._recordings = dict(list(kept.items())[-KEPT_RECORDINGS:])
        self._publish(protocol.Recorded(number=recording.number, name=recording.name))
        # The state belongs to the other thread, which never waits for this one's wake.
        self._wake()

    # --- state ---

    def _changed(self) -> None:
        self.state = self._snapshot()
        self._publish(self.state)

    def _snapshot(self) -> protocol.State:
        labels = [self._students[i].label for i in self._order]
        if self._hidden:
            labels = [chr(ord("A") + i) for i in range(len(labels))]
        return protocol.State(
            take=self._number,
            chunk=0 if self._take is None else self._take.chunk,
            seed=self._seed,
            prompt=self._prompt,
            start=self._start,
            playing=self._playing,
            recording=self._recording is not None,
            blind=self._blind,
            voted=self._voted,
            columns=protocol.Columns(labels=labels, hidden=self._hidden),
            recordings=list(self._recordings),
        )
