"""LoRA adapters of several versions on one network, through PEFT.

The network's own weights are frozen and shared; a version is what its adapter adds to them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from afd.extras import need
from afd.models.wan.network import CausalWan

if TYPE_CHECKING:
    # Benchmarks make students where pydantic is missing.
    from afd.models.config import LoraConfig

# Every linear layer of the blocks.
TARGETS = r"blocks\.\d+\.((self_attn|cross_attn)\.[qkvo]|ffn\.[02])"


def adapter_name(version: str) -> str:
    """PEFT's name of a version: the trained one is PEFT's "default", which its tools expect."""
    return "default" if version == "theta" else version


class Adapters:
    """The adapters of a network's versions, of which one is on, or none.

    All start as the same zero: B = 0, and the same A for all, drawn from `seed`.

    Raises:
        ConfigError: where peft is not installed.
    """

    def __init__(
        self, net: CausalWan, versions: tuple[str, ...], config: LoraConfig, seed: int
    ) -> None:
        need("student.lora", "peft")
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self.net, self.versions = net, versions
        settings = PeftConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=TARGETS
        )
        for version in versions:
            with warnings.catch_warnings():
                # PEFT warns of every adapter but the first.
                warnings.simplefilter("ignore", UserWarning)
                # Without memory: it would draw all of them twice, a minute at real size.
                inject_adapter_in_model(
                    settings, net, adapter_name(version), low_cpu_mem_usage=True
                )
        # One list that all layers look at: switching does not walk through them.
        self._on: list[str] = [adapter_name(versions[0])]
        generator = torch.Generator().manual_seed(seed)
        for module in net.modules():
            if isinstance(module, LoraLayer):
                module._active_adapter = self._on
                _fill(module, generator)
        net.requires_grad_(False)
        net.adapters = self

    @property
    def active(self) -> str | None:
        """PEFT's name of the adapter that is on."""
        return self._on[0] if self._on else None

    @contextmanager
    def using(self, version: str | None) -> Iterator[None]:
        """Turn one version's adapter on, or all off (None); what was on before is put back."""
        with self._turned_on([] if version is None else [adapter_name(version)]):
            yield

    def recompute(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For checkpointed blocks: they are computed again with what is on now."""
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
        """A and B of every layer of a version, without the adapter's name in theirs."""
        part = f".{adapter_name(version)}.weight"
        return {
            name.replace(part, ".weight"): parameter
            for name, parameter in self.net.named_parameters()
            if name.endswith(part) and (".lora_A." in name or ".lora_B." in name)
        }


def _fill(layer: Any, generator: torch.Generator) -> None:
    """Give a `LoraLayer`'s adapters memory: B = 0, and one A for all, uniform as PEFT has it."""
    like = layer.get_base_layer().weight
    bound = layer.in_features**-0.5
    a_RI = torch.empty(next(iter(layer.lora_A.values())).weight.shape)
    a_RI.uniform_(-bound, bound, generator=generator)
    for parts, value in ((layer.lora_A, a_RI), (layer.lora_B, None)):
        for linear in parts.values():
            weight = torch.zeros(linear.weight.shape, dtype=like.dtype, device=like.device)
            linear.weight = nn.Parameter(weight if value is None else weight.copy_(value))
