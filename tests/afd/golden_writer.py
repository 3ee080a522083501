"""Writes golden folders in the documented format, from an implementation that shares no code.

Float64, dense masks, complex rotations, a cache that is rolled: the network as its formulas read,
with nothing of the package. Shape letters: B batch, F frames, T tokens per frame, L tokens,
D width, h heads, d head channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

KV = tuple[Tensor, Tensor]
SIGMAS = torch.tensor([5 * u / (1 + 4 * u) for u in (1 - i / 1000 for i in range(1000))]).double()


def sigma_at(t: Tensor) -> Tensor:
    """The table's noise level nearest to each time."""
    return SIGMAS[(1000 * SIGMAS - t.double().flatten()[:, None]).abs().argmin(1)].view(t.shape)


def warp(steps: Sequence[int]) -> list[float]:
    return [float(1000 * SIGMAS[1000 - u]) for u in steps]


def random_weights(config: dict[str, Any], draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    """A state dict with the released names, every parameter random."""
    D, text, freq, ffn = (config[k] for k in ("dim", "text_dim", "freq_dim", "ffn_dim"))
    linears = {
        "patch_embedding": (D, 16, 1, 2, 2),
        "text_embedding.0": (D, text),
        "text_embedding.2": (D, D),
        "time_embedding.0": (D, freq),
        "time_embedding.2": (D, D),
        "time_projection.1": (6 * D, D),
        "head.head": (64, D),
    }
    weights = {"head.modulation": draw(1, 2, D) / D**0.5}
    for i in range(config["num_layers"]):
        block = f"blocks.{i}."
        weights[f"{block}modulation"] = draw(1, 6, D) / D**0.5
        weights[f"{block}norm3.weight"] = 1 + 0.1 * draw(D)
        weights[f"{block}norm3.bias"] = 0.1 * draw(D)
        linears |= {f"{block}ffn.0": (ffn, D), f"{block}ffn.2": (D, ffn)}
        for kind in ("self_attn", "cross_attn"):
            for name in ("q", "k", "v", "o"):
                linears[f"{block}{kind}.{name}"] = (D, D)
            for name in ("norm_q", "norm_k"):
                weights[f"{block}{kind}.{name}.weight"] = 1 + 0.1 * draw(D)
    for name, shape in linears.items():
        inputs = torch.Size(shape[1:]).numel()
        weights[f"{name}.weight"] = draw(*shape) / inputs**0.5
        weights[f"{name}.bias"] = 0.1 * draw(shape[0])
    return weights


class Oracle:
    """The network by its formulas."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.config = config
        self.w = {k: v.double().requires_grad_() for k, v in weights.items()}
        self.rows, self.cols = config["H"] // 2, config["W"] // 2
        self.tokens = self.rows * self.cols

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.config["num_heads"], -1)).transpose(1, 2)

    def normed(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{name}.weight"]

    def rotate(self, x_BhLd: Tensor, positions: Sequence[int]) -> Tensor:
        pairs = x_BhLd.shape[-1] // 2
        counts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        angles = []
        for frame in positions:
            for row in range(self.rows):
                for col in range(self.cols):
                    place = (frame, row, col)
                    angle = [
                        p * 10000 ** (-j / n)
                        for p, n in zip(place, counts, strict=True)
                        for j in range(n)
                    ]
                    angles.append(angle)
        turn = torch.polar(
            *(f(torch.tensor(angles).double()) for f in (torch.ones_like, torch.clone))
        )
        pairs_BhLp = torch.view_as_complex(x_BhLd.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs_BhLp * turn).flatten(-2)

    def text_kv(self, text: Tensor) -> list[KV]:
        embedded = self.linear("text_embedding.0", text.double())
        embedded = self.linear("text_embedding.2", F.gelu(embedded, approximate="tanh"))
        kv = []
        for i in range(self.config["num_layers"]):
            name = f"blocks.{i}.cross_attn."
            k = self.normed(f"{name}norm_k", self.linear(f"{name}k", embedded))
            kv.append((self.heads(k), self.heads(self.linear(f"{name}v", embedded))))
        return kv

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        text_kv: list[KV],
        positions: Sequence[int],
        frame_mask: Tensor | None = None,
        past: list[KV] | None = None,
        keep: list[KV] | None = None,
        seen: Callable[[int, Tensor, Tensor], KV] | None = None,
        taps: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Flow of all frames [B, F, 16, H, W]; `keep` receives the pass's own keys and values.

        `seen` maps a layer and its own keys and values to those that are attended.
        """
        taps = {} if taps is None else taps
        B, frames = x.shape[:2]
        half = self.config["freq_dim"] // 2
        angle = t.double()[..., None] * 10000.0 ** (-torch.arange(half).double() / half)
        e = self.linear("time_embedding.0", torch.cat([angle.cos(), angle.sin()], -1))
        e = self.linear("time_embedding.2", F.silu(e))
        e0 = self.linear("time_projection.1", F.silu(e)).unflatten(-1, (6, -1))
        taps["time_embedding"], taps["time_projection"] = (
            e.flatten(0, 1),
            e0.flatten(2).flatten(0, 1),
        )
        weight, bias = self.w["patch_embedding.weight"], self.w["patch_embedding.bias"]
        h = F.conv3d(x.double().transpose(1, 2), weight, bias, stride=(1, 2, 2))
        taps["patch_embedding.b0"] = h[:1]
        x_BLD = h.flatten(2).transpose(1, 2)
        mask = None
        if frame_mask is not None:
            mask = frame_mask.repeat_interleave(self.tokens, 0).repeat_interleave(self.tokens, 1)

        def spread(m_BFD: Tensor) -> Tensor:
            return m_BFD.repeat_interleave(self.tokens, 1)

        def norm(x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], eps=1e-6)

        for i in range(self.config["num_layers"]):
            name = f"blocks.{i}."
            m = [spread(y) for y in (self.w[f"{name}modulation"] + e0).unbind(2)]
            h = norm(x_BLD) * (1 + m[1]) + m[0]
            q, k = (
                self.heads(
                    self.normed(f"{name}self_attn.norm_{a}", self.linear(f"{name}self_attn.{a}", h))
                )
                for a in "qk"
            )
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            v = self.heads(self.linear(f"{name}self_attn.v", h))
            if keep is not None:
                keep.append((k, v))
            if seen is not None:
                k, v = seen(i, k, v)
            if past is not None:
                k, v = torch.cat([past[i][0], k], 2), torch.cat([past[i][1], v], 2)
            y = self.linear(f"{name}self_attn.o", self.attend(q, k, v, mask))
            taps[f"{name}self_attn"] = y
            x_BLD = x_BLD + m[2] * y
            h = norm(x_BLD) * self.w[f"{name}norm3.weight"] + self.w[f"{name}norm3.bias"]
            q = self.normed(f"{name}cross_attn.norm_q", self.linear(f"{name}cross_attn.q", h))
            y = self.linear(f"{name}cross_attn.o", self.attend(self.heads(q), *text_kv[i], None))
            taps[f"{name}cross_attn"] = y
            x_BLD = x_BLD + y
            h = norm(x_BLD) * (1 + m[4]) + m[3]
            y = self.linear(
                f"{name}ffn.2", F.gelu(self.linear(f"{name}ffn.0", h), approximate="tanh")
            )
            taps[f"{name}ffn"] = y
            x_BLD = taps[f"blocks.{i}"] = x_BLD + m[5] * y
        shift, scale = (self.w["head.modulation"] + e.unsqueeze(2)).unbind(2)
        y = self.linear("head.head", norm(x_BLD) * (1 + spread(scale)) + spread(shift))
        y = y.view(B, frames, self.rows, self.cols, 2, 2, 16).permute(0, 1, 6, 2, 4, 3, 5)
        return y.reshape(x.shape)


class RolledCache:
    """Keys and values as the released code keeps them: rows that are moved."""

    def __init__(self, layers: int, capacity: int, sink: int) -> None:
        self.kv: list[KV | None] = [None] * layers
        self.capacity, self.sink, self.seen, self.filled = capacity, sink, 0, 0

    def past(self, end: int, new: int) -> list[KV] | None:
        """Evicts what must go for `new` tokens that end at `end`; what comes before them."""
        if end > self.seen and self.filled + new > self.capacity:
            gone = self.filled + new - self.capacity
            self.kv = [
                tuple(torch.cat([x[:, :, : self.sink], x[:, :, self.sink + gone :]], 2) for x in kv)
                for kv in self.kv
            ]
        self.filled = min(self.filled + end - self.seen, self.capacity)
        self.seen, self.base = end, self.filled - new
        return (
            None if self.base == 0 else [tuple(x[:, :, : self.base] for x in kv) for kv in self.kv]
        )

    def write(self, own: list[KV]) -> None:
        for i, kv in enumerate(own):
            old = self.kv[i]
            head = [x[:, :, : self.base] for x in old] if old is not None and self.base else None
            self.kv[i] = (
                kv if head is None else tuple(map(lambda a, b: torch.cat([a, b], 2), head, kv))
            )


def frame_mask(frames: int, chunk: int, window: int | None = None, alone: bool = False) -> Tensor:
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for f in range(frames):
        block = (f + chunk - 1) // chunk if alone else f // chunk
        end = min(frames, block * chunk + 1 if alone else (block + 1) * chunk)
        mask[f, max(0, end - window) if window else 0 : end] = True
    return mask


@dataclass
class Writer:
    """Writes the files of one configuration; `first_steps` is the first chunk's own list."""

    folder: Path
    config: dict[str, Any]
    first_steps: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.config.get("seed", 0))
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        weights = random_weights(self.config, self.draw)
        save_file(weights, self.folder / "weights.safetensors")
        self.net = Oracle(self.config, weights)
        self.chunk = self.config["chunk"]

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def video(self, batch: int, frames: int) -> Tensor:
        return self.draw(batch, frames, 16, self.config["H"], self.config["W"])

    def text(self, batch: int) -> Tensor:
        text = self.draw(batch, self.config["text_len"], self.config["text_dim"])
        for row, length in zip(text, self.config["prompt_lens"], strict=False):
            row[length:] = 0
        return text

    def save(self, name: str, tensors: dict[str, Any]) -> None:
        out = {}
        for key, value in tensors.items():
            value = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
            out[key] = (value.float() if value.is_floating_point() else value).contiguous().clone()
        save_file(out, self.folder / f"{name}.safetensors")

    def gradients(self, loss: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {**self.net.w, **inputs}
        found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norms = {f"gradnorm.{name}": found[name].norm() for name in self.net.w}
        small = {f"grad.{name}": g for name, g in found.items() if g.numel() <= 4096}
        return norms | small | {f"grad.{name}": found[name] for name in inputs}

    def one_pass(self) -> None:
        """Block-causal in its variants, and teacher forcing."""
        batch, frames = self.config["batch"], self.config["frames"]
        text, t = self.text(batch), 1000 * torch.rand(batch, frames, generator=self.generator)
        variants = {
            "train_causal": (
                frames,
                None,
                False,
                t[:, :: self.chunk].repeat_interleave(self.chunk, 1),
            ),
            "train_causal_per_frame_t": (frames, None, False, t),
            "train_causal_window": (frames, self.config["win_train"], False, t),
            "train_causal_first_frame_independent": (frames - self.chunk + 1, None, True, t),
        }
        for name, (count, window, alone, times) in variants.items():
            x, times, taps = self.video(batch, count), times[:, :count], {}
            mask, leaf = frame_mask(count, self.chunk, window, alone), x.double().requires_grad_()
            flow = self.net(leaf, times, self.net.text_kv(text), range(count), mask, taps=taps)
            out = {"x": x, "t": times, "context": text, "flow": flow, "frame_mask": mask}
            out["x0"] = x - sigma_at(times)[..., None, None, None] * flow
            if name == "train_causal":
                R = self.draw(*flow.shape)
                loss = (flow * R).mean()
                out |= {"R": R, "loss": loss, **self.gradients(loss, {"x": leaf})}
                out |= {f"tap.{key}": value for key, value in taps.items()}
            self.save(name, out)
        for name, aug_t in (("teacher_forcing", None), ("teacher_forcing_aug", t.flip(1) / 5)):
            self._teacher_forcing(name, text, t, aug_t)

    def _teacher_forcing(self, name: str, text: Tensor, t: Tensor, aug_t: Tensor | None) -> None:
        batch, frames = t.shape
        x, clean = self.video(batch, frames), self.video(batch, frames)
        mask = torch.zeros(2 * frames, 2 * frames, dtype=torch.bool)
        block = torch.arange(frames) // self.chunk
        mask[:frames, :frames] = block[None] <= block[:, None]
        mask[frames:, :frames] = block[None] < block[:, None]
        mask[frames:, frames:] = block[None] == block[:, None]
        leaves = {"x": x.double().requires_grad_(), "clean_x": clean.double().requires_grad_()}
        both = torch.cat([leaves["clean_x"], leaves["x"]], 1)
        times = torch.cat([torch.zeros_like(t) if aug_t is None else aug_t, t], 1)
        places = [*range(frames), *range(frames)]
        flow = self.net(both, times, self.net.text_kv(text), places, mask)[:, frames:]
        out = {"x": x, "clean_x": clean, "t": t, "context": text, "flow": flow, "frame_mask": mask}
        if aug_t is None:
            R = self.draw(*flow.shape)
            loss = (flow * R).mean()
            self.save(name, out | {"R": R, "loss": loss, **self.gradients(loss, leaves)})
        else:
            self.save(name, out | {"aug_t": aug_t})

    @torch.no_grad()
    def rollout(self, name: str, frames: int, batch: int, capacity: int, sink: int) -> None:
        noise, text = self.video(batch, frames), self.text(batch)
        text_kv, T = self.net.text_kv(text), self.net.tokens
        cache = RolledCache(self.config["num_layers"], capacity * T, sink * T)
        out: dict[str, Any] = {"noise": noise, "context": text}
        steps = warp(self.config["steps"])
        out["denoising_step_list"] = torch.tensor(steps)
        first, latents, calls, draws = warp(self.first_steps or self.config["steps"]), [], 0, 0
        for start in range(0, frames, self.chunk):
            x = noise[:, start : start + self.chunk].double()
            times = [*(steps if start else first), 0.0]
            for j, u in enumerate(times):
                t, own = torch.full(x.shape[:2], u), []
                end, new = (start + self.chunk) * T, self.chunk * T
                past = cache.past(end, new)
                places = range(start, start + self.chunk)
                flow = self.net(x, t, text_kv, places, past=past, keep=own)
                cache.write(own)
                x0 = x - sigma_at(t)[..., None, None, None] * flow
                key, calls = f"call.{calls:03d}", calls + 1
                out |= {f"{key}.meta": [start * T, end, cache.filled], f"{key}.t": t}
                out |= {f"{key}.flow": flow, f"{key}.x0": x0}
                if j + 2 < len(times):
                    noise_j = out[f"renoise.{draws:03d}"] = self.draw(*x.flatten(0, 1).shape)
                    draws, level = draws + 1, float(sigma_at(torch.tensor(times[j + 1])))
                    x = (1 - level) * x0 + level * noise_j.view_as(x)
                elif j + 2 == len(times):
                    x = x0
                    latents.append(x0)
        out["latents"] = torch.cat(latents, 1)
        for i, (kv, text_layer) in enumerate(zip(cache.kv, text_kv, strict=True)):
            for letter, own_x, text_x in zip("kv", kv, text_layer, strict=True):
                rows = torch.zeros(batch, capacity * T, *own_x.transpose(1, 2).shape[2:])
                rows[:, : own_x.shape[2]] = own_x.transpose(1, 2)
                out[f"final.kv.{i}.{letter}"] = rows
                out[f"final.cross.{i}.{letter}"] = text_x.transpose(1, 2)
        self.save(name, out)

    def self_forcing(self) -> None:
        """Gradients through the exit steps, with and without the leak between chunks."""
        frames, leave, steps = (
            self.config["sf_frames"],
            self.config["sf_exit"],
            self.config["steps"],
        )
        noise, text, R = self.video(1, frames), self.text(1), self.video(1, frames)
        times, c = warp(steps), self.chunk
        draws = [self.draw(c, *noise.shape[2:]) for _ in range((leave + 1) * frames // c)]
        for name, leak in (("reference", True), ("detached", False)):
            text_kv, fresh = self.net.text_kv(text), iter(draws)
            chunks: list[list[KV]] = []
            latents = []
            for start in range(0, frames, c):
                past = None
                if chunks:
                    layers = zip(*chunks, strict=True)
                    past = [tuple(torch.cat(x, 2) for x in zip(*kv, strict=True)) for kv in layers]
                x = noise[:, start : start + c].double()
                for j in range(leave + 1):
                    own: list[KV] = []
                    t = torch.full((1, c), times[j])
                    places = range(start, start + c)
                    flow = self.net(x, t, text_kv, places, past=past, keep=own)
                    x0 = x - float(sigma_at(t[0, :1])) * flow
                    if j < leave:
                        level = float(sigma_at(torch.tensor(times[j + 1])))
                        x = ((1 - level) * x0 + level * next(fresh)).detach()
                latents.append(x0)
                level = float(SIGMAS[-1])
                clean = ((1 - level) * x0 + level * next(fresh)).detach()
                kept: list[KV] = []
                with torch.no_grad():
                    self.net(clean, torch.zeros(1, c), text_kv, places, past=past, keep=kept)
                if leak:
                    # The value of the context pass, the gradient of the exit step.
                    kept = [
                        tuple(a + b - b.detach() for a, b in zip(values, paths, strict=True))
                        for values, paths in zip(kept, own, strict=True)
                    ]
                chunks.append(kept)
            video = torch.cat(latents, 1)
            loss = (video * R).mean()
            out = {"noise": noise, "context": text, "R": R, "latents": video, "loss": loss}
            out |= {f"renoise.{i:03d}": x for i, x in enumerate(draws)}
            out |= {"exit_index": leave, "steps": torch.tensor(times)}
            out |= {"t_from": steps[leave], "t_to": [*steps, 0][leave + 1]}
            self.save(f"sf_train_grad_{name}", out | self.gradients(loss, {}))

    def write(self) -> Path:
        """Every kind of file; returns the folder."""
        config, c = self.config, self.chunk
        self.one_pass()
        self.rollout("rollout", config["frames"], config["batch"], config["frames"], 0)
        frames = config["roll_chunks"] * c
        self.rollout("rollout_rolling", frames, 1, config["window"], config["sink"])
        self.rollout("rollout_window_nosink", frames - c, 1, config["window"], 0)
        self.self_forcing()
        return self.folder
