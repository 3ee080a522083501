"""Analytic metrics of the bouncing-ball task.

Lengths are pixels, times are frames, y points down. Shape letters: N videos, F frames, C colour
channels, H x W pixels, G grid points, P parameters. Videos are [N, F, C, H, W] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from afd.lab.simulator import (
    GRAVITY,
    SIZE,
    Domain,
    apply_look,
    attribute_table,
    colour_table,
    drift,
    fall,
    motion,
    render,
    source_gravity,
)

CHUNK = 3  # frames that the toy student generates at a time
WINDOW = 4.0  # px around the strongest spot: the ball and a soft edge

# Definition of each metric, as shown in the report.
DEFINITIONS = {
    "phys": "RMSE (px) of the ball's height to the best trajectory under the teacher's gravity",
    "g_mae": "mean |fitted gravity - the teacher's gravity| (px/frame²)",
    "fit_res": "RMSE (px) to the best trajectory of any constant gravity: smoothness",
    "seam_jerk": "kinks of the trajectory across chunk boundaries over those within chunks (RMS): "
    "1 is even",
    "motion": "mean speed of the ball (px/frame)",
    "rend": "RMSE to the clean render of the same ball (0-1 colour scale): look and quality",
    "adh": "share of videos with all four attributes of their prompt (endless: its colour, and "
    "whether the ball moves sideways)",
    "div": "mean distance (px, RMS over frames) between two videos of one prompt",
    "nn": "mean distance (px, RMS over frames) to the nearest training trajectory",
    "traj_fd": "Fréchet distance (px² per frame) of the trajectories to fresh teacher ones",
}


@dataclass
class Physics:
    """Per-video measurements, each [N] unless noted."""

    track: Tensor  # [N, F, 2] centroid (x, y)
    colour: Tensor  # int64, index into the simulator's colours
    gravity: Tensor
    phys: Tensor
    phys_x: Tensor  # of the horizontal position, under the domain's drag
    fit_res: Tensor
    kink: Tensor  # [N, F-2], squared second difference of the residual to the best trajectory
    motion: Tensor
    rend: Tensor
    attributes: Tensor  # int64 [N, 4], what the video shows


def track_ball(video_NFCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Track the most colourful object: centroids [N, F, 2] and colour indices [N].

    Backgrounds, textures and marks are grey in every look, so the pixels' excess of one channel
    over the grey level finds the ball without knowing the look. Only the surroundings of the
    strongest spot count, so that noise elsewhere does not pull the centroid.
    """
    chroma = video_NFCHW - video_NFCHW.mean(2, keepdim=True)
    colour_N = chroma.clamp_min(0).square().sum((1, 3, 4)).argmax(1)
    excess = chroma[torch.arange(len(chroma)), :, colour_N]
    centres = torch.arange(SIZE, dtype=excess.dtype) + 0.5
    spot = F.avg_pool2d(excess, 3, stride=1, padding=1).flatten(2).argmax(2)
    dy = centres - centres[spot // SIZE][..., None]
    dx = centres - centres[spot % SIZE][..., None]
    near = dy.square()[..., :, None] + dx.square()[..., None, :] < WINDOW**2
    peak = excess.amax((2, 3), keepdim=True)
    weight = (excess - 0.3 * peak).clamp_min(0) * near + 1e-9
    total = weight.sum((2, 3))
    x, y = (weight.sum(2) * centres).sum(-1) / total, (weight.sum(3) * centres).sum(-1) / total
    return torch.stack([x, y], -1), colour_N


def _free_fall(parameters: Tensor, frames: int, domain: Domain = GRAVITY) -> Tensor:
    y0, vy, gravity = parameters.unbind(-1)
    return fall(y0, vy, gravity, torch.tensor(domain.bounce), frames)


def _target_fall(parameters: Tensor, frames: int, domain: Domain = GRAVITY) -> Tensor:
    y0, vy = parameters.unbind(-1)
    assert domain.gravity is not None
    return fall(y0, vy, torch.tensor(domain.gravity), torch.tensor(domain.bounce), frames)


def _sideways(parameters: Tensor, frames: int, domain: Domain = GRAVITY) -> Tensor:
    x0, vx = parameters.unbind(-1)
    return drift(x0, vx, torch.tensor(domain.bounce), frames, domain.drag)


_Curve = Callable[[Tensor, int, Domain], Tensor]
_GRIDS: dict[str, tuple[_Curve, list[tuple[float, float, int]]]] = {
    "free": (_free_fall, [(2, 14, 25), (-1.5, 1.0, 26), (0.0, 0.8, 33)]),
    "target": (_target_fall, [(2, 14, 49), (-1.5, 1.5, 61)]),
    "sideways": (_sideways, [(2, 14, 49), (-1.2, 1.2, 49)]),
    # A ball in the middle of a stream may just have bounced, or be about to.
    "moving free": (_free_fall, [(2, 14, 25), (-3.2, 3.2, 65), (0.0, 0.8, 17)]),
    "moving target": (_target_fall, [(2, 14, 49), (-3.2, 3.2, 129)]),
}


@lru_cache(maxsize=16)
def _grid(kind: str, frames: int, domain: Domain) -> tuple[Tensor, Tensor]:
    curve, axes = _GRIDS[kind]
    points = torch.cartesian_prod(*(torch.linspace(a, b, n) for a, b, n in axes))
    return points, curve(points, frames, domain)


def fit(
    kind: str, curve_NF: Tensor, rounds: int = 8, domain: Domain = GRAVITY
) -> tuple[Tensor, Tensor]:
    """Least-squares parameters [N, P] and RMSE [N]: nearest point of a grid, then Gauss-Newton.

    Bounces make the problem non-convex: the grid finds the basin, and a step that does not improve
    the fit is halved.
    """
    frames = curve_NF.shape[1]
    points_GP, curves_GF = _grid(kind, frames, domain)
    best = points_GP[torch.cdist(curve_NF, curves_GF).argmin(1)]
    curve = _GRIDS[kind][0]
    residual = curve_NF - curve(best, frames, domain)
    error = residual.square().mean(1)
    damping = torch.full_like(error, 1e-3)
    step = 1e-3
    eye = torch.eye(best.shape[1])
    for _ in range(rounds):
        nudged = best[:, None] + step * eye
        jacobian = (curve(nudged, frames, domain) - curve(best, frames, domain)[:, None]) / step
        normal = jacobian @ jacobian.mT + damping[:, None, None] * eye
        change = torch.linalg.solve(normal, jacobian @ residual[..., None]).squeeze(-1)
        trial = best + change
        if kind.endswith("free"):
            trial[:, 2].clamp_(min=0.0)
        trial_residual = curve_NF - curve(trial, frames, domain)
        trial_error = trial_residual.square().mean(1)
        better = trial_error < error
        best = torch.where(better[:, None], trial, best)
        residual = torch.where(better[:, None], trial_residual, residual)
        error = torch.where(better, trial_error, error)
        damping = torch.where(better, damping * 0.3, damping * 10)
    return best, error.sqrt()


def measure_each(video_NFCHW: Tensor, domain: Domain = GRAVITY, *, moving: bool = False) -> Physics:
    """All measurements that need only a single video; `phys` is nan without a gravity.

    `moving`: the videos are clips of longer ones, in which the ball may be fast at the beginning;
    those of an endless domain always are.
    """
    if video_NFCHW.ndim != 5 or video_NFCHW.shape[2:] != (3, SIZE, SIZE):
        raise ValueError(f"video: {tuple(video_NFCHW.shape)} came, [N, F, 3, 16, 16] is needed")
    video = video_NFCHW.detach().float()
    track, colour = track_ball(video)
    frames = track.shape[1]
    when = "moving " if moving or domain.endless else ""
    free, free_rmse = fit(f"{when}free", track[..., 1], domain=domain)
    phys = torch.full_like(free_rmse, torch.nan)
    if domain.gravity is not None:
        _, phys = fit(f"{when}target", track[..., 1], domain=domain)
    sideways, sideways_rmse = fit("sideways", track[..., 0], domain=domain)
    across, down = _sideways(sideways, frames, domain), _free_fall(free, frames, domain)
    best_NF2 = torch.stack([across, down], -1)
    clean = render(track, colour_table(colour))
    if domain.look is not None:
        clean = apply_look(domain.look, track, colour_table(colour), Generator().manual_seed(0))
    side = (sideways[:, 0] > SIZE / 2).long()
    direction = 1 + (sideways[:, 1] > 0.25).long() - (sideways[:, 1] < -0.25).long()
    start = (free[:, 1] < -0.25).long()
    return Physics(
        track=track,
        colour=colour,
        gravity=free[:, 2],
        phys=phys,
        phys_x=sideways_rmse,
        fit_res=(free_rmse.square() + sideways_rmse.square()).sqrt(),
        kink=(track - best_NF2).diff(n=2, dim=1).square().sum(-1),
        motion=(track[:, 1:] - track[:, :-1]).norm(dim=-1).mean(1),
        rend=(video - clean).square().mean((1, 2, 3, 4)).sqrt() / 2,
        attributes=torch.stack([colour, side, direction, start], 1),
    )


def adheres(shown_N4: Tensor, wanted_N4: Tensor, domain: Domain = GRAVITY) -> Tensor:
    """Whether videos show the attributes of their prompts, bool [N]; of an endless domain's the
    colour, and whether the ball moves sideways."""
    if domain.endless:
        colour_N = shown_N4[:, 0] == wanted_N4[:, 0]
        return colour_N & ((shown_N4[:, 2] == 1) == (wanted_N4[:, 2] == 1))
    return (shown_N4 == wanted_N4).all(1)


def seam_jerk(kink_NT: Tensor, chunk: int = CHUNK) -> float:
    """RMS of the kinks across chunk boundaries over that of all other kinks; nan without either.

    The second difference at frame f + 1 spans the frames f to f + 2.
    """
    middle = torch.arange(1, kink_NT.shape[1] + 1) % chunk
    inside = (middle > 0) & (middle < chunk - 1)
    return float((kink_NT[:, ~inside].mean() / kink_NT[:, inside].mean()).sqrt())


def frechet_distance(a_NP: Tensor, b_MP: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of points."""
    a, b = a_NP.double(), b_MP.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr sqrt(A B) from the symmetric sqrt(A) B sqrt(A), whose eigenvalues are the same.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return float(mean + cov_a.trace() + cov_b.trace() - 2 * cross)


@lru_cache(maxsize=4)
def fresh_teacher_tracks(
    count: int = 3600, seed: int = 987_654_321, domain: Domain = GRAVITY
) -> Tensor:
    """Tracks [count, F, 2] with the teacher's physics, not in the training videos."""
    generator = Generator().manual_seed(seed)
    table = attribute_table(domain.in_turn(count))
    gravity = torch.full((count,), domain.gravity or 0.0)
    if domain.gravity is None:
        gravity = source_gravity(count, generator)
    return motion(table, domain, gravity, generator)


def spread(track_NF2: Tensor, group_N: Tensor) -> float:
    """Mean pairwise distance of tracks within a group (nan when no group has two)."""
    distances = []
    for group in group_N.unique():
        tracks = track_NF2[group_N == group].flatten(1)
        if len(tracks) > 1:
            distances.append(torch.pdist(tracks) / track_NF2.shape[1] ** 0.5)
    return float(torch.cat(distances).mean()) if distances else float("nan")


def measure(
    video_NFCHW: Tensor,
    prompts: list[str],
    training_tracks_MF2: Tensor | None = None,
    domain: Domain = GRAVITY,
) -> dict[str, float]:
    """All metrics of a set of videos with their prompts; see DEFINITIONS. The teacher's gravity and
    the clean render are the domain's; without a gravity, phys and g_mae are nan. A domain
    with drag adds phys_x, the RMSE (px) of the ball's horizontal position to the best trajectory
    under that drag.

    `nn` needs the training videos' tracks (from `track_ball`); `traj_fd` needs more than 24 videos
    of 12 frames, with the prompts in equal numbers.
    """
    if len(prompts) != len(video_NFCHW):
        raise ValueError(f"prompts: {len(prompts)} came for {len(video_NFCHW)} videos")
    wanted = attribute_table(prompts)
    each = measure_each(video_NFCHW, domain)
    target = torch.nan if domain.gravity is None else domain.gravity
    codes = wanted @ torch.tensor([1000, 100, 10, 1])
    metrics = {
        "phys": float(each.phys.mean()),
        "g_mae": float((each.gravity - target).abs().mean()),
        "fit_res": float(each.fit_res.mean()),
        "seam_jerk": seam_jerk(each.kink),
        "motion": float(each.motion.mean()),
        "rend": float(each.rend.mean()),
        "adh": float(adheres(each.attributes, wanted, domain).float().mean()),
        "div": spread(each.track, codes),
    }
    if domain.drag:
        metrics["phys_x"] = float(each.phys_x.mean())
    flat = each.track.flatten(1)
    fresh = fresh_teacher_tracks(domain=domain)
    if flat.shape[0] > flat.shape[1] and each.track.shape[1] == fresh.shape[1]:
        metrics["traj_fd"] = frechet_distance(flat, fresh.flatten(1)) / each.track.shape[1]
    if training_tracks_MF2 is not None:
        nearest = torch.cdist(flat, training_tracks_MF2.flatten(1)).amin(1)
        metrics["nn"] = float(nearest.mean()) / each.track.shape[1] ** 0.5
    return metrics
