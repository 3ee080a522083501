"""Norms, rotation and modulation of tokens: afd.ops.qk_norm_rope(_append_) and adaln.

    python benchmarks/row_ops.py                  # CPU: float32, a small student's chunk
    python benchmarks/row_ops.py --device cuda    # a chunk of 480x832 in bfloat16, B = 1 and 4

Forwards as in a rollout: inputs are slices of fused projections, and append writes k and v into a
cache. Backwards include the gradients of parameters shared by tokens. Backends are interleaved in
one run with a copy of equal bytes. Each is first compared with the reference in float64; one that
disagrees is not timed and fails the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd import ops
from benchmarks import floors, harness, report

BACKENDS = ("reference", "native", "triton")
OPS = ("qk_norm_rope", "qk_norm_rope_append_", "qk_norm_rope_bwd", "adaln", "adaln_bwd")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative L2 error against float64: fp32 arithmetic, or one rounding to bfloat16 (adaln's norm
# reads the residual as rounded).
BOUND = {"fp32": 1e-5, "bf16": 1e-2}
EPS = 1e-6
HOW = (
    "ms: median of one call, p20 and p80; bytes: every token read and written once, and the rotary "
    "table; GB/s = bytes / median; % copy: of the GB/s of a copy of as many bytes in the same run; "
    "error: the worst relative L2 error against float64; speedup: the reference's median, plain "
    "PyTorch, over this one's."
)

Tensors = dict[str, Tensor]
Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op at one shape: a chunk of `frames` frames of `tokens` tokens per video."""

    op: str
    dtype: str
    batch: int
    frames: int
    tokens: int
    heads: int
    width: int

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} B={self.batch}"

    @property
    def length(self) -> int:
        return self.frames * self.tokens

    @property
    def bytes(self) -> int:
        """Bytes that the op must move."""
        token = self.heads * self.width * DTYPES[self.dtype].itemsize
        streams = 4 if self.op in ("qk_norm_rope", "adaln") else 6
        table = 0 if self.op.startswith("adaln") else 4 * self.length * self.width
        return self.batch * self.length * token * streams + table

    def tensors(self, device: str, seed: int) -> Tensors:
        """Inputs, with q, k and v as slices of one projection and modulations of one table."""
        g = torch.Generator(device).manual_seed(seed)
        dtype, channels = DTYPES[self.dtype], self.heads * self.width

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device=device).to(dtype)

        if self.op.startswith("adaln"):
            x, branch, grad_x_out, grad_h = draw(4, self.batch, self.length, channels)
            gate, scale, shift = draw(self.batch, self.frames, 6, channels).unbind(2)[:3]
            if self.op == "adaln":
                return {"x": x, "branch": branch, "gate": gate, "scale": scale, "shift": shift}
            given = {"grad_x_out": grad_x_out, "grad_h": grad_h, "x_out": x, "branch": branch}
            return given | {"gate": gate, "scale": scale}
        q, k, v = draw(self.batch, self.length, 3, self.heads, self.width).unbind(2)
        angles = torch.rand(1, self.length, self.width // 2, generator=g, device=device)
        given = {"q": q, "k": k, "weight_q": draw(channels), "weight_k": draw(channels)}
        given["rope"] = torch.stack((angles.cos(), angles.sin()), -1)
        if self.op == "qk_norm_rope":
            return given
        if self.op == "qk_norm_rope_bwd":
            grad_q, grad_k = draw(2, self.batch, self.length, self.heads, self.width)
            return {"grad_q": grad_q, "grad_k": grad_k} | given
        k_cache, v_cache = draw(2, self.batch, 2 * self.length, self.heads, self.width)
        # The first token's frame: the second half of the cache.
        position = torch.tensor([self.frames], device=device)
        return given | {"v": v, "k_cache": k_cache, "v_cache": v_cache, "position": position}

    def step(self, backend: str) -> Callable[[Tensors], Result]:
        """A function that runs the op and returns everything it returns or writes."""

        def run(i: Tensors) -> Result:
            with torch.no_grad(), ops.use_backend(backend):
                if self.op == "adaln":
                    return ops.adaln(**i)
                if self.op == "qk_norm_rope":
                    return ops.qk_norm_rope(**i)
                if self.op == "adaln_bwd":
                    return torch.ops.afd.adaln_bwd(*i.values(), 1.0, EPS)
                if self.op == "qk_norm_rope_bwd":
                    return torch.ops.afd.qk_norm_rope_bwd(*i.values(), EPS)
                q = ops.qk_norm_rope_append_(**i, tokens_per_frame=self.tokens, sink_frames=0)
                return q, i["k_cache"], i["v_cache"]

        return run

    def exact(self, i: Tensors) -> Result:
        """The reference's result in float64, on copies of the caches."""
        plain = {n: x.double() if x.is_floating_point() else x for n, x in i.items()}
        if "rope" in plain:
            plain["rope"] = i["rope"]
        return self.step("reference")(plain)


@dataclass(frozen=True)
class Row:
    """One backend on one case. Times in milliseconds."""

    case: str
    dtype: str
    B: int
    backend: str
    median_ms: float
    p20: float
    p80: float
    host_ms: float | None
    reps: int
    bytes: int
    gb_per_s: float
    pct_of_copy: float
    error: float
    speedup: float | None  # against "reference"


def measure(case: Case, args: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Rows of the backends that run here and agree with float64, and why the rest failed."""
    count = harness.input_sets(case.bytes, args.device)
    sets = [case.tensors(args.device, seed) for seed in range(count)]
    exact = case.exact({name: x.clone() for name, x in sets[0].items()})
    op = case.op.removesuffix("_append_").removesuffix("_bwd")  # has the same backends
    refusals = ops.explain(op, args.device, {DTYPES[case.dtype]})
    errors, failed, runs = {}, dict[str, str](), dict[str, harness.Run]()
    for backend in args.providers:
        if refusals.get(backend, "no such backend") is not None:
            continue
        step = case.step(backend)
        try:
            error = _error(step({name: x.clone() for name, x in sets[0].items()}), exact)
        except Exception as broken:  # a failure must not lose the other backends' numbers
            failed[f"{case}, {backend}"] = f"{type(broken).__name__}: {broken}"
            continue
        if not error <= BOUND[case.dtype]:  # NaN comes here too
            failed[f"{case}, {backend}"] = f"relative error {error:.3g} is above the bound"
            continue
        errors[backend], runs[backend] = error, _on(step, sets)
    floor = floors.copy(case.bytes, args.device)
    timings = harness.timed(runs | {"copy": floor.run}, args.device, count, args.reps, args.budget)
    copied = floor.bytes / timings["copy"].median_ms / 1e6
    print(f"{case}: copy {copied:.1f} GB/s")
    rows = []
    for backend in runs:
        timing = timings[backend]
        rate, plain = case.bytes / timing.median_ms / 1e6, timings.get("reference")
        rows.append(
            Row(
                case=case.op,
                dtype=case.dtype,
                B=case.batch,
                backend=backend,
                **asdict(timing),
                bytes=case.bytes,
                gb_per_s=rate,
                pct_of_copy=100 * rate / copied,
                error=errors[backend],
                speedup=None if plain is None else plain.median_ms / timing.median_ms,
            )
        )
    return rows, failed


def _on(step: Callable[[Tensors], Result], sets: list[Tensors]) -> harness.Run:
    return lambda index: step(sets[index])


def _error(out: Result, exact: Result) -> float:
    """The worst error of the results; tensor max, because Python's max() ignores NaN."""
    pairs = zip(out, exact, strict=True)
    distances = [float((x.double() - y).norm() / y.norm()) for x, y in pairs]
    return float(torch.tensor(distances).max())


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """A chunk of the released student on a GPU; else sizes feasible on a CPU."""
    if args.quick:
        shapes = [("fp32", 2, 2, 8, 2, 8)]
    elif args.device == "cuda":
        shapes = [("bf16", batch, 3, 1560, 12, 128) for batch in (4, 1)]
    else:
        shapes = [(dtype, 1, 3, 1560, 4, 64) for dtype in DTYPES]
    for shape in shapes:
        for op in OPS:
            yield Case(op, *shape)


def show(rows: list[Row]) -> None:
    """The table of one case."""
    report.table(
        f"{rows[0].case}, {rows[0].dtype}, B={rows[0].B}",
        ("backend",),
        ("ms", "p20", "p80", "host ms", "MB", "GB/s", "% copy", "error", "speedup"),
        [
            (
                *(row.backend, row.median_ms, row.p20, row.p80, row.host_ms, row.bytes / 1e6),
                *(row.gb_per_s, row.pct_of_copy, f"{row.error:.1e}", row.speedup),
            )
            for row in rows
        ],
    )


def main(argv: list[str] | None = None) -> None:
    args = report.parse(report.arguments(__doc__.splitlines()[0], BACKENDS), argv)
    named = ((str(case), partial(measure, case, args)) for case in cases(args))
    report.run("row_ops", HOW, named, show, args)


if __name__ == "__main__":
    main()
