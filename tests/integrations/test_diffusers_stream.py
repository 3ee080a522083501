"""The student's stream in diffusers: the latents of afd's own, schedulers, callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from afd.integrations.diffusers import (
    CausalWanPipeline,
    CausalWanTransformer3DModel,
    SelfForcingScheduler,
)
from afd.models.student import Level
from afd.models.wan.checkpoints import save_diffusers
from afd.models.wan.student import WanStudent
from afd.models.wan.text import TextEncoder
from afd.rollout import Switch, SwitchMode, rollout
from tests.afd import tiny_wan
from tests.afd.test_rollout import FOUR, TWO, make_student
from tests.afd.test_text import LENGTH, diffusers_folder
from tests.afd.test_vae import whole_decode
from tests.conftest import ROOT
from tests.fake_cuda import fake_cuda
from tests.integrations.streams import (
    FRAMES,
    SEEDS,
    SIZES,
    generate,
    generators,
    pipeline,
    streamed,
    text,
)
from tests.tolerances import NETWORK_REORDERED as SAME


@pytest.fixture(scope="module")
def student() -> WanStudent:
    return make_student()


class SeedPrompts(WanStudent):
    """A student whose prompts are the seeds of their embeddings."""

    def encode(self, prompts: list[str]) -> Tensor:
        return torch.cat([text(1, int(prompt)) for prompt in prompts]).to(self.dtype)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"window": 5, "sink": 1}, {"independent_first_frame": True}],
    ids=["whole", "window", "first alone"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_pipeline_gives_the_latents_of_the_rollout_bit_for_bit(
    sizes: dict[str, Any], dtype: torch.dtype
) -> None:
    student = make_student(**sizes).to(dtype)
    frames = 11 if sizes.get("independent_first_frame") else 12
    prompted = SeedPrompts(student.net, height=4, width=6, frames=frames)
    expected = rollout(prompted, ["7", "8"], SEEDS, denoising_steps=FOUR)
    embeds = prompted.encode(["7", "8"])
    made = generate(pipeline(student), frames, prompt_embeds=embeds)
    assert made.dtype == dtype
    assert torch.equal(made, expected)
    assert not torch.equal(made[:1], made[1:])


def test_other_steps_and_a_noised_context_are_the_rollouts(student: WanStudent) -> None:
    expected = streamed(student, steps=TWO, context_noise=50.0)
    made = generate(pipeline(student, steps=TWO), context_noise=50.0)
    assert torch.equal(made, expected)
    assert torch.equal(generate(pipeline(student), timesteps=TWO, context_noise=50.0), expected)
    assert not torch.equal(generate(pipeline(student, steps=TWO)), expected)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("mode", get_args(SwitchMode))
def test_a_callback_switches_the_prompt_as_a_stream_does(
    mode: SwitchMode, window: int | None
) -> None:
    student = make_student(window=window, sink=0 if window is None else 1)
    other, third = text(seed=9), text(seed=10)
    expected = streamed(student, 12, switches={1: Switch(other, mode), 4: Switch(third, mode)})
    seen = []

    def callback(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((pipe.current_chunk, step, sorted(tensors)))
        # The last of four steps of a chunk: the next chunk has another prompt.
        return {3: {"prompt_embeds": other}, 15: {"prompt_embeds": third}}.get(step, {})

    pipe = pipeline(student)
    asked = {"callback_on_step_end_tensor_inputs": ["latents"], "prompt_switch": mode}
    made = generate(pipe, 12, callback_on_step_end=callback, **asked)
    assert torch.equal(made, expected)
    assert not torch.equal(made, streamed(student, 12))
    assert seen == [(step // 4, step, ["latents"]) for step in range(24)]
    assert pipe.num_timesteps == 24


@pytest.mark.parametrize(("last", "chunks"), [(6, 1), (7, 2)])
def test_a_callback_changes_latents_and_ends_the_stream(
    student: WanStudent, last: int, chunks: int
) -> None:
    calls = []

    def callback(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(step)
        pipe._interrupt = step == last
        return {"latents": torch.zeros_like(tensors["latents"])} if step in (3, 7) else {}

    made = generate(pipeline(student), callback_on_step_end=callback)
    assert calls == list(range(last + 1))
    # The second chunk counts if its last step was done.
    assert torch.equal(made, torch.zeros(2, 2 * chunks, 4, 4, 6))


def test_diffusers_own_callbacks_are_driven(student: WanStudent) -> None:
    from diffusers.callbacks import PipelineCallback

    class Halve(PipelineCallback):
        tensor_inputs = ("latents",)  # type: ignore[assignment]

        def callback_fn(self, pipe: Any, step: int, t: Tensor, tensors: Any) -> dict[str, Any]:
            return {"latents": tensors["latents"] / 2}

    made = generate(pipeline(student), 2, callback_on_step_end=Halve())
    assert made.abs().mean() < generate(pipeline(student), 2).abs().mean()


@pytest.mark.parametrize("name", ["FlowMatchLCMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_diffusers_own_schedulers_drive_the_stream(student: WanStudent, name: str) -> None:
    """The loop of afd's own passes, with their levels and with the noise as they draw it."""
    import diffusers

    more = {} if "LCM" in name else {"stochastic_sampling": True}
    # Its shift of these times is the students' warp.
    scheduler = getattr(diffusers, name)(shift=5.0, **more)
    pipe = pipeline(student, scheduler)
    made = generate(pipe, generator=generators(), num_inference_steps=4)
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    draws = generators()

    def noise() -> Tensor:
        drawn = torch.cat([torch.randn(1, 4, 2, 4, 6, generator=g) for g in draws])
        return drawn.transpose(1, 2)

    cache, chunks = student.new_cache(text(), FRAMES), []
    for start in range(0, FRAMES, 2):
        x = noise()
        for sigma, to, t in zip(sigmas, sigmas[1:], scheduler.timesteps, strict=False):
            level = Level(float(t), sigma, t.view(1, 1))
            x0 = student.denoise(x, level, cache, start)
            x = (1 - to) * x0 + to * noise()
        student.remember(x, Level.at(0.0, 0.0, student.device), cache, start)
        chunks.append(x)
    torch.testing.assert_close(made, torch.cat(chunks, 1), **SAME)


def test_a_generator_gives_new_noise_every_time_and_a_list_each_video_its_own(
    student: WanStudent,
) -> None:
    pipe, draws = pipeline(student), generators()
    first = generate(pipe, generator=draws)
    assert torch.equal(generate(pipe, generator=generators()), first)
    assert not torch.equal(generate(pipe, generator=draws), first)
    alone = generate(pipe, generator=generators([2]), prompt_embeds=text()[1:])
    torch.testing.assert_close(alone, first[1:], **SAME)


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a WanPipeline of tiny random parts, and its text encoder, tokenizer and VAE."""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import AutoTokenizer, UMT5EncoderModel

    folder = diffusers_folder(tmp_path_factory.mktemp("parts"))
    parts: dict[str, Any] = {
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        "vae": AutoencoderKLWan(base_dim=8).eval(),
    }
    save_diffusers(folder / "net", make_student(**SIZES).net)
    transformer = WanTransformer3DModel.from_pretrained(folder / "net")
    scheduler = FlowMatchEulerDiscreteScheduler()
    whole = WanPipeline(**parts, scheduler=scheduler, transformer=transformer)
    whole.save_pretrained(folder / "pipe")
    return folder, parts


def test_prompts_are_encoded_and_latents_decoded_as_by_diffusers(
    components: tuple[Path, dict[str, Any]],
) -> None:
    folder, parts = components
    prompts = ["the ball", "a red ball falls on the table"]
    student = make_student(**SIZES)
    pipe = CausalWanPipeline(
        **parts,
        scheduler=SelfForcingScheduler(TWO),
        transformer=CausalWanTransformer3DModel.from_network(student.net),
    )
    encoder = TextEncoder.load(folder, dtype=torch.float32, text_len=LENGTH)
    ours = WanStudent(student.net, height=4, width=6, frames=4, encoder=encoder.encode)
    expected = rollout(ours, prompts, SEEDS, denoising_steps=TWO)
    options: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 13, "seeds": SEEDS}
    latents = pipe(prompts, output_type="latent", **options).frames.transpose(1, 2)
    torch.testing.assert_close(latents, expected, **SAME)
    (video,) = pipe(prompts, output_type="pt", return_dict=False, **options)
    pixels = (whole_decode(parts["vae"], latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(video, pixels, **SAME)


def test_the_code_of_the_page_runs(components: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = components
    page = (ROOT / "docs" / "TRAINING.md").read_text(encoding="utf-8")
    code = page[page.index("### In diffusers") :].partition("```python\n")[2].partition("```")[0]
    save_diffusers(tmp_path / "whole" / "transformer", make_student(**SIZES).net)
    tiny = {
        "exported/whole": str(tmp_path / "whole"),
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": str(folder / "pipe"),
        "torch.bfloat16": "torch.float32",
        "max_sequence_length=512": f"max_sequence_length={LENGTH}",
        "num_frames=81": "num_frames=29, height=32, width=48",
    }
    for text_there, text_here in tiny.items():
        assert text_there in code
        code = code.replace(text_there, text_here)
    names: dict[str, Any] = {}
    exec(compile(code, "TRAINING.md", "exec"), names)
    assert names["video"].shape == (29, 32, 48, 3)
    pipe = names["pipe"]
    options: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 29, "seeds": [0]}
    plain = pipe("a street", **options).frames[0]
    # Frames of the first three chunks, as far as the decoder is causal, are those without a switch.
    assert (names["video"][:21] == plain[:21]).all()
    assert (names["video"][21:] != plain[21:]).any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")
def test_a_stream_on_a_gpu_is_the_cpus_and_never_waits_after_its_first_chunk() -> None:
    def made(device: str, callback: Any = None) -> Tensor:
        net = tiny_wan.tiny().to(device, torch.bfloat16)
        pipe = pipeline(WanStudent(net, height=6, width=4, frames=9))
        embeds = tiny_wan.text(net).to(device, torch.bfloat16)
        options = {"height": 48, "width": 32, "num_frames": 33, "seeds": SEEDS}
        return pipe(
            prompt_embeds=embeds, output_type="latent", callback_on_step_end=callback, **options
        ).frames

    expected = made("cpu")
    with fake_cuda() as machine:
        waits = []

        def count(pipe: Any, step: int, t: Tensor, tensors: Any) -> dict[str, Any]:
            waits.append(machine.waits.total())
            return {}

        found = made("cuda", count)
        assert found.device.type == "cuda"
        assert torch.equal(found.cpu(), expected)
    assert len(waits) == 12
    assert waits[3:] == [waits[3]] * 9
