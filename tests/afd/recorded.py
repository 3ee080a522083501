"""The decoded chunks that sampling records."""

from __future__ import annotations

import pytest
from torch import Tensor

from afd.video.recorder import Recorder


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that gets every chunk [B, F, 3, H, W] put into a recorder from now on."""
    chunks: list[Tensor] = []
    put = Recorder.put

    def noted(recorder: Recorder, video_BFCHW: Tensor) -> None:
        chunks.append(video_BFCHW.clone())
        put(recorder, video_BFCHW)

    monkeypatch.setattr(Recorder, "put", noted)
    return chunks
