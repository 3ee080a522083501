"""Reading and writing checkpoints of the causal Wan network in all common layouts.

Read: Self-Forcing and Causal-Forcing `.pt` files, diffusers Wan folders (a pipeline or its
`transformer/`, sharded or not), folders of the original Wan code, and single safetensors files with
either set of parameter names. Written: Self-Forcing `.pt` files and diffusers folders. Round trips
are bit for bit, and a crash while writing leaves the previous file or folder intact.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from afd.files import replacing
from afd.listing import few
from afd.models.network import CausalNetwork
from afd.models.wan.block import EPS
from afd.models.wan.network import CausalWan
from afd.models.wan.types import WanConfig
from afd_kernels.contracts import require

_log = logging.getLogger("afd")
LAYOUTS = (
    "a Self-Forcing or Causal-Forcing .pt file, a .safetensors file, a diffusers Wan folder or its "
    "transformer/ folder (config.json and *.safetensors)"
)
# The parts of a .pt file that `ema` selects, in order of preference.
PARTS: dict[bool | None, tuple[str, ...]] = {
    None: ("generator_ema", "generator", "model"),
    True: ("generator_ema",),
    False: ("generator", "model"),
}
# dtypes by their names in safetensors files.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Prefixes added to names by FSDP, activation checkpointing and torch.compile.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Settings of the causal network that diffusers' WanTransformer3DModel does not have.
CAUSAL = ("text_len", "chunk", "window", "sink", "independent_first_frame")
# Network files do not store the head width; every released Wan model has this one.
HEAD_DIM = 128

_TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{ours}.{leaf}": f"{theirs}.{_ATTENTION.get(leaf, leaf)}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for leaf in (*_ATTENTION, "norm_q", "norm_k")
    },
}
_Tables = tuple[dict[str, str], dict[str, str]]
_OUT: _Tables = (_TOP, _BLOCK)
_IN: _Tables = ({v: k for k, v in _TOP.items()}, {v: k for k, v in _BLOCK.items()})


def _translate(name: str, tables: _Tables) -> str:
    match = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name)
    if match is None:
        return name
    block, stem, leaf = match.groups(default="")
    return block + tables[bool(block)].get(stem, stem) + leaf


def to_diffusers(name: str) -> str:
    """diffusers' name of a parameter of the released network; unknown names are unchanged."""
    return _translate(name, _OUT)


def from_diffusers(name: str) -> str:
    """The released network's name of a parameter of diffusers' WanTransformer3DModel."""
    return _translate(name, _IN)


# The tensors from whose shapes the network's sizes are inferred.
_SIZED = (
    "patch_embedding.weight",
    "text_embedding.0.weight",
    "time_embedding.0.weight",
    "head.head.weight",
    "blocks.0.ffn.0.weight",
)

# --- reading ---


def load_checkpoint(
    path: str | Path,
    *,
    ema: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    head_dim: int | None = None,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    **settings: Any,
) -> CausalWan:
    """Load a network from a checkpoint, with its sizes inferred from the weights.

    `ema`: from a `.pt` file, True takes generator_ema, False generator (or model); None prefers the
    average. `dtype`: None keeps the file's. `head_dim`: None takes that of config.json, or 128 if
    absent. `change`: applied to the weights read, to merge adapters. `settings`: fields of
    WanConfig that files do not store (chunk, window, sink, independent_first_frame, text_len).
    Weights are read from disk once, directly into the network: there is never a second copy in
    memory, and the file may be replaced afterwards.

    Raises FileNotFoundError for an unknown path, ValueError for an unsuitable file; names and
    shapes must match exactly, and the error lists what is missing, extra or misshaped.
    """
    weights, written = read_weights(path, ema=ema)
    if change is not None:
        weights = change(weights)
    config = replace(infer_config(weights, written, head_dim=head_dim), **settings)
    with torch.device("meta"):
        network = CausalWan(config)
    fill(network, weights, path, dtype=dtype, device=device)
    return network


def fill(
    network: nn.Module,
    weights: dict[str, Tensor],
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Load `weights` into a network on the meta device, emptying `weights` in the process.

    Raises ValueError unless names and shapes match exactly, or if the weights mix dtypes and no
    `dtype` is given; `path` is for the message.
    """
    needed = network.state_dict()
    missing = [name for name in needed if name not in weights]
    extra = [name for name in weights if name not in needed]
    misshaped = [
        f"{name} {list(weights[name].shape)} for {list(like.shape)}"
        for name, like in needed.items()
        if name in weights and weights[name].shape != like.shape
    ]
    named = (("missing", missing), ("extra", extra), ("wrongly shaped", misshaped))
    problems = [f"{len(names)} {what} ({_few(names)})" for what, names in named if names]
    if problems:
        raise ValueError(f"checkpoint {path}: of {len(needed)} tensors, " + "; ".join(problems))
    kinds = {tensor.dtype for tensor in weights.values()}
    shown = ", ".join(sorted(str(kind) for kind in kinds))
    floats = all(kind.is_floating_point for kind in kinds)
    require(floats, f"checkpoint {path}", shown, "floating point weights")
    # Eight-bit floats are storage formats, not compute dtypes.
    usable = dtype is not None or (len(kinds) == 1 and all(kind.itemsize > 1 for kind in kinds))
    require(usable, "dtype", dtype, f"a dtype to compute in; {path} holds {shown}")
    state: dict[str, Tensor] = {}
    for name in needed:
        # Copied one tensor at a time, as the tensors read are views of the mapped file.
        state[name] = weights.pop(name).to(device=device, dtype=dtype, copy=True).contiguous()
    network.load_state_dict(state, assign=True)


def read_weights(
    path: str | Path, *, ema: bool | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors by the released network's names, and config.json ({} if absent).

    Nothing is copied if the file can be memory-mapped. Pickles are read with weights_only=True: a
    file that contains more than tensors and plain values is rejected.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: {path} does not exist; needed: {LAYOUTS}")
    held: Mapping[str, Tensor]
    written: dict[str, Any] = {}
    if path.is_dir():
        held, written = _read_folder(path)
    elif path.suffix == ".safetensors":
        held = _read_safetensors(path)
    else:
        held = _pick(read_pickle(path), ema, path)
        ema = None
    require(ema is not True, "ema", ema, f"a .pt file with generator_ema; {path} has no parts")
    cleaned = [(clean_name(name), tensor) for name, tensor in held.items()]
    if any(name.startswith("condition_embedder.") for name, _ in cleaned):
        cleaned = [(from_diffusers(name), tensor) for name, tensor in cleaned]
    weights = dict(cleaned)
    if len(weights) != len(cleaned):
        raise ValueError(f"checkpoint {path}: two of its tensors have the same name once cleaned")
    return weights, written


def read_pickle(path: Path) -> Mapping[str, Any]:
    """Read a torch pickle of tensors, memory-mapped if its format allows."""
    try:
        held = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # damaged bytes make an unpickler raise anything
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"checkpoint {path}: it is damaged, or contains objects other than tensors, "
            f"which are not unpickled because they could run code ({reason})"
        ) from error
    require(isinstance(held, Mapping), f"checkpoint {path}", type(held).__name__, LAYOUTS)
    return held


def clean_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers and the released pipelines."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("model.")


def infer_config(
    weights: Mapping[str, Tensor],
    written: Mapping[str, Any] | None = None,
    *,
    head_dim: int | None = None,
) -> WanConfig:
    """Infer the sizes of a network from its weights (released names) and config.json, if any.

    The head width and text_len do not follow from the weights: `head_dim`, else config.json's, else
    128; config.json's text_len, else 512.
    """
    written = written or {}
    lacking = [name for name in _SIZED if name not in weights]
    if lacking:
        raise ValueError(
            f"checkpoint: no {_few(lacking)}; a Wan network has them, this holds "
            f"{_few(list(weights)) or 'no tensors'}"
        )
    patch, *matrices = (weights[name].shape for name in _SIZED)
    require(len(patch) == 5 and patch[2] == 1, "patch_embedding", tuple(patch), "[D, C, 1, ph, pw]")
    for name, shape in zip(_SIZED[1:], matrices, strict=True):
        require(len(shape) == 2 and 0 not in shape, name, tuple(shape), "a matrix")
    text, time, head, ffn = matrices
    for key in ("num_attention_heads", "num_heads", "text_len"):
        number = written.get(key, 1)
        require(
            isinstance(number, int) and number > 0, f"config.json: {key}", number, "a number > 0"
        )
    eps = written.get("eps", EPS)
    require(eps == EPS, "config.json: eps", eps, f"{EPS}, which every released Wan network has")
    dim = patch[0]
    if head_dim is None:
        heads = written.get("num_attention_heads") or written.get("num_heads")
        head_dim = dim // heads if heads else HEAD_DIM
    require(
        head_dim > 0 and dim % head_dim == 0, "head_dim", head_dim, f"a divisor of the width {dim}"
    )
    return WanConfig(
        dim=dim,
        num_heads=dim // head_dim,
        ffn_dim=ffn[0],
        num_layers=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        freq_dim=time[1],
        text_dim=text[1],
        text_len=written.get("text_len", WanConfig.text_len),
        in_dim=patch[1],
        out_dim=head[0] // math.prod(patch[3:]),
        patch=(patch[3], patch[4]),
    )


def _pick(held: Mapping[str, Any], ema: bool | None, path: Path) -> Mapping[str, Tensor]:
    """The part of a .pt file that `ema` selects; a bare state dict counts as a single part."""
    parts = [key for key, value in held.items() if isinstance(value, Mapping)]
    if not parts and ema is not True:
        part, chosen = "its tensors", held
    else:
        part = next((name for name in PARTS[ema] if name in parts), "")
        if not part:
            has = ", ".join(f"{name} ({len(held[name])} tensors)" for name in parts)
            wanted = " or ".join(PARTS[ema])
            raise ValueError(
                f"ema: got {ema}; needed: a file with {wanted}; {path} holds {has or 'no parts'}"
            )
        chosen = held[part]
    odd = [str(name) for name, value in chosen.items() if not _is_weight(name, value)]
    require(not odd, f"checkpoint {path}", _few(odd), "named, dense tensors only")
    _log.info("checkpoint %s: %s", path, part)
    return chosen


def _is_weight(name: object, value: object) -> bool:
    held = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return held and isinstance(name, str)


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"checkpoint: {config} does not exist; needed: {LAYOUTS}")
    written = _read_json(config)
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    indices = list(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        table = _read_json(indices[0]).get("weight_map")
        named = isinstance(table, dict) and all(isinstance(name, str) for name in table.values())
        require(named, str(indices[0]), table, "weight_map: tensors and the files they lie in")
        names = sorted(set(cast("dict[str, str]", table).values()))
        for name in names:
            # The index is untrusted data: it may only name files in this folder.
            require(Path(name).name == name, str(indices[0]), name, "file names in its own folder")
    else:
        require(len(names) == 1, f"checkpoint {folder}", names, "one .safetensors file or index")
    held: dict[str, Tensor] = {}
    for name in names:
        held.update(_read_safetensors(folder / name))
    return held, written


def _read_json(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # invalid JSON or UTF-8
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    require(isinstance(held, dict), str(path), type(held).__name__, "a JSON object")
    return cast("dict[str, Any]", held)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that stay on disk: read-only views of its mapping.

    The library's own mapping is a writable private one, which a machine with less memory than the
    file refuses, even if only the header is wanted.
    """
    try:
        with safe_open(path, "np") as opened:
            slices = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            named = [(name, found.get_shape(), found.get_dtype()) for name, found in slices]
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path}: it cannot be read ({error})") from error
    odd = sorted({dtype for _, _, dtype in named} - set(_DTYPES))
    require(not odd, f"checkpoint {path}", odd, "tensors of PyTorch's plain dtypes")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # The library has checked that the tensors follow each other without gaps.
    offset, held = 8 + int.from_bytes(mapped[:8], "little"), {}
    for name, shape, kind in named:
        dtype, count = _DTYPES[kind], math.prod(shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            held[name] = (
                torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(shape)
                if count
                else torch.empty(shape, dtype=dtype)
            )
        offset += count * dtype.itemsize
    return held


def _few(names: list[str]) -> str:
    return ", ".join(few(names, 4))


# --- writing ---

Weights = nn.Module | Mapping[str, Tensor]


def save_self_forcing(
    path: str | Path,
    *,
    generator: Weights | None = None,
    generator_ema: Weights | None = None,
    note: str | None = None,
) -> None:
    """Write a `.pt` file that Self-Forcing's and Causal-Forcing's inference scripts load.

    Either or both parts, as networks or state dicts; dtypes are kept, devices are not. `note` is
    stored under "afd", which those scripts ignore.
    """
    parts = {"generator": generator, "generator_ema": generator_ema}
    held: dict[str, object] = {
        part: {f"model.{name}": tensor for name, tensor in _state(weights).items()}
        for part, weights in parts.items()
        if weights is not None
    }
    require(bool(held), "generator", None, "a network in generator or generator_ema")
    with replacing(Path(path)) as partial, partial.open("wb") as file:
        try:
            torch.save(held if note is None else held | {"afd": note}, file)
        except RuntimeError as error:
            # After a failed write, closing the archive raises a second, misleading error.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def diffusers_sizes(config: WanConfig) -> dict[str, Any]:
    """The network's sizes under diffusers' names."""
    return {
        "patch_size": (1, *config.patch),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_dim,
        "out_channels": config.out_dim,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
    }


def save_diffusers(folder: str | Path, network: CausalNetwork, *, note: str | None = None) -> None:
    """Write a folder that diffusers' `WanTransformer3DModel.from_pretrained` loads.

    It corresponds to `transformer/` of a pipeline. The folder must be new or empty. Settings that
    diffusers does not have (`CAUSAL`) are stored in config.json under "_afd", which diffusers
    ignores; `note` is stored in the weights' header under "afd".
    """
    folder, config = Path(folder), network.config
    require(isinstance(network, CausalWan), "network", type(network).__name__, "a Wan network")
    filled = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    require(not filled, "folder", str(folder), "a new or empty folder")
    written = {
        "_class_name": "WanTransformer3DModel",
        **diffusers_sizes(config),
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": EPS,
        "_afd": {name: getattr(config, name) for name in CAUSAL},
    }
    state = {to_diffusers(name): tensor for name, tensor in _state(network).items()}
    with replacing(folder) as partial:
        partial.mkdir()
        weights = partial / "diffusion_pytorch_model.safetensors"
        header = {"format": "pt"} | ({} if note is None else {"afd": note})
        save_file(state, weights, metadata=header)
        (partial / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _state(weights: Weights) -> dict[str, Tensor]:
    """CPU tensors by clean name, none of them a view of a larger storage."""
    held = weights.state_dict() if isinstance(weights, nn.Module) else weights
    state = {}
    for name, value in held.items():
        tensor = value.detach().cpu().contiguous()
        alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        state[clean_name(name)] = tensor if alone else tensor.clone()
    return state
