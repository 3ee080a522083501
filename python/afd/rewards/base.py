"""The reward interface: frozen scores of finished videos, beside the online discriminator.

Shape letters: B videos, F frames, C channels, H x W pixels or latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from afd.config.base import Section
from afd.extras import need
from afd.models.config import StudentConfig
from afd.registry import load

if TYPE_CHECKING:
    from afd.models.student import Student
    from afd.video.config import VideoConfig


class Reward(ABC):
    """A frozen score of a video for its prompt. It has no state and draws no random numbers.

    Attributes:
        input_space: pixels in [-1, 1], or the student's latents.
        identity: digest of everything that its scores depend on besides its section, such as the
            weights it read; a resumed run is refused if it changed. None: no files.
    """

    input_space: Literal["pixels", "latents"] = "pixels"
    identity: str | None = None

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        """The part of the videos that it uses as input; only this needs to be stored."""
        return video_BFCHW

    @property
    def prepared_by(self) -> object:
        """Scorers of one input space with equal, hashable values share one prepared input."""
        return None if type(self).prepare is Reward.prepare else self

    @abstractmethod
    def score(self, input_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B], higher is better; without gradient. Each depends on its own video and prompt
        alone. Inputs are on the CPU."""


class RewardConfig(Section):
    """Base class of every reward's section: a named entry of `rewards`.

    A subclass implements `build` (docs/EXTENDING.md); a built-in one sets `builder` to the
    function, as "module:name".
    """

    builder: ClassVar[str]
    # Optional packages required to build it.
    packages: ClassVar[tuple[str, ...]] = ()

    kind: str = Field(description="name of the reward in the registry")
    weight: float = Field(
        default=1.0,
        ge=0,
        le=1e6,
        description="its weight in the sum; 0: measured, but not optimised (it still counts in "
        "afd.prior_share)",
    )

    def build(
        self,
        student: Student,
        video: VideoConfig,
        prompts: Sequence[str] = (),
        *,
        beside: Sequence[object] = (),
    ) -> Reward:
        """Build the reward for this student's videos and these prompts.

        `beside`: the run's discriminator, if any, and the rewards built before, with which it may
        share a frozen network. Raises ValueError, FileNotFoundError or ConfigError if a part cannot
        be loaded.
        """
        need(f"rewards: kind={self.kind}", *self.packages)
        return load(self.builder)(self, student, video, prompts, beside=beside)

    def check_student(self, student: StudentConfig) -> None:
        """Raise ValueError if it cannot score this student's videos."""

    def missing(self, key: str) -> Iterator[str]:
        """Yield a sentence for each file that a run would not find or would have to download.

        `key`: dotted key of this section, for the sentence.
        """
        yield from ()


class OnlineConfig(RewardConfig):
    """The run's discriminator as one of the rewards: its weight, and its place among them."""

    kind: Literal["discriminator"] = Field(
        default="discriminator", description="the run's discriminator, to give it a weight"
    )


@dataclass(frozen=True)
class Term:
    """One reward of a run. `reward` None: the online discriminator, its head of `teacher` if there
    are several."""

    name: str
    weight: float = 1.0
    reward: Reward | None = None
    teacher: str = ""


# The name of the discriminator's term where `rewards` has no entry of its kind.
ONLINE = "discriminator"


def online(rewards: Mapping[str, RewardConfig]) -> list[str]:
    """Names of the entries of `rewards` that are the online discriminator."""
    return [name for name, section in rewards.items() if isinstance(section, OnlineConfig)]
