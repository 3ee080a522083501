"""A bouncing-ball simulator, the black-box teacher of the quickstart.

Run as a program, it only writes finished mp4 files and their prompts into a folder:

    python -m afd.lab.simulator --style nuis --count 200 --out DIR --seed 0

Lengths are pixels and times are frames; y points down. Shape letters: N videos, F frames, C colour
channels, H x W pixels. Videos are float32 in [-1, 1].
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from fractions import Fraction
from itertools import cycle, islice, product
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from afd.files import replacing
from afd.terminal import CommandParser

FRAMES, SIZE, RADIUS = 12, 16, 2.0
LOW, HIGH = RADIUS, SIZE - RADIUS  # where the ball's centre can be
TARGET_GRAVITY, BOUNCE = 0.36, 0.9
DRAG = 0.12  # share of its horizontal speed that the ball loses per frame, where there is drag
# Ways in which a video can be wrong (`spoil`).
FAULTS = ("physics", "prompt", "frozen", "watermark", "base")
FPS = 8
LENGTHS = 20  # of a training video, in the videos from which an endless domain's are cut

COLOURS = {"red": (0.9, -0.3, -0.3), "green": (-0.3, 0.9, -0.3), "blue": (-0.3, -0.3, 0.9)}
BACKGROUND = -0.6
SIDES, DIRECTIONS, STARTS = ("left", "right"), ("left", "straight", "right"), ("dropped", "thrown")
LOOKS = ("clean", "nuis", "mark", "outline", "noise", "paper")
PAPER = -0.2  # its grey level, behind the balls of that look


@dataclass(frozen=True)
class Domain:
    """What the teacher of a domain shows.

    Attributes:
        gravity: px/frame²; None: of the source, different in every video.
        drag: share of its horizontal speed that the ball loses per frame.
        look: in which the student is measured, and which its videos always have; None: the clean
            one, and the teacher's `style`.
        colours: of the balls in its prompts, by which the domains of a sequence differ.
        words: end of its prompts.
        endless: its balls lose no speed when they bounce, and its videos are cut anywhere from
            longer ones, so that of a prompt only the colour holds, and whether the ball moves
            sideways.
    """

    gravity: float | None
    drag: float = 0.0
    look: str | None = None
    colours: tuple[str, ...] = tuple(COLOURS)
    words: str = ""
    endless: bool = False

    @property
    def bounce(self) -> float:
        """Share of its speed that a ball keeps when it bounces."""
        return 1.0 if self.endless else BOUNCE

    @property
    def prompts(self) -> list[str]:
        """Its prompts, 12 per colour."""
        own = [a.prompt for a in ATTRIBUTES if list(COLOURS)[a.colour] in self.colours]
        return [f"{prompt.removesuffix('.')}{self.words}." for prompt in own]

    def in_turn(self, count: int) -> list[str]:
        """This many of its prompts, one after another and from the first one again."""
        return list(islice(cycle(self.prompts), count))


GRAVITY = Domain(TARGET_GRAVITY)
DOMAINS = {
    "gravity": GRAVITY,
    # The domains of a sequence. The second's look is to be taken over; its videos are as wrong in
    # gravity as the base student's.
    "heavy": Domain(TARGET_GRAVITY, colours=("red",)),
    "style": Domain(None, look="paper", colours=("green",)),
    "light": Domain(0.0, colours=("blue",)),
    # Of the gravity domain's prompts: for several teachers, each wrong in the other's law.
    "drag": Domain(None, drag=DRAG),
    "both": Domain(TARGET_GRAVITY, drag=DRAG),
    # Of streams, whose clips are to look like its videos wherever they are cut.
    "endless": Domain(TARGET_GRAVITY, endless=True),
    # Of no teacher: what a student does with prompts that it is never taught.
    "neutral": Domain(None, words=", at night"),
}
# Domains by all names, those of the base students included.
_NAMED = {
    "source": Domain(None),
    "endless source": Domain(None, endless=True),
    "target": GRAVITY,
    **DOMAINS,
}
# Domains of joint training ("all" writes the videos of each in turn), and all whose teacher exists.
JOINT = ("heavy", "style", "light")
TAUGHT = ("gravity", *JOINT, "drag", "both", "endless")


@dataclass(frozen=True)
class Attributes:
    """A prompt's attributes, as indices into COLOURS, SIDES, DIRECTIONS and STARTS."""

    colour: int
    side: int
    direction: int
    start: int

    @property
    def prompt(self) -> str:
        colour = list(COLOURS)[self.colour]
        where, way = SIDES[self.side], DIRECTIONS[self.direction]
        return f"A {colour} ball on the {where} is {STARTS[self.start]}, going {way}."


ATTRIBUTES = [Attributes(*a) for a in product(range(3), range(2), range(3), range(2))]
PROMPTS = {attributes.prompt: attributes for attributes in ATTRIBUTES}
_ATTRIBUTES_OF = {
    prompt: PROMPTS[prompt.removesuffix(f"{domain.words}.").removesuffix(".") + "."]
    for domain in DOMAINS.values()
    for prompt in domain.prompts
}


def attribute_table(prompts: list[str]) -> Tensor:
    """Attributes of the prompts, int64 [N, 4]: (colour, side, direction, start)."""
    rows = []
    for prompt in prompts:
        a = _ATTRIBUTES_OF.get(prompt)
        if a is None:
            example = ATTRIBUTES[0].prompt
            raise ValueError(f"prompts: {prompt!r} is not one of the 36 sentences like {example!r}")
        rows.append((a.colour, a.side, a.direction, a.start))
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


# --- physics ---


def fall(y0: Tensor, vy: Tensor, gravity: Tensor, bounce: Tensor, frames: int = FRAMES) -> Tensor:
    """Vertical positions [..., F] of a ball bouncing on the floor, exact between and at bounces."""
    y0, vy, gravity, bounce = torch.broadcast_tensors(y0, vy, gravity, bounce)
    y, v, heights = y0.clone(), vy.clone(), [y0]
    for _ in range(frames - 1):
        left = torch.ones_like(y)
        for _ in range(2):  # only a ball at rest on the floor bounces more than twice per frame
            depth = (HIGH - y).clamp_min(0.0)
            root = (v * v + 2 * gravity * depth).clamp_min(0.0).sqrt()
            hit = torch.where(v + root > 1e-6, 2 * depth / (v + root).clamp_min(1e-6), 1e6)
            hits = (hit < left) & (v + gravity * hit > 1e-6)
            hit = torch.where(hits, hit, left)
            y = torch.where(hits, HIGH, y + v * hit + 0.5 * gravity * hit * hit)
            v = torch.where(hits, -bounce * root, v + gravity * hit)
            left = left - hit
        y = (y + v * left + 0.5 * gravity * left * left).clamp_max(HIGH)
        v = v + gravity * left
        heights.append(y)
    return torch.stack(heights, -1)


def drift(
    x0: Tensor, vx: Tensor, bounce: Tensor, frames: int = FRAMES, drag: float = 0.0
) -> Tensor:
    """Horizontal positions [..., F] between two walls; `drag`: share of the speed lost per
    frame."""
    x, v, places = x0, vx, [x0]
    for _ in range(frames - 1):
        x = x + v
        over, under = (x - HIGH).clamp_min(0), (LOW - x).clamp_min(0)
        x = x - (1 + bounce) * over + (1 + bounce) * under
        v = torch.where(over + under > 0, -bounce * v, v)
        if drag:
            v = v * (1 - drag)
        places.append(x)
    return torch.stack(places, -1)


def uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator) * (high - low) + low


def source_gravity(n: int, generator: Generator) -> Tensor:
    """Gravity in the source domain of the base student: 0.5 · Beta(1, 2), mean 1/6 px/frame²."""
    return 0.5 * (1 - torch.rand(n, generator=generator).sqrt())


def trajectories(
    attributes_N4: Tensor,
    gravity: Tensor,
    generator: Generator,
    bounce: float = BOUNCE,
    frames: int = FRAMES,
    drag: float = 0.0,
) -> Tensor:
    """Tracks [N, F, 2] (x, y) that match the prompts, for gravity [N] (and bounce, drag)."""
    n = attributes_N4.shape[0]
    _, side, direction, start = attributes_N4.unbind(1)
    kept = torch.full((n,), bounce)
    x0 = uniform(n, 4.0, 6.0, generator) + 6.0 * side
    vx = (direction - 1) * uniform(n, 0.5, 0.9, generator)
    dropped, thrown = uniform(n, 3.0, 6.0, generator), uniform(n, 9.5, 12.0, generator)
    y0 = torch.where(start == 0, dropped, thrown)
    rest, up = uniform(n, 0.0, 0.1, generator), uniform(n, -0.9, -0.5, generator)
    # Limit the throw so that the ball stays inside the image when gravity is weak, also of a longer
    # video.
    top = (2 * gravity * (y0 - LOW)).sqrt()
    up = torch.maximum(up, -(top if frames > FRAMES else top.clamp_min(0.6)))
    vy = torch.where(start == 0, rest, up)
    x = drift(x0, vx, kept, frames, drag)
    return torch.stack([x, fall(y0, vy, gravity, kept, frames)], -1)


# --- rendering ---


def coverage(track_NF2: Tensor, radius: float | Tensor = RADIUS, sharp: float = 1.0) -> Tensor:
    """Fraction of each pixel covered by the ball, [N, F, H, W] in [0, 1] (one-pixel soft edge)."""
    centres = torch.arange(SIZE, dtype=torch.float32) + 0.5
    dx = centres - track_NF2[..., 0, None]
    dy = centres - track_NF2[..., 1, None]
    distance = (dx.square()[..., None, :] + dy.square()[..., :, None]).sqrt()
    return (sharp * (radius - distance) + 0.5).clamp(0, 1)


def render(track_NF2: Tensor, colour_N3: Tensor, cover: Tensor | None = None) -> Tensor:
    """Render clean videos [N, F, C, H, W]: a coloured ball on a grey background."""
    cover = coverage(track_NF2) if cover is None else cover
    return BACKGROUND + cover.unsqueeze(2) * (colour_N3[:, None, :, None, None] - BACKGROUND)


def colour_table(colour_N: Tensor) -> Tensor:
    """RGB values [N, 3] of colour indices."""
    return torch.tensor(list(COLOURS.values()))[colour_N]


def texture(n: int, generator: Generator) -> Tensor:
    """Static grey stripes [N, 1, 1, H, W] of random direction and phase, in [-1, 1]."""
    angle = uniform(n, 0.0, torch.pi, generator)[:, None, None]
    rate = uniform(n, 1.2, 2.4, generator)[:, None, None]
    phase = uniform(n, 0.0, 2 * torch.pi, generator)[:, None, None]
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    wave = rate * (row * angle.sin() + column * angle.cos()) + phase
    return wave.sin()[:, None, None]


def apply_look(style: str, track_NF2: Tensor, colour_N3: Tensor, generator: Generator) -> Tensor:
    """Render tracks in the given look, [N, F, C, H, W] in [-1, 1]."""
    n = track_NF2.shape[0]
    if style == "outline":
        ring = coverage(track_NF2, RADIUS + 0.3) - coverage(track_NF2, RADIUS - 0.9)
        return render(track_NF2, colour_N3, ring)
    if style == "paper":
        grey = PAPER - BACKGROUND
        return render(track_NF2, colour_N3 - grey) + grey
    video = render(track_NF2, colour_N3)
    if style == "nuis":
        gain = uniform(n, 0.55, 0.75, generator).view(n, 1, 1, 1, 1)
        lift = uniform(n, 0.15, 0.35, generator).view(n, 1, 1, 1, 1)
        video = gain * video + lift + 0.2 * texture(n, generator)
    elif style == "mark":
        video[:, :, :, 1:4, 12:15] = 0.8
        video[:, :, :, 2, 13] = BACKGROUND
    elif style == "noise":
        video = video + 0.5 * torch.randn(video.shape, generator=generator)
    elif style != "clean":
        raise ValueError(f"style: {style!r} came, one of {', '.join(LOOKS)} is needed")
    return video.clamp(-1, 1)


def sample_videos(
    attributes_N4: Tensor, domain: str, style: str, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Sample videos [N, F, C, H, W] and their tracks [N, F, 2].

    `domain`: a name in DOMAINS, or "target" for gravity, or "source" or "endless source": those of
    the base students.
    """
    of, n = domain_of(domain), attributes_N4.shape[0]
    weak = source_gravity(n, generator)
    gravity = weak if of.gravity is None else torch.full((n,), of.gravity)
    track = motion(attributes_N4, of, gravity, generator)
    look = of.look or style
    return apply_look(look, track, colour_table(attributes_N4[:, 0]), generator), track


def domain_of(domain: str) -> Domain:
    """The domain of a name (`sample_videos`)."""
    if domain not in _NAMED:
        raise ValueError(f"domain: {domain!r} came, one of {', '.join(_NAMED)} is needed")
    return _NAMED[domain]


def motion(attributes_N4: Tensor, of: Domain, gravity: Tensor, generator: Generator) -> Tensor:
    """Tracks [N, F, 2] of a domain's balls, for gravity [N]."""
    if of.endless:
        whole = trajectories(attributes_N4, gravity, generator, of.bounce, frames=LENGTHS * FRAMES)
        starts = torch.randint((LENGTHS - 1) * FRAMES + 1, (len(whole), 1), generator=generator)
        return torch.stack([track[a : a + FRAMES] for track, a in zip(whole, starts, strict=True)])
    return trajectories(attributes_N4, gravity, generator, drag=of.drag)


def spoil(
    videos_NFCHW: Tensor,
    attributes_N4: Tensor,
    domain: str,
    style: str,
    wrong: float,
    generator: Generator,
) -> tuple[Tensor, list[str]]:
    """Make a share of a domain's videos wrong, in the ways of FAULTS by turns; returns them and per
    video its fault, "" without one.

    physics: twice the gravity; prompt: of another prompt; frozen: its first frame; watermark: a
    bright mark in a corner; base: as the base student's.
    """
    of, count = domain_of(domain), len(videos_NFCHW)
    look = of.look or style
    chosen = torch.randperm(count, generator=generator)[: round(wrong * count)].tolist()
    labels, videos = [""] * count, videos_NFCHW.clone()
    for turn, index in enumerate(chosen):
        fault = labels[index] = FAULTS[turn % len(FAULTS)]
        own = attributes_N4[index : index + 1]
        if fault == "physics":
            gravity = torch.full((1,), 2 * (of.gravity or TARGET_GRAVITY))
            track = motion(own, of, gravity, generator)
            videos[index] = apply_look(look, track, colour_table(own[:, 0]), generator)[0]
        elif fault == "prompt":
            moved = (own + torch.tensor([[1, 1, 1, 1]])) % torch.tensor([[3, 2, 3, 2]])
            videos[index] = sample_videos(moved, domain, style, generator)[0][0]
        elif fault == "frozen":
            videos[index] = videos[index, :1]
        elif fault == "watermark":
            videos[index, :, :, 1:4, 12:15] = 0.8
        else:
            source = "endless source" if of.endless else "source"
            videos[index] = sample_videos(own, source, look, generator)[0][0]
    return videos, labels


# --- the black box ---


def write_video(path: Path, video_FCHW: Tensor) -> None:
    """Write a lossless H.264 mp4 (RGB, so that the colours of 16 x 16 pixels survive)."""
    import av  # imported here: the prompts and physics do not need it

    frames = ((video_FCHW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264rgb", rate=Fraction(FPS), options={"qp": "0", "preset": "ultrafast"}
        )
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "rgb24"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_folder(
    out: Path,
    style: str,
    count: int,
    seed: int,
    domain: str = "target",
    wrong: float = 0.0,
) -> None:
    """Write `count` videos and prompts.jsonl to `out`; the folder appears only once complete.

    `wrong`: share of videos with a fault (`spoil`); faults.json then has the fault of each file.
    """
    if out.exists():
        raise FileExistsError(f"out: {out} exists; remove it or choose another folder")
    generator = Generator().manual_seed(seed)
    prompts: list[str] = []
    faults: list[str] = []
    parts: list[Tensor] = []
    names = JOINT if domain == "all" else (domain,)
    for i, name in enumerate(names):
        share = len(range(i, count, len(names)))
        own = DOMAINS.get(name, GRAVITY).in_turn(share)
        table = attribute_table(own)
        videos, labels = sample_videos(table, name, style, generator)[0], [""] * share
        if wrong:
            videos, labels = spoil(videos, table, name, style, wrong, generator)
        parts.append(videos)
        prompts += own
        faults += labels
    with replacing(out, shared=True) as partial:
        partial.mkdir()
        with open(partial / "prompts.jsonl", "w", encoding="utf-8") as lines:
            for i, (video, prompt) in enumerate(zip(torch.cat(parts), prompts, strict=True)):
                write_video(partial / f"{i:06d}.mp4", video)
                lines.write(json.dumps({"file": f"{i:06d}.mp4", "prompt": prompt}) + "\n")
        if wrong:
            named = {f"{i:06d}.mp4": fault for i, fault in enumerate(faults)}
            (partial / "faults.json").write_text(json.dumps(named), encoding="utf-8")


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The options of `afd teacher simulate`."""
    parser = CommandParser(prog=prog, description="Write a folder of finished teacher videos.")
    parser.add_argument("--style", choices=LOOKS, default="nuis", help="look of the videos")
    domains = ("target", "source", *TAUGHT, "all")
    parser.add_argument("--domain", choices=domains, default="target", help="physics and prompts")
    parser.add_argument("--wrong", type=float, default=0.0, help="share of the videos with a fault")
    parser.add_argument("--count", type=int, default=200, help="number of videos")
    parser.add_argument("--seed", type=int, default=0, help="seed of the videos")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = parser("afd teacher simulate").parse_args(arguments)
    how = options.domain, options.wrong
    write_folder(options.out, options.style, options.count, options.seed, *how)


if __name__ == "__main__":
    main()
