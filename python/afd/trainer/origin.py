"""What a run starts from: `student.checkpoint` alone, or changed by what `student.init` names.

A run's weights are the released ones, changed by the adapters of its parents one after another, or
replaced by a parent that trained every weight. An adapter belongs on the weights that it was
trained on, or on the released ones with its parents' adapters: their SHA-256 is recorded with it,
and compared before it is folded in.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from afd.discriminators.base import Discriminator
from afd.errors import AfdError, ConfigError
from afd.files import parse_json
from afd.hub import ADAPTERS, holds_adapters, named_errors
from afd.models.config import DTYPES, LoraConfig, StudentConfig
from afd.models.low_rank import LowRank, folded, stacked_digest
from afd.models.network import CausalNetwork
from afd.models.policies import start_digest
from afd.models.wan.checkpoints import LAYOUTS, from_diffusers, read_weights
from afd.trainer import checkpoint

# Order of preference if no version of a run's weights is named; the first is the evaluated one.
PREFERRED = ("ema", "old", "theta")
NOTE = "afd.json"
# A longer chain is a circle.
MOST_PARENTS = 1000
WHOLE = ("model.pt", "student.safetensors", "network.safetensors")
NEEDED = (
    "a run folder, a checkpoint of one, or an exported LoRA (PEFT, diffusers) or whole weights "
    f"({LAYOUTS})"
)
_log = logging.getLogger("afd")


@dataclass
class Start:
    """The weights that a run starts from.

    Attributes:
        network: with these weights, in float32 on the CPU.
        changes: what was folded into the released weights, oldest first; None if a parent replaced
            them.
        parents: origin of each change, oldest first, as JSON values.
        load: loads the released weights again.
    """

    network: CausalNetwork
    load: Callable[[], CausalNetwork]
    changes: list[LowRank] | None = field(default_factory=list)
    parents: list[dict[str, Any]] = field(default_factory=list)
    _released: dict[str, str] = field(default_factory=dict)

    def digest(self, dtype: str, *, stacked: bool) -> str:
        """SHA-256 of these weights rounded to a dtype; `stacked`: of the released ones, rounded,
        and of the changes."""
        if not stacked or not self.changes:
            return start_digest(self.network, DTYPES[dtype])
        if dtype not in self._released:
            self._released[dtype] = start_digest(self.load(), DTYPES[dtype])
        return stacked_digest(self._released[dtype], self.changes)

    def stack(self, init: str | None) -> list[LowRank]:
        """The changes as adapters beside the released weights. Raises ConfigError if they cannot
        be."""
        if self.changes is None:
            raise ConfigError(
                f"student.parents: got stacked; {init} has whole weights; needed: folded, or these "
                "weights, exported, as student.checkpoint"
            )
        layers = [layer for change in self.changes for layer in change.a_RI]
        odd = [layer for layer in layers if not re.fullmatch(self.network.adapted, layer)]
        if odd:
            raise ConfigError(
                f"student.parents: got stacked; {init} changes {odd[0]}, which has no adapters "
                "here; needed: folded"
            )
        return self.changes

    def fold(self, change: LowRank, parent: dict[str, Any]) -> None:
        """Add an adapter to the weights."""
        state = self.network.state_dict()
        change.check(state, "student.init")
        self.network.load_state_dict(folded(state, change))
        if self.changes is not None:
            self.changes.append(change)
        self.parents.append(parent)

    def replace(self, weights: Mapping[str, Tensor], parent: dict[str, Any]) -> None:
        """Put other weights in the place of all. Raises ValueError if they do not fit."""
        state = self.network.state_dict()
        odd = sorted(weights.keys() ^ state.keys())
        odd += [n for n in state if n in weights and weights[n].shape != state[n].shape]
        if odd:
            raise ValueError(
                f"student.init: its weights do not fit the network of student.checkpoint "
                f"({', '.join(odd[:4])}); needed: those of the same student"
            )
        self.network.load_state_dict({name: x.float() for name, x in weights.items()})
        self.changes = None
        self.parents.append(parent)


def start_of(section: StudentConfig, out: Path | None = None) -> Start:
    """Load what a student's section starts from.

    `out`: the run's own folder, from which it cannot start. Raises ConfigError if a part is missing
    or unsuitable, belongs on other weights, or starts from itself.
    """
    try:
        return _start(section, section.init, section.init_weights, () if out is None else (out,))
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        raise ConfigError(text if text.startswith("student.") else f"student: {text}") from error


def _start(
    section: StudentConfig, init: str | None, version: str | None, seen: tuple[Path, ...]
) -> Start:
    if init is None:
        section.require_weights()
        return Start(section.load_network(), section.load_network)
    path = Path(init)
    folders = {path.resolve(), path.resolve().parent.parent}
    if folders & {other.resolve() for other in seen}:
        circle = " from ".join(str(other) for other in (*seen, path))
        raise ConfigError(f"student.init: a circle ({circle}); needed: a run with another start")
    if not path.exists():
        raise ConfigError(f"student.init: {init} does not exist; needed: {NEEDED}")
    saved = _checkpoint(path)
    if saved is not None:
        return _of_run(section, path, saved, version, seen)
    if version is not None:
        raise ConfigError(f"student.init_weights: got {version}; {init} holds a single version")
    start = _start(section, None, None, ())
    file = _adapter_file(path)
    if file is not None:
        change, note = read_adapter(file)
        base = (note or {}).get("base")
        if isinstance(base, dict):
            refuse_other_base(f"student.init: {init}", start, base)
        else:
            _log.warning("student.init %s: does not record which weights it belongs on", init)
        start.fold(change, _origin(path, note))
        _log.info("student.init %s: a LoRA of rank %d%s", init, change.rank, _made_by(note))
        return start
    weights, note = _read_whole(path)
    start.replace(weights, _origin(path, note))
    _log.info("student.init %s: whole weights%s", init, _made_by(note))
    return start


def _of_run(
    section: StudentConfig,
    path: Path,
    saved: Path,
    version: str | None,
    seen: tuple[Path, ...],
) -> Start:
    """The start of a run's parent: its own start, changed by what it has learned."""
    meta = checkpoint.read_meta(saved)
    student = meta["config"]["student"]
    if student["kind"] != section.kind:
        raise ConfigError(
            f"student.init: {path} is of a {student['kind']} student; needed: {section.kind}"
        )
    how: dict[str, Any] = {"method": meta["method"], "config": meta["config"]}
    plain = checkpoint.load(saved, **how, only="-")["method_state"]["policies"]
    has = [name for name in PREFERRED if name in plain]
    if version is not None and version not in has:
        raise ConfigError(f"student.init_weights: got {version}; {path} has {', '.join(has)}")
    name = version or has[0]
    only = f"method_state/policies/{name}/"
    weights = checkpoint.load(saved, **how, only=only)["method_state"]["policies"][name]
    parent = {
        "run": meta["config"]["name"],
        "method": meta["method"],
        "update": meta["update"],
        "weights": name,
        "lora": student["lora"],
        "start_sha256": plain["start"],
        "dtype": student["dtype"],
        "checkpoint_sha256": meta["sha256"],
    }
    found = f"update {meta['update']} of a run, weights {name}"
    if student["lora"] is None:
        start = _start(section, None, None, ())
        start.replace(weights, parent)
        _log.info("student.init %s: %s, every weight", path, found)
        return start
    lora = LoraConfig.model_validate(student["lora"])
    start = _start(section, student["init"], student["init_weights"], (*seen, path))
    base = {"dtype": student["dtype"], "sha256": plain["start"]}
    stacked = student.get("parents") == "stacked"
    refuse_other_base(f"student.init: {path}", start, base, stacked=stacked)
    start.fold(LowRank.of(weights, lora.alpha / lora.rank), parent)
    _log.info("student.init %s: %s, a LoRA of rank %d", path, found, lora.rank)
    return start


def carry_on(discriminator: Discriminator, folder: Path) -> None:
    """Give a discriminator the state that a run's ended with. Raises ConfigError if it has none, or
    one of other settings."""
    saved = _checkpoint(folder) if folder.exists() else None
    if saved is None:
        raise ConfigError(f"discriminator.init: {folder} is no run folder; needed: that of a run")
    meta = checkpoint.read_meta(saved)
    how: dict[str, Any] = {"method": meta["method"], "config": meta["config"]}
    state = checkpoint.load(saved, **how, only="method_state/discriminator/")["method_state"]
    if state.get("discriminator") is None:
        raise ConfigError(f"discriminator.init: the run in {folder} has no discriminator")
    try:
        discriminator.load_state_dict(state["discriminator"])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(
            f"discriminator.init: that of {folder} has other settings ({reason})"
        ) from error
    _log.info("discriminator.init %s: after update %d", folder, meta["update"])


def parent_ranks(section: StudentConfig) -> list[int] | None:
    """Ranks of the adapters between the released weights and what a section starts from, without
    loading any; None if weights were replaced. One that cannot be read yet counts as the run's."""
    ranks: list[int] = []
    init = section.init
    while init is not None and len(ranks) < MOST_PARENTS:
        own = section.lora.rank if section.lora is not None else 0
        try:
            saved, file = _checkpoint(Path(init)), _adapter_file(Path(init))
            if saved is not None:
                meta = checkpoint.read_meta(saved)
                student = meta["config"]["student"]
                if student["lora"] is None:
                    return None
                ranks.append(int(student["lora"]["rank"]))
                init = student["init"]
                continue
            if file is None and Path(init).exists():
                return None
            ranks.append(own if file is None else read_adapter(file)[0].rank)
        except (OSError, ValueError, KeyError, AfdError):
            ranks.append(own)  # the run itself reports what is wrong
        break
    return ranks


def refuse_other_base(
    what: str, start: Start, base: Mapping[str, Any], *, stacked: bool = False
) -> None:
    """Raise ConfigError if an adapter's weights (dtype and SHA-256) are not those of `start`."""
    now = start.digest(str(base["dtype"]), stacked=stacked)
    if now != base["sha256"]:
        raise ConfigError(
            f"{what} belongs on other weights than these (SHA-256 {base['sha256']} there, {now} "
            f"here); needed: the student.checkpoint, and the student.init, that it was trained on"
        )


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path names, or the newest one of a run folder; None for others."""
    if (path / checkpoint.META).is_file():
        return path
    if not (path / "checkpoints").is_dir():
        return None
    newest = checkpoint.latest(path / "checkpoints")
    if newest is None:
        raise ConfigError(f"student.init: run folder {path} has no checkpoint; needed: {NEEDED}")
    return newest


def _adapter_file(path: Path) -> Path | None:
    """The file with an adapter's factors, or None."""
    for name in ADAPTERS:
        if (path / name).is_file():
            return path / name
    return path if path.suffix == ".safetensors" and holds_adapters(path) else None


def read_adapter(file: Path) -> tuple[LowRank, dict[str, Any] | None]:
    """Read a LoRA in PEFT's or diffusers' names, and the note of its export, if any.

    Its scale is alpha / rank as its settings have it; 1 without settings. Raises ValueError for
    other parameters than the factors of linear layers.
    """
    with named_errors("LoRA", file):
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
        held = load_file(file)
    scale, factors = _scale(file, header), {}
    for name, tensor in held.items():
        name = name.removeprefix("base_model.model.").removeprefix("transformer.")
        layer, found, rest = name.replace(".default.weight", ".weight").rpartition(".lora_")
        if not found or rest not in ("A.weight", "B.weight"):
            raise ValueError(
                f"student.init: {file} holds {name}; needed: only lora_A.weight and lora_B.weight "
                "of linear layers"
            )
        factors[f"{from_diffusers(layer)}.lora_{rest}"] = tensor.float()
    note = parse_json(header["afd"]) if "afd" in header else None
    return LowRank.of(factors, scale), note if isinstance(note, dict) else None


def _scale(file: Path, header: Mapping[str, str]) -> float:
    settings: Any = {}
    beside = file.with_name("adapter_config.json")
    if "lora_adapter_metadata" in header:
        settings = parse_json(header["lora_adapter_metadata"])
        settings = {key.removeprefix("transformer."): x for key, x in settings.items()}
    elif beside.is_file():
        settings = parse_json(beside.read_text(encoding="utf-8"))
    if settings.get("rank_pattern") or settings.get("alpha_pattern") or settings.get("use_dora"):
        raise ValueError(f"student.init: {file} has ranks per layer or DoRA; needed: a plain LoRA")
    rank, alpha = settings.get("r", 1), settings.get("lora_alpha", settings.get("r", 1))
    if settings.get("use_rslora"):
        raise ValueError(f"student.init: {file} is scaled by rsLoRA; needed: a plain LoRA")
    return float(alpha) / float(rank)


def _read_whole(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Whole weights by the network's names, and the note of their export, if any."""
    note = None
    if (path / NOTE).is_file():
        note = parse_json((path / NOTE).read_text(encoding="utf-8"))
    file = next((path / name for name in WHOLE if (path / name).is_file()), path)
    try:
        weights, _ = read_weights(file)
    except (FileNotFoundError, ValueError, SafetensorError) as error:
        raise ConfigError(f"student.init: {error}") from error
    return {name.removeprefix("net."): x for name, x in weights.items()}, note


def _origin(path: Path, note: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parent that an exported file is: its note, or its name alone."""
    return {"file": path.name} if note is None else json.loads(json.dumps(note))


def _made_by(note: Mapping[str, Any] | None) -> str:
    return "" if note is None else f", of run {note.get('run')} after update {note.get('update')}"
