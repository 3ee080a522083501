"""Parts of attention's cost, for attention.py: the merge of two intervals, and dq alone.

The merge: a chunk whose context is stored separately from its own keys takes two library calls and
a merge; with all keys in one tensor it would take one call. dq alone: the backward needed with a
context without gradient, next to the full backward of our kernels and of PyTorch's libraries. All
start from a finished forward, and only the backward is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from afd import ops
from afd.ops import Intervals
from benchmarks.attention_case import Case, Step, Tensors

LIBRARIES = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Merged(Case):
    """One block of queries: a context, then its own keys."""

    def steps(self) -> dict[str, Step]:
        """One call over all keys in one tensor, and two calls with a merge."""
        together = Case(**vars(self) | {"context": 0, "rows": _joined(self.rows)})
        return {
            "library, one call": together.our_step("library"),
            "library, merged": self.our_step("library"),
        }


@dataclass(frozen=True)
class Backward(Case):
    """The backward alone, from a finished forward; the compared result is dq."""

    device: str = "cpu"

    @property
    def flop(self) -> float:
        """FLOP of the three products that dq needs."""
        return 6.0 * self.heads * self.width * self.batch * self.rows.pairs

    def tensors(self, device: str, seed: int) -> Tensors:
        given = super().tensors(device, seed)
        with torch.no_grad():
            out, lse = ops.block_attention(*(given[name] for name in "qkv"), self.rows)
        return given | {"out": out, "lse": lse}

    def step(self, attend: object) -> Step:
        """dq of attend(q, k, v), including the forward; used for the oracle."""
        both = super().step(attend)  # type: ignore[arg-type]
        return lambda i: both(i)[1:2]

    def steps(self) -> dict[str, Step]:
        """Ours with and without key gradients; on a GPU also the libraries' full backwards."""
        backend = "triton" if self.device == "cuda" else "library"
        found = {
            f"{backend}, dq alone": self._ours(backend, keys=False),
            f"{backend}, full": self._ours(backend, keys=True),
        }
        if self.device == "cuda":
            found |= {f"{name}, full": self._library(kind) for name, kind in LIBRARIES.items()}
        return found

    def _ours(self, backend: str, keys: bool) -> Step:
        flat, streams, scale = self.rows.flat(), self.rows.streams, self.width**-0.5

        def step(i: Tensors) -> tuple[Tensor, ...]:
            saved = (i["q"], i["k"], i["v"], None, None, i["out"], i["lse"])
            with torch.no_grad(), ops.use_backend(backend):
                grads = torch.ops.afd.block_attention_bwd(
                    i["grad"], *saved, flat, streams, scale, [True, keys, False]
                )
            return grads[:1]

        return step

    def _library(self, kind: SDPBackend) -> Step:
        """A library's backward; its forward is run at a set's first use and kept."""
        kept: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}

        def step(i: Tensors) -> tuple[Tensor, ...]:
            if id(i["q"]) not in kept:
                leaves = tuple(i[name].detach().requires_grad_() for name in "qkv")
                with sdpa_kernel(kind):
                    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves))
                kept[id(i["q"])] = out.transpose(1, 2), leaves
            out, leaves = kept[id(i["q"])]
            return torch.autograd.grad(out, leaves, i["grad"], retain_graph=True)[:1]

        return step


def _joined(rows: Intervals) -> Intervals:
    """The same pairs with the two adjacent intervals merged."""
    return Intervals(tuple(tuple((*r[:3], r[5], 0, 0) for r in one) for one in rows.rows))


def cases(args: argparse.Namespace) -> Iterator[Merged | Backward]:
    """The middle (average) chunk of 480x832 on a GPU; else a size feasible on a CPU."""
    if args.quick:
        tokens, known, heads, width, dtype = 16, 32, 2, 16, "fp32"
    elif args.device == "cuda":
        tokens, known, heads, width, dtype = 4680, 14040, 12, 128, "bf16"
    else:
        tokens, known, heads, width, dtype = 256, 768, 12, 64, "fp32"
    two = Intervals((((0, tokens, 0, known, known, known + tokens),),))
    yield Merged("context apart", two, heads, width, dtype, context=known)
    context = Intervals((((0, tokens, 0, known, 0, 0),),))
    yield Backward("context, backward", context, heads, width, dtype, True, device=args.device)
