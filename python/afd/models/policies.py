"""The versions of a student that a method needs side by side: trained, old, averaged, reference.

Either whole copies, or one network with an adapter for each version.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from afd.hub import refuse_other_weights, weights_digest
from afd.models.adapters import Adapters
from afd.models.student import Student
from afd.models.wan.network import CausalWan
from afd.models.weights import Weights
from afd_kernels.contracts import require

if TYPE_CHECKING:
    # Benchmarks make students where pydantic is missing.
    from afd.models.config import LoraConfig

REFERENCE = "ref"


class Policies(ABC):
    """Versions of a student's weights. All start equal; only the trained ones take gradients.

    Attributes:
        student: the resting student, in which version names[0] is active.
        names: the versions with weights of their own. "ref", the frozen start, is not among them.
        start: digest of the start weights, where a state means nothing without them; else None.
    """

    def __init__(
        self, student: Student, names: tuple[str, ...], trained: tuple[str, ...], frozen: bool
    ) -> None:
        own = tuple(name for name in names if name != REFERENCE)
        require(len(own) > 0 and len(set(own)) == len(own), "names", names, "different versions")
        require(set(trained) <= set(own), "trained", trained, f"some of {own}")
        self.student, self.names, self.trained = student, own, trained
        self.start = start_digest(student.net) if frozen else None
        self._weights: dict[str, Weights] = {}

    @abstractmethod
    def using(self, name: str) -> AbstractContextManager[Student]:
        """The student as a version, in `names` or "ref"; afterwards it rests as before."""

    def weights(self, name: str) -> Weights:
        """The masters of a version in `names`."""
        require(name in self.names, "name", name, f"one of {self.names}")
        return self._weights[name]

    def average(self, name: str, source: str, decay: float) -> None:
        """name <- decay · name + (1 - decay) · source, on the masters; then published."""
        self.weights(name).average(self.weights(source), decay)

    def state_dict(self) -> dict[str, Any]:
        """The masters of all versions by name, not copied (`Weights.state_dict`); and `start`, the
        digest."""
        versions = {name: self._weights[name].state_dict() for name in self.names}
        return {"start": self.start, **versions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave, bit for bit, whatever the number of processes was.

        Raises ConfigError where it belongs to other start weights.
        """
        needed = {"start", *self.names}
        require(set(state) == needed, "state", sorted(state), f"versions {self.names} and start")
        refuse_other_weights("student.checkpoint", state["start"], self.start)
        for name in self.names:
            self._weights[name].load_state_dict(state[name])


def start_digest(net: CausalWan, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of a network's weights, rounded to a dtype: what adapters and a prior stand on."""
    return weights_digest({name: x.to(dtype or x.dtype) for name, x in net.state_dict().items()})


class FullPolicies(Policies):
    """Every version a network of its own. "ref" exists where the names ask for it."""

    def __init__(
        self,
        student: Student,
        names: tuple[str, ...],
        trained: tuple[str, ...],
        shard: Callable[[CausalWan], object],
    ) -> None:
        super().__init__(student, names, trained, frozen=REFERENCE in names)
        others = [name for name in names if name != self.names[0]]
        self._students = {self.names[0]: student} | {name: _copy(student) for name in others}
        for version in self._students.values():
            version.net.requires_grad_(False)
            shard(version.net)
        for name in self.names:
            parameters = dict(self._students[name].net.named_parameters())
            self._weights[name] = Weights(parameters, trained=name in trained)

    def using(self, name: str) -> AbstractContextManager[Student]:
        known = name in self._students
        require(known, "name", name, f"one of {tuple(self._students)}, as make_policies was told")
        return nullcontext(self._students[name])


class LoraPolicies(Policies):
    """One network with an adapter for each version; "ref" is the network with none."""

    def __init__(
        self,
        student: Student,
        names: tuple[str, ...],
        trained: tuple[str, ...],
        shard: Callable[[CausalWan], object],
        lora: LoraConfig,
        seed: int,
    ) -> None:
        super().__init__(student, names, trained, frozen=True)
        self.adapters = Adapters(student.net, self.names, lora, seed)
        for name in trained:
            for parameter in self.adapters.parameters(name).values():
                parameter.requires_grad_(True)
        shard(student.net)
        for name in self.names:
            parameters = self.adapters.parameters(name)
            self._weights[name] = Weights(parameters, trained=name in trained)

    @contextmanager
    def using(self, name: str) -> Iterator[Student]:
        require(name in (*self.names, REFERENCE), "name", name, f"one of {self.names} or 'ref'")
        with self.adapters.using(None if name == REFERENCE else name):
            yield self.student


def make_policies(
    student: Student,
    names: tuple[str, ...],
    *,
    trained: tuple[str, ...] = ("theta",),
    lora: LoraConfig | None = None,
    seed: int = 0,
    shard: Callable[[CausalWan], object] | None = None,
) -> Policies:
    """Versions of a student, all equal to it.

    Args:
        student: becomes the resting student.
        names: the versions; with "ref" among them a full student's start is kept for `using`.
        trained: those that take gradients.
        lora: adapters instead of whole copies.
        seed: of the adapters' A.
        shard: called with every network, adapters in place, before its masters are made.
    """
    shard = shard or (lambda net: None)
    if lora is None:
        return FullPolicies(student, names, trained, shard)
    return LoraPolicies(student, names, trained, shard, lora, seed)


def _copy(student: Student) -> Student:
    """A student with a network of its own; what only reads (the text encoder) is shared."""
    other = copy.copy(student)
    # The shallow copy still has the student's own table of modules, and its recorded passes.
    other._modules = dict(student._modules)
    other.net = copy.deepcopy(student.net)
    if student.net.fused:
        other.net.fuse_projections()
    other.use_graphs(student._graphs is not None)
    return other
