"""Whole paths on a simulated CUDA device (tests/fake_cuda): nothing is on the wrong device, nothing
waits where it must not, and the numbers are the CPU's."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from torch import Tensor

from afd import ops
from afd.config.run import RunConfig
from afd.discriminators.config import LatentConfig, VideoAlignConfig
from afd.discriminators.latent import LatentDiscriminator
from afd.discriminators.videoalign.discriminator import VideoAlignDiscriminator
from afd.discriminators.videoalign.model import VideoAlign
from afd.discriminators.videoalign.prompt import OWN_TEMPLATE
from afd.distributed import Ranks
from afd.methods.config import DmdConfig, GanConfig
from afd.methods.dmd import Dmd
from afd.methods.gan import Gan
from afd.models.config import LoraConfig
from afd.models.noise import EndlessLayout, counted_noise
from afd.models.policies import make_policies
from afd.models.student import Student
from afd.models.wan.tiny_vae import TinyVAE
from afd.models.wan.vae import VideoVAE
from afd.rollout import Switch, stream, stream_layout
from afd.testing.tiny_vae import drawn_weights
from afd.trainer.loop import _home
from afd.video.recorder import Recorder
from afd_kernels import dispatch, native
from afd_kernels.block_attention import library_cuda, library_impl
from tests.afd import test_text, test_vae, tiny_methods, tiny_videoalign, tiny_wan
from tests.afd.test_tiny_vae import keys
from tests.afd.tiny_methods import WAN_STEPS, make_afd, make_sft, toy_batch, wan_batch
from tests.fake_cuda import FakeCuda, fake_cuda
from tests.tolerances import ACCUMULATED

# Where there is one, the paths run on it.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")
BF16, LORA = torch.bfloat16, LoraConfig(rank=4, alpha=8)


def on(device: str, *tensors: Tensor) -> list[Tensor]:
    return [x.to(device, BF16) for x in tensors]


def same(ours: Tensor, expected: Tensor) -> None:
    """Of the device, with the CPU's bits."""
    assert ours.device.type == "cuda"
    assert torch.equal(ours.cpu(), expected)


# --- the machine itself ---


def test_what_a_gpu_refuses_is_refused_and_every_wait_is_counted() -> None:
    cpu = torch.arange(6.0)
    with fake_cuda() as machine:
        gpu = torch.arange(6.0, device="cuda")
        for wrong in (
            lambda: gpu + cpu,
            lambda: torch.cat([gpu, cpu]),
            lambda: torch.nn.Linear(6, 1).to("cuda")(cpu),
            lambda: gpu.numpy(),
            lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
            lambda: torch.empty(3, device="cuda").normal_(generator=torch.Generator()),
            lambda: ops.forward_noise(gpu[None], torch.ones(1), noise=gpu[None]),
            torch.cuda.CUDAGraph,
        ):
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                wrong()
        same(gpu * torch.tensor(2.0), cpu * 2)
        with machine.no_waits():
            total = (gpu.reshape(2, 3) @ torch.ones(3, 1, device="cuda")).sum()
        same(total, cpu.sum())
    assert not torch.cuda.is_available()


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool(x[0]),
    "if": lambda x: 1 if (x > 0).any() else 0,
    "max": lambda x: max(x),
    "format": lambda x: f"{x[0]:.3f}",
    "print": str,
    "index of a list": lambda x: [0, 1][x.long()[0]],
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "copy_": lambda x: torch.empty(6).copy_(x),
    "index": lambda x: x[torch.arange(6)],
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "event": lambda x: torch.cuda.Event().synchronize(),
}


@pytest.mark.parametrize("how", WAITS)
def test_every_way_to_wait_is_counted(how: str) -> None:
    with fake_cuda() as machine:
        gpu = torch.arange(6.0, device="cuda")
        with pytest.raises(AssertionError), machine.no_waits():
            WAITS[how](gpu)


def op_calls(device: str) -> dict[str, Callable[[], Any]]:
    """A call of every public op, forward and backward where it has one."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, BF16).requires_grad_(grad)

    x, old, base = some(2, 4, 6, 4, 4, grad=True), *(some(2, 4, 6, 4, 4) for _ in range(2))
    t, seed = torch.full((2, 2), 0.5).to(device), torch.arange(2).to(device)
    q, k, v = (some(2, 24, 2, 16, grad=True) for _ in range(3))
    gain, rope = some(32, grad=True), torch.ones(1, 24, 8, 2).to(device)
    caches, position = (some(2, 32, 2, 16), some(2, 32, 2, 16)), torch.zeros(1).long().to(device)
    seen, rows = ops.intervals.causal(frames=6, chunk=3, tokens=4), some(1, 6, 32, grad=True)
    stream = some(2, 24, 32, grad=True)

    def append() -> Tensor:
        with torch.no_grad():
            given = (q, k, v, gain, gain, rope, *caches, position)
            return ops.qk_norm_rope_append_(*given, tokens_per_frame=4, sink_frames=1)

    weight = torch.ones(2).to(device)
    given = {"v_old": old, "v_ref": base, "x0": base, "t": t, "r": t, "seed": seed}
    return {
        "forward_noise": lambda: ops.forward_noise(x, t, seed=seed).sum().backward(),
        "nft_loss": lambda: ops.nft_loss(
            v_theta=x, nft_beta=0.1, prior_weight=1e-4, group="chunk", **given
        ).loss.backward(),
        "nft_loss of another trainer": lambda: ops.nft_loss(
            v_theta=x,
            nft_beta=0.1,
            weighting="x0",
            prior_space="x0",
            prior_weight=weight,
            sample_weight=weight,
            sigma=t,
            **given,
        ).loss.backward(),
        "block_attention": lambda: ops.block_attention(q, k, v, seen)[0].sum().backward(),
        "qk_norm_rope": lambda: ops.qk_norm_rope(q, k, gain, gain, rope)[0].sum().backward(),
        "qk_norm_rope_append_": append,
        "adaln": lambda: ops.adaln(stream, stream, rows, rows, rows)[1].sum().backward(),
    }


def test_every_op_is_called_below() -> None:
    assert set(dispatch.OPS) <= set(op_calls("cpu"))


@pytest.mark.parametrize("name", op_calls("cpu"))
def test_an_op_never_waits_for_the_device(name: str) -> None:
    """Nor does the CUDA host code of any of its backends, forward and backward."""
    with fake_cuda() as machine:
        call = op_calls("cuda")[name]
        with machine.no_waits():
            call()


# --- passes and streams ---


def trained(device: str, how: str) -> tuple[Tensor, Tensor]:
    """One pass with gradients: the prediction, and the gradient of a weight."""
    net = tiny_wan.tiny().to(device, BF16)
    x, clean, text = on(
        device, tiny_wan.video(net, 6), tiny_wan.video(net, 6, seed=3), tiny_wan.text(net)
    )
    t_BF = torch.full((2, 6), 300.0, device=device)
    given: dict[str, Any] = {}
    if how == "recompute":
        given["x0_BFCHW"] = clean
    elif how == "context":
        with torch.no_grad():
            given["context"] = net.clean_context(clean, text)
    net.checkpoint_blocks = how == "recompute"
    out = net(x, t_BF, text, **given)
    out.float().square().mean().backward()
    gradient = net.blocks[0].self_attn.norm_k.weight.grad
    assert gradient is not None
    return out.detach(), gradient


@pytest.mark.parametrize("how", ["causal", "recompute", "context"])
def test_a_training_pass_is_on_the_device_alone(how: str) -> None:
    expected = trained("cpu", how)
    with fake_cuda() as machine:
        found = trained("cuda", how)
        # Of the weights and the inputs; after that the host runs ahead of the device.
        assert {what for what, _ in machine.waits} == {"copy to the device"}
        for ours, theirs in zip(found, expected, strict=True):
            same(ours, theirs)
    wanted = {"_adaln_fwd_kernel", "_adaln_bwd_kernel", "_block_attention_dq_kernel"}
    wanted |= {"_scaled_dot_product_flash_attention", "_qk_norm_rope_bwd_kernel"}
    assert wanted <= set(machine.launches)


def merged(device: str) -> tuple[Tensor | None, ...]:
    """Two calls of one library, forward and backward: gradients of q, k, v and of the context."""
    library = library_cuda.AtenFlash() if device == "cuda" else library_impl._CPU
    draw = torch.Generator().manual_seed(0)
    q, k, v, grad, k_past, v_past = (
        torch.randn(2, 32, 2, 16, generator=draw).to(device) for _ in range(6)
    )
    keys, seen = library_impl._Keys(k, v, k_past, v_past), ops.intervals.noisy_half(4, 2, 8)
    out, lse = library_impl.forward(library, q, keys, seen, 0.25)
    needs = (True, True, True)
    return library_impl.backward(library, grad, q, keys, out, lse, seen, 0.25, needs)


def test_a_librarys_calls_are_merged_on_the_device() -> None:
    expected = merged("cpu")
    with fake_cuda() as machine:
        for ours, theirs in zip(merged("cuda"), expected, strict=True):
            assert ours is not None
            assert theirs is not None
            same(ours, theirs)
    assert machine.launches["_scaled_dot_product_flash_attention_backward"] > 1


def wan(device: str, fuse: bool = False, **changes: Any) -> Student:
    student = tiny_methods.wan_student(BF16, **changes).to(device)
    if fuse:
        student.net.fuse_projections()
    return student


STREAMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fused": ({"fuse": True}, {}),
    "window and sink": ({"window": 9, "sink": 3}, {"frames": 18}),
    "other prompts": ({}, {"switch": 2, "first_chunk_steps": WAN_STEPS[::2]}),
    "recache": ({"window": 9, "sink": 3}, {"frames": 18, "switch": 4, "mode": "recache"}),
    "new sink": ({"window": 8, "sink": 2}, {"frames": 18, "switch": 4, "mode": "new_sink"}),
    "picture": ({}, {"frames": 7, "prefix_BFCHW": torch.linspace(-1, 1, 96).view(1, 1, 4, 6, 4)}),
}


def streamed(name: str, device: str, machine: FakeCuda | None = None) -> Tensor:
    """All chunks; after the first one nothing may wait."""
    changes, settings = STREAMS[name]
    student, settings = wan(device, **changes), dict(settings)
    prefix = settings.get("prefix_BFCHW")
    if prefix is not None:
        (settings["prefix_BFCHW"],) = on(device, prefix)
    if "switch" in settings:
        text_BLE, mode = student.encode(["another one"]), settings.pop("mode", "plain")
        settings["switches"] = {settings.pop("switch"): Switch(text_BLE, mode)}
    layout = stream_layout(student, settings.get("frames", student.frames), int(name == "picture"))
    noise = student.noise_source([7], layout, len(WAN_STEPS))
    chunks = stream(
        student, student.encode(["a ball"]), noise, denoising_steps=WAN_STEPS, **settings
    )
    first = next(chunks)
    if machine is None:
        return torch.cat([first, *chunks], 1)
    with machine.no_waits():
        return torch.cat([first, *chunks], 1)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_never_waits_for_the_device(name: str) -> None:
    expected = streamed(name, "cpu")
    with fake_cuda() as machine:
        same(streamed(name, "cuda", machine), expected)
    assert machine.launches["_block_attention_fwd_kernel"] > 0
    assert machine.launches["_qk_norm_rope_fwd_kernel"] > 0


def test_a_tiny_decode_and_an_endless_streams_noise_never_wait() -> None:
    weights, latent = drawn_weights(keys()), torch.linspace(-1, 1, 3 * 16 * 6).view(1, 3, 16, 3, 2)
    layout = EndlessLayout(2)

    def run(device: str) -> Tensor:
        vae = TinyVAE.of(weights, device=device)
        noise = counted_noise([3], layout, 2, (16, 3, 2), device=device)
        decode, held = vae.stream(), latent.to(device)
        with machine.no_waits() if device == "cuda" else nullcontext():
            return decode(torch.cat([held, noise(0, 1), noise(7, 0)], 1))

    expected = run("cpu")
    with fake_cuda() as machine:
        same(run("cuda"), expected)


# --- training ---


def afd(device: str, lora: LoraConfig | None = LORA, **settings: Any) -> Any:
    return make_afd(wan(device), lora=lora, learning_rate=1e-3, **settings)


def sft(device: str) -> Any:
    return make_sft(wan(device), lora=LORA, micro_batch=1, timesteps="uniform", ema_decay=0.9)


def toy(device: str) -> Any:
    return make_afd(tiny_methods.toy_student().to(device), micro_batch=3)


def gan(device: str) -> Any:
    student, config = wan(device), GanConfig(prior_weight=0.1)
    policies = make_policies(student, config.versions, trained=config.trained, lora=LORA)
    discriminator = LatentDiscriminator(
        student.encode, LatentConfig(loss="gan", width=4), channels=4, text_dim=8, device=device
    )
    return Gan(policies, discriminator, config, denoising_steps=WAN_STEPS)


def dmd(device: str) -> Any:
    config = DmdConfig(score_warmup_updates=0, score_updates=1)
    policies = make_policies(wan(device), config.versions, trained=config.trained)
    return Dmd(policies, config, denoising_steps=WAN_STEPS)


PARTS = {"micro_batch": 1, "chunks_per_update": 2, "draws": 1}
METHODS: dict[str, Callable[[str], Any]] = {
    "shared context, kept": lambda device: afd(device, draws=1),
    "shared context, made": lambda device: afd(device, None, keep_context=False, **PARTS),
    "own context": lambda device: afd(device, context="own_context", baseline="teacher", **PARTS),
    "recompute": lambda device: afd(device, None, context="recompute", ema_decay=0.9, **PARTS),
    "toy": toy,
    "sft": sft,
    "gan": gan,
    "dmd": dmd,
}


def updates(method: Any, name: str, number: int) -> dict[str, float]:
    method.policies.student.net.checkpoint_blocks = name != "toy"
    batch = toy_batch(number) if name == "toy" else wan_batch(number, count=1)
    if method.needs_rollout:
        method.rollout(batch)
    found = method.discriminator_step(batch) if method.needs_discriminator else {}
    return found | method.student_step(batch)


@pytest.mark.parametrize("name", METHODS)
def test_an_update_is_on_the_device_and_its_state_comes_back(name: str) -> None:
    expected = updates(METHODS[name]("cpu"), name, 0)
    with fake_cuda():
        method = METHODS[name]("cuda")
        masters = method.policies.weights("theta").masters
        assert {x.device.type for x in masters} == {"cuda"}
        assert updates(method, name, 0) == pytest.approx(expected, rel=ACCUMULATED, abs=1e-7)
        file = io.BytesIO()
        torch.save(method.state_dict(), file)
        file.seek(0)
        again = METHODS[name]("cuda")
        again.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        assert "student/loss" in updates(again, name, 1)


def videoalign(folder: Path, device: str) -> tuple[Tensor, dict[str, float]]:
    """Scores of VideoAlign as a discriminator, then one update."""
    scorer = VideoAlign.load(
        folder / "root", base=folder / "base", dtype=BF16, template=OWN_TEMPLATE, device=device
    )
    discriminator = VideoAlignDiscriminator(
        scorer, VideoAlignConfig(lora_rank=4, lora_alpha=8), seed=0
    )
    clips = tiny_videoalign.clips().to(device)
    seen = discriminator.prepare(clips)
    score = discriminator.score(seen, tiny_videoalign.PROMPTS)
    return score, discriminator.step(seen.flip(0), seen, tiny_videoalign.PROMPTS)


def test_videoalign_looks_scores_and_learns_on_the_device(tmp_path: Path) -> None:
    folder = tiny_videoalign.write_released(tmp_path / "videoalign")
    score, metrics = videoalign(folder, "cpu")
    with fake_cuda():
        ours, found = videoalign(folder, "cuda")
        same(ours, score)
    assert found == pytest.approx(metrics, rel=ACCUMULATED)


# --- what is around the student ---


def test_a_run_says_which_backends_its_own_device_has(tmp_path: Path) -> None:
    console = Console(quiet=True)
    config = RunConfig(out=str(tmp_path))
    # A core without CUDA code: on the CPU adaln would run on it.
    no_cuda = patch.object(native, "has_cuda", lambda: False)
    ranks = Ranks(device=torch.device("cuda"))
    with fake_cuda(), no_cuda, _home(config, console, ranks):
        log = (tmp_path / "train.log").read_text()
    assert "op adaln runs on backend triton" in log


def test_text_and_frames_come_from_the_device_and_files_are_written_beside_it(
    tmp_path: Path,
) -> None:
    encoder = test_text.encoder()
    text = encoder.encode(test_text.PROMPTS)
    latent = test_vae.latent(2).to(BF16)
    vae = VideoVAE(test_vae.model().to(BF16))
    video, code = vae.decode(latent), vae.encode(torch.zeros(1, 5, 3, 16, 16))
    with Recorder([tmp_path / "cpu.mp4"], ["a"], fps=16, crf=18) as recorder:
        recorder.put(video[:1])
    with fake_cuda() as machine:
        encoder.model.to("cuda")
        same(encoder.encode(test_text.PROMPTS), text)
        vae = VideoVAE(test_vae.model().to("cuda", BF16))
        same(vae.encode(torch.zeros(1, 5, 3, 16, 16)), code)
        decode, (chunk,) = vae.stream(), on("cuda", latent)
        with machine.no_waits():
            pieces = [decode(frame) for frame in chunk.split(1, 1)]
        same(torch.cat(pieces, 1), video)
        recording = Recorder([tmp_path / "gpu.mp4"], ["a"], fps=16, crf=18)
        with recording as recorder, machine.no_waits():
            recorder.put(torch.cat(pieces, 1)[:1])
    assert (tmp_path / "gpu.mp4").read_bytes() == (tmp_path / "cpu.mp4").read_bytes()
