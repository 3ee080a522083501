"""The typed configuration: every section of a run's YAML file, with defaults and meanings."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """One section of the YAML file; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class StudentConfig(Section):
    """The small causal student and how it samples."""

    checkpoint: str = Field(
        "base", description="safetensors file of the start weights; 'base' is the shipped one"
    )
    steps: list[float] = Field(
        [1.0, 0.9375, 0.833, 0.625],
        min_length=1,
        description="denoising times, descending in (0, 1], first one 1",
    )


class DiscriminatorConfig(Section):
    """The prompt-conditioned scorer D(video, prompt) and its optimizer."""

    backbone: Literal["motion", "scratch", "random"] = Field(
        "motion",
        description="frozen pretrained motion features, all trained from scratch, or frozen random",
    )
    checkpoint: str = Field(
        "motion", description="safetensors file of the motion backbone; 'motion' is the shipped one"
    )
    loss: Literal["bt", "gan"] = Field(
        "bt", description="Bradley-Terry on prompt-matched pairs, or the vanilla GAN loss"
    )
    learning_rate: float = Field(1e-3, ge=0, description="AdamW learning rate")
    betas: tuple[float, float] = Field((0.5, 0.99), description="AdamW betas")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay")
    r1: float = Field(
        0.1, ge=0, description="weight of the squared gradient norm at the teacher's inputs"
    )
    noise: float = Field(
        0.2, ge=0, description="std of noise on the features (scratch: on the pixels) in training"
    )
    random_looks: bool = Field(
        True, description="re-render both inputs under random contrast, tint and texture"
    )
    score_looks: int = Field(4, ge=1, description="looks averaged in a score (1: the video as is)")
    warmup_steps: int = Field(20, ge=0, description="critic steps before the first student step")
    steps_per_update: int = Field(1, ge=0, description="critic steps per student step")


class AfdConfig(Section):
    """On-policy adversarial flow distillation: advantage, NFT step, old policy, optimizer."""

    samples_per_prompt: int = Field(4, ge=1, description="rollouts per prompt (G)")
    advantage: Literal["score", "random"] = Field(
        "score", description="from the discriminator, or random numbers (a control)"
    )
    baseline: Literal["batch", "group", "teacher", "ema"] = Field(
        "group", description="what is subtracted from a score to get its advantage"
    )
    normalize: Literal["batch", "group", "none"] = Field(
        "batch", description="whose standard deviation divides the advantage"
    )
    adv_clip: float = Field(2.0, gt=0, description="advantages are clipped to ± this before r")
    nft_beta: float = Field(1.0, gt=0, description="how far v± lie from v_old towards v_theta")
    prior_weight: float = Field(1e-4, ge=0, description="weight of |v_theta - v_ref|²")
    prior_by_r: bool = Field(False, description="weigh the prior of a video by its r")
    weighting: Literal["x0_adaptive", "velocity"] = Field(
        "x0_adaptive", description="error in x0 space with adaptive weights, or plain velocity"
    )
    timesteps: Literal["student", "uniform"] = Field(
        "student", description="t from the student's own steps, or uniform"
    )
    timestep_per: Literal["video", "chunk"] = Field("chunk", description="one t per video or chunk")
    draws: int = Field(2, ge=1, description="(t, noise) draws per rollout and update")
    context: Literal["recompute", "own_context", "shared_context"] = Field(
        "recompute", description="who computes the clean context of v, and with which gradient"
    )
    old: Literal["ema", "current"] = Field(
        "ema", description="the policy that rolls out and anchors the NFT branches"
    )
    old_decay: float = Field(0.95, ge=0, lt=1, description="largest decay of the old policy's EMA")
    old_decay_slope: float = Field(
        0.02, ge=0, description="decay at step s is min(old_decay, slope · (s - old_decay_start))"
    )
    old_decay_start: int = Field(0, ge=0, description="decay is 0 up to this step")
    learning_rate: float = Field(1e-4, ge=0, description="AdamW learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW betas")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay")
    cosine_steps: int = Field(
        700, ge=1, description="steps over which the rate falls as a cosine to 5 %"
    )
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")


class SftConfig(Section):
    """Supervised flow matching on the teacher's videos: the baseline."""

    draws: int = Field(4, ge=1, description="(t, noise) draws per teacher video and update")
    timesteps: Literal["student", "uniform"] = Field(
        "student", description="t from the student's own steps, or uniform"
    )
    context_noise: float = Field(0.1, ge=0, description="largest noise level of the clean context")
    learning_rate: float = Field(1e-4, ge=0, description="AdamW learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW betas")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay")
    cosine_steps: int = Field(
        700, ge=1, description="steps over which the rate falls as a cosine to 5 %"
    )
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema_decay: float = Field(0.95, ge=0, lt=1, description="EMA of the evaluated policy")
