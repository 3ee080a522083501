"""`afd export`: write a run's trained weights in formats that other programs load.

Adapters are written separately (with PEFT's or diffusers' names) or merged into the weights they
were trained on; a run that trained every weight has no adapters. Everything is computed from the
fp32 masters and fp32 start weights and rounded only once, to the requested dtype.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from afd.config.base import Folder, Section
from afd.config.run import FREE_KEYS, RunConfig, flatten, plain
from afd.errors import ConfigError
from afd.extras import need
from afd.files import replacing
from afd.hub import refuse_other_weights
from afd.models.adapters import TARGETS
from afd.models.config import DTYPES, LoraConfig
from afd.models.policies import start_digest
from afd.models.wan.checkpoints import (
    save_diffusers,
    save_self_forcing,
    to_diffusers,
)
from afd.models.wan.network import CausalWan
from afd.trainer import checkpoint
from afd.trainer.run_folder import load_run

# Order of preference if no version is named; the first is the one that is evaluated.
PREFERRED = ("ema", "old", "theta")


class ExportConfig(Section):
    """Configuration of `afd export`."""

    out: Folder = Field(description="folder to write, new or empty")
    kind: Literal["peft", "diffusers_lora", "self_forcing", "diffusers", "student"] | None = Field(
        default=None,
        description="peft: adapter folder; diffusers_lora: for load_lora_weights; self_forcing: "
        "model.pt with whole weights; diffusers: transformer/ with whole weights; "
        "student: loadable as student.checkpoint; null: diffusers_lora if the run "
        "trains adapters, else self_forcing",
    )
    weights: Literal["ema", "old", "theta"] | None = Field(
        default=None, description="version of the weights; null: ema if the run has it, else old"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="dtype of the written weights"
    )


def export(folder: Path, config: ExportConfig) -> Path:
    """Write the newest checkpoint of the run in `folder`; returns the folder written.

    It is written under a temporary name and renamed, so it is complete or absent. Its `afd.json`
    and the header of its weights record their origin. A model.pt has the trained weights as
    `generator` and the requested version as `generator_ema`; Self-Forcing's inference loads either.
    Raises ConfigError if the export is not possible, naming the alternatives.
    """
    out = config.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out: {out} is not empty; needed: a new or empty folder")
    run = load_run(folder)
    path = checkpoint.latest(folder / "checkpoints")
    if path is None:
        raise ConfigError(f"run folder {folder}: has no checkpoint, nothing to export")
    only = "method_state/policies/"
    state = checkpoint.load(path, method=run.method, config=plain(run), only=only)
    versions = dict(state["method_state"]["policies"])
    start = versions.pop("start")
    kind = config.kind or ("self_forcing" if run.student.lora is None else "diffusers_lora")
    name = _choose(config, versions)
    note = json.dumps(_provenance(run, path, state["update"], kind, name), indent=1)
    learned = _Learned(run, versions, start, DTYPES[config.dtype], note)
    with replacing(out) as partial:
        partial.mkdir()
        (partial / "afd.json").write_text(note + "\n", encoding="utf-8")
        getattr(learned, kind)(partial, name)
    return out


def start_network(run: RunConfig) -> CausalWan:
    """Load the network that a run started from, in float32."""
    run.student.require_weights()
    try:
        network: CausalWan = run.student.load_network()
    except ValueError as error:
        raise ConfigError(f"student.checkpoint: {error}") from error
    return network


def merged(
    network: CausalWan, adapters: Mapping[str, Tensor], lora: LoraConfig
) -> dict[str, Tensor]:
    """A network's weights with adapters merged: W + alpha / rank · B A, in the network's dtype."""
    state = dict(network.state_dict())
    for name, b_OR in adapters.items():
        layer, adapter, _ = name.rpartition(".lora_B")
        if not adapter:
            continue
        change = (b_OR @ adapters[f"{layer}.lora_A.weight"]) * (lora.alpha / lora.rank)
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + change
    return state


@dataclass(frozen=True)
class _Learned:
    """A run's trained versions, with one export method per file format."""

    run: RunConfig
    versions: Mapping[str, Mapping[str, Tensor]]
    start: str | None
    dtype: torch.dtype
    note: str

    def peft(self, folder: Path, version: str) -> None:
        """Write a folder for `PeftModel.from_pretrained(net, folder)`."""
        lora, adapters = self._adapters("peft", version)
        need("kind=peft", "peft")
        from peft import LoraConfig as PeftConfig

        settings = PeftConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=TARGETS, inference_mode=True
        )
        settings.save_pretrained(str(folder))
        state = {f"base_model.model.{name}": tensor for name, tensor in adapters.items()}
        header = {"format": "pt", "afd": self.note}
        save_file(state, folder / "adapter_model.safetensors", metadata=header)

    def diffusers_lora(self, folder: Path, version: str) -> None:
        """Write the file for `WanPipeline.load_lora_weights(folder)`, with rank and alpha."""
        lora, adapters = self._adapters("diffusers_lora", version)
        state, layers = {}, set()
        for name, tensor in adapters.items():
            layer, adapter, rest = name.partition(".lora_")
            layers.add(to_diffusers(layer))
            state[f"transformer.{to_diffusers(layer)}{adapter}{rest}"] = tensor
        settings = {
            "transformer.r": lora.rank,
            "transformer.lora_alpha": lora.alpha,
            "transformer.target_modules": sorted(layers),
        }
        header = {"format": "pt", "afd": self.note, "lora_adapter_metadata": json.dumps(settings)}
        save_file(state, folder / "pytorch_lora_weights.safetensors", metadata=header)

    def self_forcing(self, folder: Path, version: str) -> None:
        network = start_network(self.run)
        average = None if version == "theta" else self._whole(network, version)
        trained = self._whole(network, "theta")
        file = folder / "model.pt"
        save_self_forcing(file, generator=trained, generator_ema=average, note=self.note)

    def diffusers(self, folder: Path, version: str) -> None:
        network = start_network(self.run)
        whole = self._whole(network, version)
        network.to(self.dtype).load_state_dict(whole)
        save_diffusers(folder / "transformer", network, note=self.note)

    def student(self, folder: Path, version: str) -> None:
        """Write a file for `student.checkpoint`, for any kind of student."""
        network = start_network(self.run)
        network.load_state_dict(self._whole(network, version))
        self.run.student.save(network, folder, self.dtype, self.note)

    def _adapters(self, kind: str, version: str) -> tuple[LoraConfig, dict[str, Tensor]]:
        lora = self.run.student.lora
        if lora is None:
            raise ConfigError(
                f"kind: got {kind}; this run trained every weight (student.lora is null), and the "
                "change of a whole weight is no low-rank product, so there is no adapter to write; "
                "needed: self_forcing or diffusers"
            )
        return lora, {k: v.to(self.dtype) for k, v in self.versions[version].items()}

    def _whole(self, network: CausalWan, version: str) -> dict[str, Tensor]:
        student, weights = self.run.student, self.versions[version]
        state = weights
        if student.lora is not None:
            digest = start_digest(network, student.torch_dtype)
            refuse_other_weights("student.checkpoint", self.start, digest)
            state = merged(network, weights, student.lora)
        return {name: tensor.to(self.dtype) for name, tensor in state.items()}


def _choose(config: ExportConfig, versions: Mapping[str, object]) -> str:
    if config.weights is None:
        return next(name for name in PREFERRED if name in versions)
    if config.weights not in versions:
        has = ", ".join(name for name in PREFERRED if name in versions)
        raise ConfigError(f"weights: got {config.weights}; this run has {has}")
    return config.weights


def _provenance(run: RunConfig, path: Path, update: int, kind: str, version: str) -> dict[str, Any]:
    """Origin of exported weights, as names and digests only, since paths may identify a person."""
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    free = tuple(f"{key}." for key in FREE_KEYS)
    settings = {k: v for k, v in flatten(plain(run)) if not f"{k}.".startswith(free)}
    lora = run.student.lora
    packages = ("safetensors", *(("peft",) if lora else ()))
    return {
        "run": run.name,
        "method": run.method,
        "update": update,
        "kind": kind,
        "weights": version,
        "lora": None if lora is None else lora.model_dump(),
        "start": Path(str(run.student.checkpoint)).name,
        "config_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "checkpoint_sha256": meta["sha256"],
        "trained_with": meta["written_by"],
        "exported_with": checkpoint.written_by() | {name: installed(name) for name in packages},
    }
