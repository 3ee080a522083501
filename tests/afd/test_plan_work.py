"""The dry run's operations against PyTorch's counter on an update of the run's own code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from afd import ops
from afd.config.run import RunConfig, make_config, plain
from afd.methods.base import Batch
from afd.methods.copies import Place
from afd.methods.rollouts import roll_out
from afd.models.codec import Pixels
from afd.models.wan.network import CausalWan
from afd.models.wan.student import WanStudent
from afd.models.wan.types import WanConfig
from afd.models.wan.vae import VideoVAE
from afd.planning.autoencoders import WAN21
from afd.planning.cost_model import Net
from afd.planning.places import RecachePass
from afd.planning.work import Work
from afd.rollout import SwitchMode
from afd.trainer.build import assemble, build_discriminator
from tests import tolerances
from tests.afd.simulated import META, operations, simulated_method

SIZE = (21, 60, 104)
TINY = WanConfig(dim=64, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=5)
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("afd", {"context": "shared_context", "keep_context": True}),
    ("afd", {"context": "shared_context", "keep_context": False}),
    ("afd", {"context": "own_context", "keep_context": False}),
    ("afd", {"context": "recompute", "keep_context": False, "prior_weight": 0.0}),
    ("sft", {"draws": 2}),
    ("gan", {"context": "own_context"}),
    ("gan", {"context": "recompute", "prior_weight": 0.0}),
    ("dmd", {"score_updates": 1, "score_warmup_updates": 0}),
    ("afd", {"context": "shared_context", "group_from_chunk": "last"}),
    ("afd", {"context": "own_context", "keep_context": False, "group_from_chunk": 1}),
    ("afd", {"context": "shared_context", "worst": 1}),
]


def make(method: str, settings: dict[str, Any], *, prompts: int = 1, **student: Any) -> RunConfig:
    """A run at 480 x 832 of one prompt an update with an inexpensive discriminator."""
    section = {"micro_batch": 1, **settings}
    if method == "afd":
        section |= {"samples_per_prompt": 2, "draws": 1}
    elif method != "sft":
        section |= {"samples_per_prompt": 1}
    data = {
        "method": method,
        method: section,
        "prompts_per_update": prompts,
        "video": {"frames": 81, "height": 480, "width": 832, "fps": 16},
        "student": {"kind": "wan", "denoising_steps": [1000], **student},
        "discriminator": {"kind": "latent", "warmup_updates": 0},
        "evaluation": {"kind": "none"},
    }
    return make_config(data)


def batch(size: tuple[int, int, int]) -> Batch:
    frames, height, width = size
    return Batch(1, ["a"], torch.zeros(1, frames, 16, height, width))


def net_of(config: RunConfig, layers: int) -> Net:
    wan = WanConfig()
    lora = None if config.student.lora is None else config.student.lora.rank
    sizes = wan.dim, wan.ffn_dim, layers, wan.text_len
    tokens, window = SIZE[1] * SIZE[2] // 4, config.student.window
    seen = {"window": window, "sink": config.student.sink}
    return Net(*sizes, 0, SIZE[0], wan.chunk, tokens, lora, **seen)


def planned(config: RunConfig, layers: int) -> dict[str, float]:
    """The plan's operations of matrix products by phase."""
    net = net_of(config, layers)
    return {phase.name: phase.flop for phase in Work(config, net, 1).phases(0)}


WHOLE = {"lora": None, "checkpoint_blocks": False}
ADAPTED = {"lora": {"rank": 32, "alpha": 32}, "checkpoint_blocks": True}


@pytest.mark.parametrize(
    ("method", "settings", "student"),
    [(*case, WHOLE) for case in METHODS] + [(*case, ADAPTED) for case in METHODS[1:6:2]],
)
def test_an_update_at_the_released_size_takes_the_planned_operations(
    method: str, settings: dict[str, Any], student: dict[str, Any]
) -> None:
    """Two layers, of which the last is special; all others repeat the first."""
    config = make(method, settings, **student)
    plan = planned(config, 2)
    run = simulated_method(config, WanConfig(num_layers=2), SIZE)
    found = {}
    if method != "sft":
        found["rollout"] = operations(lambda: run.rollout(batch(SIZE)))
    if method == "dmd":
        found["discriminator"] = operations(lambda: run.discriminator_step(batch(SIZE)))
    elif method == "afd":  # the scores, which the plan does not count
        operations(lambda: run.discriminator_step(batch(SIZE)))
    found["student"] = operations(lambda: run.student_step(batch(SIZE)))
    for phase, flop in found.items():
        assert plan[phase] == pytest.approx(flop, rel=tolerances.PLANNED_WORK), phase


def test_a_pass_holds_the_chosen_videos_unless_all_are_replayed(tmp_path: Path) -> None:
    prompts = tmp_path / "earlier.txt"
    prompts.write_text("a\n", encoding="utf-8")
    chosen = {"micro_batch": None, "best": 1}
    config = make("afd", chosen, prompts=4)
    assert Work(config, net_of(config, 2), 1).micro == 4
    replay = {"fraction": 0.5, "prompts": str(prompts)}
    replayed = make_config(plain(config) | {"replay": replay})
    assert Work(replayed, net_of(replayed, 2), 1).micro == 8


def test_an_update_on_clips_of_streams_takes_the_planned_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mean over all places; the plan does not count the codec of clips."""
    settings = {"stream_frames": 27, "train_window": 12, "group_from_chunk": 2, "stream_start": 0.4}
    shared = {"context": "shared_context", "keep_context": False}
    config = make("afd", {**shared, **settings}, **WHOLE, window=9, sink=3)
    plan = planned(config, 2)
    run = simulated_method(config, WanConfig(num_layers=2, window=9, sink=3), SIZE)
    found = {"rollout": 0.0, "student": 0.0}
    for clip, often in enumerate((0.6, 0.2, 0.2)):
        place = Place(clip, clip + 2, 3)
        monkeypatch.setattr("afd.methods.afd.draw_place", lambda *_, place=place: place)
        found["rollout"] += often * operations(lambda: run.rollout(batch(SIZE)))
        operations(lambda: run.discriminator_step(batch(SIZE)))
        found["student"] += often * operations(lambda: run.student_step(batch(SIZE)))
    for phase, flop in found.items():
        assert plan[phase] == pytest.approx(flop, rel=tolerances.PLANNED_WORK), phase


@pytest.mark.parametrize(
    ("mode", "switch"), [("recache", 2), ("recache", 5), ("recache_causal", 5), ("new_sink", 5)]
)
def test_a_recache_takes_the_planned_operations(mode: SwitchMode, switch: int) -> None:
    """While the stream fits the window, and later: what a stream takes beside a plain switch."""
    settings = {"context": "own_context", "keep_context": False, "stream_frames": 36}
    config = make("afd", settings, **WHOLE, window=9, sink=3)
    run = simulated_method(config, WanConfig(num_layers=2, window=9, sink=3), SIZE)

    def taken(mode: SwitchMode) -> int:
        two = replace(batch(SIZE), earlier=["b"])
        with run.policies.using("old") as student:
            given = student, two, 1, torch.Generator(), run.streaming
            place = Place(switch, switch=switch)
            return operations(lambda: roll_out(*given, place=place, switch_mode=mode))

    net = net_of(config, 2)
    kept = 3 if mode != "new_sink" and switch > 3 else 0
    again = RecachePass(min(3 * switch, 9) - kept, kept, mode == "recache_causal")
    found = taken(mode) - taken("plain")
    # What no plan counts: the patches' embedding, and the queries of a context pass's last layer.
    left_out = 2.0 * again.frames * net.tokens * net.dim * (net.dim + 4 * net.channels)
    assert again.flop(net) + left_out == pytest.approx(found, rel=tolerances.EXACT_COUNT)


@pytest.mark.parametrize("shared", [None, 2])
def test_the_plan_counts_a_recache_for_every_stream_that_switches(shared: int | None) -> None:
    settings = {"keep_context": False, "stream_frames": 36, "group_from_chunk": shared}
    off, on = (
        make("afd", {**settings, "stream_switch": mode}, **WHOLE, window=9, sink=3, prompts=2)
        for mode in (None, "recache")
    )
    net = net_of(on, 2)
    short, full = [RecachePass(frames) for frames in (3, 6)], [RecachePass(9), RecachePass(6, 3)]
    passes = [*short, *full, full[1]]
    # Clips begin at chunk 0 to 5 of the stream, and a switch is before each with the same chance.
    means = [sum(one.flop(net) for one in passes[:clip]) / clip for clip in range(1, 6)]
    streams = 2 * (1 if shared else 2)
    more = planned(on, 2)["rollout"] - planned(off, 2)["rollout"]
    assert more == pytest.approx(streams * sum(means) / 6, rel=1e-9)


def test_an_update_of_the_whole_released_network_takes_the_planned_operations() -> None:
    config = make("sft", {"draws": 1}, lora=None, checkpoint_blocks=True)
    run = simulated_method(config, WanConfig(), SIZE)
    flop = operations(lambda: run.student_step(batch(SIZE)))
    assert planned(config, 30)["student"] == pytest.approx(flop, rel=tolerances.PLANNED_WORK)


@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_the_simulated_update_counts_what_a_real_one_counts(
    method: str, settings: dict[str, Any]
) -> None:
    size = (6, 6, 4)
    config = make(method, settings, lora=None, dtype="float32")
    wan = replace(TINY, in_dim=16, out_dim=16)
    student = WanStudent(
        CausalWan(wan),
        frames=size[0],
        height=size[1],
        width=size[2],
        encoder=lambda prompts: torch.zeros(len(prompts), wan.text_len, wan.text_dim),
    )
    student.net.checkpoint_blocks = config.student.checkpoint_blocks
    discriminator = (
        build_discriminator(config, student) if config.method in ("afd", "gan") else None
    )
    real = assemble(config, student, Pixels(), discriminator)
    simulated = simulated_method(config, wan, size)
    phases = ["rollout"] * (method != "sft") + ["discriminator_step"] * (method != "sft")
    for phase in (*phases, "student_step"):
        ours, theirs = (
            operations(lambda one=one, phase=phase: getattr(one, phase)(batch(size)), real=here)
            for one, here in ((simulated, False), (real, True))
        )
        assert ours == pytest.approx(theirs, rel=tolerances.EXACT_COUNT), phase


def test_a_decode_with_gradients_takes_three_decodes() -> None:
    """Forward, recomputation, and the gradient of its input: the weights are frozen."""
    from diffusers import AutoencoderKLWan

    with META:
        vae = VideoVAE(AutoencoderKLWan().requires_grad_(False))
    latents = torch.zeros(1, 2, 16, 60, 104, device=META, requires_grad=True)
    flop = operations(lambda: vae.decode(latents).sum().backward())
    config = make("gan", {}).model_copy(
        update={"discriminator": make_config({"discriminator": VIDEOALIGN}).discriminator}
    )
    work = Work(config, Net(1536, 8960, 30, 512, 0, 21, 3, 1560), 1)
    student = next(phase for phase in work.phases(0) if phase.name == "student")
    share = WAN21.decode_flop(2, 480 * 832) / WAN21.decode_flop(21, 480 * 832)
    assert student.convolutions * share == pytest.approx(flop, rel=tolerances.PLANNED_WORK)


VIDEOALIGN = {"kind": "videoalign", "checkpoint": "videoalign"}


@pytest.mark.parametrize("needs", [(True, False, False), (True, True, False), (True, True, True)])
def test_attention_counts_two_products_forward_and_three_to_five_backward(
    needs: tuple[bool, bool, bool],
) -> None:
    for _ in range(2):
        ops.register_flop_formulas()
    wanted = ops.intervals.noisy_half(6, 3, 4)
    q, k, v, k_past, v_past = (torch.randn(2, 24, 2, 16) for _ in range(5))
    for need, tensors in zip(needs, ((q,), (k, v), (k_past, v_past)), strict=True):
        for x in tensors:
            x.requires_grad_(need)
    # 24 queries attend to the 12 tokens of their chunk; the second chunk, to the first clean one.
    own, past = 24 * 12, 12 * 12
    one = 2 * 2 * 2 * 16  # multiply and add, videos, heads, channels
    with FlopCounterMode(display=False) as counter:
        out, _ = ops.block_attention(q, k, v, wanted, k_context=k_past, v_context=v_past)
        assert counter.get_total_flops() == 2 * one * (own + past)
        out.sum().backward()
    back = own * (3 + 2 * needs[1]) + past * (3 + 2 * needs[2])
    assert counter.get_total_flops() == one * (2 * (own + past) + back)
