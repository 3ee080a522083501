"""Presentation times of a clip's frames, and selection of frames for a target frame rate."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

import av

from afd.errors import VideoError
from afd.video.source import Source, frame_rate

# Codecs with one displayed frame per packet, in containers that store a time with every packet.
_ONE_TO_ONE = {"h264", "hevc", "av1"}
_TIMED = ("mov", "matroska")


class Shown(NamedTuple):
    """A frame and its presentation time, relative to the start of the clip.

    time: seconds after the first frame. length: seconds on screen if no frame follows. frame:
    PyAV's frame, or None if only packets were read. deinterlaced: whether a filter produced it.
    """

    time: Fraction
    length: Fraction
    frame: Any
    deinterlaced: bool = False


def decoded(source: Source) -> Iterator[Shown]:
    """Yield every frame that a player would show, deinterlaced if necessary.

    A frame without a time, or with a time before its predecessor's (concatenated streams), follows
    its predecessor by the predecessor's length; later frames are shifted accordingly.
    """
    return _deinterlaced(source, _timed(source))


def from_packets(source: Source) -> list[Shown] | None:
    """The times of `decoded` from the packets alone; None if they can only be found by decoding.

    Reads the whole file and raises VideoError if the container's index extends beyond its end.
    """
    name, stream = source.name, source.stream
    there = source.file.stat().st_size if hasattr(source.file, "stat") else None
    plain = stream.codec_context.name in _ONE_TO_ONE
    plain = plain and source.container.format.name.startswith(_TIMED)
    held: list[tuple[int, int]] = []
    count = 0
    for packet in source.container.demux(stream):
        if not packet.size:
            continue
        count += 1
        source.check_count(count)
        plain = plain and _is_plain(packet, first=count == 1)
        if plain:
            held.append((packet.pts, packet.duration or 0))
    index = stream.index_entries
    if there is not None and source.container.format.name.startswith("mov"):
        whole = sum(entry.pos + entry.size <= there for entry in index)
        if whole < len(index):
            raise VideoError(f"{name}: is cut off ({whole} of {len(index)} frames are present)")
    # A frame shown before the first packet's frame depends on one that is missing.
    if not plain or not held or min(held) != held[0]:
        return None
    base = Fraction(stream.time_base)
    start, nominal = held[0][0], source.frame_length
    shown = []
    for (pts, duration), following in zip(sorted(held), [*sorted(held)[1:], None], strict=True):
        if following is not None and following[0] == pts:
            return None
        length = duration * base or nominal
        if length is None:
            return None
        shown.append(Shown((pts - start) * base, length, None))
    return shown


def _is_plain(packet: Any, first: bool) -> bool:
    """Whether a packet is displayed, undamaged, at its own time and with the stream's settings."""
    if packet.pts is None or packet.is_discard or packet.is_corrupt:
        return False
    return not packet.has_sidedata("new_extradata") and (packet.is_keyframe or not first)


def chosen(
    source: Source, clip: Iterable[Shown], frames: int, fps: float | None
) -> Iterator[Shown]:
    """Select at most `frames` frames, in order.

    Frame k is the one shown nearest to k / fps seconds, the earlier one of a tie; fps None takes
    the first frames without resampling.
    """
    if fps is None:
        for shown in islice(clip, frames):
            source.check_time(shown.time)
            yield shown
        return
    # Exact arithmetic: a target time half-way between two frames must not depend on rounding.
    step = 1 / frame_rate(fps)
    taken = 0
    before: Shown | None = None
    for shown in clip:
        source.check_time(shown.time)
        # The previous frame may still be nearer to the target time than this one.
        while before is not None and taken < frames and taken * step <= shown.time:
            wanted = taken * step
            nearer = wanted - before.time <= shown.time - wanted
            yield before if nearer else shown
            taken += 1
        before = shown
        if taken == frames:
            return
    # The last frame remains on screen for its length.
    while before is not None and taken < frames and taken * step < before.time + before.length:
        yield before
        taken += 1


def _timed(source: Source) -> Iterator[Shown]:
    """Yield decoded frames with their times relative to the start of the clip."""
    nominal = source.frame_length
    stamps = _Stamps(source.container.format.name == "avi")
    before: Shown | None = None
    # Container time of the clip's start; None until a frame has a time.
    zero: Fraction | None = None
    for index, frame in enumerate(source.frames()):
        base = Fraction(frame.time_base or source.stream.time_base or 0)
        ticks = stamps.best(frame.pts, frame.dts)
        stamp = None if ticks is None else ticks * base
        length = (frame.duration or 0) * base or nominal
        follows = Fraction(0) if before is None else before.time + before.length
        if length is None:
            if stamp is None:
                raise VideoError(
                    f"{source.name}: frame {index} has no timestamp, and the file no frame rate"
                )
            length = Fraction(0)
        time = follows if stamp is None or zero is None else stamp - zero
        if before is not None and time < before.time:
            time = follows
        if stamp is not None:
            zero = stamp - time
        before = Shown(time, length, frame)
        yield before


class _Stamps:
    """Chooses between a frame's pts and dts by FFmpeg's rule: the one that has failed to increase
    less often.

    `decode_only`: for containers such as AVI, in which the presentation time of a reordered frame
    is that of another frame.
    """

    def __init__(self, decode_only: bool) -> None:
        self._faulty_pts, self._faulty_dts = int(decode_only), 0
        self._last_pts: int | None = None
        self._last_dts: int | None = None

    def best(self, pts: int | None, dts: int | None) -> int | None:
        """The time to use for the next frame."""
        if dts is not None and self._last_dts is not None:
            self._faulty_dts += dts <= self._last_dts
        if pts is not None and self._last_pts is not None:
            self._faulty_pts += pts <= self._last_pts
        self._last_dts = pts if dts is None else dts
        self._last_pts = dts if pts is None else pts
        if pts is not None and (dts is None or self._faulty_pts <= self._faulty_dts):
            return pts
        return dts


def _deinterlaced(source: Source, clip: Iterator[Shown]) -> Iterator[Shown]:
    """Deinterlace frames with FFmpeg's bwdif, which also reads the previous and next frames. Times
    are unchanged; frames before the first interlaced one bypass the filter, and later progressive
    ones pass through it unmodified."""
    graph: Any = None
    waiting: deque[Shown] = deque()
    shape: tuple[int, int, str] | None = None

    def push(frame: Any) -> Iterator[Shown]:
        graph.push(frame)
        while waiting:
            try:
                whole = graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            shown = waiting.popleft()
            yield shown._replace(frame=whole, deinterlaced=shown.frame.interlaced_frame)

    for shown in clip:
        frame = shown.frame
        now = frame.width, frame.height, frame.format.name
        if graph is not None and now != shape:
            yield from push(None)
            graph = None
        if graph is None and frame.interlaced_frame:
            graph, shape = _bwdif(source, frame), now
        if graph is None:
            yield shown
        else:
            waiting.append(shown)
            yield from push(frame)
    if graph is not None:
        yield from push(None)


def _bwdif(source: Source, frame: Any) -> Any:
    """Build a bwdif filter that outputs one frame per input frame."""
    if frame.width < 3 or frame.height < 4:
        raise VideoError(
            f"{source.name}: is interlaced, and {frame.width}x{frame.height} is too small to "
            "deinterlace"
        )
    graph = av.filter.Graph()
    nodes = [
        graph.add_buffer(
            width=frame.width,
            height=frame.height,
            format=frame.format,
            time_base=frame.time_base or Fraction(1, 1000),
        ),
        graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    return graph
