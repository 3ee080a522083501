"""fp32 master weights of one version, which are optimised and averaged whatever the compute dtype.

A bf16 weight cannot represent the small steps of fine-tuning (a step below 1/256 of it rounds
away), so every version has fp32 masters; the network computes with their rounded copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from afd_kernels.contracts import require


class Weights:
    """fp32 master weights of one version.

    If the network's parameters are already fp32 (as FSDP's shards are), the masters are these
    parameters. Otherwise they are copies; each gradient is accumulated into its master in fp32 as
    soon as autograd produces it, and the parameter's gradient is freed.

    Args:
        parameters: the version's parameters by name, in the order of the network.
        trained: whether gradients are needed.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, trained: bool) -> None:
        self.names = list(parameters)
        self.masters: list[Tensor] = []
        self._rounded: list[tuple[nn.Parameter, Tensor]] = []
        for parameter in parameters.values():
            parameter.requires_grad_(trained)
            if parameter.dtype.itemsize >= 4:
                self.masters.append(parameter)
                continue
            master = parameter.detach().float().requires_grad_(trained)
            self.masters.append(master)
            self._rounded.append((parameter, master))
            if trained:
                parameter.register_post_accumulate_grad_hook(_add_to(master))

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the network's parameters in place, so that fused projections and
        captured graphs that hold them use the new values."""
        if self._rounded:
            parameters, masters = zip(*self._rounded, strict=True)
            torch._foreach_copy_(list(parameters), list(masters))

    @torch.no_grad()
    def average(self, source: Weights, decay: float) -> None:
        """EMA, then publish: masters <- decay · masters + (1 - decay) · source's masters."""
        mine, theirs = ([local(x) for x in w.masters] for w in (self, source))
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        self.publish()

    def state_dict(self) -> dict[str, Tensor]:
        """The masters by name, fp32, not copied; DTensors in a sharded run."""
        masters = zip(self.names, self.masters, strict=True)
        return {name: master.detach() for name, master in masters}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load every master by name (see `fill`) and publish."""
        odd = sorted(set(state) ^ set(self.names))
        require(not odd, "state", odd[:4], "the weights of this version, each under its name")
        for name, master in zip(self.names, self.masters, strict=True):
            same = state[name].shape == master.shape
            require(same, f"state: {name}", state[name], f"shape {list(master.shape)}")
            fill(master, state[name])
        self.publish()


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy `value` into `tensor`; it is full and equal on all processes, or sharded like it."""
    if isinstance(tensor, DTensor) and not isinstance(value, DTensor):
        mesh, placements = tensor.device_mesh, tensor.placements
        value = distribute_tensor(value.to(tensor.device), mesh, placements, src_data_rank=None)
    local(tensor).copy_(local(value))


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; otherwise the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _add_to(master: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return add
