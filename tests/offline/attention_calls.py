"""The uses of block_attention that are compiled offline, with the shapes of 480x832.

A chunk of 3 frames is 4680 tokens; 7 chunks are a clip of 81 frames. 12 heads of 128 channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from afd_kernels.block_attention import intervals
from afd_kernels.block_attention.contract import AttentionInputs
from afd_kernels.block_attention.intervals import Intervals
from tests.offline.launches import ARCHS, ONE_EACH, Call, Launch, empty

CHUNK, CHUNKS = 4680, 7
CLIP = CHUNK * CHUNKS
HEADS = 12
# A chunk that attends its cache, all keys in one tensor.
ROLLOUT = intervals.cache(CLIP, CHUNK)
# Keys [clean | noisy] in one tensor; and the noisy queries with the clean keys as the context.
FORCING = intervals.teacher_forcing(CHUNKS, 1, CHUNK)
NOISY = intervals.noisy_half(CHUNKS, 1, CHUNK)


@dataclass(frozen=True)
class AttentionCall(Call):
    rows: Intervals = ROLLOUT
    context: int = 0  # keys in tensors of their own
    needs: tuple[bool, bool, bool] = (True, True, False)
    width: int = 128
    dtype: torch.dtype = torch.bfloat16

    def measure(self, kernel: str, launch: Launch, sizes: dict[str, int]) -> None:
        launch.hot = "products"
        block = launch.constants
        row = block["BLOCK_D"] * self.dtype.itemsize
        # The loop loads a tile of K and V, or of Q and dO.
        launch.loaded = 2 * row * block["BLOCK_M" if kernel == "dkdv" else "BLOCK_N"]
        results = 2 * block["BLOCK_N"] if kernel == "dkdv" else block["BLOCK_M"]
        launch.stored = results * row

    def run(self, module: Any) -> None:
        def heads(tokens: int) -> torch.Tensor:
            return empty(self.dtype, 1, tokens, HEADS, self.width)

        queries, keys = self.rows.queries, self.rows.keys
        q, k = heads(queries), heads(keys - self.context)
        context = heads(self.context) if self.context else None
        inputs = AttentionInputs(q, k, k, context, context)
        if self.op == "block_attention":
            module.block_attention(inputs, self.rows, 0.1)
            return
        lse = empty(torch.float32, 1, HEADS, queries)
        module.block_attention_bwd(q, inputs, q, lse, self.rows, 0.1, self.needs)


_BACKWARD = ("dq", "dkdv")
_DQ_ONLY = {"rows": NOISY, "context": CLIP, "needs": (True, False, False)}
_HOPPER: dict[str, Any] = {"archs": ("sm_90",)}
CALLS = (
    AttentionCall("rollout", "block_attention", ("fwd",)),
    AttentionCall("noisy", "block_attention", ("fwd",), ONE_EACH, NOISY, CLIP),
    AttentionCall("forcing", "block_attention_bwd", _BACKWARD, ARCHS, FORCING),
    AttentionCall("noisy", "block_attention_bwd", ("dq",), **_DQ_ONLY, archs=ONE_EACH),
    AttentionCall("d64", "block_attention", ("fwd",), width=64),
    AttentionCall("d64", "block_attention_bwd", _BACKWARD, ARCHS, FORCING, width=64),
    AttentionCall("d40", "block_attention", ("fwd",), width=40, **_HOPPER),
    AttentionCall("d40", "block_attention_bwd", _BACKWARD, width=40, rows=FORCING, **_HOPPER),
    AttentionCall("fp16", "block_attention", ("fwd",), dtype=torch.float16, **_HOPPER),
    AttentionCall("fp32", "block_attention", ("fwd",), dtype=torch.float32, **_HOPPER),
    AttentionCall("fp32", "block_attention_bwd", _BACKWARD, dtype=torch.float32, **_HOPPER),
)
