"""The released students' denoising steps as a diffusers scheduler.

Letters: B videos, C channels, F latent frames, H x W latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from afd.schedules import ShiftedFlow, check_steps, renoise, x0_from_flow
from afd_kernels.contracts import require


@dataclass
class SelfForcingSchedulerOutput(BaseOutput):
    """A step's result.

    Attributes:
        prev_sample: the next step's input; after the last step the clean latents.
        pred_original_sample: the clean latents that the prediction implies.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class SelfForcingScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Few-step sampling: predict the clean chunk, mix it with fresh noise for the next time.

    The steps and their arithmetic are those of `afd.rollout`. diffusers' `FlowMatchLCMScheduler`
    does the same with other rounding.

    Attributes:
        timesteps: float32 [steps], warped, on the 0-1000 scale.
        sigmas: the noise levels of the steps, then 0.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        denoising_steps: tuple[int, ...] = (1000, 750, 500, 250),
        shift: float = 5.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        """
        Args:
            denoising_steps: whole numbers before the warp that descend from 1000.
            shift: of `afd.schedules.ShiftedFlow`.
            num_train_timesteps: entries of its table.
        """
        check_steps(denoising_steps, first=1000)
        self._flow = ShiftedFlow(shift, num_train_timesteps)
        self.init_noise_sigma = 1.0
        self._prepared: tuple[list[int], Any] | None = None
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Prepare a chunk's steps.

        Args:
            num_inference_steps: None, or the number of `denoising_steps`: students are trained on
                a fixed list.
            timesteps: another list of denoising steps, before the warp.
        """
        steps = list(self.config["denoising_steps"] if timesteps is None else timesteps)
        check_steps(steps, first=1000)
        count = num_inference_steps
        fits = count is None or count == len(steps)
        require(fits, "num_inference_steps", count, f"None or {len(steps)}, the trained steps")
        self._step = 0
        if self._prepared == (steps, device):
            return  # Prepared for an earlier chunk: another copy to the device would wait for it.
        times = self._flow.warp(steps)
        self.num_inference_steps = len(steps)
        self.timesteps = torch.tensor(times, dtype=torch.float32, device=device)
        self.sigmas = [*(self._flow.sigma_of(t) for t in times), 0.0]
        self._prepared = (steps, device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SelfForcingSchedulerOutput | tuple[Tensor]:
        """From one step's noisy latents [B, C, F, H, W] to the next one's.

        Steps are counted: call `set_timesteps` before each chunk. `timestep` is not needed.
        `variance_noise`: the fresh noise, in the sample's shape; None: drawn from `generator`.
        """
        needed = f"set_timesteps after {self.num_inference_steps} steps"
        require(self._step < self.num_inference_steps, "step", self._step + 1, needed)
        sigma, to = self.sigmas[self._step : self._step + 2]
        self._step += 1
        x0 = x0_from_flow(model_output, sample, sigma)
        previous = x0
        if self._step < self.num_inference_steps:
            noise = variance_noise
            previous = renoise(x0, draw(sample, generator) if noise is None else noise, to)
        return SelfForcingSchedulerOutput(previous, x0) if return_dict else (previous,)


def draw(like: Tensor, generator: Generator | list[Generator] | None) -> Tensor:
    """Noise in the shape and dtype of `like`, on its device; a list has a generator per video."""
    many = len(generator) if isinstance(generator, list) else len(like)
    require(many == len(like), "generator", many, f"one, or {len(like)}")
    return randn_tensor(tuple(like.shape), generator, like.device, like.dtype)
