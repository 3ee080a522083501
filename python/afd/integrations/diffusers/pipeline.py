"""The stream of a causal Wan student as a diffusers pipeline.

Letters: B videos, C channels, F latent frames, H x W latent size, L text tokens, E text channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from diffusers import AutoencoderKLWan
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Generator, Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from afd.integrations.diffusers.cache import RollingKVCache
from afd.integrations.diffusers.model import CausalWanTransformer3DModel
from afd.integrations.diffusers.scheduler import draw
from afd.rollout import NoiseSource, SwitchMode, chunk_layout, counted_noise
from afd_kernels.contracts import require

Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]


class CausalWanPipeline(WanPipeline):
    """Generates videos chunk by chunk with a rolling KV cache.

    It has WanPipeline's components, with a `CausalWanTransformer3DModel` as the transformer, and
    its methods for prompts, files and offloading. There is no classifier-free guidance: the
    students are distilled.
    """

    _callback_tensor_inputs = ["latents", "prompt_embeds"]  # noqa: RUF012

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: SchedulerMixin,
        transformer: CausalWanTransformer3DModel | None = None,
        transformer_2: None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        # The last three belong to Wan2.2; diffusers requires them of a subclass.
        others: Any = (vae, scheduler, transformer)
        super().__init__(tokenizer, text_encoder, *others)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        generator: Generator | list[Generator] | None = None,
        seeds: Sequence[int] | None = None,
        prompt_embeds: Tensor | None = None,
        context_noise: float = 0.0,
        prompt_switch: SwitchMode = "plain",
        kv_cache: RollingKVCache | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | PipelineCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> WanPipelineOutput | tuple[Any]:
        """Generate one video per prompt.

        Args:
            prompt: or `prompt_embeds` [B, text_len, E].
            height: of the video, in pixels.
            width: likewise.
            num_frames: of the video; its 1 + (num_frames - 1) / 4 latent frames are whole chunks
                of the transformer.
            num_inference_steps: passed to the scheduler with `timesteps`, if given.
            generator: of the noise; a list has one per video.
            seeds: instead of `generator` one per video, whose noise is then that of `afd.rollout`:
                a function of seed, chunk and step, on every device. The scheduler's step has to
                take `variance_noise`, as `SelfForcingScheduler`'s does.
            context_noise: time of the pass that caches a finished chunk, on the 0-1000 scale.
            prompt_switch: what becomes of the cached frames when a chunk begins with other
                prompt_embeds than the last one had: "plain", "recache", "recache_causal" or
                "new_sink", as in `afd.rollout.Switch`.
            kv_cache: holds the context and can be read afterwards; None: a new one.
            output_type: "np", "pt" or "pil", or "latent" for latents [B, C, F, H, W].
            callback_on_step_end: called as callback(pipeline, step, timestep, tensors) after every
                denoising step, counted over all chunks, with the chunk's "latents" and the
                "prompt_embeds" if asked for. What it returns replaces them. New prompt_embeds count
                from the next denoising step on; a finished chunk is cached under the prompt of its
                last step. `pipeline.current_chunk` is the chunk; `pipeline._interrupt = True` ends
                the video, with this chunk if it was its last step, else without.

        Raises:
            ValueError: naming the argument, the value given and what is needed.
        """
        asked = _asked(callback_on_step_end, callback_on_step_end_tensor_inputs)
        for name in asked:
            known = ", ".join(self._callback_tensor_inputs)
            ok = name in self._callback_tensor_inputs
            require(ok, "callback_on_step_end_tensor_inputs", name, f"some of {known}")
        modes = get_args(SwitchMode)
        known_mode = prompt_switch in modes
        require(known_mode, "prompt_switch", prompt_switch, f"one of {', '.join(modes)}")
        causal = isinstance(self.transformer, CausalWanTransformer3DModel)
        kind = type(self.transformer).__name__
        require(causal, "transformer", kind, "a CausalWanTransformer3DModel")
        device, net = self._execution_device, self.transformer.net
        text = self._text(prompt, prompt_embeds, device)
        frames = (num_frames - 1) // self.vae_scale_factor_temporal + 1
        alone = net.config.independent_first_frame
        layout = chunk_layout(frames, net.config.chunk, first_alone=alone)
        size = (height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial)
        cache = RollingKVCache(frames) if kv_cache is None else kv_cache
        cache.reset()
        given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps}
        steps = {name: value for name, value in given.items() if value is not None}
        self.scheduler.set_timesteps(device=device, **steps)
        per_chunk = len(self.scheduler.timesteps)
        self._num_timesteps = per_chunk * len(layout)
        self._interrupt = False
        source = None
        if seeds is not None:
            shape = (net.config.in_dim, *size)
            source = counted_noise(seeds, layout, per_chunk, shape, device=device, dtype=text.dtype)
        noise = _Noise(self.scheduler, generator, source)
        chunks: list[Tensor] = []
        block_causal = prompt_switch == "recache_causal"
        used = text
        for self.current_chunk, (start, count) in enumerate(layout):
            self.scheduler.set_timesteps(device=device, **steps)
            latents = noise.first(
                self.current_chunk, text.new_empty(len(text), net.config.in_dim, count, *size)
            )
            if chunks and text is not used and prompt_switch != "plain":
                self.transformer.rewrite_kv_cache(
                    torch.cat(chunks, 2),
                    text,
                    cache,
                    new_sink=prompt_switch == "new_sink",
                    chunks=[x.shape[2] for x in chunks] if block_causal else (),
                    timestep=context_noise,
                )
            used = text
            for i, t in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    break
                cache.overwrite_newest, used = i > 0, text
                flow = self.transformer(
                    latents,
                    t.expand(len(text)),
                    text,
                    frame_offset=start,
                    attention_kwargs={"kv_cache": cache},
                    return_dict=False,
                )[0]
                drawn = noise.after(self.current_chunk, i, per_chunk)
                latents = self.scheduler.step(flow, t, latents, return_dict=False, **drawn)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "prompt_embeds": text}
                    tensors = {name: tensors[name] for name in asked}
                    step = self.current_chunk * per_chunk + i
                    changed = callback_on_step_end(self, step, t, tensors) or {}
                    latents = changed.get("latents", latents)
                    text = changed.get("prompt_embeds", text).to(text)
            else:
                chunks.append(latents)
            if self.interrupt:
                break
            if self.current_chunk + 1 < len(layout):
                self.transformer.write_kv_cache(
                    latents, used, cache, frame_offset=start, timestep=context_noise
                )
        require(bool(chunks), "callback_on_step_end", "an interrupt", "one finished chunk at least")
        frames_out = self._decoded(torch.cat(chunks, 2), output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=frames_out) if return_dict else (frames_out,)

    def _text(
        self, prompt: str | list[str] | None, embeds: Tensor | None, device: torch.device
    ) -> Tensor:
        """Text embeddings [B, text_len, E] in the transformer's dtype."""
        one = (prompt is None) != (embeds is None)
        if not one:
            given = "neither" if prompt is None else "both"
            raise ValueError(f"prompt, prompt_embeds: got {given}; needed: exactly one of them")
        if embeds is None:
            assert prompt is not None
            embeds, _ = self.encode_prompt(
                prompt,
                do_classifier_free_guidance=False,
                max_sequence_length=self.transformer.net.config.text_len,
                device=device,
            )
        return embeds.to(device, self.transformer.dtype)

    def _decoded(self, latents_BCFHW: Tensor, output_type: str) -> Any:
        """Videos of the kind asked for, or the latents themselves."""
        if output_type == "latent":
            return latents_BCFHW
        vae = self.vae

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=vae.dtype, device=vae.device).view(1, -1, 1, 1, 1)

        scaled = latents_BCFHW.to(vae.device, vae.dtype) * column(vae.config.latents_std)
        video = vae.decode(scaled + column(vae.config.latents_mean), return_dict=False)[0]
        return self.video_processor.postprocess_video(video, output_type=output_type)


class _Noise:
    """The noise of a stream: from `source`, or drawn from `generator`."""

    def __init__(self, scheduler: Any, generator: Any, source: NoiseSource | None) -> None:
        self._generator, self._source = generator, source
        takes = inspect.signature(scheduler.step).parameters
        self._draws = "generator" in takes
        if source is not None:
            require(generator is None, "generator", generator, "None where seeds are given")
            kind, needed = type(scheduler).__name__, "a scheduler whose step takes variance_noise"
            require("variance_noise" in takes, "seeds: scheduler", kind, needed)

    def first(self, chunk: int, like: Tensor) -> Tensor:
        """What a chunk starts as, in the shape of `like`, [B, C, F, H, W]."""
        if self._source is None:
            return draw(like, self._generator)
        noise = self._source(chunk, 0).transpose(1, 2)
        same = noise.shape == like.shape
        require(same, "seeds", len(noise), f"{len(like)}, one per video")
        return noise

    def after(self, chunk: int, step: int, steps: int) -> dict[str, Any]:
        """Arguments of the scheduler's step with this index, for the noise it adds."""
        if self._source is None:
            return {"generator": self._generator} if self._draws else {}
        last = step + 1 == steps
        return {"variance_noise": None if last else self._source(chunk, step + 1).transpose(1, 2)}


def _asked(callback: Any, inputs: Sequence[str]) -> list[str]:
    """Names of the tensors a callback is given: those it lists itself, if it does."""
    listed = isinstance(callback, PipelineCallback | MultiPipelineCallbacks)
    return list(callback.tensor_inputs if listed else inputs)
