"""Where AFD's updates are in their rollouts (`afd.methods.copies.Place`), and what these cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from afd.config.run import RunConfig
from afd.methods.copies import Place
from afd.planning import cost_model as cost
from afd.planning.cost_model import Net


@dataclass(frozen=True)
class RecachePass:
    """A pass that encodes cached frames again where a stream switches its prompt.

    Attributes:
        frames: frames of the pass.
        sink: frames before them that it attends to.
        causal: whether a chunk of it attends to itself and earlier frames only.
    """

    frames: int
    sink: int = 0
    causal: bool = False

    def flop(self, net: Net) -> float:
        """The pass, for one stream."""
        pairs = float(self.frames * (self.frames + self.sink))
        if self.causal:
            first = self.frames % net.chunk
            ends = [
                *([first] if first else []),
                *range(first + net.chunk, self.frames + 1, net.chunk),
            ]
            begins = [0, *ends]
            pairs = float(
                sum((b - a) * (b + self.sink) for a, b in zip(begins, ends, strict=False))
            )
        return net.context(self.frames / net.chunk, pairs / net.chunk**2)


class Places:
    """All places that an update of a run may have, and how often it has each. Costs are averaged
    over the chunks at which the prompt may switch before a clip."""

    def __init__(self, config: RunConfig, net: Net) -> None:
        self.net, self.afd = net, config.afd
        afd = config.method == "afd"
        self.shared = config.afd.group_from_chunk if afd else None
        self.stream = config.afd.stream_frames if afd else None
        self.switch_mode = config.afd.stream_switch if self.stream is not None else None
        self.all = list(self._each())
        # The share of the first clips, beside which all clips are equally likely.
        start = config.afd.stream_start if afd and self.stream is not None else 0.0
        first = [place.clip == 0 for place in self.all]
        self.weights = [(1 - start) / len(first) + start * begins / sum(first) for begins in first]

    def _each(self) -> Iterator[Place]:
        chunks, afd = self.net.chunks, self.afd
        forks = [int(self.shared or 0)] if isinstance(self.shared, int | None) else [chunks - 1]
        if self.shared == "random":
            forks = [*range(chunks)]
        begins = 1 if self.stream is None else self.stream // self.net.chunk - chunks + 1
        trained = chunks
        if self.stream is not None and afd.train_window is not None:
            trained = afd.train_window // self.net.chunk
        for clip in range(begins):
            for fork in forks:
                at = None if self.shared is None else clip + fork
                yield Place(clip, at or None, max(fork, chunks - trained))

    def switches(self, place: Place) -> bool:
        """Whether the streams of an update at this place switch their prompt."""
        return self.switch_mode is not None and place.clip > 0

    def recaches(self, place: Place) -> dict[RecachePass, float]:
        """What a switch before this clip may encode again, with the likelihood of each."""
        if self.switch_mode in (None, "plain"):
            return {}
        chunk, window = self.net.chunk, self.net.window
        found: Counter[RecachePass] = Counter()
        for end in range(chunk, place.clip * chunk + 1, chunk):
            kept = self.net.sink if window is not None and end > window else 0
            kept = 0 if self.switch_mode == "new_sink" else kept
            frames = min(end, window or end) - kept
            found[RecachePass(frames, kept, self.switch_mode == "recache_causal")] += 1
        return {one: count / place.clip for one, count in found.items()}

    @property
    def least_shared(self) -> int:
        """Chunks of a whole video that the videos of a prompt share in every update."""
        return min(place.fork or 0 for place in self.all) if self.stream is None else 0

    @property
    def held(self) -> int:
        """Frames that the cache of a rollout holds."""
        frames = self.net.frames if self.stream is None else self.stream
        return min(frames, self.net.window or frames)

    def rollout_flop(self, prompts: int, group: int, steps: int, first: int | None) -> float:
        """The mean rollouts of an update."""
        chunks = self.net.chunks
        until = max(place.clip for place in self.all) + chunks
        total = cost.rolled_flop(self.net, steps, first, until)

        def of(place: Place) -> float:
            end, fork = place.clip + chunks, place.fork or 0
            own = total[end] - total[fork] - self.net.context(1, self.net.seen(end - 1))
            again = sum(share * one.flop(self.net) for one, share in self.recaches(place).items())
            return prompts * (total[fork] + group * own + (again if fork else group * again))

        return self.mean(map(of, self.all))

    def mean(self, values: Iterable[float]) -> float:
        """The mean of what an update takes at each of the places."""
        return sum(w * x for w, x in zip(self.weights, values, strict=True))

    def mean_of(self, flop: Callable[[Net, int], float]) -> float:
        """The mean of what an update takes on a clip, given its net and first chunk."""
        known: dict[tuple[float, int], float] = {}
        found = []
        for place in self.all:
            net = replace(self.net, start=place.clip)
            key = (net.seen(0), place.first)
            if key not in known:
                known[key] = flop(net, place.first)
            found.append(known[key])
        return self.mean(found)
