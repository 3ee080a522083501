"""An open video file: which stream is read, within which limits, and how its failures are named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

import av
from av.stream import Disposition
from PIL import Image

from afd.errors import VideoError
from afd.video.orientation import Orientation, read_still

# Containers that hold their pictures themselves. FFmpeg also opens lists (m3u8, ffconcat), which
# would take a manifest's path out of its folder.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"  # single pictures: a stream may begin so
)
# Frames per second that can be asked for: below, a clip is a slide show; above, no clock has it.
RATES = (1e-3, 1e4)


@dataclass(frozen=True)
class Limits:
    """What a clip may cost before it is refused; the configuration's `video.max_...`.

    pixels: of a stored frame, which bounds memory. frames, seconds: up to the last one read, and
    for frames of the whole file when it is checked.
    """

    pixels: int = 2**25
    frames: int = 500_000
    seconds: float = 14_400.0


DEFAULT_LIMITS = Limits()


class Source:
    """A container and its one video stream. As a context manager every failure inside it becomes
    the file's VideoError."""

    def __init__(self, file: Path | BytesIO, name: str, limits: Limits) -> None:
        """`name` is for messages."""
        self.file, self.name, self.limits = file, name, limits
        self.container: Any = None
        self.stream: Any = None
        # Of a picture, whose file says it once; a video's frames carry their own.
        self.orientation: Orientation | None = None

    def __enter__(self) -> Source:
        if isinstance(self.file, Path) and not self.file.is_file():
            raise VideoError(f"{self.name}: no such file")
        # Absolute, as a name such as "concat:a.mp4" would be a protocol.
        file: Any = str(self.file.absolute()) if isinstance(self.file, Path) else self.file
        # Opening decodes a little already, so the limit is set before.
        options = {"format_whitelist": CONTAINERS, "max_pixels": self._most_pixels}
        try:
            still = self._still()
            self.container = av.open(file, options=options, metadata_errors="replace")
            self.stream = self._choose()
            self._prepare()
            if still is not None and self.container.format.name.endswith("_pipe"):
                self.orientation = still
        except BaseException as error:
            self._close()
            if isinstance(error, av.ArgumentError):
                raise VideoError(f"{self.name}: is none of the containers {CONTAINERS}") from None
            if isinstance(error, VideoError) or not isinstance(error, Exception):
                raise
            raise VideoError(f"{self.name}: cannot be read as a video ({_words(error)})") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()
        if isinstance(error, Exception) and not isinstance(error, VideoError):
            raise VideoError(f"{self.name}: cannot be decoded ({_words(error)})") from error

    def _close(self) -> None:
        if self.container is not None:
            self.container.close()

    def _choose(self) -> Any:
        """FFmpeg's best stream, as players take it, but never a cover picture."""
        streams = self.container.streams.video
        moving = [s for s in streams if not s.disposition & Disposition.attached_pic]
        if not moving:
            cover = " but an attached picture" if len(streams) else ""
            raise VideoError(f"{self.name}: has no video stream{cover}")
        best = self.container.streams.best("video")
        return next((s for s in moving if best is not None and s.index == best.index), moving[0])

    def _prepare(self) -> None:
        context = self.stream.codec_context
        if context is None:
            raise VideoError(f"{self.name}: its codec is unknown to this FFmpeg")
        self.check_size(context.width, context.height)
        context.options = {"max_pixels": self._most_pixels}
        # Starting threads costs more than decoding a small picture.
        if context.width * context.height >= 256 * 256:
            self.stream.thread_type = "AUTO"

    @property
    def _most_pixels(self) -> str:
        """The decoder's own bound: it counts whole blocks, `check_size` what is shown."""
        return str(2 * self.limits.pixels + 2**16)

    def _still(self) -> Orientation | None:
        """Of a picture file, how it is to be shown; its size is checked before FFmpeg sees it."""
        if not isinstance(self.file, Path):
            return None
        try:
            still = read_still(self.file)
        except Image.DecompressionBombError as error:
            raise VideoError(
                f"{self.name}: is larger than the {self.limits.pixels} pixels of video.max_pixels "
                f"({_words(error)})"
            ) from None
        if still is None:
            return None
        size, orientation = still
        self.check_size(*size)
        return orientation

    @property
    def aspect(self) -> float:
        """Width of a stored pixel over its height: the container's, else the codec's."""
        return float(self.stream.sample_aspect_ratio or 1)

    @property
    def frame_length(self) -> Fraction | None:
        """Seconds from frame to frame at the stream's nominal rate, where it has one."""
        rate = self.stream.average_rate or self.stream.guessed_rate
        return 1 / Fraction(rate) if rate else None

    def check_size(self, width: int, height: int) -> None:
        if width * height > self.limits.pixels:
            raise VideoError(
                f"{self.name}: its frames are {width}x{height}, more than the "
                f"{self.limits.pixels} pixels of video.max_pixels"
            )

    def check_count(self, frames: int) -> None:
        if frames > self.limits.frames:
            raise VideoError(
                f"{self.name}: has more than the {self.limits.frames} frames of video.max_frames"
            )

    def check_time(self, seconds: Fraction) -> None:
        if seconds > self.limits.seconds:
            raise VideoError(
                f"{self.name}: lasts longer than the {self.limits.seconds:g} seconds of "
                "video.max_seconds"
            )

    def frames(self) -> Iterator[Any]:
        """Decoded frames in the order in which they are shown.

        What a stream that was cut without re-encoding holds before its first whole picture is
        passed over, as players do; damage after it is an error.
        """
        count = 0
        for packet in self._packets():
            for frame in self._decoded(packet, count):
                count += 1
                self.check_count(count)
                self.check_size(frame.width, frame.height)
                yield frame
        if count == 0:
            animated = self.container.format.name == "webp_pipe"
            advice = "; convert an animated WebP to mp4, webm or gif" if animated else ""
            raise VideoError(f"{self.name}: has a video stream without a single frame{advice}")

    def _packets(self) -> Iterator[Any]:
        """The stream's packets and, last, the empty one that flushes the decoder. Some files hold
        empty ones in between."""
        end = None
        for packet in self.container.demux(self.stream):
            if packet.size:
                yield packet
            else:
                end = packet
        yield end

    def _decoded(self, packet: Any, count: int) -> list[Any]:
        """The decoder's next whole frames; `count` came before."""
        try:
            frames = self.stream.codec_context.decode(packet)
        except av.InvalidDataError:
            if count == 0:
                return []
            raise VideoError(f"{self.name}: is damaged after frame {count - 1}") from None
        except av.ArgumentError as error:
            raise VideoError(
                f"{self.name}: cannot be decoded ({_words(error)}); it is damaged, or its frames "
                f"have far more than the {self.limits.pixels} pixels of video.max_pixels"
            ) from None
        whole: list[Any] = []
        for frame in frames:
            if not frame.is_corrupt:
                whole.append(frame)
            elif count + len(whole):
                raise VideoError(f"{self.name}: is damaged at frame {count + len(whole)}")
        return whole


def opened(
    file: Path | BytesIO, name: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> Source:
    """A file, or bytes under a `name`, to be used in a `with` block."""
    return Source(file, name or str(file), limits)


def frame_rate(fps: float) -> Fraction:
    """Frames per second as the fraction that was meant, such as 30000/1001."""
    if not RATES[0] <= fps <= RATES[1]:
        raise ValueError(f"fps: got {fps}, needs a rate from {RATES[0]:g} to {RATES[1]:g} a second")
    return Fraction(fps).limit_denominator(65535)


def _words(error: Exception) -> str:
    """What an exception of PyAV says, in few words."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]
