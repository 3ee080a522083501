"""`build_method` makes the method that a configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afd.discriminators.toy import ToyCritic
from afd.methods.afd import Afd
from afd.methods.base import Method
from afd.methods.sft import Sft
from afd.models.toy import ToyStudent

if TYPE_CHECKING:
    from afd.config import RunConfig


def build_method(config: RunConfig) -> Method:
    """The method of a run, from its start checkpoint and seed."""
    assert config.student.kind == "toy"
    assert config.discriminator.kind == "toy"
    student = ToyStudent.load(config.student.checkpoint)
    steps = config.student.steps
    if config.method == "sft":
        return Sft(student, config.sft, steps, seed=config.seed)
    critic = ToyCritic(config.discriminator, student.config.frames, seed=config.seed)
    return Afd(
        student,
        critic,
        config.afd,
        steps,
        critic_warmup=config.discriminator.warmup_steps,
        critic_updates=config.discriminator.steps_per_update,
        seed=config.seed,
    )
