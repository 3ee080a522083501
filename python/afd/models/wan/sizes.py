"""Sizes of the published Wan networks and of the latents that they work in, by name.

Sources: the configurations of the original code (wan_t2v_1_3B, wan_t2v_14B, wan_ti2v_5B) and the
config.json files of their diffusers folders.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple


class Latents(NamedTuple):
    """What an autoencoder makes of a video.

    Attributes:
        channels: channels of a latent.
        time: video frames per latent frame after the first.
        space: pixels per latent row and column.
    """

    channels: int
    time: int
    space: int

    @property
    def scale(self) -> tuple[int, int]:
        """Video frames per latent frame, and pixels per latent row and column."""
        return self.time, self.space


LatentsName = Literal["wan2.1", "wan2.2"]
LATENTS: dict[str, Latents] = {"wan2.1": Latents(16, 4, 8), "wan2.2": Latents(48, 4, 16)}


class Size(NamedTuple):
    """A published network: the fields of WanConfig in which it differs from Wan2.1-T2V-1.3B."""

    latents: str
    network: dict[str, Any]


SizeName = Literal["wan2.1-1.3b", "wan2.1-14b", "wan2.2-5b"]
SIZES: dict[str, Size] = {
    "wan2.1-1.3b": Size("wan2.1", {}),
    "wan2.1-14b": Size(
        "wan2.1", {"dim": 5120, "num_heads": 40, "ffn_dim": 13_824, "num_layers": 40}
    ),
    "wan2.2-5b": Size(
        "wan2.2",
        {
            "dim": 3072,
            "num_heads": 24,
            "ffn_dim": 14_336,
            "num_layers": 30,
            "in_dim": 48,
            "out_dim": 48,
        },
    ),
}
# The size of a student that names none and whose checkpoint is not there.
DEFAULT_SIZE = "wan2.1-1.3b"
