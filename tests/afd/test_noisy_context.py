"""afd.context=noisy and timesteps=list: what a chunk attends to, and which levels are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from afd.config.run import make_config
from afd.errors import ConfigError
from afd.methods.afd import Afd
from afd.methods.config import AfdConfig, DmdConfig, SftConfig
from afd.methods.copies import draw_copies
from afd.planning import cost_model as cost
from afd.planning.plan import make_plan
from tests.afd.tiny_methods import (
    gradients,
    make_afd,
    step,
    toy_batch,
    toy_student,
    wan_batch,
    wan_student,
)

STUDENTS: dict[str, Any] = {"toy": (toy_student, toy_batch), "wan": (wan_student, wan_batch)}
LISTED = {"timesteps": "list", "timestep_list": [1.0, 0.75, 0.5, 0.25]}


def velocity(method: Afd, x0: Tensor, x_t: Tensor, copies: Any) -> Tensor:
    rollouts = method._current()
    with torch.no_grad():
        shared = method._shared_context(rollouts, copies)
        return method._velocity("theta", x0, x_t, rollouts, copies, shared)


@pytest.mark.parametrize("kind", list(STUDENTS))
def test_a_chunk_attends_to_earlier_noisy_chunks_only(kind: str) -> None:
    student, batch = STUDENTS[kind]
    method = make_afd(student(), context="noisy", timestep_per="video")
    method.rollout(batch())
    rollouts = method._current()
    x0 = rollouts.x0_BFCHW
    copies = draw_copies(
        AfdConfig(draws=1, timestep_per="video"), len(x0), 4, [0.5], Generator().manual_seed(0)
    )
    x_t = copies.noise(x0)
    before = velocity(method, x0, x_t, copies)
    # The clean video is never seen: another one changes nothing.
    assert torch.equal(velocity(method, torch.zeros_like(x0), x_t, copies), before)
    moved = x_t.clone()
    moved[:, 3:6] += 1  # the second of four chunks
    after = velocity(method, x0, moved, copies)
    apart = (after - before).abs().unflatten(1, (4, 3)).amax((0, 2, 3, 4, 5))
    assert apart[0] == 0
    assert float(apart[1:].min()) > 0
    # Under a clean context the second chunk's noise stays within the second chunk.
    clean = make_afd(student(), context="shared_context", timestep_per="video")
    clean.rollout(batch())
    old, new = (velocity(clean, x0, x, copies) for x in (x_t, moved))
    apart = (new - old).abs().unflatten(1, (4, 3)).amax((0, 2, 3, 4, 5))
    assert [float(a) > 0 for a in apart] == [False, True, False, False]


@pytest.mark.parametrize("kind", list(STUDENTS))
def test_a_noisy_context_trains_and_makes_no_clean_pass(kind: str) -> None:
    student, batch = STUDENTS[kind]
    method = make_afd(student(), context="noisy", **LISTED)
    made: list[int] = []
    kept = method.policies.student.clean_context

    def counted(*args: Any, **how: Any) -> Any:
        made.append(1)
        return kept(*args, **how)

    method.policies.student.clean_context = counted  # type: ignore[method-assign]
    metrics = step(method, batch())
    assert made == []
    assert metrics["student/grad_norm"] > 0
    assert all(bool(torch.isfinite(g).all()) for g in gradients(method))
    method.rollout(batch(1))
    assert method._current().contexts == []


def test_listed_levels_are_drawn_alike_per_video_and_per_chunk() -> None:
    for each, columns in (("video", 1), ("chunk", 7)):
        config = AfdConfig(draws=100, timestep_per=each, **LISTED)
        # The student's own levels, and those of its first chunk, are not used.
        copies = draw_copies(
            config, 8, 7, [0.9], Generator().manual_seed(0), first_times=[1.0, 0.1]
        )
        assert copies.t_NK.shape == (800, columns)
        counts = {t: float((copies.t_NK == t).float().mean()) for t in LISTED["timestep_list"]}
        assert counts == pytest.approx(dict.fromkeys(counts, 0.25), abs=0.05)
        assert sum(counts.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        (
            "afd.timesteps=list",
            "'afd.timesteps=list': afd.timesteps: got list with timestep_list=None; needed",
        ),
        ("afd.timestep_list=[0.5]", "afd.timesteps: got student with timestep_list=[0.5]; needed"),
        ("sft.timestep_list=[0.5]", "sft.timesteps: got shifted with timestep_list=[0.5]; needed"),
        ("dmd.timesteps=list", "dmd.timesteps is 'list'"),
    ],
)
def test_a_list_and_its_law_belong_together(override: str, needed: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_config({}, [override])
    assert needed in str(refused.value)
    for level in (0, 1.5, "nan"):
        with pytest.raises(ConfigError, match=r"timestep_list"):
            make_config({}, ["afd.timesteps=list", f"afd.timestep_list=[{level}]"])
    SftConfig(timesteps="list", timestep_list=[0.5])
    assert "list" not in str(DmdConfig.model_fields["timesteps"].annotation)


def test_chunks_of_a_noisy_pass_cannot_be_drawn() -> None:
    with pytest.raises(ConfigError, match=r"afd\.chunks_per_update: got 2; needed: null with"):
        make_config({}, ["afd.context=noisy", "afd.chunks_per_update=2"])


def test_the_plan_of_a_noisy_context_has_no_clean_pass() -> None:
    data: dict[str, Any] = {
        "video": {"frames": 81, "height": 480, "width": 832, "fps": 16},
        "student": {"kind": "wan"},
        "discriminator": {"kind": "videoalign", "micro_batch": 1},
        "evaluation": {"kind": "none"},
    }
    plans = {c: make_plan(make_config(data, [f"afd.context={c}"])) for c in ("noisy", "recompute")}
    assert not {"context", "kept contexts"} & {part.name for part in plans["noisy"].memory}
    activations = {
        name: next(part.bytes for part in plan.memory if part.name == "activations")
        for name, plan in plans.items()
    }
    assert activations["recompute"] == 2 * activations["noisy"]
    net = plans["noisy"].net
    kept = cost.nft_flop(net, "shared_context", kept=True)
    noisy = cost.nft_flop(net, "noisy")
    # Dearer than a kept clean context only by the gradients of earlier keys and values.
    extra = cost.noisy_backward(net, through_context=True) - cost.noisy_backward(net)
    assert noisy - kept == pytest.approx(extra)
    assert noisy < cost.nft_flop(net, "own_context")
