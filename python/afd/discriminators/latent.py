"""A small discriminator on latents, for use without VideoAlign.

Shape letters: B videos, F latent frames, C latent channels, H x W latent cells, N cells after the
convolutions, L text tokens, E text channels, D channels of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from afd.discriminators.base import head_numbers
from afd.discriminators.config import LatentConfig
from afd.discriminators.pairs import DiscriminatorOptimizer, TeacherHeads
from afd.discriminators.windows import windows
from afd.distributed import ALONE, Ranks
from afd.models.student import Student
from afd.video.config import VideoConfig
from afd_kernels.contracts import require

# Maps prompts to embeddings [B, L, E], zero past a prompt's end; for example `TextEncoder.encode`.
Encode = Callable[[Sequence[str]], Tensor]


def _bounded(layer: nn.Module) -> nn.Module:
    """Spectral normalisation: the layer with its largest singular value kept at 1.

    A single power iteration per update would lag behind in the first, fast updates.
    """
    return spectral_norm(layer, n_power_iterations=3)


class LatentScorer(nn.Module):
    """Spatio-temporal convolutions, then cross-attention from every cell to the prompt.

    Every layer is spectrally normalised: a bounded Lipschitz constant keeps scores of similar
    latents similar, so that a few outlier cells cannot drive the advantage to its limits.
    """

    def __init__(self, channels: int, text_dim: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        require(width % heads == 0, "width", width, f"a multiple of {heads}")
        # Space is halved three times and time twice, as neighbours differ little in either.
        sizes = ((channels, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        self.convs = nn.ModuleList(
            _bounded(nn.Conv3d(i, o, 3, stride=(time, 2, 2), padding=1)) for i, o, time in sizes
        )
        self.heads, self.dim = heads, 4 * width
        dim = self.dim
        self.query = _bounded(nn.Linear(dim, dim))
        self.key = _bounded(nn.Linear(text_dim, dim))
        self.value = _bounded(nn.Linear(text_dim, dim))
        self.mix = _bounded(nn.Linear(3 * dim, dim))
        self.out = _bounded(nn.Linear(dim, 1))
        # Normalises the text channels, whose scale depends on the encoder.
        self.text_norm = nn.LayerNorm(text_dim, elementwise_affine=False)

    @torch.no_grad()
    def follow_norms(self) -> None:
        """Re-estimate every layer's spectral norm, once per update.

        In training mode every access to a weight would do so, and the result would depend on the
        number of passes in an update.
        """
        self.train()
        for module in self.modules():
            if hasattr(module, "parametrizations"):
                _ = module.weight
        self.eval()

    def add_heads(self, count: int) -> None:
        """Replace the last layer by one with a row for each of `count` teachers."""
        device = next(self.parameters()).device
        self.out = _bounded(nn.Linear(self.dim, count)).to(device)

    def forward(
        self, latent_BFCHW: Tensor, text_BLE: Tensor, head_B: Tensor | None = None
    ) -> Tensor:
        """Scores [B] by the given heads; None: the mean over all."""
        x = latent_BFCHW.transpose(1, 2)
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
        cell_BND = x.flatten(2).transpose(1, 2)
        heard_BND = self._read(cell_BND, text_BLE)
        # The product lets the prompt modulate a cell's features, not only add to them (FiLM).
        both = torch.cat([cell_BND, heard_BND, cell_BND * heard_BND], 2)
        pooled_BD = F.leaky_relu(self.mix(both), 0.2).mean(1)
        score_BH = self.out(pooled_BD)
        if head_B is None:
            return score_BH.mean(1) if score_BH.shape[1] > 1 else score_BH.squeeze(1)
        return score_BH.gather(1, head_B.to(score_BH.device)[:, None]).squeeze(1)

    def _read(self, cell_BND: Tensor, text_BLE: Tensor) -> Tensor:
        """Cross-attention from each cell to the prompt; rows of zeros are padding."""
        used_BL = text_BLE.abs().sum(2) > 0
        # The first row is always attended to, as a prompt may be empty.
        used_BL = torch.cat([torch.ones_like(used_BL[:, :1]), used_BL[:, 1:]], 1)
        text_BLE = self.text_norm(text_BLE)
        q, k, v = (
            rearrange(part, "B N (heads d) -> B heads N d", heads=self.heads)
            for part in (self.query(cell_BND), self.key(text_BLE), self.value(text_BLE))
        )
        heard = F.scaled_dot_product_attention(q, k, v, attn_mask=used_BL[:, None, None])
        return rearrange(heard, "B heads N d -> B N (heads d)")


class LatentDiscriminator(TeacherHeads):
    """A `LatentScorer` with its optimizer (see `Discriminator`).

    Its inputs are latents [B, F, C, H, W].
    """

    input_space: Literal["pixels", "latents"] = "latents"

    def __init__(
        self,
        encode: Encode,
        config: LatentConfig,
        *,
        channels: int = 16,
        text_dim: int = 4096,
        device: torch.device | str = "cpu",
        video: VideoConfig | None = None,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        """`encode`: maps prompts to embeddings [B, L, text_dim]; it gets no gradient. `video`: the
        length and rate of the videos, for windows; by default those of the toy task."""
        self.encode, self.device = encode, torch.device(device)
        self.video, self.seed = video or VideoConfig(), seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = LatentScorer(channels, text_dim, config.width).to(device).eval()
        super().__init__(net, config, ranks)
        self.net: LatentScorer
        self.config: LatentConfig

    def add_heads(self, count: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net.add_heads(count)
        self.net.eval()
        self.optimizer = DiscriminatorOptimizer(self.net.parameters(), self.config)

    def differentiable_score(
        self, latent_BFCHW: Tensor, prompts: Sequence[str], teachers: Sequence[str] = ()
    ) -> Tensor:
        """Scores [B] with gradients to the latents."""
        head_B = head_numbers(teachers, self.teachers)
        with torch.no_grad():
            text_BLE = self.encode(prompts).to(self.device, torch.float32)
        latent_BFCHW = latent_BFCHW.to(self.device, torch.float32)
        size = self.config.window_frames(self.video, latent_BFCHW.shape[1])
        if size is None:
            return self.net(latent_BFCHW, text_BLE, head_B)
        window_BN = windows(latent_BFCHW, size)
        count = window_BN.shape[1]
        head_N = None if head_B is None else head_B.repeat_interleave(count)
        score = self.net(window_BN.flatten(0, 1), text_BLE.repeat_interleave(count, 0), head_N)
        return score.view(-1, count).sum(1)

    def step(
        self,
        teacher_BFCHW: Tensor,
        student_BFCHW: Tensor,
        prompts: Sequence[str],
        teachers: Sequence[str] = (),
        weights_B: Tensor | None = None,
    ) -> dict[str, float]:
        """One update on prompt-matched pairs; returns loss, accuracy, margin and gradient norm."""
        metrics = super().step(teacher_BFCHW, student_BFCHW, prompts, teachers, weights_B)
        self.net.follow_norms()
        return metrics


def build(
    config: LatentConfig,
    student: Student,
    video: VideoConfig,
    prompts: Sequence[str] = (),
    *,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> LatentDiscriminator:
    """Build the discriminator from its configuration (`DiscriminatorConfig.build`)."""
    wan = student.net.config
    return LatentDiscriminator(
        lambda prompts: student.encode(list(prompts)),
        config,
        channels=wan.in_dim,
        text_dim=wan.text_dim,
        device=student.device,
        video=video,
        seed=seed,
        ranks=ranks,
    )
