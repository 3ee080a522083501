"""Every use of a Triton kernel that is compiled offline."""

from __future__ import annotations

from tests.offline import attention_calls, fused_calls, noise_calls
from tests.offline.launches import Call

CALLS: tuple[Call, ...] = (*noise_calls.CALLS, *fused_calls.CALLS, *attention_calls.CALLS)
