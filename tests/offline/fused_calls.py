"""The uses of qk_norm_rope and adaln that are compiled offline, with the shapes of 480x832.

A chunk is 3 frames of 1560 tokens; 12 heads of 128 channels; the cache holds 21 frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.offline.launches import ONE_EACH, Call, Launch, empty

STREAMS, FRAMES, TOKENS, HEADS, WIDTH = 2, 3, 1560, 12, 128
LENGTH, CHANNELS = FRAMES * TOKENS, HEADS * WIDTH
SLOTS = 21 * TOKENS
# The rows of a token that a program reads and writes, by op and kernel. The gains, the tables and
# the modulation, which every program reads, are left to the cache.
_ROWS = {
    ("qk_norm_rope", "fwd"): ("q k", "q_out k_out"),
    ("qk_norm_rope_append_", "fwd"): ("q k v", "q_out k_out v_out"),
    ("qk_norm_rope_bwd", "bwd"): ("q k grad_q grad_k", "dq dk"),
    ("adaln", "fwd"): ("x branch", "x_out h"),
    ("adaln_bwd", "bwd"): ("grad_x_out grad_h x_out branch", "dx dbranch"),
}


@dataclass(frozen=True)
class FusedCall(Call):
    dtype: torch.dtype = torch.bfloat16
    gated: bool = True  # adaln: with a branch and its gate

    def measure(self, kernel: str, launch: Launch, sizes: dict[str, int]) -> None:
        if kernel == "reduce":
            return
        # Lanes past the channels are known to be idle, their accesses are dropped.
        row = launch.constants["CHANNELS"]
        if not self.gated:
            # Passed all the same, as empty tensors.
            sizes = sizes | {"dbranch_ptr": 0} | ({"x_out_ptr": 0} if kernel == "fwd" else {})
        launch.loaded, launch.stored = (
            sum(row * sizes.get(f"{name}_ptr", 0) for name in names.split())
            for names in _ROWS[self.op, kernel]
        )

    def run(self, module: Any) -> None:
        if self.op.startswith("adaln"):
            self._run_adaln(module)
            return
        # Slices of one fused projection.
        q, k, v = empty(self.dtype, STREAMS, LENGTH, 3, HEADS, WIDTH).unbind(2)
        gains = (empty(self.dtype, CHANNELS),) * 2
        rope = empty(torch.float32, 1, LENGTH, WIDTH // 2, 2)
        if self.op == "qk_norm_rope_bwd":
            module.qk_norm_rope_bwd(q, k, q, k, *gains, rope, 1e-6)
        elif self.op == "qk_norm_rope_append_":
            cache = empty(self.dtype, STREAMS, SLOTS, HEADS, WIDTH)
            position = empty(torch.int64, 1)
            tensors = (q, k, v, *gains, rope, cache, cache, position)
            module.qk_norm_rope_append_(*tensors, TOKENS, 3, 1e-6)
        else:
            module.qk_norm_rope(q, k, *gains, rope, 1e-6)

    def _run_adaln(self, module: Any) -> None:
        x = empty(self.dtype, STREAMS, LENGTH, CHANNELS)
        gate, scale, shift = empty(torch.float32, STREAMS, FRAMES, 6, CHANNELS).unbind(2)[:3]
        branch, gate = (x, gate) if self.gated else (None, None)
        if self.op == "adaln":
            module.adaln(x, branch, gate, scale, shift, 1.0, 1e-6)
        else:
            grad_x_out = x if self.gated else None
            module.adaln_bwd(grad_x_out, x, x, branch, gate, scale, 1.0, 1e-6)


_BACKWARD = ("bwd", "reduce")
CALLS = (
    FusedCall("bf16", "qk_norm_rope", ("fwd",)),
    FusedCall("fp32", "qk_norm_rope", ("fwd",), ONE_EACH, torch.float32),
    FusedCall("bf16", "qk_norm_rope_append_", ("fwd",)),
    FusedCall("bf16", "qk_norm_rope_bwd", _BACKWARD),
    FusedCall("bf16", "adaln", ("fwd",)),
    FusedCall("fp32", "adaln", ("fwd",), ONE_EACH, torch.float32),
    FusedCall("plain", "adaln", ("fwd",), ONE_EACH, gated=False),
    FusedCall("bf16", "adaln_bwd", _BACKWARD),
    FusedCall("plain", "adaln_bwd", ("bwd",), ONE_EACH, gated=False),
)
