"""One version's weights as they are optimised and averaged: in fp32, whatever the network is in.

A bf16 weight cannot hold the small steps of fine-tuning (a step below 1/256 of it rounds away), so
every version has fp32 masters; the network computes with their rounded copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from afd_kernels.contracts import require


class Weights:
    """fp32 masters of one version's weights.

    Where the network's parameters are fp32 already (or FSDP's shares, which are), the masters are
    these very parameters. Elsewhere they are copies; each gradient is added to its master in fp32
    as soon as autograd has made it, and the parameter's own is let go.

    Args:
        parameters: the version's parameters by name, in the order of the network.
        trained: whether gradients are wanted.
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
        """Write the masters into the network's parameters, in place: whoever holds these (fused
        projections, captured graphs) computes with the new values."""
        if self._rounded:
            parameters, masters = zip(*self._rounded, strict=True)
            torch._foreach_copy_(list(parameters), list(masters))

    @torch.no_grad()
    def average(self, source: Weights, decay: float) -> None:
        """masters <- decay · masters + (1 - decay) · the source's, then published."""
        mine, theirs = ([local(x) for x in w.masters] for w in (self, source))
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        self.publish()

    def state_dict(self) -> dict[str, Tensor]:
        """The masters themselves by name, fp32: not copied, in a sharded run its shares."""
        masters = zip(self.names, self.masters, strict=True)
        return {name: master.detach() for name, master in masters}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take values for every master, by name (see `fill`); publishes them."""
        odd = sorted(set(state) ^ set(self.names))
        require(not odd, "state", odd[:4], "the weights of this version, each under its name")
        for name, master in zip(self.names, self.masters, strict=True):
            same = state[name].shape == master.shape
            require(same, f"state: {name}", state[name], f"shape {list(master.shape)}")
            fill(master, state[name])
        self.publish()


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """tensor <- value, which is whole and the same on every process, or in the tensor's shares."""
    if isinstance(tensor, DTensor) and not isinstance(value, DTensor):
        mesh, placements = tensor.device_mesh, tensor.placements
        value = distribute_tensor(value.to(tensor.device), mesh, placements, src_data_rank=None)
    local(tensor).copy_(local(value))


def local(tensor: Tensor) -> Tensor:
    """This process's share of a sharded tensor, else the tensor."""
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
