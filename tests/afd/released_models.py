"""Everything a full-size configuration names, tiny: the same files in the same layouts.

checkpoints/ with files as Self-Forcing, Causal-Forcing and Krea publish them and VideoReward/, a
diffusers folder with text_encoder/, tokenizer/ and vae/, and a teacher's clips, which like real
ones have another size and rate than the trainer asks for.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from afd.models.wan.checkpoints import save_self_forcing
from afd.models.wan.network import CausalWan
from afd.models.wan.types import WanConfig
from afd.video import write_video
from tests.afd.test_text import LENGTH, diffusers_folder
from tests.afd.test_vae import model as vae_model
from tests.afd.tiny_videoalign import write_released

STUDENT: dict[str, Any] = {
    "dim": 32,
    "num_heads": 2,
    "ffn_dim": 48,
    "num_layers": 2,
    "freq_dim": 16,
    "text_dim": 24,
    "text_len": LENGTH,
}
FRAMES, HEIGHT, WIDTH = 21, 32, 48  # six latent frames: two chunks, or six framewise
PROMPTS = ("a red ball falls on the table", "the ball", "a table falls on a ball")


def write_models(folder: Path) -> Path:
    """All of it, random."""
    checkpoints = folder / "checkpoints"
    for name in ("chunkwise", "framewise"):
        (checkpoints / name).mkdir(parents=True)
    torch.manual_seed(0)
    student = CausalWan(WanConfig(**STUDENT))
    average = CausalWan(WanConfig(**STUDENT))
    path = checkpoints / "self_forcing_dmd.pt"
    save_self_forcing(path, generator=student, generator_ema=average)
    for name in ("chunkwise", "framewise"):
        shutil.copy(path, checkpoints / name / "causal_forcing.pt")
    krea = {f"model.{name}": x for name, x in student.state_dict().items()}
    save_file(krea, checkpoints / "krea-realtime-video-14b.safetensors")
    diffusers_folder(folder / "wan")
    vae_model().save_pretrained(folder / "wan" / "vae")
    videoalign = write_released(folder / "videoalign")
    (videoalign / "root").rename(checkpoints / "VideoReward")
    write_clips(folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return folder


def write_clips(folder: Path) -> Path:
    """Two clips a prompt of soft blobs that drift, 24 a second."""
    folder.mkdir()
    lines = []
    for i in range(2 * len(PROMPTS)):
        write_video(folder / f"{i}.mp4", _blobs(i), fps=24)
        lines.append(f"{i}.mp4\t{PROMPTS[i % len(PROMPTS)]}\n")
    (folder / "prompts.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def _blobs(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 6, 8, generator=draw) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, (36, 48, 64), mode="trilinear")
    return smooth[0].transpose(0, 1)


def overrides(models: Path, method: str, rewards: Sequence[str] = ()) -> list[str]:
    """What makes a full-size configuration run on them, and on a CPU, in seconds. `rewards`: the
    names of its rewards, if it has them instead of a discriminator and a teacher's videos."""
    scores = method in ("afd", "gan") and not rewards
    teacher = models / ("prompts.txt" if rewards else "teacher")
    sizes = [
        "device=cpu",
        "prompts_per_update=2",
        f"cache={models / 'cache'}",
        f"teacher.path={teacher}",
        f"video.frames={FRAMES}",
        f"video.height={HEIGHT}",
        f"video.width={WIDTH}",
        f"student.pretrained={models / 'wan'}",
        f"student.text_len={LENGTH}",
        "student.size=null",
        "student.head_dim=16",
        "student.dtype=float32",
        "student.vae_dtype=float32",
        "student.denoising_steps=[1000,500]",
        "student.lora.rank=4",
        "student.lora.alpha=4",
        "evaluation.every=2",
        "evaluation.videos=2",
        "evaluation.curve_videos=2",
        "evaluation.samples=1",
        "logging.videos_every=1",
        "logging.progress=false",
        "checkpoint.every=1",
    ]
    if scores:
        sizes += [
            f"discriminator.checkpoint={models / 'checkpoints' / 'VideoReward'}",
            f"discriminator.base={models / 'videoalign' / 'base'}",
            "discriminator.dtype=float32",
            "discriminator.lora_rank=2",
        ]
        if method == "afd":  # windows of two of the four sampled frames
            sizes += ["discriminator.window=0.7", "discriminator.warmup_updates=0"]
    for name in rewards:
        sizes += [
            f"rewards.{name}.checkpoint={models / 'checkpoints' / 'VideoReward'}",
            f"rewards.{name}.base={models / 'videoalign' / 'base'}",
            f"rewards.{name}.dtype=float32",
        ]
    if method != "sft":
        sizes.append(f"{method}.samples_per_prompt={2 if method == 'afd' else 1}")
    if method == "dmd":
        sizes += ["dmd.score_updates=1", "dmd.score_warmup_updates=1"]
    return sizes
