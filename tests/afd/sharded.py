"""What each process of the sharding tests does; a module, because processes import it."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from afd.distributed import join
from afd.models.config import LoraConfig
from afd.models.policies import make_policies
from afd.models.sharding import shard_over
from afd.models.weights import local
from tests.afd.distributed import parent, sharing, wan_method
from tests.afd.tiny_methods import wan_batch, wan_student


def _groups(net: torch.nn.Module) -> list[FSDPParamGroup]:
    modules = [module for module in net.modules() if isinstance(module, FSDPModule)]
    return [module._get_fsdp_state()._fsdp_param_group for module in modules]


def _numbers(group: FSDPParamGroup) -> int:
    return sum(param._orig_size.numel() for param in group.fsdp_params)


# Frozen weights of a run with adapters, by what its parents are.
FROZEN = ("none", "stacked", "taken back", "replaced")


def held_weights(sharded: bool) -> dict[str, int]:
    """Bytes of all weights and masters of a bf16 Wan's versions in this process, for each of
    FROZEN, for versions whose every weight is their own, and, not sharded, with rollouts ahead."""
    with join("cpu") as ranks:
        shard = shard_over(ranks, torch.bfloat16) if sharded else None
        ahead = () if sharded else ("stacked, ahead",)
        return {name: _held(name, shard) for name in (*FROZEN, "every weight", *ahead)}


def _held(name: str, shard: Any) -> int:
    student = wan_student(torch.bfloat16)
    lora, more = LoraConfig(rank=4, alpha=4.0), {}
    versions = ("theta", "ema", "ref")
    if name.startswith("stacked"):
        more["parents"] = [parent(student, 3, 0.5), parent(student, 2, 1.0)]
        versions = (*versions, "pretrained", *(["behind"] if "ahead" in name else []))
    elif name in ("taken back", "replaced"):
        weights = dict(student.net.state_dict())
        more["released"] = parent(student, 5, 1.0) if name == "taken back" else weights
        versions = (*versions, "pretrained")
    whole = name == "every weight"
    policies = make_policies(student, versions, lora=None if whole else lora, shard=shard, **more)
    found: dict[int, int] = {}
    held = [master for one in policies.names for master in policies.weights(one).masters]
    for version in versions:
        with policies.using(version) as using:
            held += using.net.parameters()
    for tensor in map(local, held):
        found[tensor.data_ptr()] = tensor.nbytes
    return sum(found.values())


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
