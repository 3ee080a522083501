"""The meta device as a simulated accelerator: an update's operations without memory or time.

Tensors on the meta device have shapes but no values, as under FakeTensorMode; tensors on the CPU
keep their values, so that drawn times, chunks and seeds select what runs as in a real update.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from afd import ops
from afd.config.run import RunConfig
from afd.models.codec import Pixels
from afd.models.wan.network import CausalWan
from afd.models.wan.student import WanStudent
from afd.models.wan.types import WanConfig
from afd.trainer.build import assemble, build_discriminator

aten = torch.ops.aten
META = torch.device("meta")


class Simulated(TorchDispatchMode):
    """Runs operations with any meta tensor on the meta device; values read from there are 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        away = [x for x in tensors if x.is_meta]
        if func is aten._local_scalar_dense.default and away:
            return 1.0
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            target = torch.device(kwargs["device"]).type
            (x,) = tensors
            if away and target == "cpu":
                return torch.ones((), dtype=kwargs.get("dtype") or x.dtype).expand(x.shape)
            if target == "meta" and not x.dtype.is_floating_point:
                # Indices and masks decide what runs.
                return func(x, **{**kwargs, "device": None})
        if away and len(away) < len(tensors):
            args, kwargs = tree_map_only(Tensor, _meta, (args, kwargs))
        return func(*args, **kwargs)


def _meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)


def simulated_method(config: RunConfig, wan: WanConfig, size: tuple[int, int, int]) -> Any:
    """A run's method on the meta device, with a network of `wan` on latents of F, H, W = `size`."""
    frames, height, width = size
    with META:
        net = CausalWan(wan)
    net.to(getattr(torch, config.student.dtype)).requires_grad_(False)
    net.checkpoint_blocks = config.student.checkpoint_blocks
    student = WanStudent(
        net,
        frames=frames,
        height=height,
        width=width,
        encoder=lambda prompts: torch.empty(len(prompts), wan.text_len, wan.text_dim, device=META),
    )
    discriminator = None
    with Simulated():
        if config.method in ("afd", "gan"):
            discriminator = build_discriminator(config, student)
        return assemble(config, student, Pixels(), discriminator)


def operations(run: Callable[[], object], *, real: bool = False) -> int:
    """Operations of a simulated or real program, by PyTorch's counter.

    The counter has no formula for the fused attention of the CPU, and the meta device none fused.
    """
    ops.register_flop_formulas()
    mode = nullcontext() if real else Simulated()
    with mode, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
