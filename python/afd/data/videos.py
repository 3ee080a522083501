"""The teacher's videos as input to a method: drawn, decoded once, encoded and cached.

Shape letters: P prompts, F frames, C = 3, H rows, W columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from afd.cache import Facts, Store, file_hash
from afd.data.inputs import Content, Contents
from afd.data.sampler import Sampler
from afd.distributed import ALONE, Ranks
from afd.errors import TeacherError, Unanswered
from afd.files import sha256_of
from afd.listing import Some
from afd.models.codec import Codec, Pixels, redecodes
from afd.teachers.base import Request, Teacher
from afd.video import Clip, from_uint8, read_clip, through_codec, to_uint8
from afd.video.config import VideoConfig

# Requests offered for prefetching at a time; the teacher decides how many to start.
AHEAD = 256
# Bytes of finished clips (or latents) kept in memory; the least recently used are evicted.
MEMORY = 4 << 30
# Clips decoded concurrently, in the background of training.
THREADS = 2
_log = logging.getLogger("afd")


class Videos:
    """A teacher's videos in the form that a method takes as input.

    Each file is decoded once, those of the next update in the background on the CPU, and kept in
    memory as bytes (only the frames that are used) or as latents, which a store also keeps for
    later runs. If the codec redecodes pixels (`afd.models.codec`), they are kept as latents and
    pass what the student's do: decoder, h264 (with codec_match), `prepare`.
    """

    def __init__(
        self,
        teacher: Teacher,
        video: VideoConfig,
        *,
        input_space: Literal["pixels", "latents"] = "pixels",
        prepare: Callable[[Tensor], Tensor] | None = None,
        codec: Codec | None = None,
        store: Store | None = None,
        ranks: Ranks = ALONE,
        memory: int = MEMORY,
        accept: bool = False,
    ) -> None:
        """`prepare`: selects what is kept of pixels [1, F, 3, H, W] (None: all); `codec`: encodes
        the latents if input_space="latents"; `memory`: bytes that may be held; `accept`: accept
        replaced videos."""
        self._teacher, self._video, self._ranks = teacher, video, ranks
        self._contents = Contents(teacher.requests, accept=accept)
        self._prepare, self._codec, self._store = prepare, codec or Pixels(), store
        self._redecodes = input_space == "pixels" and redecodes(self._codec)
        latents = input_space == "latents" or self._redecodes
        # None for pixels. Computed here, because it may depend on weights on a GPU.
        self._identity = self._codec.identity if latents else None
        self._as_pixels = not latents
        self._paths: dict[Request, Path] = {}
        self._kept: dict[Request, Tensor] = {}  # most recently used last
        self._memory = memory
        self._coming: dict[Request, Future[tuple[Tensor, Content]]] = {}
        self._pool = ThreadPoolExecutor(THREADS, "afd decode")
        self._skips = Some(_log, logging.WARNING, "skipped: %s")
        self._made, self._found = 0, 0  # latents encoded, and latents read from the store

    def draw(self, sampler: Sampler, count: int, ahead: int = 0) -> list[Request]:
        """Draw the sampler's next `count` requests that have an answer, the same on every rank. One
        that asks several teachers becomes as many, one after another.

        Requests without an answer are skipped with a warning (`listing.Some`); TeacherError if none
        is left.
        `ahead`: the most that will still be drawn; a slow teacher starts on them now, and videos of
        the next draw that are ready are decoded meanwhile. Only the main rank queries the teacher.
        """
        shared = None
        if self._ranks.main:
            drawn = self._answered(sampler, count, ahead)
            next_ones = sampler.peek(min(count, ahead))
            soon = [r for one in next_ones for r in self._asked(one) if self._is_there(r)]
            answers = [
                [[r.prompt, r.draw, r.teacher, str(self._teacher.answer(r))] for r in part]
                for part in (drawn, soon)
            ]
            shared = [*answers, sampler.state_dict()]
        *answers, cursor = self._ranks.same(shared)
        if not self._ranks.main:
            sampler.load_state_dict(cursor)
        drawn, soon = ([Request(*request) for *request, _ in part] for part in answers)
        self._paths = {Request(*request): Path(path) for part in answers for *request, path in part}
        self._coming = {r: future for r, future in self._coming.items() if r in self._paths}
        for request in soon[self._ranks.share(len(soon))]:
            self._begin(request)
        return drawn

    def _answered(self, sampler: Sampler, count: int, ahead: int) -> list[Request]:
        prefetch = getattr(self._teacher, "prefetch", None)
        drawn: list[Request] = []
        skipped, made = 0, 0
        while made < count:
            if prefetch is not None:
                prefetch(sampler.peek(min(AHEAD, count - made + ahead)))
            request = sampler.draw(1)[0]
            asked = self._asked(request)
            try:
                for one in asked:
                    self._teacher.answer(one)
            except Unanswered as reason:
                skipped += 1
                self._skips(str(reason))
                if skipped > len(self._teacher.requests):
                    raise TeacherError(f"no request succeeded, the last: {reason}") from None
            else:
                drawn += asked
                made += 1
        return drawn

    def _asked(self, request: Request) -> list[Request]:
        """The requests to single teachers that a drawn one stands for."""
        expand = getattr(self._teacher, "expand", None)
        return [request] if expand is None else list(expand(request))

    def _is_there(self, request: Request) -> bool:
        """Whether the answer is available without waiting, for teachers that work on demand."""
        ready = getattr(self._teacher, "ready", None)
        return ready is None or bool(ready(request))

    def fetch(self, requests: Sequence[Request]) -> Tensor:
        """Load float32 [P, F, C, H, W] on the CPU, one per request: frames in [-1, 1], or latents.

        With several ranks, each fetches its share of the drawn requests.
        """
        for request in requests:
            self._begin(request)
        videos = [self._one(request) for request in requests]
        if self._redecodes:
            with torch.no_grad():
                decoded = [self._codec.decode(x0_FCHW[None]).float().cpu() for x0_FCHW in videos]
            videos = list(self._pool.map(self._finished, decoded))
        return torch.stack(videos)

    def _finished(self, video_1FCHW: Tensor) -> Tensor:
        """A decoded video as the method's input; the steps of the student's (`InputPipeline`)."""
        video = self._video
        if video.codec_match:
            video_1FCHW = through_codec(video_1FCHW, fps=video.fps, crf=video.crf)
        return (video_1FCHW if self._prepare is None else self._prepare(video_1FCHW))[0]

    def clip(self, request: Request) -> Tensor:
        """The full clip, float32 [F, 3, H, W] in [-1, 1], independent of the method's input."""
        path = self._path(request)
        frames, content = self._with_content(
            path, lambda path: to_uint8(self._read(path).video_FCHW)
        )
        self._contents.check(request, path, content)
        return from_uint8(frames)

    def state_dict(self) -> list[Any]:
        """The content of every video read so far. Every process must call this."""
        return self._contents.state_dict(self._ranks)

    def load_state_dict(self, state: list[Any]) -> None:
        """Restore known contents. Raises TeacherError for a video that was replaced since."""

        def path(request: Request) -> Path | None:
            # Only the main process queries the teacher, and only for videos that are ready.
            known = self._ranks.main and self._is_there(request)
            return self._teacher.answer(request) if known else None

        self._contents.load_state_dict(state, path, sha256_of)

    def close(self) -> None:
        """Stop the decoding threads and log how many latents were encoded or read."""
        self._pool.shutdown(cancel_futures=True)
        self._skips.end()
        self._contents.close()
        if self._store is not None and self._made + self._found:
            held = self._store.summary("latents")
            _log.info("latents: %d made, %d from the cache; %s", self._made, self._found, held)

    def _path(self, request: Request) -> Path:
        return self._paths.get(request) or self._teacher.answer(request)

    def _begin(self, request: Request) -> None:
        if request not in self._kept and request not in self._coming:
            path = self._path(request)
            self._coming[request] = self._pool.submit(self._with_content, path, self._load)

    def _one(self, request: Request) -> Tensor:
        if request in self._kept:
            held = self._kept.pop(request)
        else:
            self._begin(request)
            held, content = self._coming.pop(request).result()
            self._contents.check(request, self._path(request), content)
            if self._identity is not None:
                self._found += held.dtype != torch.uint8
                if held.dtype == torch.uint8:
                    held = self._encode(held, self._path(request))
        self._kept[request] = held
        while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > self._memory:
            del self._kept[next(iter(self._kept))]
        return held.float() if self._identity is not None else from_uint8(held)

    def _with_content(self, path: Path, load: Callable[[Path], Tensor]) -> tuple[Tensor, Content]:
        """Load a file and identify its content."""
        latents = self._identity is not None and self._store is not None
        try:
            # If cached latents spare the decoding, the cached hash also spares reading the file.
            content = Content.of(
                path, partial(file_hash, store=self._store) if latents else sha256_of
            )
            loaded = load(path)
            if not content.is_of(path):
                raise TeacherError(f"teacher video {path}: changed while it was read")
        except FileNotFoundError:
            raise TeacherError(f"teacher video {path}: no longer exists") from None
        return loaded, content

    def _load(self, path: Path) -> Tensor:
        """Load a file's frames as uint8 [F, H, W, 3], or its latents if the store has them.

        Runs in the background of training, so it must not use the accelerator.
        """
        if self._identity is not None and self._store is not None:
            known = self._store.get("latents", self._facts(path))
            if known is not None:
                return known
        video_FCHW, own_pixels = self._read(path)
        if self._as_pixels:
            if self._video.codec_match and not own_pixels:
                # Scaling has altered the clip's own codec artefacts: re-encode it at this size, so
                # that they match the student's.
                video_FCHW = through_codec(
                    video_FCHW[None], fps=self._video.fps, crf=self._video.crf
                )[0]
            if self._prepare is not None:
                video_FCHW = self._prepare(video_FCHW[None])[0]
        return to_uint8(video_FCHW)

    def _read(self, path: Path) -> Clip:
        video = self._video
        return read_clip(
            path,
            frames=video.frames,
            height=video.height,
            width=video.width,
            fps=video.fps,
            short=video.short,
            hdr=video.hdr,
            limits=video.limits,
        )

    def _encode(self, video_FHWC: Tensor, path: Path) -> Tensor:
        latent_FCHW = self._codec.encode(from_uint8(video_FHWC)[None])[0].cpu()
        self._made += 1
        if self._store is not None:
            self._store.put("latents", self._facts(path), latent_FCHW)
        return latent_FCHW

    def _facts(self, path: Path) -> Facts:
        """Everything that latents depend on, as the cache key."""
        video = self._video.model_dump(include={"frames", "height", "width", "fps", "short", "hdr"})
        return {"video": file_hash(path, self._store), "codec": self._identity, **video}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
