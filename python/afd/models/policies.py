"""The policies of a student that a method holds side by side: trained, old, averaged, reference.

They are either full copies, or one network with a LoRA adapter per version.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afd.hub import refuse_other_weights, weights_digest
from afd.models.adapters import Adapters
from afd.models.low_rank import LowRank, folded, stacked_digest
from afd.models.network import CausalNetwork
from afd.models.student import Student
from afd.models.weights import Weights
from afd_kernels.contracts import require

if TYPE_CHECKING:
    # Benchmarks build students without pydantic installed.
    from afd.models.config import LoraConfig

REFERENCE = "ref"
PRETRAINED = "pretrained"
# The version that rolls out in a thread, while others are trained.
BEHIND = "behind"
# What leads from a run's start back to the released weights: a low-rank change, or these weights.
Released = LowRank | Mapping[str, Tensor]


class Policies(ABC):
    """Versions of a student's weights. All start equal; only the trained ones take gradients.

    Attributes:
        student: the student outside `using`, with version names[0] active.
        names: the versions that have their own weights, excluding the frozen "ref", the start, and
            "pretrained", the released weights.
        start: digest of the start weights, `parents` included, if a state depends on them; else
            None.
    """

    def __init__(
        self,
        student: Student,
        names: tuple[str, ...],
        trained: tuple[str, ...],
        frozen: bool,
        parents: Sequence[LowRank] = (),
    ) -> None:
        own = tuple(name for name in names if name not in (REFERENCE, PRETRAINED))
        require(len(own) > 0 and len(set(own)) == len(own), "names", names, "different versions")
        require(set(trained) <= set(own), "trained", trained, f"some of {own}")
        self.student, self.names, self.trained = student, own, trained
        self.start = stacked_digest(start_digest(student.net), parents) if frozen else None
        self._weights: dict[str, Weights] = {}
        # Whether the student starts from other weights than the released ones.
        self._continued = PRETRAINED in names

    @abstractmethod
    def using(self, name: str) -> AbstractContextManager[Student]:
        """Context in which the student is a version from `names`, "ref", or "pretrained" if that
        was asked for; restored on exit."""

    def reference(self, name: str) -> str:
        """The frozen version that a prior's reference, "pretrained" or "previous", is."""
        return PRETRAINED if name == PRETRAINED and self._continued else REFERENCE

    def weights(self, name: str) -> Weights:
        """Master weights of a version in `names`."""
        require(name in self.names, "name", name, f"one of {self.names}")
        return self._weights[name]

    def average(self, name: str, source: str, decay: float) -> None:
        """EMA on the masters, then publish: name <- decay · name + (1 - decay) · source."""
        self.weights(name).average(self.weights(source), decay)

    def state_dict(self) -> dict[str, Any]:
        """Master weights of all versions by name, not copied (`Weights.state_dict`), and the digest
        `start`."""
        versions = {name: self._weights[name].state_dict() for name in self.names}
        return {"start": self.start, **versions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict` bit for bit, from a run of any number of processes.

        Raises ConfigError if the state belongs to other start weights.
        """
        needed = {"start", *self.names}
        require(set(state) == needed, "state", sorted(state), f"versions {self.names} and start")
        refuse_other_weights("student.checkpoint", state["start"], self.start)
        for name in self.names:
            self._weights[name].load_state_dict(state[name])


def start_digest(net: CausalNetwork, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of the base weights, optionally rounded to `dtype`, that adapters and prior use."""
    return weights_digest({name: x.to(dtype or x.dtype) for name, x in net.state_dict().items()})


class FullPolicies(Policies):
    """Each version is a separate network; "ref" exists if it is in `names`."""

    def __init__(
        self,
        student: Student,
        names: tuple[str, ...],
        trained: tuple[str, ...],
        shard: Callable[[CausalNetwork], object],
        released: Released | None = None,
    ) -> None:
        super().__init__(student, names, trained, bool({REFERENCE, PRETRAINED} & {*names}))
        others = [name for name in names if name != self.names[0]]
        self._students = {self.names[0]: student} | {name: _copy(student) for name in others}
        if PRETRAINED in names:
            _load(self._students[PRETRAINED], released)
        for version in self._students.values():
            version.net.requires_grad_(False)
            shard(version.net)
        for name in self.names:
            parameters = dict(self._students[name].net.named_parameters())
            self._weights[name] = Weights(parameters, trained=name in trained)

    def using(self, name: str) -> AbstractContextManager[Student]:
        known = name in self._students
        require(
            known, "name", name, f"one of {tuple(self._students)}, the versions of make_policies"
        )
        return nullcontext(self._students[name])


class LoraPolicies(Policies):
    """One network with an adapter per version.

    With `parents`, whose adapters are kept beside the frozen weights, every version has them, "ref"
    has them alone, and "pretrained" has none. Otherwise "ref" has no adapter, and "pretrained" one
    that takes back what the start has learned, or it is a copy of the network if that is no
    low-rank change of the adapted layers. "behind" is a network of its own, which another thread
    uses; it shares the frozen weights.
    """

    def __init__(
        self,
        student: Student,
        names: tuple[str, ...],
        trained: tuple[str, ...],
        shard: Callable[[CausalNetwork], object],
        lora: LoraConfig,
        seed: int,
        released: Released | None = None,
        parents: Sequence[LowRank] = (),
    ) -> None:
        super().__init__(student, names, trained, True, parents)
        frozen = {f"parent{n}": change for n, change in enumerate(parents, 1)}
        shared = {name: list(frozen) for name in (*self.names, REFERENCE)}
        self._copy: Student | None = None
        if PRETRAINED in names and not parents:
            if isinstance(released, LowRank) and all(
                re.fullmatch(student.net.adapted, layer) for layer in released.a_RI
            ):
                frozen[PRETRAINED], shared[PRETRAINED] = released, [PRETRAINED]
            else:
                self._copy = _copy(student)
                _load(self._copy, released)
                self._copy.net.requires_grad_(False)
                shard(self._copy.net)
        self._behind: Student | None = None
        beside: dict[str, Adapters] = {}
        if BEHIND in self.names:
            self._behind = _copy(student, share=True)
            kept = {name: change for name, change in frozen.items() if name != PRETRAINED}
            one = (self._behind.net, (BEHIND,), lora, seed)
            beside[BEHIND] = Adapters(*one, kept, {BEHIND: list(kept)})
            shard(self._behind.net)
        switched = tuple(name for name in self.names if name not in beside)
        self.adapters = Adapters(student.net, switched, lora, seed, frozen, shared)
        for name in trained:
            for parameter in self.adapters.parameters(name).values():
                parameter.requires_grad_(True)
        shard(student.net)
        for name in self.names:
            parameters = beside.get(name, self.adapters).parameters(name)
            self._weights[name] = Weights(parameters, trained=name in trained)

    @contextmanager
    def using(self, name: str) -> Iterator[Student]:
        others = (REFERENCE, PRETRAINED) if self._continued else (REFERENCE,)
        require(name in (*self.names, *others), "name", name, f"one of {self.names} or {others}")
        if name == PRETRAINED and self._copy is not None:
            yield self._copy
            return
        if name == BEHIND:
            assert self._behind is not None
            yield self._behind
            return
        with self.adapters.using(name):
            yield self.student


def make_policies(
    student: Student,
    names: tuple[str, ...],
    *,
    trained: tuple[str, ...] = ("theta",),
    lora: LoraConfig | None = None,
    seed: int = 0,
    shard: Callable[[CausalNetwork], object] | None = None,
    released: Released | None = None,
    parents: Sequence[LowRank] = (),
) -> Policies:
    """Create versions of a student, all initially equal to it.

    Args:
        student: becomes `Policies.student`.
        names: the versions; "ref" keeps a copy of the start of a fully trained student,
            "pretrained" makes the released weights.
        trained: those that take gradients.
        lora: use adapters instead of full copies.
        seed: seeds the adapters' A.
        shard: called with every network, adapters in place, before its masters are created.
        released: for "pretrained": what leads from the student back to the released weights.
        parents: with `lora` and a student of the released weights: adapters of earlier runs, kept
            beside them, which belong to every version but "pretrained".
    """
    shard = shard or (lambda net: None)
    needed = PRETRAINED in names and not parents
    require((released is not None) == needed, "released", names, "with pretrained, without parents")
    require(lora is not None or not parents, "parents", len(parents), "none without lora")
    if lora is None:
        return FullPolicies(student, names, trained, shard, released)
    return LoraPolicies(student, names, trained, shard, lora, seed, released, parents)


def _load(student: Student, released: Released | None) -> None:
    """Give a copy of the student the released weights."""
    assert released is not None
    state: Mapping[str, Tensor] = released if not isinstance(released, LowRank) else {}
    if isinstance(released, LowRank):
        state = folded(student.net.state_dict(), released)
    student.net.load_state_dict(state)


def _copy(student: Student, *, share: bool = False) -> Student:
    """A student with a deep copy of the network; read-only parts (the text encoder) are shared.

    `share`: so are the network's weights.
    """
    other = copy.copy(student)
    # The shallow copy still shares the student's module table and recorded passes.
    other._modules = dict(student._modules)
    memo = {id(x): x for x in student.net.parameters()} if share else {}
    other.net = copy.deepcopy(student.net, memo)
    if student.net.fused:
        other.net.fuse_projections()
    other.use_graphs(student._graphs is not None)
    return other
