"""The ops on token rows as the kernels are compared on them. Letters as in the ops' contract.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afd import ops
from tests.cuda_on_cpu.cases import BF16, F16, F32, placed
from tests.cuda_on_cpu.device import Memory

RUN = 16  # tokens of which one block of a backward adds up what they share
MOST = 6144  # channels


@dataclass(frozen=True)
class AdalnCase:
    """One call of adaln, and of its gradient."""

    shape: tuple[int, int, int]  # B, L, D
    dtype: torch.dtype = F32
    frames: int = 1  # of scale and shift; 0: one row [D] for all
    gate_frames: int = 1  # 0: no gate
    branch: bool = True
    streams: bool = True  # whether every stream has its own modulation
    gate: torch.dtype | None = None  # dtypes of the modulations, if not x's
    scale: torch.dtype | None = None
    strided: bool = False  # x and branch are slices of one tensor, modulations of another
    shift: int = 0  # bytes by which every address misses 16
    size: float = 1.0  # of x: squares of very small and very large ones leave fp32
    eps: float = 1e-6

    def __str__(self) -> str:
        kind = "norm" if not self.branch else f"gate{self.gate_frames}"
        parts = ("x".join(map(str, self.shape)), str(self.dtype)[6:], kind, f"scale{self.frames}")
        return "-".join((*parts, f"{self.size:g}", str(self.shift)))

    def run(self, memory: Memory | None = None) -> list[Tensor]:
        """x_out where there is a branch, h and the gradients of what was given."""
        g = torch.Generator().manual_seed(5)
        batch, _, width = self.shape

        def draw(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
            return torch.randn(shape, generator=g).to(dtype or self.dtype)

        def modulation(frames: int, dtype: torch.dtype | None) -> Tensor:
            rows = (batch if self.streams else 1, frames) if frames else ()
            return draw(*rows, 2 if self.strided else 1, width, dtype=dtype)

        inputs: dict[str, Any] = {"x": self.size * draw(*self.shape[:2], 2, width)}
        if self.branch:
            inputs["branch"] = self.size * draw(*self.shape[:2], 2, width)
        if self.branch and self.gate_frames:
            inputs["gate"] = modulation(self.gate_frames, self.gate)
        inputs["scale"] = modulation(self.frames, self.scale)
        inputs["shift"] = modulation(self.frames, self.scale)
        held = placed(memory, {n: x.requires_grad_() for n, x in inputs.items()}, self.shift)
        if not self.strided:
            held = {n: x.detach()[..., 0, :].clone() for n, x in held.items()}
            held = placed(memory, held, self.shift)
            given = {n: x.requires_grad_() for n, x in held.items()}
        else:
            given = {n: x[..., -1, :] for n, x in held.items()}
        given |= {name: None for name in ("branch", "gate") if name not in given}
        x_out, h = ops.adaln(**given, scale_offset=1.0, eps=self.eps)
        grads = {"x_out": draw(*self.shape), "h": draw(*self.shape)}
        grads = placed(memory, grads, self.shift)
        outputs = (h, x_out)[: 2 if self.branch else 1]
        incoming = (grads["h"], grads["x_out"])[: len(outputs)]
        found = torch.autograd.grad(outputs, list(held.values()), incoming)
        return [*(x.detach() for x in outputs), *found]


@dataclass(frozen=True)
class RopeCase:
    """One call of qk_norm_rope and of its gradient, or with `slots` of qk_norm_rope_append_."""

    shape: tuple[int, int, int, int]  # B, L, h, d
    dtype: torch.dtype = F32
    weights: torch.dtype | None = None
    tables: bool = False  # whether every stream has its own
    strided: bool = False  # q, k and v are slices of one tensor
    shift: int = 0  # bytes by which every address misses 16
    size: float = 1.0
    slots: int = 0
    frame: int = 1  # tokens of a frame
    sink: int = 0
    position: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        parts = ("x".join(map(str, self.shape)), str(self.dtype)[6:], f"{self.size:g}")
        return "-".join((*parts, str(self.slots), str(self.shift)))

    def inputs(self, memory: Memory | None = None) -> dict[str, Any]:
        """The arguments of the op."""
        g = torch.Generator().manual_seed(7)
        batch, tokens, heads, width = self.shape

        def draw(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
            return torch.randn(shape, generator=g).to(dtype or self.dtype)

        angle = torch.rand(batch if self.tables else 1, tokens, width // 2, generator=g) * 6.3
        rows = draw(batch, tokens, 3, heads, width)
        rows[:, :, 0] *= self.size
        inputs: dict[str, Any] = {
            "weight_q": draw(heads * width, dtype=self.weights),
            "weight_k": draw(heads * width, dtype=self.weights),
            "rope": torch.stack((angle.cos(), angle.sin()), -1),
        }
        if self.slots:
            inputs["position"] = torch.tensor(self.position)
            inputs["k_cache"] = draw(batch, self.slots, heads, width)
            inputs["v_cache"] = draw(batch, self.slots, heads, width)
        if self.strided:
            (fused,) = placed(memory, {"rows": rows}, self.shift).values()
            inputs = placed(memory, inputs, self.shift)
            return inputs | dict(zip("qkv", fused.unbind(2), strict=True))
        return placed(memory, inputs | dict(zip("qkv", rows.unbind(2), strict=True)), self.shift)

    def run(self, memory: Memory | None = None) -> list[Tensor]:
        """What the op returns or writes, and its gradients."""
        inputs = self.inputs(memory)
        if self.slots:
            q = ops.qk_norm_rope_append_(
                **inputs, tokens_per_frame=self.frame, sink_frames=self.sink
            )
            return [q, inputs["k_cache"], inputs["v_cache"]]
        del inputs["v"]
        leaves = [x.requires_grad_() for name, x in inputs.items() if name != "rope"]
        outputs = ops.qk_norm_rope(**inputs)
        g = torch.Generator().manual_seed(8)
        grads = {n: torch.randn(self.shape, generator=g).to(self.dtype) for n in "qk"}
        incoming = list(placed(memory, grads, self.shift).values())
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, incoming)]


ADALNS = (
    AdalnCase((2, 2, 1536), BF16, gate=F32, scale=F32),
    AdalnCase((1, 3, 1544), F16, frames=3, strided=True),
    AdalnCase((2, 2 * RUN + 5, 40), frames=0, streams=False, strided=True),
    AdalnCase((2, 6 * (RUN + 1), 16), BF16, frames=3, gate_frames=2, gate=F32),
    AdalnCase((2, 6 * (RUN + 1), 7), frames=3, gate_frames=2, streams=False),
    AdalnCase((3, 4, 1), F16, frames=2, gate_frames=0),
    AdalnCase((2, 4, 24), F32, frames=4, branch=False),
    AdalnCase((1, 2, MOST), BF16, gate_frames=2),
    AdalnCase((1, 2, 769), BF16, scale=F32),
    AdalnCase((2, 3, 64), F32, shift=4),
    AdalnCase((2, 3, 64), BF16, shift=2, strided=True),
    AdalnCase((1, 3, 64), F16, shift=8),
    AdalnCase((1, 2, 48), size=1e25),
    AdalnCase((1, 2, 48), size=1e-25, eps=1e-40),
    AdalnCase((5, 2, 8), frames=2),
)
ROPES = (
    RopeCase((1, 2, 12, 128), BF16),
    RopeCase((2, RUN + 3, 3, 40), F16, weights=F32, tables=True, strided=True),
    RopeCase((2, 2 * RUN, 1, 6), BF16, weights=F32),
    RopeCase((1, 3, 5, 2)),
    RopeCase((2, 2, 3, 10), F16, tables=True),
    RopeCase((1, 2, 48, 128), BF16, strided=True),
    RopeCase((2, 3, 2, 8), F32, shift=4),
    RopeCase((2, 3, 2, 16), BF16, shift=2),
    RopeCase((1, 2, 2, 16), size=1e25),
    RopeCase((1, 2, 2, 16), size=1e-25),
    RopeCase((5, 2, 1, 8)),
)
APPENDS = (
    RopeCase((2, 6, 3, 16), BF16, slots=12, frame=2, sink=1, position=(0, 7)),
    RopeCase((2, 4, 1, 6), F16, slots=10, frame=2, position=(2**40 + 3,), strided=True),
    RopeCase((1, 6, 12, 128), BF16, slots=12, frame=3, sink=2, position=(1,), strided=True),
    RopeCase((2, 4, 2, 8), F32, slots=8, frame=1, position=(5, 0), shift=4),
    RopeCase((5, 2, 1, 8), slots=4, frame=2, position=(1,)),
)
