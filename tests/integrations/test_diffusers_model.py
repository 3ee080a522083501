"""The student as a diffusers model: its cache, files and training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afd.integrations.diffusers import (
    CausalWanPipeline,
    CausalWanTransformer3DModel,
    RollingKVCache,
    SelfForcingScheduler,
)
from afd.models.wan.checkpoints import load_checkpoint, save_diffusers, save_self_forcing
from afd.models.wan.student import WanStudent
from afd.rollout import stream_layout
from tests.afd.test_rollout import TWO, make_student
from tests.integrations.streams import (
    FRAMES,
    SEEDS,
    generate,
    generators,
    pipeline,
    streamed,
    text,
)
from tests.tolerances import NETWORK_BFLOAT16, NETWORK_FORWARD


@pytest.fixture(scope="module")
def student() -> WanStudent:
    return make_student()


# --- the cache ---


def test_a_loop_over_model_and_cache_is_the_stream(student: WanStudent) -> None:
    """The calls that diffusers' proposal makes: append, overwrite, and the finished chunk again."""
    model = CausalWanTransformer3DModel.from_network(student.net)
    scheduler, cache = SelfForcingScheduler(), RollingKVCache(FRAMES)
    noise = student.noise_source(SEEDS, stream_layout(student, FRAMES), 4)
    chunks = []
    embeds = text()
    for chunk, start in enumerate(range(0, FRAMES, 2)):
        x = noise(chunk, 0).transpose(1, 2)
        scheduler.set_timesteps()
        cache.enable_append_mode()
        for i, t in enumerate(scheduler.timesteps):
            flow = model(
                x,
                t.expand(2, 2),
                embeds,
                frame_offset=start,
                attention_kwargs={"kv_cache": cache},
            ).sample
            cache.enable_overwrite_mode()
            fresh = None if i == 3 else noise(chunk, i + 1).transpose(1, 2)
            x = scheduler.step(flow, t, x, variance_noise=fresh).prev_sample
        model(x, torch.zeros(2, 2), embeds, start, {"kv_cache": cache})
        chunks.append(x)
    expected = streamed(student)
    assert torch.equal(torch.cat(chunks, 2).transpose(1, 2), expected)
    # Reset, it is a new stream in the same memory.
    assert cache.ring is not None
    memory = cache.ring.self_kv[0][0].data_ptr()
    made = generate(pipeline(student), kv_cache=cache)
    assert torch.equal(made, expected)
    assert cache.ring.self_kv[0][0].data_ptr() == memory


def test_a_changed_prompt_is_read_again_and_an_unchanged_one_is_not(
    student: WanStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = CausalWanTransformer3DModel.from_network(student.net), RollingKVCache(FRAMES)
    calls = []
    text_kv = student.net.text_kv

    def counted(text_BLE: Tensor) -> Any:
        calls.append(text_BLE)
        return text_kv(text_BLE)

    monkeypatch.setattr(student.net, "text_kv", counted)
    embeds, x = text(), torch.randn(2, 4, 2, 4, 6)

    def call() -> Tensor:
        return model(x, torch.ones(2), embeds, 0, {"kv_cache": cache}, return_dict=False)[0]

    first = call()
    cache.enable_overwrite_mode()
    assert torch.equal(call(), first)
    assert len(calls) == 1
    embeds += 1
    assert not torch.equal(call(), first)
    assert len(calls) == 2
    embeds = embeds.clone()
    call()
    assert len(calls) == 3


def test_mistakes_are_named(student: WanStudent) -> None:
    from diffusers import FlowMatchLCMScheduler

    model, cache = CausalWanTransformer3DModel.from_network(student.net), RollingKVCache(FRAMES)
    x, t, embeds, given = torch.randn(2, 4, 2, 4, 6), torch.ones(2), text(), {"kv_cache": cache}

    def refused(match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            model(*args, **options)

    refused("frame_offset: got 2; needed: 0 where the cache is empty", x, t, embeds, 2, given)
    model(x, t, embeds, 0, given)
    refused("frame_offset: got 0; needed: 2, as the cache appends", x, t, embeds, 0, given)
    cache.enable_overwrite_mode()
    refused("frame_offset: got 2; needed: 0, as the cache overwrites", x, t, embeds, 2, given)
    refused("hidden_states: .* needed: the batch", x[:1], t[:1], embeds[:1], 0, given)
    refused("one time for the chunk", x, torch.tensor([1.0, 2.0]), embeds, 0, given)
    refused("frame_offset: got 2; needed: 0 where there is no kv_cache", x, t, embeds, 2)
    refused(r"timestep: got .* needed: a number, \[2\] or \[2, 2\]", x, torch.ones(3), embeds)
    refused("timestep: got 900; needed: a tensor", x, 900, embeds)
    refused("attention_kwargs: got .*scale", x, t, embeds, 0, {"scale": 1.0})
    refused("kv_cache.*RollingKVCache", x, t, embeds, 0, {"kv_cache": []})
    refused(r"hidden_states: got .* needed: \[B, C, F, H, W\]", x[0], t, embeds)
    endless = {"kv_cache": RollingKVCache()}
    refused("frames: got None; needed: a number, as there is no window", x, t, embeds, 0, endless)
    with pytest.raises(ValueError, match="num_inference_steps: got 7; needed: None or 4"):
        SelfForcingScheduler().set_timesteps(7)
    scheduler = SelfForcingScheduler((1000,))
    scheduler.step(x, 1000.0, x)
    with pytest.raises(ValueError, match="step: got 2; needed: set_timesteps after 1 steps"):
        scheduler.step(x, 1000.0, x)
    with pytest.raises(ValueError, match="prompt, prompt_embeds: got neither"):
        generate(pipeline(student), prompt_embeds=None)
    with pytest.raises(ValueError, match="generator: got 3; needed: one, or 2"):
        generate(pipeline(student), generator=generators([1, 2, 3]))
    with pytest.raises(ValueError, match="seeds: got 3; needed: 2, one per video"):
        generate(pipeline(student), seeds=[1, 2, 3])
    with pytest.raises(ValueError, match=r"generator: got .*; needed: None where seeds are given"):
        generate(pipeline(student), seeds=SEEDS, generator=generators())
    with pytest.raises(ValueError, match="seeds: scheduler: got 'FlowMatchLCMScheduler'; needed"):
        generate(pipeline(student, FlowMatchLCMScheduler()), num_inference_steps=4)
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs: got 'nothing'"):
        generate(pipeline(student), callback_on_step_end_tensor_inputs=["nothing"])
    with pytest.raises(
        ValueError, match="prompt_switch: got 'fade'; needed: one of plain, recache"
    ):
        generate(pipeline(student), prompt_switch="fade")
    with pytest.raises(ValueError, match="kv_cache: got 'an empty cache'; needed: one with"):
        model.rewrite_kv_cache(x, embeds, RollingKVCache(FRAMES))


# --- files ---


def test_a_saved_model_is_loaded_bit_for_bit(student: WanStudent, tmp_path: Path) -> None:
    windowed = make_student(window=5, sink=1)
    model = CausalWanTransformer3DModel.from_network(windowed.net)
    model.save_pretrained(tmp_path / "model")
    again = CausalWanTransformer3DModel.from_pretrained(tmp_path / "model")
    assert again.net.config == windowed.net.config
    assert dict(again.config) == dict(model.config)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert not again.training
    half = CausalWanTransformer3DModel.from_pretrained(
        tmp_path / "model", torch_dtype=torch.bfloat16, window=None, sink=0, low_cpu_mem_usage=True
    )
    assert half.dtype == torch.bfloat16
    assert half.net.config.window is None
    with pytest.raises(ValueError, match=r"folder: .*needed: a new or empty folder"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="variant: got 'fp16'; needed: nothing; the settings are"):
        CausalWanTransformer3DModel.from_pretrained(tmp_path / "model", variant="fp16")
    with pytest.raises(ValueError, match="safe_serialization: got False"):
        model.save_pretrained(tmp_path / "other", safe_serialization=False)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_it_reads_what_others_write_and_they_read_what_it_writes(
    student: WanStudent, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import WanTransformer3DModel

    causal = {"text_len": 5, "chunk": 2}
    x, t, embeds = torch.randn(2, 4, 2, 4, 6), torch.tensor([900.0, 300.0]), text()
    with torch.no_grad():
        expected = CausalWanTransformer3DModel.from_network(student.net)(x, t, embeds).sample
    save_diffusers(tmp_path / "pipe" / "transformer", student.net)
    save_self_forcing(tmp_path / "model.pt", generator=student.net)
    for source in (tmp_path / "pipe", tmp_path / "pipe" / "transformer"):
        model = CausalWanTransformer3DModel.from_pretrained(source, **causal)
        with torch.no_grad():
            assert torch.equal(model(x, t, embeds).sample, expected)
    model = CausalWanTransformer3DModel.from_pretrained(
        tmp_path / "pipe", subfolder="transformer", **causal
    )
    model.save_pretrained(tmp_path / "ours")
    assert load_checkpoint(tmp_path / "ours", **causal).config == student.net.config
    # What afd writes says what it is.
    again = CausalWanTransformer3DModel.from_pretrained(tmp_path / "pipe")
    assert again.net.config == student.net.config
    broken = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(broken | {"_afd": {"chunk": "2"}}))
    with pytest.raises(ValueError, match=r"config.json: _afd: got .*; needed: integers or null of"):
        CausalWanTransformer3DModel.from_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json"):
        CausalWanTransformer3DModel.from_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(broken))
    # A chunk that holds all frames is diffusers' bidirectional network.
    caplog.clear()
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "ours").eval()
    assert not caplog.records, "no setting that diffusers warns about"
    with torch.no_grad():
        out = theirs(x, t, embeds, return_dict=False)[0]
    assert (out - expected).norm() / expected.norm() <= NETWORK_FORWARD
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CausalWanTransformer3DModel.from_pretrained(tmp_path / "nowhere")


def test_the_pipeline_is_loaded_around_a_wan_pipelines_folder(
    student: WanStudent, tmp_path: Path
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    save_diffusers(tmp_path / "net", student.net)
    theirs = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=WanTransformer3DModel.from_pretrained(tmp_path / "net"),
    )
    theirs.save_pretrained(tmp_path / "pipe")
    pipe = CausalWanPipeline.from_pretrained(
        tmp_path / "pipe",
        transformer=CausalWanTransformer3DModel.from_pretrained(
            tmp_path / "pipe", text_len=5, chunk=2
        ),
        scheduler=SelfForcingScheduler(),
        **dict.fromkeys(("tokenizer", "text_encoder", "vae")),
    )
    assert torch.equal(generate(pipe), streamed(student))
    with pytest.raises(ValueError, match="transformer: got 'WanTransformer3DModel'"):
        CausalWanPipeline(**theirs.components)(prompt_embeds=text())


def test_a_saved_pipeline_is_loaded_whole(
    student: WanStudent, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline(student, steps=TWO).save_pretrained(tmp_path)
    caplog.clear()
    none = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = CausalWanPipeline.from_pretrained(tmp_path, **none)
    assert torch.equal(generate(pipe), streamed(student, steps=TWO))
    half = CausalWanPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, **none)
    assert half.transformer.dtype == torch.bfloat16
    given = {"transformer": pipe.transformer, "scheduler": pipe.scheduler}
    CausalWanPipeline.from_pretrained(tmp_path, **given, **none)
    assert not caplog.records


def test_a_scheduler_is_saved_and_loaded(tmp_path: Path) -> None:
    SelfForcingScheduler((1000, 500), shift=3.0).save_pretrained(tmp_path)
    again = SelfForcingScheduler.from_pretrained(tmp_path)
    assert (
        again.timesteps.tolist() == SelfForcingScheduler((1000, 500), shift=3.0).timesteps.tolist()
    )
    assert len(again.sigmas) == 3


# --- training ---


def test_gradient_checkpointing_recomputes_the_same_gradients(tmp_path: Path) -> None:
    student = make_student()
    model = CausalWanTransformer3DModel.from_network(student.net).train()
    model.requires_grad_(True)
    x, embeds = torch.randn(2, 4, 6, 4, 6), text()
    t = torch.tensor([[900.0, 300.0]]).repeat(2, 3).sort().values

    def gradients() -> list[Tensor]:
        loss = model(x, t, embeds).sample.square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    whole = gradients()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda y: (kept.append(y.numel()), y)[1], lambda y: y
    ):
        gradients()
    without = sum(kept)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda y: (kept.append(y.numel()), y)[1], lambda y: y
    ):
        again = gradients()
    assert sum(kept) < without / 2
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="gradient_checkpointing_func"):
        model.enable_gradient_checkpointing(lambda *args: None)


def test_peft_adapts_the_model_and_bfloat16_is_near(student: WanStudent) -> None:
    import copy

    from peft import LoraConfig, get_peft_model

    model = CausalWanTransformer3DModel.from_network(copy.deepcopy(student.net))
    x, t, embeds = torch.randn(2, 4, 4, 4, 6), torch.tensor([900.0, 300.0]), text()
    with torch.no_grad():
        expected = model(x, t, embeds).sample
        half = copy.deepcopy(model).to(torch.bfloat16)
        out = half(x.bfloat16(), t, embeds.bfloat16()).sample.float()
    assert (out - expected).norm() / expected.norm() <= NETWORK_BFLOAT16
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q", "k", "v", "o"]))
    out = adapted(x, t, encoder_hidden_states=embeds).sample
    torch.testing.assert_close(out.detach(), expected)
    out.square().mean().backward()
    assert sum(p.grad is not None for p in adapted.parameters()) == 2 * 2 * 8


def test_the_package_does_not_import_diffusers() -> None:
    program = (
        "import sys, afd, afd.rollout, afd.integrations.nft\n"
        "assert 'afd.integrations.diffusers' not in sys.modules\n"
        "sys.modules['diffusers'] = None\n"
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "import afd.extras\n"
        "afd.extras.find_spec = lambda name: None if name == 'diffusers' else real(name)\n"
        "try:\n"
        "    import afd.integrations.diffusers\n"
        "except afd.errors.ConfigError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (
        "afd.integrations.diffusers: needs diffusers, which is not installed; "
        "pip install 'afd-video[wan]'"
    )
