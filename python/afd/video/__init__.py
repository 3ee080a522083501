"""Video file I/O: check, decode, resample in time, centre-crop and resize; encode."""

from afd.errors import VideoError
from afd.video.levels import from_uint8, to_uint8
from afd.video.picture import Hdr
from afd.video.read import Clip, check_video, frame_size, read_clip, read_comment, read_video
from afd.video.source import DEFAULT_LIMITS, Limits
from afd.video.write import VideoWriter, through_codec, write_video

__all__ = [
    "DEFAULT_LIMITS",
    "Clip",
    "Hdr",
    "Limits",
    "VideoError",
    "VideoWriter",
    "check_video",
    "frame_size",
    "from_uint8",
    "read_clip",
    "read_comment",
    "read_video",
    "through_codec",
    "to_uint8",
    "write_video",
]
