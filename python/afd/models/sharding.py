"""FSDP2: every process holds a share of a network's weights and gathers them for each pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from afd.distributed import Ranks
from afd.models.wan.network import CausalWan

# The passes of a network that are called from outside, beside `forward`. They do not call each
# other: the end of the inner one would let go of what the outer one computes with.
PASSES = ("clean_context", "forward_over", "forward_cached", "new_cache")


def shard_over(ranks: Ranks, compute_dtype: torch.dtype) -> Callable[[CausalWan], object]:
    """What `make_policies` does to each of its networks: one group of shares over the processes.

    The shares of what can be trained are fp32 and are the masters themselves; a pass computes with
    them in `compute_dtype`. Gradients are summed in fp32, as losses are shares of one mean.
    """

    def shard(net: CausalWan) -> None:
        # Here, because a single process needs none of it.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        # It warns of views, which a pass returns, as nobody may write into them; nobody does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        net.compute_dtype = compute_dtype
        for name, parameter in net.named_parameters():
            # The network below adapters is never trained and stays as it is.
            if net.adapters is None or ".lora_" in name:
                parameter.data = parameter.data.float()
        sharded = fully_shard(
            net,
            mesh=init_device_mesh(ranks.device.type, (ranks.world,)),
            # Weights change between passes that have no backward: none may outlive its pass.
            reshard_after_forward=True,
            # Inputs stay as they are: times are fp32.
            mp_policy=MixedPrecisionPolicy(
                param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        for name in PASSES:
            register_fsdp_forward_method(net, name)

    return shard
