"""A rolling KV cache for diffusers' loops, on the preallocated ring of `afd`.

Letters: B videos, F latent frames, C channels, H x W latent size, L text tokens, E text channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afd.models.wan.kv_cache import KVCache
from afd.models.wan.network import CausalWan
from afd_kernels.contracts import require


class RollingKVCache:
    """The keys and values of a stream's frames, filled by calls of the transformer.

    In append mode a chunk follows the newest one; in overwrite mode it replaces it. A chunk's first
    denoising step appends, its other steps and the pass on the finished chunk overwrite. Memory is
    allocated at the first call and kept by `reset`; window and sink are the transformer's. The
    prompt's keys and values are computed when `encoder_hidden_states` is another tensor, or has
    been modified, and replace those of the previous prompt for the chunks that follow.

    Attributes:
        overwrite_newest: the mode.
        ring: the cache itself; None before the first call.
    """

    def __init__(self, num_frames: int | None = None) -> None:
        """
        Args:
            num_frames: most latent frames of a stream. None: a stream without end, for which the
                transformer needs a window.
        """
        self.num_frames = num_frames
        self.overwrite_newest = False
        self.ring: KVCache | None = None
        self._text: tuple[Tensor, int] | None = None

    def enable_append_mode(self) -> None:
        """The next chunk follows the newest one."""
        self.overwrite_newest = False

    def enable_overwrite_mode(self) -> None:
        """The next call replaces the newest chunk."""
        self.overwrite_newest = True

    def reset(self) -> None:
        """Forget all frames and the prompt. Call it when weights have changed, too."""
        self.overwrite_newest = False
        self._text = None
        if self.ring is not None:
            self.ring.reset()

    @torch.no_grad()
    def prepare(
        self, net: CausalWan, x_BFCHW: Tensor, text_BLE: Tensor, frame_offset: int
    ) -> KVCache:
        """The ring, ready for a pass of `net` on these frames at `frame_offset`.

        Raises:
            ValueError: naming the argument, the value given and what is needed.
        """
        ring = self.ring
        if ring is not None:
            newest = ring.start if self.overwrite_newest else ring.end
            mode = "overwrites its newest chunk" if self.overwrite_newest else "appends"
            known = frame_offset == newest
            require(known, "frame_offset", frame_offset, f"{newest}, as the cache {mode}")
        else:
            require(frame_offset == 0, "frame_offset", frame_offset, "0 where the cache is empty")
        size, device = x_BFCHW.shape[-2:], x_BFCHW.device
        if ring is None or (ring.end == 0 and self._unfit(ring, net, x_BFCHW)):
            ring = self.ring = net.new_cache(text_BLE, self.num_frames, *size)
        else:
            fits = not self._unfit(ring, net, x_BFCHW)
            kept = f"the batch, size and device of the cached frames ({ring.self_kv[0][0].device})"
            require(fits, "hidden_states", f"{list(x_BFCHW.shape)} on {device}", kept)
            self.switch_text(net, text_BLE)
        # The tensor is kept, so that no other one can be taken for it.
        self._text = (text_BLE, _at(text_BLE))
        return ring

    @torch.no_grad()
    def switch_text(self, net: CausalWan, text_BLE: Tensor) -> KVCache:
        """The ring, with the keys and values of this prompt for the passes that follow.

        Raises:
            ValueError: if nothing is cached yet.
        """
        require(self.ring is not None, "kv_cache", "an empty cache", "one with finished frames")
        assert self.ring is not None
        text, version = self._text or (None, 0)
        if text is not text_BLE or version != _at(text_BLE):
            self.ring.switch_text(net.text_kv(text_BLE))
        self._text = (text_BLE, _at(text_BLE))
        return self.ring

    @staticmethod
    def _unfit(ring: KVCache, net: CausalWan, x_BFCHW: Tensor) -> bool:
        kept = ring.self_kv[0][0]
        have = (kept.shape[0], (ring.rows, ring.cols), kept.device)
        return have != (len(x_BFCHW), net.config.grid(*x_BFCHW.shape[-2:]), x_BFCHW.device)


def _at(x: Tensor) -> int:
    """The version of a tensor's values."""
    return 0 if x.is_inference() else x._version
