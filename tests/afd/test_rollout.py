"""The stream: its order of calls, its noise, prompts that change, videos that begin with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from afd.models.student import Level
from afd.models.wan.network import CausalWan
from afd.models.wan.student import WanStudent
from afd.models.wan.types import WanConfig
from afd.rollout import (
    chunk_layout,
    counted_noise,
    draw_exits,
    rollout,
    seeded_noise,
    self_forcing_rollout,
    stream,
    stream_layout,
)
from tests.tolerances import NETWORK_FORWARD, NETWORK_GRADIENT
from tests.tolerances import NETWORK_REORDERED as SAME

SIZES: dict[str, Any] = {
    "dim": 48,
    "num_heads": 2,
    "ffn_dim": 64,
    "num_layers": 2,
    "freq_dim": 16,
    "text_dim": 12,
    "text_len": 5,
    "in_dim": 4,
    "out_dim": 4,
}
FOUR, TWO = (1000, 750, 500, 250), (1000, 500)


def make_student(**sizes: Any) -> WanStudent:
    torch.manual_seed(0)
    net = CausalWan(WanConfig(**{**SIZES, "chunk": 2, **sizes})).requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return WanStudent(net, height=4, width=6, frames=6)


@pytest.fixture(scope="module")
def student() -> WanStudent:
    return make_student()


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(7))


def noise_of(student: WanStudent, seeds: list[int], frames: int = 6, prefix: int = 0) -> Any:
    layout = stream_layout(student, frames, prefix)
    return counted_noise(seeds, layout, 4, student.frame_shape)


def video(student: WanStudent, text: Tensor, seeds: list[int], **options: Any) -> Tensor:
    options = {"denoising_steps": TWO, "frames": 6} | options
    prefix = options.get("prefix_BFCHW")
    given = 0 if prefix is None else prefix.shape[1]
    noise = noise_of(student, seeds, options["frames"], given)
    return torch.cat(list(stream(student, text, noise, **options)), 1)


class Spy:
    """Every call of the network: (frames from, frames to, time, context only)."""

    def __init__(self, student: WanStudent, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[int, int, float, bool]] = []
        forward = student.net.forward_cached

        def watched(x: Tensor, t: Tensor, cache: Any, start: int, **options: Any) -> Any:
            seen = (start, start + x.shape[1], round(float(t[0, 0]), 3))
            self.calls.append((*seen, options.get("context_only", False)))
            return forward(x, t, cache, start, **options)

        monkeypatch.setattr(student.net, "forward_cached", watched)


def test_a_chunk_is_denoised_then_remembered_and_the_last_one_is_not(
    student: WanStudent, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(student, monkeypatch)
    video(student, text, [1, 2], frames=4, denoising_steps=FOUR)
    times = (1000.0, 937.5, 833.333, 625.0)
    steps = [[(start, start + 2, t, False) for t in times] for start in (0, 2)]
    assert spy.calls == [*steps[0], (0, 2, 0.0, True), *steps[1]]
    spy.calls.clear()
    video(
        student,
        text,
        [1, 2],
        frames=4,
        denoising_steps=[1000],
        remember_last=True,
        context_noise=7.0,
    )
    assert spy.calls[-1] == (2, 4, 7.0, True)


def test_the_first_chunk_may_take_more_steps(
    student: WanStudent, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(student, monkeypatch)
    video(student, text, [1, 2], frames=4, denoising_steps=[1000], first_chunk_steps=FOUR)
    assert [call[:2] for call in spy.calls if not call[3]] == [(0, 2)] * 4 + [(2, 4)]


@pytest.mark.parametrize("case", ["A_small", "B_hd128"])
def test_the_rollout_is_the_released_one(shared: Path, case: str) -> None:
    folder = shared / "golden" / case
    sizes = json.loads((folder / "config.json").read_text())
    golden = load_file(folder / "rollout.safetensors")
    names = ("dim", "num_heads", "ffn_dim", "num_layers", "freq_dim", "text_dim", "text_len")
    config = WanConfig(**{name: sizes[name] for name in names}, chunk=sizes["chunk"])
    net = CausalWan(config).requires_grad_(False)
    net.load_state_dict(load_file(folder / "weights.safetensors"))
    student = WanStudent(net, height=sizes["H"], width=sizes["W"])
    drawn = iter(sorted(name for name in golden if name.startswith("renoise.")))
    first = golden["noise"].split(config.chunk, 1)

    def noise(chunk: int, step: int) -> Tensor:
        return golden[next(drawn)].view_as(first[0]) if step else first[chunk]

    options: dict[str, Any] = {
        "frames": golden["noise"].shape[1],
        "denoising_steps": sizes["steps"],
    }
    out = torch.cat(list(stream(student, golden["context"], noise, **options)), 1)
    error = (out - golden["latents"]).norm() / golden["latents"].norm()
    assert error < NETWORK_FORWARD


def test_the_layout_names_every_frame_once() -> None:
    assert chunk_layout(6, 3) == ((0, 3), (3, 3))
    assert chunk_layout(7, 3, first_alone=True) == ((0, 1), (1, 3), (4, 3))
    assert chunk_layout(3, 1, first_alone=True) == ((0, 1), (1, 1), (2, 1))
    with pytest.raises(ValueError, match="frames: got 7; needed: a multiple of the chunk 3"):
        chunk_layout(7, 3)
    with pytest.raises(ValueError, match="frames: got 6; needed: 1 \\+ a multiple of the chunk 3"):
        chunk_layout(6, 3, first_alone=True)


def test_noise_depends_on_seed_chunk_and_step_alone() -> None:
    layout = ((0, 1), (1, 2), (3, 2))
    together = counted_noise([3, 4, 5], layout, 2, (4, 2, 3))
    alone = counted_noise([4], layout, 2, (4, 2, 3))
    draws = [(chunk, step) for chunk in range(3) for step in range(2)]
    for chunk, step in reversed(draws):
        drawn = together(chunk, step)
        assert drawn.shape == (3, layout[chunk][1], 4, 2, 3)
        assert torch.equal(drawn[1:2], alone(chunk, step))
        assert torch.equal(drawn, together(chunk, step))
    first = {round(float(alone(*draw).flatten()[0]), 6) for draw in draws}
    assert len(first) == len(draws)


def test_noise_is_standard_normal_in_the_dtype_asked_for() -> None:
    draw = counted_noise([0], ((0, 8),), 1, (16, 32, 32), dtype=torch.bfloat16)(0, 0)
    assert draw.dtype == torch.bfloat16
    assert abs(draw.float().mean()) < 0.01
    assert abs(draw.float().std() - 1) < 0.01


def test_a_video_does_not_depend_on_its_batch(student: WanStudent, text: Tensor) -> None:
    together = video(student, text, [8, 9])
    torch.testing.assert_close(together[1:], video(student, text[1:], [9]), **SAME)


def test_a_longer_stream_begins_like_a_shorter_one(student: WanStudent, text: Tensor) -> None:
    long = video(student, text, [1, 2], frames=10)
    assert long.shape[1] == 10
    torch.testing.assert_close(long[:, :6], video(student, text, [1, 2]), **SAME)


def test_another_prompt_changes_the_chunks_from_its_own_on(
    student: WanStudent, text: Tensor
) -> None:
    plain = video(student, text, [1, 2])
    switched = video(student, text, [1, 2], switches={1: text.flip(0)})
    torch.testing.assert_close(switched[:, :2], plain[:, :2], rtol=0, atol=0)
    assert (switched[:, 2:4] - plain[:, 2:4]).abs().max() > 1e-3
    from_start = video(student, text, [1, 2], switches={0: text.flip(0)})
    torch.testing.assert_close(from_start, video(student, text.flip(0), [1, 2]), **SAME)


def test_a_prefix_is_remembered_clean_and_comes_out_again(
    student: WanStudent, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = video(student, text, [1, 2])
    spy = Spy(student, monkeypatch)
    continued = video(student, text, [1, 2], prefix_BFCHW=whole[:, :4], context_noise=5.0)
    assert spy.calls[:2] == [(0, 2, 0.0, True), (2, 4, 0.0, True)]
    assert torch.equal(continued[:, :4], whole[:, :4])
    torch.testing.assert_close(continued[:, 4:], whole[:, 4:], **SAME)


def test_an_image_is_a_chunk_of_its_own(
    student: WanStudent, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.randn(2, 1, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    spy = Spy(student, monkeypatch)
    out = video(
        student,
        text,
        [1, 2],
        frames=5,
        denoising_steps=[1000],
        prefix_BFCHW=image,
        first_chunk_steps=TWO,
    )
    ranges = [(call[:2], call[3]) for call in spy.calls]
    middle = [((1, 3), False), ((1, 3), False), ((1, 3), True)]
    assert ranges == [((0, 1), True), *middle, ((3, 5), False)]
    assert out.shape[1] == 5
    assert torch.equal(out[:, :1], image)


def test_whole_videos_need_a_seed_each(student: WanStudent) -> None:
    with pytest.raises(ValueError, match="seeds: got 1; needed: 2"):
        rollout(student, ["a", "b"], [1])
    with pytest.raises(ValueError, match=r"prompts: got .*; needed: at least one prompt"):
        rollout(student, [], [])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"frames": 7}, "frames: got 7; needed: a multiple of the chunk 2"),
        ({"denoising_steps": (750, 500)}, "steps: .* decreasing from 1000"),
        ({"denoising_steps": (1000, 333.3)}, "steps: got 333.3; needed: whole numbers"),
        ({"switches": {3: torch.zeros(2, 5, 12)}}, r"switches: got 3; needed: a chunk in \[0, 3\)"),
        ({"switches": {1: torch.zeros(1, 5, 12)}}, r"switches: got float32 \[1, 5, 12\]"),
        ({"prefix_BFCHW": torch.zeros(2, 3, 4, 4, 6)}, r"prefix: .* P one of \[2, 4\]"),
        ({"prefix_BFCHW": torch.zeros(2, 6, 4, 4, 6)}, r"prefix: .* P one of \[2, 4\]"),
        ({"prefix_BFCHW": torch.zeros(1, 2, 4, 4, 6)}, r"prefix: got .* \[2, P, 4, 4, 6\]"),
        ({"prefix_BFCHW": torch.zeros(2, 2, 4, 4, 6).half()}, r"prefix: got float16 .*float32 \["),
    ],
)
def test_a_mistake_is_told_before_the_first_chunk(
    student: WanStudent, text: Tensor, options: dict[str, Any], told: str
) -> None:
    noise = noise_of(student, [1, 2])
    with pytest.raises(ValueError, match=told):
        stream(student, text, noise, **{"denoising_steps": TWO, **options})


def test_a_cache_of_another_batch_is_told_before_the_first_chunk(
    student: WanStudent, text: Tensor
) -> None:
    cache = student.new_cache(text[:1], 6)
    with pytest.raises(ValueError, match=r"cache: got .*; needed: one of 2 streams"):
        stream(student, text, noise_of(student, [1, 2]), denoising_steps=TWO, cache=cache)


def test_noise_of_another_layout_is_refused(text: Tensor) -> None:
    student = make_student(independent_first_frame=True)
    whole = seeded_noise([1, 2], (2, *student.frame_shape))
    with pytest.raises(ValueError, match=r"noise: got .*; needed: 1 frames for chunk 0"):
        next(stream(student, text, whole, frames=5, denoising_steps=TWO))


def test_graphs_are_refused_where_there_is_no_cuda_device(student: WanStudent) -> None:
    with pytest.raises(ValueError, match="cuda_graphs: got 'cpu'; needed: a network on a CUDA"):
        student.use_graphs()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
def test_replayed_passes_are_the_launched_ones(text: Tensor, window: int | None) -> None:
    student = make_student(window=window, sink=1 if window else 0).to("cuda")
    layout = stream_layout(student, 12)
    noise = counted_noise([1, 2], layout, 2, student.frame_shape, device="cuda")
    options: dict[str, Any] = {"frames": 12, "denoising_steps": TWO}
    text = text.to("cuda")
    launched = torch.cat(list(stream(student, text, noise, **options)), 1)
    student.use_graphs()
    cache = student.new_cache(text, 12)
    for _ in range(2):
        replayed = torch.cat(list(stream(student, text, noise, cache=cache, **options)), 1)
        torch.testing.assert_close(replayed, launched, **SAME)


@pytest.mark.gpu
def test_nothing_in_the_loop_waits_for_the_device(text: Tensor) -> None:
    student = make_student(window=4, sink=1).to("cuda")
    layout = stream_layout(student, 12)
    noise = counted_noise([1, 2], layout, 2, student.frame_shape, device="cuda")
    chunks = stream(student, text.to("cuda"), noise, frames=12, denoising_steps=TWO)
    next(chunks)  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(chunks)) == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Watch(TorchDispatchMode):
    """Ops that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_back_in_the_loop(text: Tensor) -> None:
    student = make_student(window=4, sink=1)
    chunks = stream(student, text, noise_of(student, [1, 2], 12), frames=12, denoising_steps=TWO)
    next(chunks)
    with Watch() as watch:
        assert len(list(chunks)) == 5
    assert watch.waits == []


def test_a_rollout_with_gradients_is_the_stream_up_to_its_noised_context(
    student: WanStudent, text: Tensor
) -> None:
    noise = counted_noise([1, 2], stream_layout(student, 6), 5, student.frame_shape)
    made = self_forcing_rollout(student, text, noise, [1, 1, 1], denoising_steps=FOUR)
    assert (made.t_from, made.t_to) == (750, 500)
    assert made.x0_BFCHW.shape == (2, 6, *student.frame_shape)
    # The first chunk has no context, so it is the first chunk of a stream of these two steps.
    first = next(stream(student, text, noise, frames=6, denoising_steps=(1000, 750)))
    torch.testing.assert_close(made.x0_BFCHW[:, :2], first, **SAME)
    later = self_forcing_rollout(
        student, text, noise, [3, 0, 0], denoising_steps=[1000], first_chunk_steps=FOUR
    )
    assert (later.t_from, later.t_to) == (1000, 0)
    alone = self_forcing_rollout(
        student, text, noise, [2], denoising_steps=[1000], first_chunk_steps=FOUR
    )
    assert (alone.t_from, alone.t_to) == (500, 250)


@pytest.mark.parametrize("name", ["sf_train_grad_reference", "sf_train_grad_detached"])
def test_gradients_of_a_rollout_are_the_released_ones(shared: Path, name: str) -> None:
    folder = shared / "golden" / "A_small"
    if not (folder / f"{name}.safetensors").is_file():
        pytest.skip(f"no {name}")
    sizes = json.loads((folder / "config.json").read_text())
    golden = load_file(folder / f"{name}.safetensors")
    names = ("dim", "num_heads", "ffn_dim", "num_layers", "freq_dim", "text_dim", "text_len")
    net = CausalWan(WanConfig(**{name: sizes[name] for name in names}, chunk=sizes["chunk"]))
    net.load_state_dict(load_file(folder / "weights.safetensors"))
    student = WanStudent(net, height=sizes["H"], width=sizes["W"])
    chunks = golden["noise"].split(sizes["chunk"], 1)
    drawn = iter(sorted(name for name in golden if name.startswith("renoise.")))

    def noise(chunk: int, step: int) -> Tensor:
        return golden[next(drawn)].view_as(chunks[0]) if step else chunks[chunk]

    leave = int(golden["exit_index"])
    made = self_forcing_rollout(
        student,
        golden["context"],
        noise,
        [leave] * len(chunks),
        denoising_steps=sizes["steps"],
        leak=name.endswith("reference"),
    )
    assert (made.t_from, made.t_to) == (float(golden["t_from"]), float(golden["t_to"]))
    error = (made.x0_BFCHW - golden["latents"]).norm() / golden["latents"].norm()
    assert error < NETWORK_FORWARD
    (made.x0_BFCHW * golden["R"]).mean().backward()
    floor = 1e-4 * max(float(v) for k, v in golden.items() if k.startswith("gradnorm."))
    for key, parameter in net.named_parameters():
        if f"gradnorm.{key}" in golden:
            norm = float(golden[f"gradnorm.{key}"])
            mine = 0.0 if parameter.grad is None else float(parameter.grad.norm())
            assert abs(mine - norm) <= NETWORK_GRADIENT * max(norm, floor), key


def test_exits_are_one_draw_for_all_but_a_first_chunk_with_its_own_list() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_exits(5, FOUR, generator) for _ in range(40)]
    assert all(len(exits) == 5 and len(set(exits)) == 1 for exits in drawn)
    assert {exits[0] for exits in drawn} == {0, 1, 2, 3}
    drawn = [draw_exits(5, [1000], generator, first_chunk_steps=FOUR) for _ in range(40)]
    assert {exits[0] for exits in drawn} == {0, 1, 2, 3}
    assert all(exits[1:] == [0] * 4 for exits in drawn)
    each = [draw_exits(5, FOUR, generator, same=False) for _ in range(20)]
    assert any(len(set(exits)) > 1 for exits in each)


def test_the_loop_runs_without_knowing_a_single_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have shapes and no numbers: whatever reads one back raises."""
    known = [(level.t, level.sigma) for level in make_student().levels(TWO)]
    with FakeTensorMode():
        student = make_student(window=4, sink=1)
        # The table of noise levels is host data, read before the loop.
        levels = [Level.at(t, sigma, student.device) for t, sigma in known]
        monkeypatch.setattr(student, "levels", lambda steps: levels)
        text = torch.randn(2, 5, 12)
        chunks = stream(
            student,
            text,
            lambda chunk, step: torch.randn(2, 2, *student.frame_shape),
            frames=12,
            denoising_steps=TWO,
            switches={2: text},
        )
        assert [tuple(chunk.shape) for chunk in chunks] == [(2, 2, 4, 4, 6)] * 6
