"""What each process of the sharding tests does; a module, because processes import it."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from afd.distributed import join
from tests.afd.distributed import sharing, wan_method
from tests.afd.tiny_methods import wan_batch


def _groups(net: torch.nn.Module) -> list[FSDPParamGroup]:
    modules = [module for module in net.modules() if isinstance(module, FSDPModule)]
    return [module._get_fsdp_state()._fsdp_param_group for module in modules]


def _numbers(group: FSDPParamGroup) -> int:
    return sum(param._orig_size.numel() for param in group.fsdp_params)


def held_by_an_update(name: str, layers: int) -> dict[str, Any]:
    """Parameters gathered during an update of a sharded method, at most, and what a pass needs.

    A group counts from the start of its gathering to the end of its use.
    """
    with join("cpu") as ranks:
        method = wan_method(name, ranks, "fsdp", num_layers=layers, checkpoint_blocks=True)
        nets = {id(s.net): s.net for s in method.policies._students.values()}
        groups = [group for net in nets.values() for group in _groups(net)]
        peak, begins = [0], FSDPParamGroup.unshard

        def unshard(group: FSDPParamGroup, async_op: bool = False) -> None:
            begins(group, async_op)
            held = [g for g in groups if g.is_unsharded or g._all_gather_result is not None]
            peak[0] = max(peak[0], sum(map(_numbers, held)))

        FSDPParamGroup.unshard = unshard  # type: ignore[method-assign]
        batch = sharing(wan_batch(0), ranks)
        method.rollout(batch)
        method.discriminator_step(batch)
        method.student_step(batch)
        left = [g for g in groups if g.is_unsharded or g._all_gather_result is not None]
        root, *blocks = map(_numbers, _groups(method.policies.student.net))
        return {"peak": peak[0], "left": len(left), "root": root, "blocks": blocks}
