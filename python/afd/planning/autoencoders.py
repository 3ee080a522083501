"""Operations and bytes of the released autoencoders, per pixel of a frame.

Counted on the released sizes at 480x832 with torch.utils.flop_counter and a live-storage counter,
on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass

from afd.models.wan.sizes import LATENTS, Latents

_PIXELS = 480 * 832


@dataclass(frozen=True)
class Autoencoder:
    """Sizes of an autoencoder.

    Attributes:
        parameters: of encoder and decoder.
        decode, encode: operations per pixel of the first latent frame (one video frame), and of
            each later one (four).
        decode_numbers, encode_numbers: live numbers per pixel at the peak of a decode of three
            latent frames, and of an encode of a clip.
        state_numbers, frame_numbers: numbers per pixel that a decode with gradients keeps for every
            latent frame (the convolutions' state before it), and for the one frame that is
            recomputed in its backward.
    """

    parameters: int
    decode: tuple[float, float]
    encode: tuple[float, float]
    decode_numbers: float
    encode_numbers: float
    state_numbers: float
    frame_numbers: float

    def decode_flop(self, latent_frames: int, pixels: int) -> float:
        """Decode one video of `pixels` pixels per frame from latents."""
        return pixels * (self.decode[0] + (latent_frames - 1) * self.decode[1])

    def encode_flop(self, latent_frames: int, pixels: int) -> float:
        """Encode one video to latents."""
        return pixels * (self.encode[0] + (latent_frames - 1) * self.encode[1])

    def decode_bytes(self, videos: int, pixels: int, itemsize: int) -> int:
        """Convolution state of a streamed decode and the current chunk, excluding weights."""
        return int(self.decode_numbers * videos * pixels * itemsize)

    def decode_gradient_bytes(
        self, latent_frames: int, videos: int, pixels: int, itemsize: int
    ) -> int:
        """A decode with gradients, one latent frame at a time, excluding weights."""
        numbers = latent_frames * self.state_numbers + self.frame_numbers
        return int(numbers * videos * pixels * itemsize)

    def encode_bytes(self, pixels: int, itemsize: int) -> int:
        """An encode of one video, excluding weights."""
        return int(self.encode_numbers * pixels * itemsize)


WAN21 = Autoencoder(
    126_892_531,
    (4_352_196_526_080 / _PIXELS, 13_550_000_455_680 / _PIXELS),
    (2_718_293_360_640 / _PIXELS, 8_051_570_442_240 / _PIXELS),
    7100,
    4000,
    1.76 * 2**29 / _PIXELS,
    15.6 * 2**29 / _PIXELS,
)
WAN22 = Autoencoder(
    704_688_668,
    (9_105_977_487_360 / _PIXELS, 29_393_516_605_440 / _PIXELS),
    (1_860_758_814_720 / _PIXELS, 5_582_538_424_320 / _PIXELS),
    6400,
    2100,
    1790,
    16_500,
)
# TAEHV: all its latent frames cost the same.
TINY21 = Autoencoder(
    11_315_539,
    (544_151_961_600 / _PIXELS, 544_151_961_600 / _PIXELS),
    (241_852_416_000 / _PIXELS, 241_852_416_000 / _PIXELS),
    900,
    530,
    84,
    1460,
)
# For Wan2.2 its layers see half the rows and columns: blocks of 2 x 2 pixels are channels.
TINY22 = Autoencoder(
    11_418_108,
    (140_408_586_240 / _PIXELS, 140_408_586_240 / _PIXELS),
    (64_661_176_320 / _PIXELS, 64_661_176_320 / _PIXELS),
    220,
    210,
    58,
    480,
)
AUTOENCODERS: dict[Latents, Autoencoder] = {LATENTS["wan2.1"]: WAN21, LATENTS["wan2.2"]: WAN22}
TINY: dict[Latents, Autoencoder] = {LATENTS["wan2.1"]: TINY21, LATENTS["wan2.2"]: TINY22}
