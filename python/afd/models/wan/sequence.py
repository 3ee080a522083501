"""Sequence parallelism: several processes compute one video (DeepSpeed-Ulysses, arXiv 2309.14509).

Outside self-attention a process holds its part of every frame's tokens, with all heads; inside, all
tokens, with its part of the heads, so that intervals, contexts and caches are those of one process.
Tokens of a frame that do not divide evenly are padded with zeros, which no attention sees.

Shape letters: B batch, F frames, T tokens of a frame, t of them in one process, N processes, h
heads, d head channels; L = F·T tokens, l = F·t of them in one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional


class SequenceGroup:
    """The processes that compute one video, and how they exchange its tokens.

    Whatever enters and leaves a network is whole, and equal in all of them; gradients of its inputs
    are whole, too. Those of its weights are sums over a process's own tokens, which add up to the
    gradient.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.parts, self.part = group, group.size(), group.rank()

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroup:
        # Copies of a network belong to the same processes.
        return self

    def own(self, tokens: int) -> int:
        """t of `tokens` = T, padding included."""
        return -(-tokens // self.parts)

    def split(self, x_BL: Tensor, tokens: int) -> Tensor:
        """This process's tokens [B, l, …] of [B, L, …]."""
        part: Tensor = _Split.apply(x_BL, self, tokens)
        return part

    def join(self, x_Bl: Tensor, tokens: int) -> Tensor:
        """All tokens [B, L, …] of every process's [B, l, …]."""
        whole: Tensor = _Join.apply(x_Bl, self, tokens)
        return whole

    def to_heads(self, parts: tuple[Tensor, ...], tokens: int) -> list[Tensor]:
        """All tokens with own heads, [B, L, h/N, d], of own tokens with all heads, [B, l, h, d]."""
        x_SBlhd = torch.stack(parts)
        x_NSBlhd = self._exchanged(x_SBlhd.unflatten(3, (self.parts, -1)).movedim(3, 0))
        x_NSBFthd = x_NSBlhd.unflatten(3, (-1, self.own(tokens)))
        x_SBFThd = x_NSBFthd.movedim(0, 3).flatten(3, 4)[:, :, :, :tokens]
        return list(x_SBFThd.flatten(2, 3).unbind())

    def to_tokens(self, x_BLhd: Tensor, tokens: int) -> Tensor:
        """The inverse of `to_heads`, of one tensor."""
        x_BFThd = self._padded(x_BLhd.unflatten(1, (-1, tokens)))
        x_NBFthd = self._exchanged(x_BFThd.unflatten(2, (self.parts, -1)).movedim(2, 0))
        return x_NBFthd.movedim(0, 3).flatten(3, 4).flatten(1, 2)

    def _exchanged(self, x: Tensor) -> Tensor:
        """Part n of x, along its first dimension, goes to process n, and n's part comes back."""
        given = functional.all_to_all_single_autograd(x.contiguous(), None, None, self.group)
        return functional.wait_tensor(given)

    def _padded(self, x_BFT: Tensor) -> Tensor:
        missing = self.own(x_BFT.shape[2]) * self.parts - x_BFT.shape[2]
        if not missing:
            return x_BFT
        zeros = x_BFT.new_zeros(*x_BFT.shape[:2], missing, *x_BFT.shape[3:])
        return torch.cat([x_BFT, zeros], 2)

    def take(self, x_BL: Tensor, tokens: int) -> Tensor:
        """`split` without derivatives."""
        x_BFT = self._padded(x_BL.unflatten(1, (-1, tokens)))
        return x_BFT.chunk(self.parts, 2)[self.part].flatten(1, 2)

    def gather(self, x_Bl: Tensor, tokens: int) -> Tensor:
        """`join` without derivatives."""
        x_Bl = x_Bl.contiguous()
        parts = [torch.empty_like(x_Bl) for _ in range(self.parts)]
        dist.all_gather(parts, x_Bl, group=self.group)
        x_BFT = torch.cat([part.unflatten(1, (-1, self.own(tokens))) for part in parts], 2)
        return x_BFT[:, :, :tokens].flatten(1, 2)


class _Split(torch.autograd.Function):
    """Its gradient is gathered: every process has that of its own tokens."""

    @staticmethod
    def forward(ctx: Any, x_BL: Tensor, group: SequenceGroup, tokens: int) -> Tensor:
        ctx.how = group, tokens
        return group.take(x_BL, tokens)

    @staticmethod
    def backward(ctx: Any, grad_Bl: Tensor) -> tuple[Tensor, None, None]:
        group, tokens = ctx.how
        return group.gather(grad_Bl, tokens), None, None


class _Join(torch.autograd.Function):
    """Its gradient is cut, not summed: every process computes the same loss of the whole."""

    @staticmethod
    def forward(ctx: Any, x_Bl: Tensor, group: SequenceGroup, tokens: int) -> Tensor:
        ctx.how = group, tokens
        return group.gather(x_Bl, tokens)

    @staticmethod
    def backward(ctx: Any, grad_BL: Tensor) -> tuple[Tensor, None, None]:
        group, tokens = ctx.how
        return group.take(grad_BL, tokens), None, None
