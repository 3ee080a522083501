"""`afd export`: write a run's trained weights in formats that other programs load.

Adapters are written separately (with PEFT's or diffusers' names) or merged into the weights they
were trained on; a run that trained every weight has no adapters. Everything is computed from the
fp32 masters and fp32 start weights and rounded only once, to the requested dtype.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from afd.config.base import Count, Folder, Section
from afd.config.run import FREE_KEYS, RunConfig, flatten, plain
from afd.errors import ConfigError
from afd.extras import need
from afd.files import replacing
from afd.hub import refuse_other_weights
from afd.models.config import DTYPES
from afd.models.low_rank import LowRank, cut, folded, joined
from afd.models.network import CausalNetwork
from afd.models.policies import start_digest
from afd.models.wan.checkpoints import save_diffusers, save_self_forcing, to_diffusers
from afd.models.wan.network import CausalWan
from afd.trainer import checkpoint
from afd.trainer.origin import PREFERRED, Start, start_of
from afd.trainer.run_folder import load_run

ADAPTER_KINDS = ("peft", "diffusers_lora")


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
    against: Literal["released", "start"] = Field(
        default="released",
        description="adapters: the change of the released weights, student.init included; or only "
        "this run's own, which belongs on what it started from",
    )
    rank: Count | None = Field(
        default=None,
        description="adapters: cut them to this rank by SVD, and print the error; null: all",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="dtype of the written weights"
    )


def export(folder: Path, config: ExportConfig) -> Path:
    """Write the newest checkpoint of the run in `folder`; returns the folder written.

    It is written under a temporary name and renamed, so it is complete or absent. Its `afd.json`
    and the header of its weights record their origin. A model.pt has the trained weights as
    `generator` and the requested version as `generator_ema`; Self-Forcing's inference loads either.
    An adapter's `afd.json` has the SHA-256 of the weights it belongs on, and the run's parents.
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
    kind = _kind(config, run)
    name = _choose(config, versions)
    if config.rank is not None and kind not in ADAPTER_KINDS:
        raise ConfigError(f"rank: got {config.rank} with kind={kind}; needed: an adapter's kind")
    origin = None if run.student.init is None else start_of(run.student, run.run_dir)
    provenance = _provenance(run, path, state["update"], kind, name)
    provenance["parents"] = [] if origin is None else origin.parents
    if origin is not None and run.student.parents == "stacked":
        refuse_other_weights(
            "student.checkpoint", start, origin.digest(run.student.dtype, stacked=True)
        )
        # Outside a run, an adapter belongs on the weights with its parents folded in.
        start = origin.digest(run.student.dtype, stacked=False)
    provenance["base"] = _base(run, start, origin, config.against)
    change = error = None
    if kind in ADAPTER_KINDS:
        whole = _change(run, versions[name], origin, kind, config.against)
        change, error = _cut(whole, config.rank)
        provenance |= {"rank": change.rank, "rank_before": whole.rank, "svd_error": error}
    note = json.dumps(provenance, indent=1)
    learned = _Learned(run, versions, start, DTYPES[config.dtype], note, change, origin)
    with replacing(out) as partial:
        partial.mkdir()
        (partial / "afd.json").write_text(note + "\n", encoding="utf-8")
        getattr(learned, kind)(partial, name)
    return out


def _base(
    run: RunConfig, start: str | None, origin: Start | None, against: str
) -> dict[str, Any] | None:
    """Dtype and SHA-256 of the weights that an adapter belongs on; None if they are not known."""
    dtype: str | None = run.student.dtype
    digest = start
    if origin is not None and against == "released":
        first = origin.parents[0]
        if origin.changes is None:
            return None
        base = first.get("base") or {}  # an exported LoRA has it so
        dtype = base.get("dtype", first.get("dtype"))
        digest = base.get("sha256", first.get("start_sha256"))
    return None if digest is None else {"dtype": dtype, "sha256": digest}


def _change(
    run: RunConfig,
    adapters: Mapping[str, Tensor],
    origin: Start | None,
    kind: str,
    against: str,
) -> LowRank:
    """The change that an adapter stands for."""
    lora = run.student.lora
    if lora is None:
        raise ConfigError(
            f"kind: got {kind}; this run trained every weight (student.lora is null), and the "
            "change of a whole weight is no low-rank product, so there is no adapter to write; "
            "needed: self_forcing or diffusers"
        )
    change = LowRank.of(adapters, lora.alpha / lora.rank)
    if origin is not None and against == "released":
        if origin.changes is None:
            raise ConfigError(
                f"against: got released; {run.student.init}, from which the run started, has whole "
                "weights, whose change is no low-rank product; needed: against=start, or "
                "kind=self_forcing or diffusers"
            )
        change = joined([*origin.changes, change])
    return change


def _cut(change: LowRank, rank: int | None) -> tuple[LowRank, float | None]:
    """A change of at most a rank, and the relative error if it was cut."""
    return (change, None) if rank is None or rank >= change.rank else cut(change, rank)


@dataclass(frozen=True)
class _Learned:
    """A run's trained versions, with one export method per file format."""

    run: RunConfig
    versions: Mapping[str, Mapping[str, Tensor]]
    start: str | None
    dtype: torch.dtype
    note: str
    change: LowRank | None
    origin: Start | None

    def peft(self, folder: Path, version: str) -> None:
        """Write a folder for `PeftModel.from_pretrained(net, folder)`."""
        rank, alpha, adapters = self._adapters()
        need("kind=peft", "peft")
        from peft import LoraConfig as PeftConfig

        layers = sorted({name.partition(".lora_")[0] for name in adapters})
        usual = CausalNetwork.adapted
        named = all(re.fullmatch(usual, layer) for layer in layers)
        settings = PeftConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=usual if named else layers,
            inference_mode=True,
        )
        settings.save_pretrained(str(folder))
        state = {f"base_model.model.{name}": tensor for name, tensor in adapters.items()}
        header = {"format": "pt", "afd": self.note}
        save_file(state, folder / "adapter_model.safetensors", metadata=header)

    def diffusers_lora(self, folder: Path, version: str) -> None:
        """Write the file for `WanPipeline.load_lora_weights(folder)`, with rank and alpha."""
        rank, alpha, adapters = self._adapters()
        state, layers = {}, set()
        for name, tensor in adapters.items():
            layer, adapter, rest = name.partition(".lora_")
            layers.add(to_diffusers(layer))
            state[f"transformer.{to_diffusers(layer)}{adapter}{rest}"] = tensor
        settings = {
            "transformer.r": rank,
            "transformer.lora_alpha": alpha,
            "transformer.target_modules": sorted(layers),
        }
        header = {"format": "pt", "afd": self.note, "lora_adapter_metadata": json.dumps(settings)}
        save_file(state, folder / "pytorch_lora_weights.safetensors", metadata=header)

    def self_forcing(self, folder: Path, version: str) -> None:
        network = self._start()
        average = None if version == "theta" else self._whole(network, version)
        trained = self._whole(network, "theta")
        file = folder / "model.pt"
        save_self_forcing(file, generator=trained, generator_ema=average, note=self.note)

    def diffusers(self, folder: Path, version: str) -> None:
        network = self._start()
        whole = self._whole(network, version)
        network.to(self.dtype).load_state_dict(whole)
        save_diffusers(folder / "transformer", network, note=self.note)

    def student(self, folder: Path, version: str) -> None:
        """Write a file for `student.checkpoint`, for any kind of student."""
        network = self._start()
        network.load_state_dict(self._whole(network, version))
        self.run.student.save(network, folder, self.dtype, self.note)

    def _adapters(self) -> tuple[int, int, dict[str, Tensor]]:
        """Rank, alpha and factors to write; alpha / rank is the scale."""
        lora, change = self.run.student.lora, self.change
        assert lora is not None
        assert change is not None
        plain = (change.rank, change.scale) == (lora.rank, lora.alpha / lora.rank)
        rank, alpha = (lora.rank, lora.alpha) if plain else (change.rank, change.rank)
        return rank, alpha, change.adapters(self.dtype)

    def _start(self) -> CausalNetwork:
        """The network that the run started from, in float32."""
        return (self.origin or start_of(self.run.student, self.run.run_dir)).network

    def _whole(self, network: CausalNetwork, version: str) -> dict[str, Tensor]:
        student, weights = self.run.student, self.versions[version]
        state = weights
        if student.lora is not None:
            digest = start_digest(network, student.torch_dtype)
            refuse_other_weights("student.checkpoint", self.start, digest)
            scale = student.lora.alpha / student.lora.rank
            state = folded(network.state_dict(), LowRank.of(weights, scale))
        return {name: tensor.to(self.dtype) for name, tensor in state.items()}


def _kind(config: ExportConfig, run: RunConfig) -> str:
    """The format to write. Raises ConfigError for one that the student's network does not have."""
    if isinstance(run.student.skeleton(), CausalWan):
        return config.kind or ("self_forcing" if run.student.lora is None else "diffusers_lora")
    if config.kind in (None, "student", "peft"):
        return config.kind or "student"
    raise ConfigError(
        f"kind: got {config.kind}; needed: student or peft, as the {run.student.kind} student is "
        "not a Wan network"
    )


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
