"""Runs the network as described by a golden file and compares every tensor in it.

Everything is read from the folder's config.json and from the tensors: sizes, chunk, window, sink,
steps, the order of calls. Shape letters: B batch, F frames, C channels, H x W latent size,
D model width, T tokens per frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from afd.models.wan.block import Block
from afd.models.wan.kv_cache import KVCache
from afd.models.wan.network import CausalWan
from afd.models.wan.self_forcing import self_forced
from afd.models.wan.types import WanConfig
from afd.ops import intervals
from afd.schedules import ShiftedFlow, renoise, x0_from_flow
from afd.testing.measure import Report

Golden = dict[str, Tensor]

_SIZES = ("dim", "num_heads", "ffn_dim", "num_layers", "freq_dim", "text_dim", "text_len", "chunk")


@dataclass(frozen=True)
class Folder:
    """A folder's network description, and where to run it.

    Attributes:
        config: config.json.
        weights: the released state dict.
        device, dtype: where and how the network runs.
    """

    config: dict[str, Any]
    weights: Golden
    device: torch.device
    dtype: torch.dtype

    def network(self, **memory: Any) -> CausalWan:
        """The network with the folder's weights; `memory`: window, sink, independent first frame.

        Raises:
            RuntimeError: if the weights do not exactly match the network.
        """
        sizes = {key: self.config[key] for key in _SIZES}
        channels = {key: self.config.get(key, 16) for key in ("in_dim", "out_dim")}
        net = CausalWan(WanConfig(**sizes, **channels, **memory))
        net.load_state_dict(self.weights)
        return net.to(self.device, self.dtype)

    @property
    def schedule(self) -> ShiftedFlow:
        return ShiftedFlow(float(self.config.get("shift", 5)))

    def put(self, x: Tensor) -> Tensor:
        """x on the device; floating point in the network's dtype."""
        return x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)


def compare(report: Report, golden: Golden, folder: Folder) -> None:
    """Detects the kind of a file from its tensors, runs it and fills the report."""
    name = report.name.rsplit("/", 1)[-1]
    if "call.000.flow" in golden:
        _rollout(report, golden, folder, name)
    elif "exit_index" in golden:
        _self_forcing(report, golden, folder, name)
    elif {"x", "t", "flow", "clean_x"} <= golden.keys():
        _teacher_forcing(report, golden, folder)
    elif {"x", "t", "flow"} <= golden.keys():
        _block_causal(report, golden, folder, name)
    else:
        report.wrong.append("unknown: none of the documented kinds of file")


# --- full-sequence files ---


def _block_causal(report: Report, golden: Golden, folder: Folder, name: str) -> None:
    memory: dict[str, Any] = {}
    if "window" in name:
        memory["window"] = folder.config["win_train"]
    if "first_frame_independent" in name:
        memory["independent_first_frame"] = True
    net = folder.network(**memory)
    x, context = folder.put(golden["x"]), folder.put(golden["context"])
    frames = x.shape[1]
    mask = net.config.sight(frames, 1).mask(frames)[0]
    _compare_mask(report, mask, golden)
    taps = _Taps(net, golden)
    flow = net(x.requires_grad_("R" in golden), golden["t"].to(folder.device), context)
    _compare_output(report, flow, golden, folder)
    taps.compare(report, x, golden)
    _compare_gradients(report, net, flow, {"x": x}, golden, folder)


def _teacher_forcing(report: Report, golden: Golden, folder: Folder) -> None:
    net = folder.network()
    x, clean = folder.put(golden["x"]), folder.put(golden["clean_x"])
    context, t = folder.put(golden["context"]), golden["t"].to(folder.device)
    aug_t = golden["aug_t"].to(folder.device) if "aug_t" in golden else None
    frames = x.shape[1]
    mask = intervals.teacher_forcing(frames, net.config.chunk, 1).mask(2 * frames)[0]
    _compare_mask(report, mask, golden)
    with torch.no_grad():
        kept = net.clean_context(clean, context, aug_t)
        report.value("flow over kept context", net(x, t, context, kept), golden["flow"])
    for leaf in (x, clean):
        leaf.requires_grad_("R" in golden)
    flow = net(x, t, context, x0_BFCHW=clean, clean_t_BF=aug_t)
    _compare_output(report, flow, golden, folder)
    _compare_gradients(report, net, flow, {"x": x, "clean_x": clean}, golden, folder)


def _compare_mask(report: Report, mask: Tensor, golden: Golden) -> None:
    if "frame_mask" in golden:
        report.exact("frame_mask", mask.tolist() == golden["frame_mask"].tolist(), True)


def _compare_output(report: Report, flow: Tensor, golden: Golden, folder: Folder) -> None:
    report.value("flow", flow, golden["flow"])
    if "x0" in golden:
        sigma = folder.schedule.sigma_at(golden["t"].to(folder.device))
        x0 = x0_from_flow(flow.detach(), folder.put(golden["x"]), sigma)
        report.value("x0", x0, golden["x0"])


def _compare_gradients(
    report: Report,
    net: CausalWan,
    flow: Tensor,
    inputs: dict[str, Tensor],
    golden: Golden,
    folder: Folder,
) -> None:
    if "R" not in golden:
        return
    product = flow * folder.put(golden["R"])
    loss = product.mean()
    # The loss is a mean of terms of both signs: its error is measured relative to their magnitude.
    report.value("loss", loss, golden["loss"], floor=float(product.detach().abs().mean()))
    loss.backward()
    report.parameter_gradients({n: p.grad for n, p in net.named_parameters()}, golden)
    for name, leaf in inputs.items():
        if f"grad.{name}" in golden:
            assert leaf.grad is not None
            report.gradient(f"grad.{name}", leaf.grad, golden[f"grad.{name}"])


class _Taps:
    """Records the intermediates stored as `tap.*` in a file while the network runs."""

    def __init__(self, net: CausalWan, golden: Golden) -> None:
        self.net, self.seen = net, dict[str, Tensor]()
        self.wanted = [key[len("tap.") :] for key in golden if key.startswith("tap.")]
        ends = {"self_attn": "self_attn.o", "cross_attn": "cross_attn.o"}
        for name in self.wanted:
            path = name.split(".")
            if path[0] == "blocks" and len(path) == 3:
                self._hook(name, ".".join([*path[:2], ends.get(path[2], path[2])]))
            elif len(path) == 1:
                self._hook(name, name)
        if any(name.startswith("blocks.") for name in self.wanted):
            net._after = self._after

    def _hook(self, name: str, module: str) -> None:
        def keep(_module: Any, _inputs: Any, output: Tensor) -> None:
            self.seen[name] = output.detach()

        self.net.get_submodule(module).register_forward_hook(keep)

    def _after(self, block: Block, x: Tensor, attended: Tensor, mods: Any, text: Any) -> Any:
        x_BLD, branch_BLD = block.after(x, attended, mods, text)
        gate_BLD = mods[5].repeat_interleave(x_BLD.shape[1] // mods[5].shape[1], 1)
        index = next(i for i, other in enumerate(self.net.blocks) if other is block)
        self.seen[f"blocks.{index}"] = (x_BLD + gate_BLD * branch_BLD).detach()
        return x_BLD, branch_BLD

    def compare(self, report: Report, x: Tensor, golden: Golden) -> None:
        with torch.no_grad():
            tokens, rows, cols = self.net._patchify(x[:1])
        self.seen["patch_embedding.b0"] = tokens.transpose(1, 2).unflatten(2, (-1, rows, cols))
        for name in self.wanted:
            expected = golden[f"tap.{name}"]
            if name not in self.seen:
                report.wrong.append(f"tap.{name}: not known")
            else:
                report.value(f"tap.{name}", self.seen[name].reshape(expected.shape), expected)


# --- rollouts ---


@dataclass(frozen=True)
class _Call:
    """One network call of a golden rollout."""

    key: str
    start: int
    t: Tensor
    meta: list[int]


def _calls(golden: Golden, tokens: int) -> Iterator[list[_Call]]:
    """The calls of each chunk in order; the last one of a chunk is its context pass."""
    keys = sorted(key[: -len(".meta")] for key in golden if key.endswith(".meta"))
    calls = []
    for key in keys:
        meta = golden[f"{key}.meta"].tolist()
        calls.append(_Call(key, meta[0] // tokens, golden[f"{key}.t"], meta))
    for _, chunk in groupby(calls, lambda call: call.start):
        yield list(chunk)


@torch.no_grad()
def _rollout(report: Report, golden: Golden, folder: Folder, name: str) -> None:
    """Replays a cached rollout call by call on its own outputs, with the file's noise."""
    noise, text = folder.put(golden["noise"]), folder.put(golden["context"])
    frames, (height, width) = noise.shape[1], noise.shape[3:]
    rows, cols = WanConfig().grid(height, width)
    tokens = rows * cols
    capacity = golden["final.kv.0.k"].shape[1] // tokens
    memory: dict[str, Any] = {}
    if capacity < frames:
        memory = {"window": capacity, "sink": 0 if "nosink" in name else folder.config["sink"]}
    net = folder.network(**memory)
    cache = net.new_cache(text, frames, height, width)
    fresh = (folder.put(golden[key]) for key in sorted(golden) if key.startswith("renoise."))
    latents = []
    for chunk in _calls(golden, tokens):
        start, count = chunk[0].start, chunk[0].t.shape[1]
        x_t = noise[:, start : start + count]
        levels = [folder.schedule.sigma_at(call.t.to(folder.device)) for call in chunk]
        for i, call in enumerate(chunk):
            flow = net.forward_cached(x_t, call.t.to(folder.device), cache, start)
            assert flow is not None
            report.value(f"{call.key}.flow", flow, golden[f"{call.key}.flow"])
            x0 = x0_from_flow(flow, x_t, levels[i])
            if f"{call.key}.x0" in golden:
                report.value(f"{call.key}.x0", x0, golden[f"{call.key}.x0"])
            held = [start * tokens, cache.end * tokens, cache.valid]
            report.exact(f"{call.key}.meta", held, call.meta)
            if i + 2 < len(chunk):
                x_t = renoise(x0, next(fresh).view_as(x0), levels[i + 1])
            elif i + 2 == len(chunk):
                x_t = x0
                latents.append(x0)
    report.value("latents", torch.cat(latents, 1), golden["latents"])
    report.exact("renoise: tensors left over", len(list(fresh)), 0)
    if "denoising_step_list" in golden:
        listed = golden["denoising_step_list"]
        table = folder.schedule.times[folder.schedule.nearest(listed)]
        report.value("denoising_step_list", table, listed)
    _compare_cache(report, cache, golden, tokens)


def _compare_cache(report: Report, cache: KVCache, golden: Golden, tokens: int) -> None:
    """Compares the released rolled cache, in frame order, with our ring buffer, reordered."""
    slots = torch.tensor([cache.slot(frame) for frame in cache.held()])
    for layer, (self_kv, cross_kv) in enumerate(zip(cache.self_kv, cache.cross_kv, strict=True)):
        for letter, ours, text in zip("kv", self_kv, cross_kv, strict=True):
            by_frame = ours.unflatten(1, (-1, tokens))[:, slots.to(ours.device)].flatten(1, 2)
            expected = golden[f"final.kv.{layer}.{letter}"][:, : by_frame.shape[1]]
            report.value(f"final.kv.{layer}.{letter}", by_frame, expected)
            key = f"final.cross.{layer}.{letter}"
            if key in golden:
                report.value(key, text, golden[key])


# --- self-forcing ---


def _self_forcing(report: Report, golden: Golden, folder: Folder, name: str) -> None:
    if ("reference" in name) == ("detached" in name):
        report.wrong.append("unknown: its name contains neither 'reference' nor 'detached'")
        return
    net = folder.network()
    net.checkpoint_blocks = True
    noise, text = folder.put(golden["noise"]), folder.put(golden["context"])
    steps, exits = golden["steps"].tolist(), golden["exit_index"].reshape(-1).tolist()
    fresh = (folder.put(golden[key]) for key in sorted(golden) if key.startswith("renoise."))
    shape = (noise.shape[0], net.config.chunk, *noise.shape[2:])
    latents = self_forced(
        net,
        text,
        noise,
        [steps],
        exits,
        lambda: next(fresh).view(shape),
        schedule=folder.schedule,
        leak="reference" in name,
    )
    report.value("latents", latents, golden["latents"])
    unwarped = [*folder.config["steps"], 0]
    for key, offset in (("t_from", 0), ("t_to", 1)):
        if key in golden and len(unwarped) == len(steps) + 1:
            report.exact(key, unwarped[exits[0] + offset], int(golden[key]))
    _compare_gradients(report, net, latents, {}, golden, folder)
