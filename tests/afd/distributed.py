"""What each process of the distributed tests does; a module, because processes import it."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from afd.config.run import make_config
from afd.discriminators.config import LatentConfig
from afd.discriminators.latent import LatentDiscriminator
from afd.distributed import Ranks, join
from afd.methods.afd import Afd
from afd.methods.base import Batch, earlier_prompts
from afd.methods.config import AfdConfig, DmdConfig, GanConfig, ReplayConfig, SftConfig
from afd.methods.dmd import Dmd
from afd.methods.gan import Gan
from afd.methods.sft import VERSIONS, Sft
from afd.models.config import LoraConfig
from afd.models.low_rank import LowRank
from afd.models.policies import make_policies
from afd.models.sharding import sequence_over, shard_over
from afd.models.student import Student
from afd.rewards.base import Term
from afd.trainer import shards
from afd.trainer.build import build_method
from afd.trainer.loop import train
from tests.afd.tiny_methods import (
    CHANNELS,
    TEXT,
    WAN_STEPS,
    Brightness,
    wan_batch,
    wan_student,
    words,
)
from tests.tolerances import DISTRIBUTED


def sharing(batch: Batch, ranks: Ranks) -> Batch:
    """This process's part of a whole batch."""
    own = ranks.share(len(batch.prompts))
    return Batch(
        batch.update,
        batch.prompts[own],
        batch.teacher_BFCHW[own],
        first=own.start,
        total=len(batch.prompts),
        replay=None if batch.replay is None else sharing(batch.replay, ranks),
        earlier=earlier_prompts(batch.prompts)[own],
    )


def wan_method(
    name: str, ranks: Ranks, parallel: str, *, checkpoint_blocks: bool = False, **sizes: Any
) -> Any:
    """AFD with LoRA ("afd", "afd replay", "afd stacked" on two parents), the others with all
    weights ("afd full", "afd rewards", "afd chosen" from two of three videos of a prompt, "afd
    switched" on streams that switch their prompt, "sft", "gan", "dmd"); " bf16" behind the name:
    computed in bf16, at a small rate.

    `sizes`: of the network.
    """
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    shard = shard_over(ranks, dtype) if parallel == "fsdp" and ranks.processes > 1 else None
    adapted = ("afd", "afd bf16", "afd replay", "afd stacked")
    lora = LoraConfig(rank=4, alpha=4.0) if name in adapted else None
    how: dict[str, Any] = {"denoising_steps": WAN_STEPS, "ranks": ranks}
    if name == "afd replay":
        how["replay"] = ReplayConfig(fraction=0.5, prompts=Path("x"), weight=2.0)
    if name == "afd switched":
        sizes = {"window": 9, "sink": 3, **sizes}
    student, rate = wan_student(dtype, **sizes), 1e-5 if dtype == torch.bfloat16 else 1e-3
    student.net.checkpoint_blocks = checkpoint_blocks
    student.net.sequence = sequence_over(ranks)
    if name.startswith("sft"):
        config = SftConfig(draws=2, learning_rate=rate)
        return Sft(make_policies(student, VERSIONS, lora=lora, shard=shard), config, **how)
    if name == "dmd":
        fields = DmdConfig(score_warmup_updates=1, score_updates=1, learning_rate=rate)
        policies = make_policies(student, fields.versions, trained=fields.trained, shard=shard)
        return Dmd(policies, fields, **how)
    discriminator = LatentDiscriminator(
        lambda prompts: words(list(prompts)),
        LatentConfig(width=8, learning_rate=1e-3, warmup_updates=0, loss="gan"),
        channels=CHANNELS,
        text_dim=TEXT,
        ranks=ranks,
    )
    if name == "gan":
        settings = GanConfig(learning_rate=rate)
        policies = make_policies(student, settings.versions, trained=settings.trained, shard=shard)
        return Gan(policies, discriminator, settings, **how)
    config = AfdConfig(
        samples_per_prompt=2,
        learning_rate=rate,
        warmup_updates=0,
        prior_weight=1e-4,
        context="recompute",
    )
    if name == "afd rewards":
        config = config.model_copy(update={"combine": "advantages", "prior_share": 0.5})
        how["rewards"] = [Term("bright", 0.5, Brightness("latents"))]
    if name == "afd chosen":
        config = config.model_copy(update={"samples_per_prompt": 3, "best": 1, "worst": 1})
    if name == "afd switched":
        switched = {"stream_frames": 24, "stream_switch": "recache", "group_from_chunk": "random"}
        config = config.model_copy(update=switched)
    more: dict[str, Any] = {}
    if name == "afd stacked":
        more["parents"] = [parent(student, 3, 0.5), parent(student, 2, 1.0)]
        both = {"pretrained": 1.0, "previous": 1.0}
        config = config.model_copy(update={"prior_reference": both})
    versions = (*config.versions, *(["pretrained"] if more else []))
    policies = make_policies(student, versions, lora=lora, shard=shard, **more)
    return Afd(policies, discriminator, config, **how)


def parent(student: Student, rank: int, scale: float) -> LowRank:
    """What an earlier run has learned in the first layer."""
    draw, layer = torch.Generator().manual_seed(rank), "blocks.0.self_attn.q"
    width = student.net.config.dim
    a_RI = 0.2 * torch.randn(rank, width, generator=draw)
    return LowRank({layer: a_RI}, {layer: torch.randn(width, rank, generator=draw)}, scale)


@dataclass(frozen=True)
class Leg:
    """Some updates of a method; `given`, `left`: folders of the states before and after them;
    `parts`: processes for each video; `videos`: of the teacher in an update."""

    method: str
    parallel: str
    updates: int
    given: Path | None = None
    left: Path | None = None
    parts: int = 1
    videos: int = 2
    sizes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Walked:
    """Metrics of each update; after them theta, and where the method's random numbers stand."""

    said: list[dict[str, float]]
    weights: dict[str, Any]
    drawn: bytes


def walk(legs: list[Leg]) -> list[Walked]:
    """Metrics of each update of a tiny Wan, and theta after them, for each leg."""
    with join("cpu") as ranks:
        return [_walk(leg, ranks.in_parts(leg.parts)) for leg in legs]


def _walk(leg: Leg, ranks: Ranks) -> Walked:
    method, first, said = wan_method(leg.method, ranks, leg.parallel, **leg.sizes), 0, []
    if leg.given is not None:
        given = shards.read(leg.given, ranks, into={"method": method.state_dict()})
        method.load_state_dict(given["method"])
        first = given["updates"]
    for step in range(first, first + leg.updates):
        whole = wan_batch(step, leg.videos)
        if leg.method == "afd replay":
            whole.replay = Batch(step, ["a", "bb", "ccc"], torch.empty(3, 0))
        batch = sharing(whole, ranks)
        method.rollout(batch)
        said.append(method.discriminator_step(batch) | method.student_step(batch))
    state = method.state_dict()
    if leg.left is not None:
        leg.left.mkdir(exist_ok=True)
        ranks.barrier()
        shards.write(leg.left, {"method": state, "updates": first + leg.updates}, ranks)
        ranks.barrier()
    # Tensors would need this process to live on until they are read.
    theta = method.policies.weights("theta")
    weights = {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().numpy().copy()
        for name, x in zip(theta.names, theta.masters, strict=True)
    }
    return Walked(said, weights, bytes(state["generator"].tolist()))


def assert_alike(ours: Walked, theirs: Walked) -> None:
    for mine, other in zip(ours.said, theirs.said, strict=True):
        assert mine.keys() == other.keys()
        for key in mine:
            # A correlation is of the size of 1, however small it is.
            near = {"rtol": 0, "atol": DISTRIBUTED["rtol"]} if "agreement" in key else DISTRIBUTED
            np.testing.assert_allclose(mine[key], other[key], **near, err_msg=key)
    # Weights have moved by 1e-3 an update, whatever their own size.
    for key, weight in ours.weights.items():
        np.testing.assert_allclose(weight, theirs.weights[key], rtol=0, atol=2e-5, err_msg=key)


def stopped_run(data: dict[str, Any], rank: int, after: int) -> str:
    """A run of a configuration in which one process receives the stop request during an update."""
    config = make_config(data)
    with join(config.device) as ranks:
        method = build_method(config, ranks)
        rollout = method.rollout

        def told(batch: Batch) -> None:
            if ranks.rank == rank and batch.update == after:
                os.kill(os.getpid(), signal.SIGINT)
            rollout(batch)

        method.rollout = told  # type: ignore[method-assign]
        return train(config, method=method, console=Console(quiet=True)).value


def run(data: dict[str, Any]) -> None:
    """A run of a configuration, to its end, in a separate process."""
    torch.set_num_threads(1)
    train(make_config(data), console=Console(quiet=True))
