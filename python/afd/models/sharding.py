"""Networks over several processes: their weights sharded (FSDP2), or the tokens of each video."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from afd.distributed import Ranks
from afd.models.network import CausalNetwork
from afd.models.wan.sequence import SequenceGroup

# Forward methods of a network besides `forward`. One may call another only as its last computation
# (new_cache calls text_kv): the end of the inner one frees the gathered weights of the outer one.
PASSES = ("clean_context", "forward_over", "forward_cached", "recache", "new_cache", "text_kv")


def shard_over(ranks: Ranks, compute_dtype: torch.dtype) -> Callable[[CausalNetwork], object]:
    """The `shard` callback of `make_policies`: makes each of a network's `groups`, its
    blocks, one FSDP group, and the rest one.

    A pass holds the weights of the block that it runs and of the next one, which are gathered
    meanwhile; a backward pass those of the block before. The shards of trainable weights are fp32
    and are the master weights themselves; a pass computes with them in `compute_dtype`. Gradients
    are summed, not averaged, in fp32, since each loss is already a share of one mean.
    """

    def shard(net: CausalNetwork) -> None:
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
        mesh = init_device_mesh(ranks.device.type, (ranks.processes,))
        # Inputs are not cast: times are fp32.
        precision = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        # Weights change between passes without a backward, so gathered ones must not outlive their
        # pass.
        how: Any = {"mesh": mesh, "reshard_after_forward": True, "mp_policy": precision}
        *blocks, root = (fully_shard(part, **how) for part in (*net.groups, net))
        for module in (*blocks, root):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        # The root's backward prefetches the last block by default, and once: a context's gradients
        # begin it again in every layer.
        for one, following in pairwise([root, *blocks]):
            one.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([one])
        for name in PASSES:
            if hasattr(net, name):
                register_fsdp_forward_method(net, name)

    return shard


def sequence_over(ranks: Ranks) -> SequenceGroup | None:
    """This process's group of those that compute the same videos; None if it is alone with them.

    Every process must call this.
    """
    if ranks.parts == 1:
        return None
    # Imported here, as a single process does not need it.
    from torch.distributed.device_mesh import init_device_mesh

    shape, names = (ranks.world, ranks.parts), ("data", "sequence")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    return SequenceGroup(mesh["sequence"].get_group())
