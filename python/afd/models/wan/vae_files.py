"""Files of Wan's autoencoders, read into diffusers' AutoencoderKLWan.

A diffusers folder states its sizes and the latents' statistics. The original files hold weights
alone, under other names: their sizes follow from the shapes, and the statistics are those in the
original code (diffusers' defaults for Wan2.1; wan/modules/vae2_2.py for Wan2.2, equal to the
config.json of Wan-AI/Wan2.2-TI2V-5B-Diffusers).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd.hub import named_errors
from afd.models.wan.checkpoints import fill, read_pickle
from afd.models.wan.sizes import LATENTS
from afd_kernels.contracts import require

# Statistics of Wan2.2's 48 latent channels.
MEAN = """
    -.2289 -.0052 -.1323 -.2339 -.2799 .0174 .1838 .1557 -.1382 .0542 .2813 .0891
    .157 -.0098 .0375 -.1825 -.2246 -.1207 -.0698 .5109 .2665 -.2108 -.2158 .2502
    -.2055 -.0322 .1109 .1567 -.0729 .0899 -.2799 -.123 -.0313 -.1649 .0117 .0723
    -.2839 -.2083 -.052 .3748 .0152 .1957 .1433 -.2944 .3573 -.0548 -.1681 -.0667
"""
STD = """
    .4765 1.0364 .4514 1.1677 .5313 .499 .4818 .5013 .8158 1.0344 .5894 1.0901
    .6885 .6165 .8454 .4978 .5759 .3523 .7135 .6804 .5833 1.4146 .8986 .5659
    .7069 .5338 .4889 .4917 .4069 .4999 .6866 .4093 .5709 .6065 .6415 .4944
    .5726 1.2042 .5458 1.6887 .3971 1.06 .3943 .5537 .5444 .4089 .7468 .7744
"""
# Wan2.2's autoencoder, in the words of diffusers, except for its widths.
WAN22: dict[str, Any] = {
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": LATENTS["wan2.2"].time,
    "scale_factor_spatial": LATENTS["wan2.2"].space,
    "latents_mean": [float(number) for number in MEAN.split()],
    "latents_std": [float(number) for number in STD.split()],
}
# A layer of a residual block of Wan2.2, whose original names nest two numbered lists.
_NESTED = re.compile(r"(encoder|decoder)\.(down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)")
_RESNET = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def load_diffusers(folder: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The autoencoder of a folder with config.json and weights; ValueError if any are missing."""
    from diffusers import AutoencoderKLWan

    with named_errors("vae", folder):
        model, info = AutoencoderKLWan.from_pretrained(
            folder, torch_dtype=dtype, low_cpu_mem_usage=False, output_loading_info=True
        )
    # diffusers initialises missing weights at random and only warns.
    lacking = [*info["missing_keys"], *info["mismatched_keys"]]
    require(not lacking, f"vae {folder}", lacking[:4], "all weights of the autoencoder")
    return model.to(device)


def load_original(file: Path, dtype: torch.dtype, device: torch.device | str, layouts: str) -> Any:
    """The autoencoder of Wan2.1_VAE.pth or Wan2.2_VAE.pth, recognised by their names.

    Raises ValueError for another file; `layouts` is for the message.
    """
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    read = dict(read_pickle(file))
    nested = {name: _unnested(name) for name in read if _NESTED.fullmatch(name)}
    weights = {new: read.pop(name) for name, new in nested.items()}
    weights |= convert_wan_vae_to_diffusers(read)
    sized = ("encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight")
    lacking = [name for name in sized if not isinstance(weights.get(name), Tensor)]
    require(not lacking, f"vae {file}", f"no {lacking}", layouts)
    base, wide, latent = (weights[name].shape[0] for name in sized)
    sizes = {"base_dim": base, "z_dim": latent}
    if nested:
        known = LATENTS["wan2.2"].channels
        require(latent == known, f"vae {file}", latent, f"{known} latent channels")
        sizes |= WAN22 | {"decoder_base_dim": wide // WAN22["dim_mult"][-1]}
    with torch.device("meta"):
        model: Any = AutoencoderKLWan(**sizes)
    fill(model, weights, file, dtype=dtype, device=device)
    return model


def _unnested(name: str) -> str:
    """diffusers' name of a nested layer: a residual block or the resampling after it."""
    match = _NESTED.fullmatch(name)
    assert match is not None
    part, way, block, layer, rest = match.groups()
    stem, _, leaf = rest.rpartition(".")
    if stem in _RESNET:
        return f"{part}.{way}_blocks.{block}.resnets.{layer}.{_RESNET[stem]}.{leaf}"
    return f"{part}.{way}_blocks.{block}.{way}sampler.{rest}"
