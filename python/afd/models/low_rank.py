"""Low-rank changes of a network's weights, W + scale · B A: folded, joined, and cut to a rank.

Shape letters: O rows and I columns of a layer's weight, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.hub import weights_digest
from afd_kernels.contracts import require

# Rows that are summed in a CPU's cache, by one thread.
_TILE = 16


@dataclass(frozen=True)
class LowRank:
    """A change of some layers' weights.

    Attributes:
        a_RI, b_OR: the factors by layer, in any float dtype.
        scale: factor of every product, an adapter's alpha / rank.
    """

    a_RI: Mapping[str, Tensor]
    b_OR: Mapping[str, Tensor]
    scale: float = 1.0

    @classmethod
    def of(cls, adapters: Mapping[str, Tensor], scale: float) -> LowRank:
        """The adapters `<layer>.lora_A.weight` and `<layer>.lora_B.weight` of a version."""
        parts: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
        for name, tensor in adapters.items():
            layer, found, rest = name.rpartition(".lora_")
            require(bool(found) and rest in ("A.weight", "B.weight"), "adapter", name, "lora_A, _B")
            parts[rest[0]][layer] = tensor
        alike = parts["A"].keys() == parts["B"].keys()
        require(alike, "adapter", list(parts["A"].keys() ^ parts["B"].keys())[:2], "pairs of A, B")
        return cls(parts["A"], parts["B"], scale)

    @property
    def rank(self) -> int:
        """The largest rank of a layer's change; 0 without layers."""
        return max((a_RI.shape[0] for a_RI in self.a_RI.values()), default=0)

    def delta(self, layer: str) -> Tensor:
        """The change of one layer's weight, [O, I] float32, to the same bits on every machine.

        Libraries sum matrix products in an order that depends on the processor, and the digest of
        folded weights must not: here every product and sum is rounded on its own, in rank order.
        """
        b_OR, a_RI = self.b_OR[layer].float(), self.a_RI[layer].float()
        delta = b_OR.new_zeros(len(b_OR), a_RI.shape[1])
        for rows_TI, b_TR in zip(delta.split(_TILE), b_OR.split(_TILE), strict=True):
            for b_T, a_I in zip(b_TR.unbind(1), a_RI, strict=True):
                rows_TI += b_T[:, None] * a_I
        return delta * self.scale

    def adapters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The factors under the names of adapters; the scale is not in them."""
        found = {}
        for layer in self.a_RI:
            found[f"{layer}.lora_A.weight"] = self.a_RI[layer].to(dtype).contiguous()
            found[f"{layer}.lora_B.weight"] = self.b_OR[layer].to(dtype).contiguous()
        return found

    def check(self, weights: Mapping[str, Tensor], what: str) -> None:
        """Raise ValueError unless every layer is one of the network's, in its shape."""
        for layer, a_RI in self.a_RI.items():
            b_OR, weight = self.b_OR[layer], weights.get(f"{layer}.weight")
            require(weight is not None, what, layer, "a layer of the student's network")
            assert weight is not None
            shape = (b_OR.shape[0], a_RI.shape[-1])
            fits = a_RI.ndim == b_OR.ndim == 2 and a_RI.shape[0] == b_OR.shape[1]
            fits = fits and shape == tuple(weight.shape)
            require(fits, f"{what}: {layer}", shape, f"{list(weight.shape)}, the layer's shape")


def folded(weights: Mapping[str, Tensor], change: LowRank) -> dict[str, Tensor]:
    """The weights with a change added, in the weights' dtype."""
    state = dict(weights)
    for layer in change.a_RI:
        name = f"{layer}.weight"
        state[name] = state[name] + change.delta(layer).to(state[name])
    return state


def joined(changes: Sequence[LowRank]) -> LowRank:
    """The sum of some changes as one of their summed rank and scale 1, in float32."""
    layers = dict.fromkeys(layer for change in changes for layer in change.a_RI)
    a_RI: dict[str, Tensor] = {}
    b_OR: dict[str, Tensor] = {}
    for layer in layers:
        held = [change for change in changes if layer in change.a_RI]
        a_RI[layer] = torch.cat([change.a_RI[layer].float() for change in held])
        b_OR[layer] = torch.cat([c.b_OR[layer].float() * c.scale for c in held], 1)
    return LowRank(a_RI, b_OR)


def stacked_digest(base: str, changes: Sequence[LowRank]) -> str:
    """SHA-256 of weights, given by theirs, with changes beside them; `base` without any."""
    if not changes:
        return base
    factors = {
        f"{n}.{name}": tensor
        for n, change in enumerate(changes)
        for name, tensor in change.adapters(torch.float32).items()
    }
    return weights_digest(factors, base, *(change.scale for change in changes))


def negated(change: LowRank) -> LowRank:
    """The change that takes this one back."""
    return LowRank(change.a_RI, change.b_OR, -change.scale)


def cut(change: LowRank, rank: int) -> tuple[LowRank, float]:
    """The nearest change of at most `rank` per layer, by SVD, and its relative error: the Frobenius
    norm of what is lost over that of the whole change. Computed in float64 from the factors."""
    require(rank >= 1, "rank", rank, "1 or more")
    a_RI: dict[str, Tensor] = {}
    b_OR: dict[str, Tensor] = {}
    lost = whole = 0.0
    for layer in change.a_RI:
        q_OR, r_b = torch.linalg.qr(change.b_OR[layer].double() * change.scale)
        q_IR, r_a = torch.linalg.qr(change.a_RI[layer].double().mT)
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
        whole += float(s.square().sum())
        lost += float(s[rank:].square().sum())
        root = s[:rank].sqrt()
        b_OR[layer] = (q_OR @ u[:, :rank] * root).float()
        a_RI[layer] = (root[:, None] * (vh[:rank] @ q_IR.mT)).float()
    return LowRank(a_RI, b_OR), (lost / whole) ** 0.5 if whole else 0.0
