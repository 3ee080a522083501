"""Videos as patches, which become tokens, and back.

Shape letters: B batch, F frames, C channels, H x W latent size, L tokens in (frame, row, column)
order, P channels of a patch.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def to_patches(x_BFCHW: Tensor, patch: tuple[int, int]) -> Tensor:
    """Patches [B, L, C·ph·pw] of `patch` = (ph, pw) latent pixels, channels first."""
    ph, pw = patch
    return rearrange(
        x_BFCHW, "B F C (rows ph) (cols pw) -> B (F rows cols) (C ph pw)", ph=ph, pw=pw
    )


def from_patches(y_BLP: Tensor, rows: int, cols: int, patch: tuple[int, int]) -> Tensor:
    """Videos [B, F, C, H, W] of patches [B, L, ph·pw·C], channels last, as the head writes them."""
    ph, pw = patch
    return rearrange(
        y_BLP,
        "B (F rows cols) (ph pw C) -> B F C (rows ph) (cols pw)",
        rows=rows,
        cols=cols,
        ph=ph,
        pw=pw,
    )
