"""Arguments of a wrong Python type: ValueErrors that name the argument, of every public op."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from afd import ops

B = 2
X = torch.randn(B, 4, 3, 4, 4)
HALF = torch.full((B,), 0.5)
SEED = torch.arange(B)
Q = torch.randn(1, 6, 2, 8)
ROPE = torch.randn(1, 6, 4, 2)
CACHE = torch.zeros(1, 12, 2, 8)
WEIGHTS = {"weight_q": torch.ones(16), "weight_k": torch.ones(16), "rope": ROPE}
TOKENS = torch.randn(1, 6, 16)
CALLS: dict[Callable[..., Any], dict[str, Any]] = {
    ops.draw_seeds: {"batch": 3},
    ops.optimality: {"rewards": torch.randn(4), "samples_per_prompt": 2},
    ops.forward_noise: {"x0": X, "t": HALF, "seed": SEED},
    ops.nft_loss: {"x0": X, "t": HALF, "r": HALF, "seed": SEED, "nft_beta": 0.1}
    | dict.fromkeys(("v_theta", "v_old", "v_ref"), X),
    ops.block_attention: {"q": Q, "k": Q, "v": Q, "intervals": ops.intervals.cache(6, 6)},
    ops.qk_norm_rope: {"q": Q, "k": Q, **WEIGHTS},
    ops.qk_norm_rope_append_: {"q": Q, "k": Q, "v": Q, **WEIGHTS}
    | {"k_cache": CACHE, "v_cache": CACHE.clone(), "position": torch.zeros(1, dtype=torch.int64)}
    | {"tokens_per_frame": 2, "sink_frames": 0},
    ops.adaln: {"x": TOKENS, "branch": None, "gate": None}
    | dict.fromkeys(("scale", "shift"), torch.zeros(16)),
}
OTHERS = (object(), "x", [1], {}, 3, 1.5, None, torch.ones(3, dtype=torch.int32))


@pytest.mark.parametrize(
    ("op", "name"),
    [
        pytest.param(op, name, id=f"{op.__name__}-{name}")
        for op in CALLS
        for name in inspect.signature(op).parameters
    ],
)
def test_a_wrong_type_is_a_value_error_that_names_the_argument(
    op: Callable[..., Any], name: str
) -> None:
    op(**CALLS[op])
    refused = 0
    for other in OTHERS:
        try:
            op(**CALLS[op] | {name: other})
        except ValueError as error:
            named = str(error).split(":")[0]
            assert name in named, error  # noqa: PT017
            refused += 1
    assert refused >= 4


def test_the_message_has_the_value_and_the_need() -> None:
    given = CALLS[ops.nft_loss]
    with pytest.raises(ValueError, match=r"nft_beta: got '0\.1'; needed: a number"):
        ops.nft_loss(**given | {"nft_beta": "0.1"})
    with pytest.raises(ValueError, match=r"group: got 3; needed: 'video', 'chunk'"):
        ops.nft_loss(**given | {"group": 3})
    with pytest.raises(ValueError, match=r"generator: got 7; needed: a Generator or None"):
        ops.draw_seeds(3, 7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'nft_beta'"):
        ops.nft_loss(**{k: v for k, v in given.items() if k != "nft_beta"})
