"""Write video files: h264 mp4 whose bytes depend only on the pixels and the settings."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from afd.video.levels import to_uint8
from afd.video.read import read_clip
from afd.video.source import frame_rate
from afd_kernels.contracts import require

# x264's B-frame decision reads uninitialised memory; without B-frames the bytes are the same in
# every process, whatever the frames' addresses.
DETERMINISTIC = {"bf": "0"}
# With x264's AVX-512 code the bytes of small videos still differed once in some hundred encodes;
# with its SSE4.2 code they never did (tests/afd/test_encoder.py), at the same speed. The cause is
# unknown.
_CODE = {"x264-params": "asm=MMX2,SSE2,SSE3,SSSE3,SSE4.2"}
_X86 = platform.machine() in ("x86_64", "AMD64")
# Code points of ISO/IEC 23091-2, which FFmpeg's enumerations use.
_BT601, _LIMITED = 6, 1


def write_video(path: Path | str, video_FCHW: Tensor, *, fps: float, crf: int = 18) -> None:
    """Encode float [F, 3, H, W] in [-1, 1] (H and W even) as h264 yuv420p mp4.

    The write is atomic. The same input gives the same bytes.
    """
    path = Path(path)
    _check_encodable(video_FCHW)
    partial = path.with_name(path.name + ".partial")
    _encode(str(partial), video_FCHW, fps, crf)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def through_codec(video_BFCHW: Tensor, *, fps: float | None = None, crf: int = 18) -> Tensor:
    """Encode and decode each video as `write_video` and `read_video` would, in memory.

    Returns float32 [B, F, 3, H, W] on the video's device, with a straight-through gradient. fps
    None means 16; the encoder's choice of quantisers depends on it.
    """
    require(
        video_BFCHW.ndim == 5, "video_BFCHW", video_BFCHW, "[B, F, 3, even H, even W] in [-1, 1]"
    )
    rate = 16.0 if fps is None else fps

    def one(video_FCHW: Tensor) -> Tensor:
        _check_encodable(video_FCHW)
        frames, _, height, width = video_FCHW.shape
        held = BytesIO()
        _encode(held, video_FCHW, rate, crf)
        held.seek(0)
        return read_clip(held, frames=frames, height=height, width=width).video_FCHW

    # One encoder thread per video, so that the bytes are the same on every machine.
    workers = max(1, min(len(video_BFCHW), os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        seen = list(pool.map(one, video_BFCHW.detach().cpu().unbind()))
    input_BFCHW = torch.stack(seen).to(video_BFCHW.device)
    if video_BFCHW.requires_grad:
        return input_BFCHW + (video_BFCHW - video_BFCHW.detach()).float()
    return input_BFCHW


def _check_encodable(video_FCHW: Tensor) -> None:
    shape = tuple(video_FCHW.shape)
    if len(shape) != 4 or shape[0] < 1 or shape[1] != 3 or shape[2] % 2 or shape[3] % 2:
        raise ValueError(f"video_FCHW: got shape {shape}, needs [F >= 1, 3, even H, even W]")


def _encode(target: Any, video_FCHW: Tensor, fps: float, crf: int) -> None:
    """Encode an h264 yuv420p mp4 to a path or a binary file."""
    with av.open(target, "w", format="mp4") as container:
        height, width = video_FCHW.shape[2:]
        # More threads would make the bytes depend on the machine.
        stream = _add_stream(container, height, width, frame_rate(fps), crf, 1, DETERMINISTIC)
        for picture_CHW in video_FCHW:
            container.mux(stream.encode(_yuv(to_uint8(picture_CHW))))
        container.mux(stream.encode(None))


def _add_stream(
    container: Any,
    height: int,
    width: int,
    rate: Fraction,
    crf: int,
    threads: int,
    options: dict[str, str],
) -> Any:
    stream: Any = container.add_stream("libx264", rate=rate)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.options = {"crf": str(crf), **(_CODE if _X86 else {}), **options}
    stream.codec_context.thread_count = threads
    # Players assume BT.709 for large untagged clips.
    stream.codec_context.colorspace, stream.codec_context.color_range = _BT601, _LIMITED
    return stream


def _yuv(picture_HWC: Tensor) -> Any:
    """Convert a uint8 [H, W, 3] picture to a yuv420p frame for the encoder."""
    # Starting threads costs more than converting a small picture, and saves nothing for 480x832.
    frame = av.VideoFrame.from_ndarray(picture_HWC.numpy(), format="rgb24")
    return frame.reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU601,
        dst_color_range=ColorRange.MPEG,
        threads=1,
    )


class VideoWriter:
    """Writes an mp4 incrementally, while its frames are being generated.

    Frames go to <path>.partial, which is playable at any time; `close` converts it to an ordinary
    mp4 under its final name. As a context manager, it leaves no file on error.
    """

    def __init__(
        self, path: Path | str, *, fps: float, crf: int = 18, comment: str | None = None
    ) -> None:
        """`comment` is stored in the file's metadata on `close`; `read_comment` reads it."""
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._rate, self._crf, self.comment = frame_rate(fps), crf, comment
        # Each frame is its own fragment, written to disk as soon as it is encoded.
        options = {
            "movflags": "frag_every_frame+empty_moov+default_base_moof",
            "flush_packets": "1",
        }
        self._container: Any = av.open(str(self.partial), "w", format="mp4", options=options)
        self._stream: Any = None
        self.frames = 0

    def append(self, video_FHWC: Tensor) -> None:
        """Encode uint8 [F, H, W, 3] (H and W even, the same in every call) as h264 yuv420p."""
        shape = tuple(video_FHWC.shape)
        even = len(shape) == 4 and shape[3] == 3 and shape[1] % 2 == shape[2] % 2 == 0
        require(
            even and video_FHWC.dtype == torch.uint8,
            "video_FHWC",
            video_FHWC,
            "uint8 [F, even H, even W, 3]",
        )
        if self._stream is None:
            # No frame waits for later ones. A fixed thread count gives the same bytes everywhere.
            live = {"tune": "zerolatency"}
            self._stream = _add_stream(
                self._container, shape[1], shape[2], self._rate, self._crf, 4, live
            )
        for picture_HWC in video_FHWC:
            self._container.mux(self._stream.encode(_yuv(picture_HWC)))
        self.frames += shape[0]

    def close(self) -> None:
        """Finish the file and give it its final name; on error nothing is left."""
        try:
            self._finish()
        except BaseException:  # a full disk, for instance
            self.abort()
            raise

    def _finish(self) -> None:
        require(self.frames > 0, "frames", self.frames, "at least one frame before close")
        self._container.mux(self._stream.encode(None))
        self._container.close()
        whole = self.path.with_name(self.path.name + ".whole")
        with (
            av.open(str(self.partial), format="mp4") as source,
            av.open(str(whole), "w", format="mp4", options={"movflags": "faststart"}) as target,
        ):
            if self.comment is not None:
                target.metadata["comment"] = self.comment
            copied: Any = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = copied
                    target.mux(packet)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.replace(self.path)
        self.partial.unlink()

    def abort(self) -> None:
        """Discard the file."""
        try:
            self._container.close()
        finally:
            for suffix in (".partial", ".whole"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.abort()
