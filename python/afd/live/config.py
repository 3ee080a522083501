"""Configuration of `afd live`: that of `afd sample`, with the students to compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from afd.config.run import load_config, make_config
from afd.errors import ConfigError
from afd.lab.simulator import PROMPTS
from afd.sampling.config import SampleConfig

# What `afd live` streams without a configuration: the shipped student, whose text encoder and
# weights are in the package. A window of three chunks keeps the ball in flight the longest.
LAPTOP: dict[str, Any] = {
    "student": {"kind": "toy", "checkpoint": "base", "dtype": "float32"},
    "prompts": [list(PROMPTS)[i] for i in (0, 13, 26, 34)],
    "frames": 12,
    "height": 16,
    "width": 16,
    "fps": 24,
    "window": 9,
}
DEFAULT_OUT = Path("runs") / "live"


class LiveConfig(SampleConfig):
    """Configuration of `afd live`."""

    compare: list[str | dict[str, Any]] = Field(
        default=[],
        max_length=2,
        description="other students beside this one: a checkpoint, or the student's keys that "
        "differ, such as {adapter: lora.pt}",
    )
    picture: Literal["jpeg", "webp"] = Field(
        default="jpeg", description="format of the frames on the socket"
    )
    quality: Annotated[int, Field(ge=1, le=100)] = Field(
        default=90, description="quality of these pictures, 1 to 100"
    )
    keep_text_encoder: bool = Field(
        default=False,
        description="keep the text encoder in memory, so that a prompt that is typed is embedded "
        "without loading it again",
    )
    full: Literal["wait", "drop"] = Field(
        default="wait",
        description="what happens to a chunk when the encoder is busy with two others: the "
        "generator waits, or the chunk is not shown",
    )
    history: Annotated[float, Field(gt=0, le=600)] = Field(
        default=30.0, description="seconds that the page keeps for scrubbing"
    )

    @field_validator("compare", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value

    @model_validator(mode="after")
    def _streams(self) -> LiveConfig:
        if self.video is not None:
            raise ValueError(f"video: got {self.video}; needed: null, or an image to start from")
        if self.batch != 1:
            raise ValueError(f"batch: got {self.batch}; needed: 1, a stream of each student")
        self.students()
        return self

    def students(self) -> list[SampleConfig]:
        """The configuration of every student: what `afd sample` needs to make the same latents."""
        own = self.model_dump(mode="json", include=set(SampleConfig.model_fields))
        # An endless stream needs a window: as many frames as the video of the configuration has.
        own["window"] = self.latent_frames if self.window is None else self.window
        others = [{"checkpoint": o} if isinstance(o, str) else o for o in self.compare]
        held = [own, *(own | {"student": own["student"] | other} for other in others)]
        return [SampleConfig.model_validate(data) for data in held]

    def labels(self) -> list[str]:
        """A short name of every student, different from all others."""
        names: list[str] = []
        for config in self.students():
            student = config.student
            path = Path(str(getattr(student, "adapter", None) or student.checkpoint))
            # An export's file has the same name in every folder.
            plain = path.stem in ("student", "network", "transformer", "model", "lora")
            name = path.parent.name if plain and path.parent.name else path.stem
            name = ascii(name[:40]).strip("'")
            known = sum(other.partition(" #")[0] == name for other in names)
            names.append(f"{name} #{known + 1}" if known else name)
        return names


def read_config(words: Sequence[str]) -> LiveConfig:
    """The configuration of `afd live [CONFIG] [k=v …]`; without a file the shipped student's.

    `checkpoint=` is short for `student.checkpoint=`. Raises ConfigError.
    """
    path = words[0] if words and ("=" not in words[0] or Path(words[0]).is_file()) else None
    rest = words if path is None else words[1:]
    rest = [f"student.{word}" if word.startswith("checkpoint=") else word for word in rest]
    try:
        if path is None:
            return make_config(LAPTOP, rest, "afd live", LiveConfig)
        return load_config(path, rest, LiveConfig)
    except FileNotFoundError as error:  # a checkpoint whose sizes a check needs
        raise ConfigError(f"student: {error}") from error
