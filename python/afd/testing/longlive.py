"""Replays LongLive's golden files: streams with window and sink, prompt switches, a LoRA file.

A folder's config.json has the parts network, stream and files. Every run uses the noise and the
draws of rollout_window_sink. Shape letters: B batch, F frames, T tokens per frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from afd.models.wan.kv_cache import KVCache
from afd.models.wan.lora import merge_lora
from afd.models.wan.network import CausalWan
from afd.models.wan.student import WanStudent
from afd.models.wan.types import LayerKV, WanConfig
from afd.rollout import Switch, SwitchMode, stream
from afd.schedules import ShiftedFlow
from afd.testing.measure import Report

Golden = dict[str, Tensor]
# The run without a switch, which stores the noise of all.
PLAIN = "rollout_window_sink"
PARTS = {"network", "stream", "files"}
_SIZES = ("dim", "num_heads", "ffn_dim", "num_layers", "freq_dim", "text_dim", "text_len")
_CHANNELS = ("in_dim", "out_dim")


class ReleasedCache(KVCache):
    """A cache whose sink is filled as in the released code where the sink is longer than a chunk.

    A chunk's first step writes all its slots; its later passes do not write the slots of the sink
    (unless the chunk begins the video), so these keep the noisiest step's keys. All slots of the
    sink are attended to from the start, as zeros until they are written.
    """

    _kept: tuple[slice, list[LayerKV]] | None = None

    @property
    def valid_frames(self) -> int:
        return max(super().valid_frames, self.sink)

    def seek(self, start: int, frames: int) -> None:
        again = 0 < start < self.sink and start + frames <= self.end
        self._kept = None
        super().seek(start, frames)
        if again:
            T = self.tokens_per_frame
            sunk = slice(start * T, min(start + frames, self.sink) * T)
            self._kept = sunk, [(k[:, sunk].clone(), v[:, sunk].clone()) for k, v in self.self_kv]

    def recache(self, *, new_sink: bool = False, chunks: Sequence[int] = ()) -> range:
        self._kept = None
        return super().recache(new_sink=new_sink, chunks=chunks)

    def view(self, layer: int) -> LayerKV:
        if self._kept is not None:
            # The pass has just written its keys; it attends to the ones kept.
            sunk, kept = self._kept
            for x, before in zip(self.self_kv[layer], kept[layer], strict=True):
                x[:, sunk] = before
        return super().view(layer)


@dataclass(frozen=True)
class LongLiveFolder:
    """A golden folder of LongLive, and where to run it."""

    path: Path
    config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype

    def load(self, name: str) -> Golden:
        """A file's tensors on the device; indices and times keep their dtype."""
        held = load_file(self.path / f"{name}.safetensors")
        return {key: self._put(key, x) for key, x in held.items()}

    def _put(self, name: str, x: Tensor) -> Tensor:
        kept = not x.is_floating_point() or name.startswith("calls.")
        return x.to(self.device, x.dtype if kept else self.dtype)

    def student(self, weights: Golden) -> WanStudent:
        """The student with these weights, window and sink."""
        network, setting = self.config["network"], self.config["stream"]
        sizes = {key: network[key] for key in _SIZES}
        sizes |= {key: network[key] for key in _CHANNELS if key in network}
        window = setting["window"]
        memory: dict[str, Any] = {}
        if window > 0:  # the released code's -1 keeps everything
            memory = {"window": window, "sink": setting["sink"]}
        patch = tuple(network.get("patch", (1, 2, 2))[1:])
        net = CausalWan(WanConfig(**sizes, patch=patch, chunk=setting["chunk"], **memory))
        net.load_state_dict(weights)
        net.to(self.device, self.dtype).requires_grad_(False)
        schedule = ShiftedFlow(float(setting["shift"]))
        size = {"height": setting["H"], "width": setting["W"]}
        return WanStudent(net, **size, frames=setting["frames"], schedule=schedule)

    def reports(self, prefix: str) -> Iterator[Report]:
        """A report for every file but the weights."""
        for path in sorted(self.path.iterdir()):
            if path.name == "config.json" or not path.is_file() or path.suffix == ".md":
                continue
            if path.stem in ("weights", "lora") and path.suffix == ".safetensors":
                continue
            report = Report(prefix + path.stem)
            try:
                if path.suffix != ".safetensors":
                    report.wrong.append(f"unknown: {path.name} is no .safetensors file")
                elif path.stem == "lora_forward":
                    _compare_lora(report, self)
                elif path.stem in self.config["files"]:
                    _compare_run(report, self, path.stem)
                else:
                    report.wrong.append("unknown: config.json does not list it under files")
            except (KeyError, RuntimeError, ValueError, StopIteration, OSError) as error:
                report.wrong.append(f"{type(error).__name__}: {error}")
            yield report


@torch.no_grad()
def _compare_lora(report: Report, folder: LongLiveFolder) -> None:
    """The base network's and the merged network's first denoising step."""
    golden, weights = folder.load("lora_forward"), folder.load("weights")
    alpha = float(folder.config["lora"]["alpha"])
    merged = merge_lora(weights, folder.path / "lora.safetensors", alpha=alpha)
    for name, held in (("flow_base", weights), ("flow_lora", merged)):
        net = folder.student(held).net
        frames, _, height, width = golden["x"].shape[1:]
        cache = net.new_cache(golden["context"], frames, height, width)
        flow = net.forward_cached(golden["x"], golden["t"], cache, 0)
        assert flow is not None
        report.value(name, flow, golden[name])


@dataclass
class _Watched:
    """The calls of a student's network, and what the passes after a switch return."""

    cache: KVCache
    calls: list[list[int]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    recache_flow: Tensor | None = None
    after_recache: Golden = field(default_factory=dict)
    switched_flow: Tensor | None = None

    def attach(self, net: CausalWan, switch_frame: int | None) -> None:
        """Record the calls of `net` from now on."""
        forward, recache = net.forward_cached, net.recache

        def forward_cached(x: Tensor, t: Tensor, cache: KVCache, start: int, **how: Any) -> Any:
            out = forward(x, t, cache, start, **how)
            self._record(start, x.shape[1], t, recaching=False)
            if start == switch_frame and self.switched_flow is None:
                self.switched_flow = out
            return out

        def recached(x: Tensor, t: Tensor, cache: KVCache, **how: Any) -> None:
            self.recache_flow = recache(x, t, cache, **how, context_only=False)
            self._record(cache.start, cache.end - cache.start, t, recaching=True)
            self.after_recache = by_frame(cache, "after_recache")

        net.forward_cached, net.recache = forward_cached, recached  # type: ignore[method-assign,assignment]

    def _record(self, start: int, frames: int, t: Tensor, *, recaching: bool) -> None:
        tokens = self.cache.tokens_per_frame
        ends = [self.cache.end * tokens, len(self.cache.held()) * tokens]
        self.calls.append([start * tokens, frames, *ends, int(recaching)])
        self.times.append(float(t.flatten()[0]))


def by_frame(cache: KVCache, name: str) -> Golden:
    """A copy of the cache's keys and values in the order of their frames, as `<name>.kv.l.k`."""
    slots = torch.tensor([cache.slot(frame) for frame in cache.held()])
    return {
        f"{name}.kv.{layer}.{letter}": x.unflatten(1, (-1, cache.tokens_per_frame))[
            :, slots.to(x.device)
        ].flatten(1, 2)
        for layer, kv in enumerate(cache.self_kv)
        for letter, x in zip("kv", kv, strict=True)
    }


@torch.no_grad()
def _compare_run(report: Report, folder: LongLiveFolder, name: str) -> None:
    """Streams the run with the stored noise and compares all that its file holds."""
    golden, plain = folder.load(name), folder.load(PLAIN)
    facts, setting = folder.config["files"][name], folder.config["stream"]
    student = folder.student(folder.load("weights"))
    chunk, steps, frames = setting["chunk"], setting["steps"], setting["frames"]
    first = plain["noise"].split(chunk, 1)

    def noise(index: int, step: int) -> Tensor:
        if step == 0:
            return first[index]
        draw = plain[f"renoise.{index * (len(steps) - 1) + step - 1:03d}"]
        return draw.view_as(first[index])

    switches, switch_frame = {}, None
    if "context_second" in golden:
        switch_frame = facts["first_frame_with_second_text"]
        switches[facts["chunk"]] = Switch(golden["context_second"], _mode(golden, facts))
    text = golden["context_first"] if switches else golden["context"]
    cache = student.new_cache(text, frames)
    net = student.net.config
    if net.sink > chunk:
        grid = net.grid(student.height, student.width)
        text_kv = student.net.text_kv(text)
        cache = ReleasedCache(text_kv, None, *grid, window=net.window, sink=net.sink)
    watched = _Watched(cache)
    watched.attach(student.net, switch_frame)
    chunks = stream(
        student,
        text,
        noise,
        frames=frames,
        denoising_steps=steps,
        switches=switches,
        context_noise=float(setting["context_noise"]),
        remember_last=True,
        cache=cache,
    )
    report.value("latents", torch.cat(list(chunks), 1), golden["latents"])
    if "denoising_step_list" in golden:
        times = torch.tensor([level.t for level in student.levels(steps)])
        report.value("denoising_step_list", times, golden["denoising_step_list"])
    held = by_frame(cache, "final") | watched.after_recache
    for layer, kv in enumerate(cache.cross_kv):
        held |= {f"final.cross.{layer}.{x}": part for x, part in zip("kv", kv, strict=True)}
    for key, expected in golden.items():
        if key in held:
            # The released cache has its full size from the start.
            report.value(key, held[key], expected[:, : held[key].shape[1]])
        elif ".kv." in key or ".cross." in key:
            report.wrong.append(f"{key}: not known")
    report.exact("final_slots_hold_frames", cache.held(), facts["final_slots_hold_frames"])
    tokens = cache.tokens_per_frame
    index = [[cache.end * tokens, len(cache.held()) * tokens]] * len(cache.self_kv)
    report.exact("final.index", index, golden["final.index"].tolist())
    if "after_switch.flow" in golden:
        assert watched.switched_flow is not None
        report.value("after_switch.flow", watched.switched_flow, golden["after_switch.flow"])
    if "recache.flow" in golden:
        flow = watched.recache_flow
        assert flow is not None
        # The released pass also predicts frames that it writes nowhere; nobody sees them.
        report.value("recache.flow", flow, golden["recache.flow"][:, -flow.shape[1] :])
    _compare_calls(report, watched, golden, facts, tokens)


def _mode(golden: Golden, facts: dict[str, Any]) -> SwitchMode:
    if "recache.flow" not in golden:
        return "plain"
    # With an early switch both settings of the released code give the same.
    return "new_sink" if facts["global_sink"] is False else "recache"


def _compare_calls(
    report: Report, watched: _Watched, golden: Golden, facts: dict[str, Any], tokens: int
) -> None:
    """Order, positions and times of all passes; of a recache, the frames written."""
    calls = golden["calls.meta"].tolist()
    for ours, expected in zip(watched.calls, calls, strict=False):
        if ours[4] and expected[4]:
            start = ours[0] // tokens
            report.exact("frames_written", [start, start + ours[1]], facts["frames_written"])
            passed = [expected[0] // tokens, expected[0] // tokens + expected[1]]
            report.exact("frames_passed", facts["frames_passed"], passed)
            ours[:2] = expected[:2]
    report.exact("calls.meta", watched.calls, calls)
    times = torch.tensor(watched.times, dtype=torch.float64)
    report.value("calls.t", times, golden["calls.t"])
