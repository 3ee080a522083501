"""LoRA adapters for several versions of one network, through PEFT.

The base weights are frozen and shared; a version is the base plus its adapters: one of its own, and
frozen ones that several versions may share.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from afd.extras import need
from afd.models.low_rank import LowRank
from afd.models.network import CausalNetwork

if TYPE_CHECKING:
    # Benchmarks build students without pydantic installed.
    from afd.models.config import LoraConfig


def adapter_name(version: str) -> str:
    """PEFT's adapter name of a version: "theta" maps to "default", which PEFT's tools expect."""
    return "default" if version == "theta" else version


class Adapters:
    """The adapters of a network's versions; those of one version are active at a time.

    All start as a zero update: B = 0, and the same A for all, drawn from `seed`.

    Args:
        versions: those with an adapter of their own.
        frozen: adapters that are never trained, by name, as changes of layers in `net.adapted`.
        shared: the frozen adapters of a version, of those without one of their own too, in the
            order in which they are added.

    Raises:
        ConfigError: if peft is not installed.
    """

    def __init__(
        self,
        net: CausalNetwork,
        versions: tuple[str, ...],
        config: LoraConfig,
        seed: int,
        frozen: Mapping[str, LowRank] | None = None,
        shared: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        need("student.lora", "peft")
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self.net, self.versions = net, versions
        frozen, self._shared = frozen or {}, shared or {}
        wanted = {adapter_name(version): (config.rank, config.alpha) for version in versions}
        wanted |= {name: (change.rank, change.rank) for name, change in frozen.items()}
        for name, (rank, alpha) in wanted.items():
            settings = PeftConfig(
                r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=net.adapted
            )
            with warnings.catch_warnings():
                # PEFT warns about every adapter but the first.
                warnings.simplefilter("ignore", UserWarning)
                # On the meta device: PEFT would initialise all adapters twice, a minute at full
                # size.
                inject_adapter_in_model(settings, net, name, low_cpu_mem_usage=True)
        # All layers share this list, so switching does not iterate over them.
        self._on: list[str] = self._of(versions[0])
        generator = torch.Generator().manual_seed(seed)
        for layer, module in net.named_modules():
            if isinstance(module, LoraLayer):
                module._active_adapter = self._on
                _fill(module, [adapter_name(version) for version in versions], generator)
                for name, change in frozen.items():
                    _fill_frozen(module, name, change, layer)
        net.requires_grad_(False)
        net.adapters = self

    @property
    def active(self) -> tuple[str, ...]:
        """PEFT's names of the active adapters; empty if all are disabled."""
        return tuple(self._on)

    @contextmanager
    def using(self, version: str) -> Iterator[None]:
        """Activate one version's adapters, none for a version that has none; restores the previous
        ones."""
        with self._turned_on(self._of(version)):
            yield

    def _of(self, version: str) -> list[str]:
        own = [adapter_name(version)] if version in self.versions else []
        return [*self._shared.get(version, ()), *own]

    def recompute(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for checkpointed blocks: recomputation uses the adapter that is active now."""
        return nullcontext(), self._turned_on(list(self._on))

    @contextmanager
    def _turned_on(self, adapters: list[str]) -> Iterator[None]:
        before = list(self._on)
        self._on[:] = adapters
        try:
            yield
        finally:
            self._on[:] = before

    def parameters(self, version: str) -> dict[str, nn.Parameter]:
        """A and B of every layer of a version; the adapter's name is removed from their names."""
        part = f".{adapter_name(version)}.weight"
        return {
            name.replace(part, ".weight"): parameter
            for name, parameter in self.net.named_parameters()
            if name.endswith(part) and (".lora_A." in name or ".lora_B." in name)
        }


def _fill(layer: Any, names: Sequence[str], generator: torch.Generator) -> None:
    """Materialise a `LoraLayer`'s trained adapters: B = 0, one shared A, uniform as in PEFT."""
    like = layer.get_base_layer().weight
    bound = layer.in_features**-0.5
    a_RI = torch.empty(layer.lora_A[names[0]].weight.shape)
    a_RI.uniform_(-bound, bound, generator=generator)
    for parts, value in ((layer.lora_A, a_RI), (layer.lora_B, None)):
        for linear in (parts[name] for name in names):
            weight = torch.zeros(linear.weight.shape, dtype=like.dtype, device=like.device)
            linear.weight = nn.Parameter(weight if value is None else weight.copy_(value))


def _fill_frozen(layer: Any, name: str, change: LowRank, which: str) -> None:
    """Materialise a frozen adapter; a layer that its change lacks, or a smaller rank, is zero."""
    like = layer.get_base_layer().weight
    # Not in a factor: its run's network multiplied the product, too.
    layer.scaling[name] = change.scale
    for parts, factors in ((layer.lora_A, change.a_RI), (layer.lora_B, change.b_OR)):
        linear = parts[name]
        weight = torch.zeros(linear.weight.shape, dtype=like.dtype, device=like.device)
        if which in factors:
            rows, columns = factors[which].shape
            weight[:rows, :columns] = factors[which]
        linear.weight = nn.Parameter(weight)
