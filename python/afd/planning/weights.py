"""The versions of a student's weights in a run: the memory that they take, and what FSDP shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from afd.config.run import RunConfig
from afd.methods.config import StudentOptimizerConfig
from afd.models.policies import BEHIND, PRETRAINED, REFERENCE
from afd.planning import cost_model as cost
from afd.planning.cost_model import Net
from afd.planning.parts import Part
from afd.trainer.build import frozen_versions
from afd.trainer.origin import parent_ranks


@dataclass(frozen=True)
class VersionWeights:
    """The weights of a run's versions, as `afd.models.policies` holds them.

    Attributes:
        net: sizes of the network.
        item: bytes of a number that it computes with.
        shards: processes over which FSDP shards all weights; 1: without FSDP.
        own: versions with weights of their own that the run changes.
        trained: those of them that take gradients.
        copies: frozen versions that are networks of their own.
        frozen: ranks of the frozen adapters in the network of `own`: the parents', or the one that
            takes the parents back.
        stacked: whether they are the parents'.
    """

    net: Net
    item: int
    shards: int
    own: tuple[str, ...]
    trained: tuple[str, ...]
    copies: tuple[str, ...] = ()
    frozen: tuple[int, ...] = ()
    stacked: bool = False

    def memory(self) -> Iterator[Part]:
        """What a process holds of the weights, of their gradients and of the optimizer's state.

        FSDP shards every network: all adapters, frozen ones too, frozen copies and trained weights
        in fp32, and the weights below adapters in the network's dtype.
        """
        net, item, parts, lora = self.net, self.item, self.shards, self.net.lora is not None
        # FSDP shards are the fp32 masters; without FSDP, the network holds copies in its own dtype.
        held = item if parts == 1 else cost.FLOAT
        master = 0 if held == cost.FLOAT else cost.FLOAT
        if lora:
            yield Part("network", net.parameters * item // parts, "always", "frozen weights")
        one = net.trained * (held + master) // parts
        note = f"{', '.join(self.own)}: {net.trained:,} numbers each"
        yield Part("adapters" if lora else "network", len(self.own) * one, "always", note)
        for name in self.copies:
            what = "the start" if name == REFERENCE else "the released weights"
            size = net.parameters * held // parts
            yield Part("reference", size, "always", f"frozen copy of {what}")
        if self.frozen:
            yield self._frozen(held)
        if parts > 1:
            # A block is gathered with all adapters in it, whichever are active.
            adapters = len(self.own) * net.lora_parameters + self._adapter(sum(self.frozen))
            size = (net.outside_blocks + 2 * (net.block + adapters // net.layers)) * item
            note = f"2 of {net.layers} blocks, and what is outside them, for a pass"
            yield Part("gathered", size, "always", note)
        numbers = len(self.trained) * net.trained // parts
        yield Part("optimizer", 2 * cost.FLOAT * numbers, "always", "Adam's two moments, fp32")
        yield Part("gradients", cost.FLOAT * numbers, "always", "fp32")

    def _frozen(self, held: int) -> Part:
        """The frozen adapters, `held` bytes a number."""
        rank = sum(self.frozen)
        size = self._adapter(rank) * held // self.shards
        if not self.stacked:
            note = f"takes back parents of rank {rank}, for the released weights"
            return Part("reference", size, "always", note)
        note = f"{len(self.frozen)} kept beside the released weights, of rank {rank}"
        if BEHIND in self.own:
            size, note = 2 * size, f"{note}; twice, as rollouts are made ahead"
        return Part("parents' adapters", size, "always", note)

    def _adapter(self, rank: int) -> int:
        """Parameters of an adapter of some rank."""
        return self.net.lora_parameters // (self.net.lora or 1) * rank


def weights_of(config: RunConfig, net: Net, item: int, shards: int) -> VersionWeights:
    """The weights of a run's versions, without loading any; arguments as in `VersionWeights`."""
    method: StudentOptimizerConfig = getattr(config, config.method)
    own = tuple(name for name in method.versions if name != REFERENCE)
    both = net, item, shards, own, method.trained
    names, student = frozen_versions(config), config.student
    if student.lora is None:
        return VersionWeights(*both, copies=tuple(names))
    stacked = student.parents == "stacked"
    if PRETRAINED not in names and not stacked:
        return VersionWeights(*both)  # the start is the network with its adapters off
    ranks = parent_ranks(student)
    if ranks is None:
        return VersionWeights(*both, copies=(PRETRAINED,))
    return VersionWeights(*both, frozen=tuple(ranks) if stacked else (sum(ranks),), stacked=stacked)
