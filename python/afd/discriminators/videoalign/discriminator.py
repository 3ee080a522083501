"""VideoAlign as an online discriminator: the released reward model, trained further.

Only a new LoRA on the language model and the reward head are trained. With the LoRA disabled and
the original head it is still the released VideoAlign, which measures motion quality independently
of this training.
Shape letters: B videos, F frames, C colours, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from afd.discriminators.base import head_numbers
from afd.discriminators.config import VideoAlignConfig, VideoAlignFiles
from afd.discriminators.pairs import DiscriminatorOptimizer, TeacherHeads
from afd.discriminators.videoalign.model import VideoAlign, rewards
from afd.discriminators.videoalign.preprocess import TEMPORAL
from afd.discriminators.windows import windows
from afd.distributed import ALONE, Ranks
from afd.errors import ConfigError
from afd.hub import refuse_other_weights, weights_digest
from afd.models.config import DTYPES
from afd.models.student import Student
from afd.video.config import VideoConfig
from afd_kernels.contracts import require

# The linears of the decoder layers: never the vision tower, the embedding or the head.
TARGETS = r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


class VideoAlignDiscriminator(TeacherHeads):
    """A VideoAlign that learns to rank the teacher's videos above the student's.

    Videos are pixels in [-1, 1]; teacher's and student's are preprocessed identically.
    """

    def __init__(
        self,
        scorer: VideoAlign,
        config: VideoAlignConfig,
        *,
        video: VideoConfig | None = None,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        """Takes ownership of `scorer` and adds LoRA to it. `video`: the rate of all videos, and
        their length, for windows; by default those of the toy task."""
        from peft import LoraConfig, get_peft_model

        self.scorer, self.video, self.ranks = scorer, video or VideoConfig(), ranks
        self.config: VideoAlignConfig = config
        self.generator = Generator().manual_seed(seed)
        released = {**dict(scorer.network.named_parameters()), "rm_head": scorer.head_OD}
        self.start = weights_digest(released)
        lora = LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=TARGETS, bias="none"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # peft creates float32 adapters whatever the network's dtype.
            self.adapted: Any = get_peft_model(scorer.network, lora)
        self.head_OD = nn.Parameter(scorer.head_OD.clone())
        if config.gradient_checkpointing:
            # The first is transformers' newer name of the second.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            enable = next(name for name in names if hasattr(scorer.network, name))
            getattr(scorer.network, enable)({"use_reentrant": False})
        # The mode only affects checkpointing, as there is no dropout.
        scorer.network.train(config.gradient_checkpointing)
        self.optimizer = DiscriminatorOptimizer(self.trained().values(), config)

    def trained(self) -> dict[str, Tensor]:
        """Trained weights by name: the LoRA and the head."""
        named = self.scorer.network.named_parameters()
        return {name: p for name, p in named if p.requires_grad} | {"rm_head.weight": self.head_OD}

    # --- scores ---

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        """Sample the input frames: about two per second."""
        return self.scorer.settings.preprocessing.choose(video_BFCHW, self.video.rate)

    def add_heads(self, count: int) -> None:
        self.head_OD = nn.Parameter(self.scorer.head_OD.clone().repeat(count, 1))
        self.optimizer = DiscriminatorOptimizer(self.trained().values(), self.config)

    def differentiable_score(
        self, seen_BNCHW: Tensor, prompts: Sequence[str], teachers: Sequence[str] = ()
    ) -> Tensor:
        """Scores [B], the mean over windows if there are any, with gradients to the pixels;
        rounding to 8 bits is straight-through."""
        size = self._window(seen_BNCHW)
        if size is None or size >= seen_BNCHW.shape[1]:
            return self._rating(seen_BNCHW, prompts, teachers)
        parts = windows(seen_BNCHW, size)
        count = parts.shape[1]
        repeated = [prompt for prompt in prompts for _ in range(count)]
        heads = [name for name in teachers for _ in range(count)]
        return self._rating(parts.flatten(0, 1), repeated, heads).view(-1, count).mean(1)

    def excerpts(self, teacher_BFCHW: Tensor, student_BFCHW: Tensor) -> tuple[Tensor, Tensor]:
        """One random window of each pair; the whole videos without windows."""
        size = self._window(teacher_BFCHW)
        if size is None:
            return teacher_BFCHW, student_BFCHW
        # Drawn for the pairs of all processes, so that their number changes no update.
        counts = self.ranks.gather(torch.tensor([len(teacher_BFCHW)])).tolist()
        last = teacher_BFCHW.shape[1] - size
        every = torch.randint(last + 1, (sum(counts),), generator=self.generator)
        own_B = every.split(counts)[self.ranks.rank].to(teacher_BFCHW.device)
        index_BN = own_B[:, None] + torch.arange(size, device=own_B.device)
        row_B1 = torch.arange(len(own_B), device=own_B.device)[:, None]
        return teacher_BFCHW[row_B1, index_BN], student_BFCHW[row_B1, index_BN]

    def _window(self, seen_BNCHW: Tensor) -> int | None:
        """Frames of a window of whole videos; an excerpt of a video is one window."""
        total = len(self.scorer.settings.preprocessing.indices(self.video.frames, self.video.rate))
        size = self.config.window_frames(self.video, total, TEMPORAL)
        return None if size is None else min(size, seen_BNCHW.shape[1])

    def _rating(
        self, seen_BNCHW: Tensor, prompts: Sequence[str], teachers: Sequence[str] = ()
    ) -> Tensor:
        hidden = self.scorer.states(seen_BNCHW, prompts)
        heads = self.head_OD.chunk(max(1, len(self.teachers)))
        each = []
        for head_OD in heads:
            ratings_B3 = rewards(hidden, head_OD)
            each.append(ratings_B3[:, 2] if self.config.head == "TA" else ratings_B3.sum(1))
        if len(each) == 1:
            return each[0]
        score_BH = torch.stack(each, 1)
        head_B = head_numbers(teachers, self.teachers)
        if head_B is None:
            return score_BH.mean(1)
        return score_BH.gather(1, head_B.to(score_BH.device)[:, None]).squeeze(1)

    def released_ratings(
        self, seen_BNCHW: Tensor, prompts: Sequence[str], *, normalised: bool = True
    ) -> dict[str, Tensor]:
        """VQ, MQ, TA and their sum Overall, [B] each, of the released VideoAlign."""
        with self.adapted.disable_adapter():
            return self.scorer.ratings_of(
                seen_BNCHW, prompts, normalised=normalised, micro_batch=self.config.micro_batch
            )

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Trained weights and optimizer state; of the released weights, which are not saved, only
        the digest."""
        trained = {name: value.detach().clone() for name, value in self.trained().items()}
        return {
            "start": self.start,
            "trained": trained,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        refuse_other_weights("discriminator.checkpoint", state["start"], self.start)
        held, ours = state["trained"], self.trained()
        shapes = {name: tuple(value.shape) for name, value in held.items()}
        same = shapes == {name: tuple(value.shape) for name, value in ours.items()}
        require(same, "state", f"{len(held)} tensors", "the LoRA and head of this rank and model")
        for name, value in ours.items():
            value.copy_(held[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


def load_released(
    files: VideoAlignFiles, device: torch.device, prompts: Sequence[str] = ()
) -> VideoAlign:
    """Load the released network of a section that has a checkpoint.

    Raises ValueError for a prompt that it cannot score: now rather than in the update that uses it.
    """
    scorer = VideoAlign.load(
        str(files.checkpoint),
        base=files.base,
        videoalign=files.checkout,
        dtype=DTYPES[files.dtype],
        device=device,
    )
    for prompt in prompts:
        scorer.prompts.request(prompt)
    return scorer


def build(
    config: VideoAlignConfig,
    student: Student,
    video: VideoConfig,
    prompts: Sequence[str] = (),
    *,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> VideoAlignDiscriminator:
    """Build the discriminator from its configuration (`DiscriminatorConfig.build`)."""
    if config.checkpoint is None:
        raise ConfigError(
            "discriminator.checkpoint: not given; needed: the folder of the released VideoReward "
            "(KwaiVGI/VideoReward on the hub)"
        )
    scorer = load_released(config, student.device, prompts)
    return VideoAlignDiscriminator(scorer, config, video=video, seed=seed, ranks=ranks)
