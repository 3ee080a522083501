"""A case of attention's benchmarks: intervals at one shape, its inputs, and its pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from afd import ops
from afd.ops import Intervals

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Tensors = dict[str, Tensor]
Step = Callable[[Tensors], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """Intervals at one shape; `context` keys come first and take no gradient."""

    name: str
    rows: Intervals
    heads: int
    width: int
    dtype: str
    backward: bool = False
    context: int = 0
    batch: int = 1

    @property
    def flop(self) -> float:
        """FLOP of the pass: two products forward; five backward, or three if only dq is needed."""
        per_pair = 2.0 * self.heads * self.width * self.batch
        if not self.backward:
            return 2 * per_pair * self.rows.pairs
        known = sum(
            (q1 - q0) * (high - low)
            for stream in self.rows.rows
            for q0, q1, a0, a1, b0, b1 in stream
            for low, high in ((a0, a1), (b0, b1))
            if high <= self.context
        )
        return per_pair * (7 * (self.rows.pairs - known) + 5 * known)

    def tensors(self, device: str, seed: int) -> Tensors:
        """q, k and v of all keys, and the incoming gradient."""
        g = torch.Generator(device).manual_seed(seed)
        queries, keys = self.rows.queries, self.rows.keys
        lengths = {"q": queries, "k": keys, "v": keys, "grad": queries}
        return {
            name: torch.randn(self.batch, n, self.heads, self.width, generator=g, device=device).to(
                DTYPES[self.dtype]
            )
            for name, n in lengths.items()
        }

    def step(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
        """Wrap attend(q, k, v) over all keys as a pass: (out,) or (out, dq, dk, dv).

        With a context, dk and dv are those of the keys after it.
        """

        def forward(i: Tensors) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(i["q"], i["k"], i["v"]),)

        def both(i: Tensors) -> tuple[Tensor, ...]:
            q, k, v = (i[name].detach().requires_grad_() for name in "qkv")
            out = attend(q, k, v)
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), i["grad"])
            return out, dq, dk[:, self.context :], dv[:, self.context :]

        return both if self.backward else forward

    def our_step(self, backend: str | None) -> Step:
        """The same pass through afd.ops, with the context as a slice without gradient."""

        def attend(q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, ...]) -> Tensor:
            names = dict(zip(("k_context", "v_context"), past, strict=False))
            if backend is None:
                return ops.block_attention(q, k, v, self.rows, **names)[0]
            with ops.use_backend(backend):
                return ops.block_attention(q, k, v, self.rows, **names)[0]

        def step(i: Tensors) -> tuple[Tensor, ...]:
            past = tuple(i[name][:, : self.context] for name in "kv" if self.context)
            q, k, v = i["q"], i["k"][:, self.context :], i["v"][:, self.context :]
            if not self.backward:
                with torch.no_grad():
                    return (attend(q, k, v, past),)
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            out = attend(q, k, v, past)
            return out, *_grad(backend, out, (q, k, v), i["grad"])

        return step


def _grad(
    backend: str | None, out: Tensor, wanted: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor, ...]:
    if backend is None:
        return torch.autograd.grad(out, wanted, grad)
    with ops.use_backend(backend):
        return torch.autograd.grad(out, wanted, grad)
