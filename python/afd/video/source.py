"""An open video file: selects the stream to read, enforces limits and reports errors."""

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

# Self-contained containers. FFmpeg also opens playlists (m3u8, ffconcat), which could lead a
# manifest's path outside its folder.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"  # single pictures: a stream may start so
)
# PyAV before 19 refuses a file whose metadata are not UTF-8 by default.
_BEFORE_19 = int(av.__version__.partition(".")[0]) < 19
METADATA_ERRORS: dict[str, Any] = {"metadata_errors": "replace"} if _BEFORE_19 else {}
# Range of frame rates that may be requested: below it a clip is a slide show; above it, beyond the
# resolution of container clocks.
RATES = (1e-3, 1e4)


@dataclass(frozen=True)
class Limits:
    """Limits beyond which a clip is refused; the configuration's `video.max_...`.

    pixels: of a stored frame, which bounds memory. frames, seconds: up to the last frame read; for
    frames, of the whole file when it is checked.
    """

    pixels: int = 2**25
    frames: int = 500_000
    seconds: float = 14_400.0


DEFAULT_LIMITS = Limits()


class Source:
    """A container and its selected video stream. As a context manager, it converts every error in
    the block to a VideoError that names the file."""

    def __init__(self, file: Path | BytesIO, name: str, limits: Limits) -> None:
        """`name`: the file's name in error messages."""
        self.file, self.name, self.limits = file, name, limits
        self.container: Any = None
        self.stream: Any = None
        # For a still picture, given once in its file; the frames of a video carry their own.
        self.orientation: Orientation | None = None

    def __enter__(self) -> Source:
        if isinstance(self.file, Path) and not self.file.is_file():
            raise VideoError(f"{self.name}: no such file")
        # Absolute, as a name such as "concat:a.mp4" would be interpreted as a protocol.
        file: Any = str(self.file.absolute()) if isinstance(self.file, Path) else self.file
        # Opening already decodes a few frames, so the limit is set first.
        options = {"format_whitelist": CONTAINERS, "max_pixels": self._most_pixels}
        try:
            still = self._still()
            self.container = av.open(file, options=options, **METADATA_ERRORS)
            self.stream = self._choose()
            self._prepare()
            if still is not None and self.container.format.name.endswith("_pipe"):
                self.orientation = still
        except BaseException as error:
            self._close()
            if isinstance(error, av.ArgumentError):
                raise VideoError(
                    f"{self.name}: is not one of the containers {CONTAINERS}"
                ) from None
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
        """Select FFmpeg's best video stream, as players do, but never cover art."""
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
        """The limit passed to the decoder, which counts whole blocks; `check_size` counts the
        displayed pixels."""
        return str(2 * self.limits.pixels + 2**16)

    def _still(self) -> Orientation | None:
        """The orientation of a still picture, whose size is checked before FFmpeg opens it."""
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
        """Pixel aspect ratio (width over height): the container's, else the codec's."""
        return float(self.stream.sample_aspect_ratio or 1)

    @property
    def frame_length(self) -> Fraction | None:
        """Seconds between frames at the stream's nominal rate, or None if it has none."""
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
        """Yield decoded frames in presentation order.

        Incomplete frames before the first complete one (as in a stream that was cut without
        re-encoding) are skipped, as players do; damage after it is an error.
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
            raise VideoError(f"{self.name}: has a video stream without any frame{advice}")

    def _packets(self) -> Iterator[Any]:
        """Yield the stream's packets and, last, the empty packet that flushes the decoder. Empty
        packets within a file are skipped."""
        end = None
        for packet in self.container.demux(self.stream):
            if packet.size:
                yield packet
            else:
                end = packet
        yield end

    def _decoded(self, packet: Any, count: int) -> list[Any]:
        """The next complete frames from the decoder; `count` frames came before."""
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
    """Open a file, or bytes under a `name`, for use in a `with` block."""
    return Source(file, name or str(file), limits)


def frame_rate(fps: float) -> Fraction:
    """Frames per second as the intended fraction, such as 30000/1001."""
    if not RATES[0] <= fps <= RATES[1]:
        raise ValueError(f"fps: got {fps}, needs a rate from {RATES[0]:g} to {RATES[1]:g} a second")
    return Fraction(fps).limit_denominator(65535)


def _words(error: Exception) -> str:
    """A short message for an exception of PyAV."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]
