"""FSDP2 sharding: every process holds a shard of a network's weights and gathers them per pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from afd.distributed import Ranks
from afd.models.wan.network import CausalWan

# Forward methods of a network besides `forward`. They must not call each other: the end of the
# inner one would free the gathered weights that the outer one computes with.
PASSES = ("clean_context", "forward_over", "forward_cached", "recache", "new_cache")


def shard_over(ranks: Ranks, compute_dtype: torch.dtype) -> Callable[[CausalWan], object]:
    """The `shard` callback of `make_policies`: makes each network one FSDP group.

    The shards of trainable weights are fp32 and are the master weights themselves; a pass computes
    with them in `compute_dtype`. Gradients are summed, not averaged, in fp32, since each loss is
    already a share of one mean.
    """

    def shard(net: CausalWan) -> None:
        # Imported here, as a single process does not need it.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        # FSDP2 warns about the views that a pass returns, as writing into them is an error; we
        # never do.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        net.compute_dtype = compute_dtype
        for name, parameter in net.named_parameters():
            # The base network below adapters is never trained and keeps its dtype.
            if net.adapters is None or ".lora_" in name:
                parameter.data = parameter.data.float()
        sharded = fully_shard(
            net,
            mesh=init_device_mesh(ranks.device.type, (ranks.world,)),
            # Weights change between passes without a backward, so gathered ones must not outlive
            # their pass.
            reshard_after_forward=True,
            # Inputs are not cast: times are fp32.
            mp_policy=MixedPrecisionPolicy(
                param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        for name in PASSES:
            register_fsdp_forward_method(net, name)

    return shard
