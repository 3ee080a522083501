"""Rollouts made an update ahead: of which policy, beside which training, and exactly resumed."""

from __future__ import annotations

import io
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from afd.config.run import load_config, make_config
from afd.errors import ConfigError
from afd.methods.afd import Afd
from afd.methods.base import Batch
from afd.methods.rollouts import Rollouts
from afd.models.config import LoraConfig
from afd.models.student import Student
from afd.planning.plan import make_plan, show
from afd.trainer.loop import Outcome, train
from tests.afd import test_kill
from tests.afd.commands import assert_same_run
from tests.afd.test_kill import small_run
from tests.afd.test_resume import assert_same, numbers
from tests.afd.tiny import make_clips
from tests.afd.tiny_methods import (
    make_afd,
    toy_batch,
    toy_student,
    wan_batch,
    wan_student,
    weights,
)
from tests.fake_cuda import fake_cuda

UPDATES = 5


def delayed(student: Student, **settings: Any) -> Afd:
    return make_afd(student, **{"async": 1, "learning_rate": 1e-3, **settings})


def update(method: Afd, batch: Batch, following: Batch | None) -> Rollouts:
    """One update in the trainer's order; returns its rollouts."""
    method.rollout(batch)
    rollouts = method._current()
    method.roll_ahead(following)
    method.discriminator_step(batch)
    method.student_step(batch)
    return rollouts


def again(method: Afd, batch: Batch, policy: dict[str, Tensor], seed: int) -> Rollouts:
    """Rollouts of a policy by hand."""
    student = toy_student()
    student.load_state_dict(policy)
    return method._roll(batch, student, torch.Generator().manual_seed(seed))


def test_an_update_trains_on_rollouts_of_the_policy_before_the_update_before() -> None:
    method = delayed(toy_student(), old_decay=0.0)
    policies = [weights(method, "old")]
    for number in range(3):
        made = update(method, toy_batch(number), toy_batch(number + 1))
        policies.append(weights(method, "old"))
        if number == 0:
            seed = method.ahead.seed if method.ahead else None
            continue
        assert seed is not None
        expected = again(method, toy_batch(number), policies[number - 1], seed)
        assert torch.equal(made.x0_BFCHW, expected.x0_BFCHW)
        newer = again(method, toy_batch(number), policies[number], seed)
        assert not torch.equal(made.x0_BFCHW, newer.x0_BFCHW)
        seed = method.ahead.seed if method.ahead else None
    method.close()


def test_rollouts_are_made_while_the_update_trains() -> None:
    """The update's training waits for the thread here, which it would not with one at a time."""
    method, begun = delayed(toy_student()), threading.Event()
    roll = method._roll

    def noted(*given: Any) -> Rollouts:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
        return roll(*given)

    assert method.ahead is not None
    method.ahead._roll = noted
    step = method.discriminator.step  # type: ignore[union-attr]

    def waiting(*given: Any, **more: Any) -> Any:
        assert begun.wait(60)
        return step(*given, **more)

    method.discriminator.step = waiting  # type: ignore[union-attr, method-assign]
    update(method, toy_batch(0), toy_batch(1))
    method.close()


@pytest.mark.parametrize("kind", ["toy", "lora"])
def test_a_state_restored_makes_the_same_rollouts_again(kind: str) -> None:
    make = toy_batch if kind == "toy" else wan_batch
    lora = None if kind == "toy" else LoraConfig(rank=2, alpha=4)

    def build() -> Afd:
        return delayed(toy_student() if kind == "toy" else wan_student(), lora=lora)

    straight = build()
    for number in range(2):
        update(straight, make(number), make(number + 1))
    state = straight.state_dict()
    state = {key: _copied(value) for key, value in state.items()}
    expected = update(straight, make(2), None).x0_BFCHW
    restored = build()
    # One that had begun others.
    update(restored, make(7), make(8))
    restored.load_state_dict(state)
    assert torch.equal(update(restored, make(2), None).x0_BFCHW, expected)
    for name in ("theta", "old", "behind"):
        assert_same(straight.policies.weights(name).state_dict(),
                    restored.policies.weights(name).state_dict(), name)  # fmt: skip
    for method in (straight, restored):
        method.close()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [*map(_copied, value)] if isinstance(value, list) else value


def test_the_network_that_rolls_out_shares_the_frozen_weights() -> None:
    method = delayed(wan_student(), lora=LoraConfig(rank=2, alpha=4))
    frozen = {x.data_ptr() for x in method.policies.student.net.parameters()}
    with method.policies.using("behind") as behind:
        assert behind is not method.policies.student
        own = [n for n, x in behind.net.named_parameters() if x.data_ptr() not in frozen]
    assert own
    assert all(".lora_" in name and "behind" in name for name in own)
    method.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")
def test_it_runs_on_a_gpu() -> None:
    with fake_cuda():
        method = delayed(wan_student().to("cuda"), lora=LoraConfig(rank=2, alpha=4))
        for number in range(2):
            made = update(method, wan_batch(number), wan_batch(number + 1))
        assert made.x0_BFCHW.device.type == "cuda"
        method.close()


def test_an_error_of_the_thread_stops_the_next_update() -> None:
    method = delayed(toy_student())
    assert method.ahead is not None
    roll = method._roll

    def breaks(batch: Batch, *given: Any) -> Rollouts:
        if batch.update == 1:
            raise RuntimeError("out of order")
        return roll(batch, *given)

    method.ahead._roll = breaks
    update(method, toy_batch(0), toy_batch(1))
    with pytest.raises(RuntimeError, match="out of order"):
        method.rollout(toy_batch(1))
    method.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("afd rollout")]


def test_closing_stops_the_thread_between_two_videos() -> None:
    """A run that is stopped, or interrupted twice, does not wait for the rollouts to be whole."""
    method = delayed(toy_student(), samples_per_prompt=40, how={"rollout_batch": 1})
    begun, parts = threading.Event(), 0
    assert method.ahead is not None
    check = method.ahead.check

    def counted() -> None:
        nonlocal parts
        parts += 1
        begun.set()
        check()

    method.ahead.check = counted  # type: ignore[method-assign]
    method.roll_ahead(toy_batch(0))
    assert begun.wait(60)
    method.close()
    assert 1 <= parts < 80
    assert not [t for t in threading.enumerate() if t.name.startswith("afd rollout")]


def run(folder: Path, out: str, updates: int = UPDATES) -> dict[str, Any]:
    data = small_run(folder / out, folder)
    data["afd"] |= {"async": 1}
    data |= {"updates": updates, "evaluation": {"kind": "none"}}
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("async")
    make_clips(folder / "clips", frames=12)
    toy_student().save(folder / "student.safetensors")
    assert train(make_config(run(folder, "straight"))) is Outcome.FINISHED
    return folder


def assert_same_runs(one: Path, other: Path) -> None:
    assert_same_run(one, other)
    assert len(numbers(one)) == UPDATES


@pytest.mark.timeout(300)
def test_a_run_killed_at_any_moment_is_the_run_never_killed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_kill, "UPDATES", UPDATES)
    data, dice = run(folder, "killed"), random.Random(0)
    for number in range(3):
        test_kill.kill(data, dice.uniform(0, 0.2), while_writing=number != 1)
    process = test_kill.begin(data)
    process.join(test_kill.PATIENCE_S)
    assert process.exitcode == 0
    assert_same_runs(folder / "killed", folder / "straight")


def test_a_run_that_is_lengthened_is_the_longer_run(folder: Path) -> None:
    """The policy of the next rollouts is kept at the end, too."""
    assert train(make_config(run(folder, "longer", 3))) is Outcome.FINISHED
    assert train(make_config(run(folder, "longer"))) is Outcome.FINISHED
    assert_same_runs(folder / "longer", folder / "straight")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["parallel=fsdp"], "afd.async: got 1 with parallel.weights=fsdp"),
        (["parallel.sequence=2"], "and parallel.sequence=2; needed: 0, or ddp and 1"),
        (["teacher.robust.trim=0.1"], "afd.async: got 1 with teacher.robust"),
        (["afd.async=2"], "afd.async"),
        (["afd.async=true"], "needed: a number"),
    ],
)
def test_what_it_does_not_go_with_is_refused(more: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config("quickstart", ["afd.async=1", *more])


def test_the_dry_run_shows_what_it_saves_and_holds() -> None:
    name = "afd_self_forcing_480x832"
    plan, off = (make_plan(load_config(name, [f"afd.async={value}"])) for value in (1, 0))
    assert off.overlapped() is None
    both = plan.overlapped()
    assert both is not None
    assert sum(both) == pytest.approx(plan.update_seconds)
    assert plan.update_seconds == off.update_seconds
    assert max(plan.peaks().values()) > max(off.peaks().values())
    screen = io.StringIO()
    show(plan, Console(file=screen, width=240))
    assert f"update takes {max(both):.1f} s on 1 GPU if neither slows" in screen.getvalue()
