"""Writes golden folders of LongLive from its rules, with slots that are moved and no ring.

Float64, a cache of slots per layer that each pass copies, rolls and rewrites: the released code's
rules as they read, with nothing of the package. Shape letters: B batch, F frames, T tokens per
frame, h heads, S slots, d head channels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.afd.golden_writer import KV, Oracle, random_weights, sigma_at, warp

Switches = dict[int, str]
LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q")
LAYERS += ("cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")


class Slots:
    """The released cache: zeros at first; a pass works on a copy, kept after its last layer."""

    def __init__(self, net: Oracle, batch: int, window: int, sink: int) -> None:
        heads = net.config["num_heads"]
        shape = (batch, heads, window * net.tokens, net.config["dim"] // heads)
        self.kv: list[KV] = [
            (torch.zeros(shape).double(), torch.zeros(shape).double())
            for _ in range(net.config["num_layers"])
        ]
        self.net, self.capacity, self.sink = net, window * net.tokens, sink * net.tokens
        self.seen = self.filled = 0

    def zero(self) -> None:
        self.kv = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in self.kv]

    def run(
        self, x: Tensor, t: float, text: list[KV], first: int, sink_too: bool = False
    ) -> Tensor:
        """One pass of the frames from `first` on; `sink_too`: recomputed frames may be the sink."""
        new = x.shape[1] * self.net.tokens
        start, end = first * self.net.tokens, first * self.net.tokens + new
        again = end <= self.seen and start > 0
        gone = max(0, self.filled + new - self.capacity) if end > self.seen else 0
        local_end = self.filled + end - self.seen - gone
        local_start = local_end - new
        write = max(local_start, self.sink) if again and not sink_too else local_start
        after: list[KV] = []

        def put(old: Tensor, own: Tensor) -> Tensor:
            slots = old.clone()
            if gone:
                slots[:, :, self.sink : self.filled - gone] = old[
                    :, :, self.sink + gone : self.filled
                ]
            slots[:, :, write:local_end] = own[:, :, write - local_start :]
            return slots

        def attended(layer: int, k: Tensor, v: Tensor) -> KV:
            old_k, old_v = self.kv[layer]
            after.append((put(old_k, k), put(old_v, v)))
            least = max(self.sink, local_end - (self.capacity - self.sink))
            k_seen, v_seen = (
                torch.cat([x[:, :, : self.sink], x[:, :, least:local_end]], 2) for x in after[layer]
            )
            return k_seen, v_seen

        times = torch.full(x.shape[:2], t).double()
        frames = range(first, first + x.shape[1])
        flow = self.net(x, times, text, frames, seen=attended)
        self.kv = after
        if not again:
            self.seen, self.filled = end, local_end
        return flow


@dataclass
class LongLiveWriter:
    """Writes the files of one configuration: config.json's parts `network` and `stream`."""

    folder: Path
    network: dict[str, Any]
    stream: dict[str, Any]
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        sizes = {k: self.stream[k] for k in ("H", "W", "chunk")}
        self.weights = random_weights(self.network | sizes, self.draw)
        self.net = Oracle(self.network | sizes, self.weights)
        self.files: dict[str, Any] = {}
        s = self.stream
        shape = (s["batch"], s["frames"], 16, s["H"], s["W"])
        self.noise, self.texts = self.draw(*shape), (self.text("first"), self.text("second"))
        chunks = s["frames"] // s["chunk"]
        self.draws = [
            [self.draw(s["batch"], s["chunk"], *shape[2:]) for _ in s["steps"][1:]]
            for _ in range(chunks)
        ]

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def text(self, which: str) -> Tensor:
        text = self.draw(self.stream["batch"], self.network["text_len"], self.network["text_dim"])
        for row, length in zip(text, self.stream[f"prompt_lens_{which}"], strict=True):
            row[length:] = 0
        return text

    @torch.no_grad()
    def run(self, switches: Switches) -> dict[str, Any]:
        """Every tensor of a run in which each switch is to the other text."""
        s, T = self.stream, self.net.tokens
        times = warp(s["steps"])
        levels = [float(sigma_at(torch.tensor([t]))) for t in times]
        cache = Slots(self.net, s["batch"], s["window"], s["sink"])
        clean, meta, told, text = [], [], [], 0
        out: dict[str, Any] = {}
        holds: list[int] = []

        def call(x: Tensor, t: float, first: int, recache: bool = False, **how: Any) -> Tensor:
            flow = cache.run(x, t, text_kv, first, **how)
            meta.append([first * T, x.shape[1], cache.seen, cache.filled, int(recache)])
            told.append(t)
            return flow

        text_kv = self.net.text_kv(self.texts[0])
        for chunk, draws in enumerate(self.draws):
            cur = chunk * s["chunk"]
            if chunk in switches:
                text = 1 - text
                text_kv, mode = self.net.text_kv(self.texts[text]), switches[chunk]
                if mode != "plain" and cur:
                    n = min(s["window"], cur)
                    if mode == "new_sink":
                        cache.zero()
                    newest = torch.cat(clean, 1)[:, cur - n :]
                    how = {"recache": True, "sink_too": mode == "new_sink"}
                    out["recache.flow"] = call(newest, s["context_noise"], cur - n, **how)
                    out |= self.caches("after_recache", cache)
                    if mode == "new_sink":
                        holds = list(range(cur - n, cur))
            x = self.noise[:, cur : cur + s["chunk"]].double()
            for step, t in enumerate(times):
                flow = call(x, t, cur)
                if chunk in switches and step == 0:
                    out["after_switch.flow"] = flow
                x0 = x - levels[step] * flow
                if step + 1 < len(times):
                    x = (1 - levels[step + 1]) * x0 + levels[step + 1] * draws[step]
            clean.append(x0)
            call(x0, s["context_noise"], cur)
            holds += range(cur, cur + s["chunk"])
            gone = len(holds) - s["window"]
            if gone > 0:
                del holds[s["sink"] : s["sink"] + gone]
        cross = {
            f"final.cross.{i}.{letter}": x.transpose(1, 2)
            for i, kv in enumerate(text_kv)
            for letter, x in zip("kv", kv, strict=True)
        }
        out |= {"calls.meta": torch.tensor(meta), "calls.t": torch.tensor(told).double()}
        index = torch.tensor([[cache.seen, cache.filled]] * len(cache.kv))
        out |= {"latents": torch.cat(clean, 1), "final.index": index, **cross}
        out |= {"denoising_step_list": torch.tensor(times), "holds": holds}
        return out | self.caches("final", cache)

    def caches(self, name: str, cache: Slots) -> dict[str, Tensor]:
        return {
            f"{name}.kv.{i}.{letter}": x.transpose(1, 2)
            for i, kv in enumerate(cache.kv)
            for letter, x in zip("kv", kv, strict=True)
        }

    def write(self, switches: dict[str, tuple[int, str]]) -> None:
        """The folder: weights, the run without a switch, and each named (chunk, mode)."""
        self.folder.mkdir(parents=True)
        self.save("weights", self.weights)
        draws = [draw.flatten(0, 1) for chunk in self.draws for draw in chunk]
        named = {f"renoise.{i:03d}": draw for i, draw in enumerate(draws)}
        plain = self.run({}) | {"noise": self.noise, "context": self.texts[0], **named}
        self.files["rollout_window_sink"] = {"final_slots_hold_frames": plain.pop("holds")}
        self.save("rollout_window_sink", plain)
        for name, (chunk, mode) in switches.items():
            out = self.run({chunk: mode})
            out |= {"context_first": self.texts[0], "context_second": self.texts[1]}
            cur, window = chunk * self.stream["chunk"], self.stream["window"]
            n = min(window, cur)
            kept = mode == "recache" and cur > window
            self.files[name] = {
                "chunk": chunk,
                "first_frame_with_second_text": cur,
                "frames_passed": [cur - n, cur],
                "frames_written": [cur - n + self.stream["sink"] * kept, cur],
                "global_sink": mode != "new_sink",
                "final_slots_hold_frames": out.pop("holds"),
            }
            self.save(name, out)
        self.lora()
        config = {"network": self.network, "stream": self.stream, "files": self.files}
        config["lora"] = {"rank": 3, "alpha": 5}
        (self.folder / "config.json").write_text(json.dumps(config))

    @torch.no_grad()
    def lora(self) -> None:
        """Adapters on every linear layer of the blocks, and the flow with and without them."""
        held, weights = {}, dict(self.weights)
        for i in range(self.network["num_layers"]):
            for layer in LAYERS:
                name = f"blocks.{i}.{layer}"
                o, n = weights[f"{name}.weight"].shape
                a, b = self.draw(3, n) / n**0.5, 0.3 * self.draw(o, 3)
                weights[f"{name}.weight"] = weights[f"{name}.weight"].double() + 5 / 3 * b @ a
                held[f"base_model.model.{name}.lora_A.weight"] = a
                held[f"base_model.model.{name}.lora_B.weight"] = b
        self.save("lora", held)
        x = self.noise[:, : self.stream["chunk"]]
        t, out = torch.full(x.shape[:2], 1000.0), {}
        for key, net in (("base", self.net), ("lora", Oracle(self.net.config, weights))):
            text_kv = net.text_kv(self.texts[0])
            out[f"flow_{key}"] = net(x, t, text_kv, range(x.shape[1]))
        self.save("lora_forward", {"x": x, "t": t, "context": self.texts[0], **out})

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        out = {}
        for key, x in tensors.items():
            wide = x.is_floating_point() and key != "calls.t"
            out[key] = (x.float() if wide else x).contiguous().clone()
        save_file(out, self.folder / f"{name}.safetensors")
