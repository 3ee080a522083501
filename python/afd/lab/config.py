"""Settings of the toy task: its student, discriminator and teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from afd.config.base import Count, Natural, Positive, Share
from afd.discriminators.windows import WindowedConfig
from afd.hub import fingerprint
from afd.lab.shipped import SHIPPED, checkpoint_path
from afd.models.config import StudentConfig
from afd.registry import load
from afd.rewards.base import RewardConfig
from afd.schedules import check_steps
from afd.teachers.config import TeacherConfig
from afd.teachers.forecast import Forecast

if TYPE_CHECKING:
    from afd.models.codec import Codec
    from afd.models.network import CausalNetwork
    from afd.models.student import Student
    from afd.models.wan.network import CausalWan
    from afd.models.wan.types import WanConfig


class ToyStudentConfig(StudentConfig):
    """Settings of the toy student."""

    kind: Literal["toy"] = Field(default="toy", description="the laptop-size student")
    checkpoint: str = Field(
        default="base",
        description="safetensors file of the start weights; 'base' and 'endless' are shipped",
    )
    denoising_steps: list[float] = Field(
        default=[1.0, 0.9375, 0.833, 0.625],
        min_length=1,
        description="denoising times, descending in (0, 1], first one 1",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ToyStudentConfig:
        for steps in (self.denoising_steps, self.first_chunk_steps):
            if steps is not None:
                check_steps(steps)
        return self

    def build(self, *given: Any, **options: Any) -> tuple[Student, Codec]:
        found: tuple[Student, Codec] = load("afd.lab.build:build")(self, *given, **options)
        return found

    def load_network(self) -> CausalWan:
        network: CausalWan = load("afd.lab.build:load_network")(self)
        return network

    def sizes(self) -> WanConfig:
        found: WanConfig = load("afd.lab.build:sizes")(self)
        return found

    def save(self, network: CausalNetwork, folder: Path, dtype: torch.dtype, note: str) -> Path:
        path: Path = load("afd.lab.build:save_network")(self, network, folder, dtype, note)
        return path

    def video_size(self) -> tuple[int, int, int]:
        size: tuple[int, int, int] = load("afd.lab.build:video_size")(self)
        return size

    def missing_weights(self) -> Iterator[str]:
        if self.checkpoint not in SHIPPED:
            yield from super().missing_weights()

    def fingerprint(self) -> str:
        return fingerprint(checkpoint_path(self.checkpoint))


class ToyDiscriminatorConfig(WindowedConfig):
    """Settings of the toy discriminator."""

    builder: ClassVar[str] = "afd.lab.discriminator:build"
    # A generator's gradient finds the weak spots of a sum of local scores (docs/ABLATIONS.md).
    of_methods: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gan": {
            "window": None,
            "beginnings": True,
            "warmup_updates": 30,
            "warmup_steps_per_update": None,
            "score_looks": 4,
        }
    }

    kind: Literal["toy"] = Field(default="toy", description="the laptop-size scorer")
    backbone: Literal["motion", "scratch", "random"] = Field(
        default="motion",
        description="frozen pretrained motion features, all trained from scratch, or frozen random",
    )
    checkpoint: str = Field(
        default="motion",
        description="safetensors file of the motion backbone; 'motion' is the shipped one",
    )
    learning_rate: float = Field(default=1e-3, ge=0, description="AdamW learning rate")
    betas: tuple[Share, Share] = Field(default=(0.5, 0.99), description="AdamW betas")
    window: Positive | None = Field(
        default=0.1875,
        description="seconds of a window (3 frames at the toy's 16 per second): the score is the "
        "sum over windows that overlap by half, each with the prompt; null: one score of the whole "
        "clip",
    )
    warmup_updates: Natural = Field(
        default=10, description="updates of the run in which only the discriminator learns"
    )
    warmup_steps_per_update: Natural | None = Field(
        default=3,
        description="its steps in each of those updates, on the same rollouts; null: "
        "steps_per_update",
    )
    steps_per_update: Natural = Field(
        default=2, description="its optimizer steps in one update of the run"
    )
    r1: float = Field(
        default=0.1, ge=0, description="weight of the squared gradient norm at the teacher's inputs"
    )
    noise: float = Field(
        default=0.2,
        ge=0,
        description="std of noise on the features (scratch: on the pixels) in training",
    )
    random_looks: bool = Field(
        default=True, description="re-render both inputs under random contrast, tint and texture"
    )
    score_looks: Count = Field(
        default=1, description="looks averaged in a score, the same for all videos"
    )
    beginnings: bool = Field(
        default=False,
        description="also rank by the first quarters of a clip, before a bounce can hide the fall; "
        "for scores of the whole clip",
    )

    def check_student(self, student: StudentConfig) -> None:
        if student.kind != "toy":
            raise ValueError(
                "discriminator.kind: got toy, which only works for the toy task; needed: "
                f"videoalign or latent for student.kind={student.kind}"
            )


class PhysicsRewardConfig(RewardConfig):
    """Settings of an exact measurement of the toy task as a reward."""

    builder: ClassVar[str] = "afd.lab.rewards:build"

    kind: Literal["physics"] = Field(
        default="physics", description="an exact measurement of the toy task"
    )
    measure: Literal["phys", "fit_res", "rend", "adh"] = Field(
        default="phys",
        description="the error to the teacher's gravity, to any gravity (smoothness), or to the "
        "clean render, negated; or the share of the prompt's attributes that the video shows",
    )
    domain: Literal["gravity", "heavy", "light", "both", "endless"] = Field(
        default="gravity", description="the domain whose laws count, as in teacher.domain"
    )

    def check_student(self, student: StudentConfig) -> None:
        if student.kind != "toy":
            raise ValueError(
                "kind: got physics, which only measures the toy task; needed: videoalign, "
                f"discriminator or an installed package's for student.kind={student.kind}"
            )


# Settings that name a simulator's folder beside its look.
_LATER = ("domain", "wrong")


class SimulatorConfig(TeacherConfig):
    """Settings of the simulator, a subprocess that writes the teacher's bouncing-ball videos."""

    opener: ClassVar[str] = "afd.lab.simulator_teacher:open_teacher"

    kind: Literal["simulator"] = Field(
        default="simulator", description="a separate process writes the videos first"
    )
    manifest: Path | None = Field(
        default=None,
        description="which file holds which prompt; null finds prompts.jsonl, .csv, .txt in path",
    )
    style: Literal["clean", "nuis", "mark", "outline", "noise"] = Field(
        default="nuis", description="the look of its renderings"
    )
    domain: Literal["gravity", "heavy", "style", "light", "drag", "both", "endless", "all"] = Field(
        default="gravity",
        description="gravity: balls that fall faster than the student's; drag: balls that lose "
        "horizontal speed, with the student's own gravity; both: gravity and drag; endless: clips "
        "from any place in long videos of balls that lose no speed, under the first one's gravity; "
        "and the domains of a sequence: heavy: red balls that fall faster; style: green balls on "
        "lighter paper, a look to be taken over, with the student's own gravity; light: blue balls "
        "that fall more slowly; all: a third of each of the three",
    )
    count: Count = Field(default=200, description="how many videos it writes")
    seed: Natural = Field(default=0, description="seed of its throws")
    wrong: Share = Field(
        default=0.0,
        description="share of its videos that are wrong, in five ways by turns: physics, prompt, "
        "frozen, watermark, as the base student's",
    )

    @property
    def asked(self) -> dict[str, Any]:
        """Settings of its videos; those added later only where they are not the default."""
        given = {
            k: v for k in _LATER if (v := getattr(self, k)) != type(self).model_fields[k].default
        }
        return {"style": self.style, "count": self.count, "seed": self.seed, **given}

    @property
    def folder_name(self) -> str:
        """A name that differs between different videos of one study."""
        return "-".join([self.style, *(f"{v}" for k, v in self.asked.items() if k in _LATER)])

    def forecast(self, folder: Path, drawn: int) -> Forecast:
        return Forecast(self.kind, self.count, 0, 0, min(drawn, self.count))
