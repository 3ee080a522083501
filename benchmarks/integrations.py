"""Other trainers' NFT losses as they compute them, beside afd.integrations and afd.ops.

    python -m benchmarks.integrations --pages

One line per page of examples/integrations: peak memory of the loss and its backward, and the
gradient's relative error against float64 on the same inputs (`benchmarks.nft_loss` measures time).
Predictions, latents and noise are bfloat16, t and r float32. The eager side promotes where the
trainer's arithmetic does and stays in bfloat16 where it does; the noisy latents are given to it, as
a trainer has made them for its model. Both sides are given the noise. `--pages` writes the results
into the pages.

Letters: B samples, C channels, F frames, H, W rows and columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from afd import ops
from afd.integrations import nft
from benchmarks import harness, report
from benchmarks.official import noised, per_sample

PAGES = report.ROOT / "examples" / "integrations"
SHAPE = (1, 16, 21, 60, 104)  # latents of 480x832, BCFHW
QUICK = (2, 4, 4, 6, 8)
# Standard deviation of v_theta - v_old and of v_ref - v_old, whose own is about 1.4.
STEP = 1e-2
BETA, PRIOR, CLIP = 0.1, 1e-4, 5.0
MARKERS = "<!-- measured:begin -->\n", "<!-- measured:end -->\n"
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Eager:
    """A trainer's loss, composed of PyTorch operations.

    Attributes:
        weight_min: least adaptive weight; None: plain squared errors.
        scale: factor of both branches.
        narrow: t, sigma and r are rounded to the latents' dtype, and so is everything else.
        weights_stay_wide: adaptive weights stay float64 and promote the loss.
        prior: weight of the prior; 0: none.
        prior_x0: the prior is in x0 space.
        frames: the last frames that count; None: all.
    """

    nft_beta: float = BETA
    weight_min: float | None = 1e-5
    scale: float = CLIP / BETA
    narrow: bool = False
    weights_stay_wide: bool = True
    prior: float = PRIOR
    prior_x0: bool = False
    frames: int | None = None

    def x_t(self, i: Inputs) -> Tensor:
        """The noisy latents as the trainer holds them."""
        return noised(i["x0"], i["noise"], self._time(i, "t"))

    def __call__(self, i: Inputs) -> Tensor:
        part = slice(None) if self.frames is None else slice(-self.frames, None)
        new, old, ref, x0, x_t = (
            i[k][:, :, part] for k in ("v_theta", "v_old", "v_ref", "x0", "x_t")
        )
        sigma, r = per_sample(self._time(i, "sigma"), x0), self._time(i, "r")
        dims = tuple(range(1, x0.ndim))

        def branch(velocity: Tensor) -> Tensor:
            x0_hat = x_t - sigma * velocity
            if self.weight_min is None:
                return ((x0_hat - x0) ** 2).mean(dims)
            with torch.no_grad():
                size = (x0_hat.double() - x0.double()).abs().mean(dims, keepdim=True)
                weight = size.clip(min=self.weight_min)
            if not self.weights_stay_wide:
                weight = weight.to(new.dtype)
            return ((x0_hat - x0) ** 2 / weight).mean(dims)

        positive = branch(self.nft_beta * new + (1 - self.nft_beta) * old)
        negative = branch((1 + self.nft_beta) * old - self.nft_beta * new)
        loss = ((r * positive + (1 - r) * negative) * self.scale).mean()
        if self.prior:
            a, b = (x_t - sigma * new, x_t - sigma * ref) if self.prior_x0 else (new, ref)
            loss = loss + self.prior * ((a - b) ** 2).mean()
        return loss

    def _time(self, i: Inputs, name: str) -> Tensor:
        return i[name].to(i["x0"].dtype) if self.narrow else i[name]


@dataclass(frozen=True)
class Trainer:
    """One page: the trainer's arithmetic and the call of afd that replaces it."""

    eager: Eager
    afd: Callable[..., ops.NftLoss]
    tensors: tuple[str, ...] = ("v_ref",)

    def step(self, i: Inputs) -> Tensor:
        names = ("v_theta", "v_old", "x0", "t", "r", "noise", *self.tensors)
        return self.afd(**{name: i[name] for name in names}).loss


_PRESET = {"nft_beta": BETA, "prior_weight": PRIOR, "adv_clip": CLIP}
_OFFICIAL = Trainer(Eager(), partial(ops.nft_loss, **_PRESET))
TRAINERS = {
    "diffusionnft": _OFFICIAL,
    "fastvideo": _OFFICIAL,
    "flow_factory": _OFFICIAL,
    "verl_omni": Trainer(Eager(weight_min=1e-3), partial(ops.nft_loss, **_PRESET, weight_min=1e-3)),
    "unirl": Trainer(
        Eager(weights_stay_wide=False),
        partial(nft.unirl, nft_beta=BETA, prior_weight=PRIOR, adv_sat_std=CLIP),
    ),
    "astrolabe": Trainer(
        Eager(weight_min=None, scale=1.0, narrow=True, prior_x0=True),
        partial(nft.astrolabe, nft_beta=BETA, kl_weight=PRIOR),
        ("v_ref", "sigma"),
    ),
    "worldcompass": Trainer(
        Eager(nft_beta=1.0, scale=0.5, prior=0.0, frames=3),
        partial(nft.worldcompass, target_frames=3, accumulation=2),
        (),
    ),
}


@dataclass(frozen=True)
class Row:
    """A page's measurement: MiB of peak memory and relative errors of the gradient."""

    trainer: str
    eager_mib: float
    afd_mib: float
    eager_error: float
    afd_error: float


def inputs(shape: tuple[int, ...], device: str, seed: int = 0) -> Inputs:
    """bfloat16 predictions near each other and near the target, t of all samples 0.75."""
    g = torch.Generator(device).manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(shape, generator=g, device=device)

    x0, noise = draw().bfloat16(), draw().bfloat16()
    v_old = noise.float() - x0.float() + 0.3 * draw()
    v_theta, v_ref = v_old + STEP * draw(), v_old + STEP * draw()
    found = {"x0": x0, "noise": noise, "v_old": v_old.bfloat16(), "v_ref": v_ref.bfloat16()}
    time = torch.full((shape[0],), 0.75, device=device)
    found |= {"v_theta": v_theta.bfloat16().requires_grad_(), "t": time, "sigma": time}
    return found | {"r": torch.full((shape[0],), 0.7, device=device)}


def gradient(loss: Callable[[Inputs], Tensor], i: Inputs) -> Tensor:
    (grad,) = torch.autograd.grad(loss(i), i["v_theta"])
    return grad


def exact(eager: Eager, i: Inputs) -> Tensor:
    """The gradient of the same formula in float64."""
    wide = {name: x.detach().double() for name, x in i.items()}
    wide["x_t"] = eager.x_t(wide)
    wide["v_theta"].requires_grad_()
    return gradient(eager, wide)


def measure(name: str, args: Any) -> tuple[list[Row], dict[str, str]]:
    """The row of one page."""
    trainer = TRAINERS[name]
    shape = QUICK if args.quick else SHAPE
    i = inputs(shape, args.device)
    right = exact(trainer.eager, i)
    i["x_t"] = trainer.eager.x_t(i).detach()
    steps = {
        "eager": partial(gradient, trainer.eager, i),
        "afd": partial(gradient, trainer.step, i),
    }
    runs: dict[str, harness.Run] = {k: lambda _, step=step: step() for k, step in steps.items()}
    error = {
        k: ((step().double() - right).norm() / right.norm()).item() for k, step in steps.items()
    }
    peak = {k: harness.peak_mib(run, args.device) for k, run in runs.items()}
    return [Row(name, peak["eager"], peak["afd"], error["eager"], error["afd"])], {}


def show(rows: list[Row]) -> None:
    lines = [(row.trainer, *_cells(row)) for row in rows]
    report.table("loss and backward, bf16", ["trainer"], ["peak MiB", "gradient error"], lines)


def write_pages(rows: list[Row], device: str) -> None:
    """Write the table of the index and the line of each page between their markers."""
    about = report.environment(device)
    where = (
        f"`python -m benchmarks.integrations --pages`, [{', '.join(map(str, SHAPE))}] in bfloat16, "
        f"{about['device_name']}, threads: {about['threads']}, torch {about['versions']['torch']}, "
        f"{about['date'][:10]}"
    )
    head = ["trainer", "peak MiB, eager → afd", "gradient error, eager → afd"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = _cells(row)
        lines.append(f"| [{row.trainer}]({row.trainer}.md) | {' | '.join(cells)} |")
        line = (
            f"Loss and backward: {cells[0]} MiB of peak memory, relative error of the gradient "
            f"{cells[1]} ({where}).\n\n"
        )
        _fill(row.trainer, line)
    step = f"{STEP:g} of standard deviation between the policies"
    _fill("README", "\n".join(lines) + f"\n\n{where}; {step}.\n")


def _cells(row: Row) -> tuple[str, str]:
    return (
        f"{row.eager_mib:.0f} → {row.afd_mib:.1f}",
        f"{row.eager_error:.1e} → {row.afd_error:.1e}",
    )


def _fill(page: str, text: str) -> None:
    path = PAGES / f"{page}.md"
    begin, end = map(re.escape, MARKERS)
    found = path.read_text(encoding="utf-8")
    filled, count = re.subn(f"({begin}).*?({end})", lambda m: m[1] + text + m[2], found, flags=re.S)
    if count != 1:
        raise SystemExit(f"{path}: needed once: {MARKERS[0].strip()} … {MARKERS[1].strip()}")
    path.write_text(filled, encoding="utf-8")


def cases(args: Any) -> Iterator[tuple[str, report.Measure]]:
    for name in TRAINERS:
        yield name, partial(measure, name, args)


def main(argv: list[str] | None = None) -> None:
    parser = report.arguments(__doc__ or "", ("eager", "afd"))
    parser.add_argument("--pages", action="store_true", help="write the results into the pages")
    args = report.parse(parser, argv)
    if args.pages and (args.quick or args.case):
        parser.error("--pages needs every case at its full size")
    shown: list[Row] = []

    def show_and_keep(rows: list[Row]) -> None:
        show(rows)
        shown.extend(rows)

    how = "python -m benchmarks.integrations: bfloat16, gradients against float64"
    report.run("integrations", how, cases(args), show_and_keep, args)
    if args.pages:
        write_pages(shown, args.device)


if __name__ == "__main__":
    main()
