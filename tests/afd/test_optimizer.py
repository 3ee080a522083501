"""The student's optimizer: its rates, its sums, its refusals, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from afd.distributed import ALONE
from afd.errors import TrainingError
from afd.lab.student import ToyStudent
from afd.methods.config import StudentOptimizerConfig
from afd.methods.optimizer import StudentOptimizer, cosine_rate
from afd.models.config import LoraConfig
from afd.models.policies import Policies, make_policies
from afd.models.student import Student
from afd.models.wan.network import CausalWan
from afd.models.wan.student import WanStudent
from afd.trainer import shards
from tests.afd.tiny_wan import HEIGHT, WIDTH, text, tiny, video

LORA = LoraConfig(rank=4, alpha=4)
KINDS = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
CONFIG = StudentOptimizerConfig(learning_rate=1e-3, cosine_updates=10)


def student(dtype: torch.dtype = torch.float32) -> WanStudent:
    return WanStudent(tiny().to(dtype), height=HEIGHT, width=WIDTH, frames=6)


def loss_of(student: Student, seed: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or student.dtype
    x_BFCHW, text_BLE = video(student.net, 6, seed=seed), text(student.net)
    out: Tensor = student.net(x_BFCHW.to(dtype), torch.tensor([[700.0]]), text_BLE.to(dtype))
    return out.float().square().mean()


def prepared(
    dtype: torch.dtype = torch.float32,
    lora: LoraConfig | None = None,
    config: StudentOptimizerConfig = CONFIG,
) -> tuple[Policies, StudentOptimizer]:
    policies = make_policies(student(dtype), ("theta", "old"), lora=lora)
    return policies, StudentOptimizer(policies.weights("theta"), config)


def test_the_rate_rises_in_a_line_then_falls_as_a_cosine_to_five_percent() -> None:
    config = CONFIG.model_copy(update={"warmup_updates": 4, "learning_rate": 1.0})
    optimizer = prepared(config=config)[1]
    rates = []
    for optimizer.updates in range(20):
        rates.append(optimizer.rate())
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:15] == [cosine_rate(step, 10) for step in range(11)]
    assert rates[14:] == pytest.approx([0.05] * 6)
    optimizer = prepared(config=config.model_copy(update={"cosine_updates": None}))[1]
    optimizer.updates = 1000
    assert optimizer.rate() == 1.0


def test_the_toy_learns_as_with_plain_adamw() -> None:
    """In fp32 the masters are the parameters, so nothing may differ by a bit."""
    plain = ToyStudent.load()
    parameters = list(plain.parameters())
    adam = torch.optim.AdamW(parameters, lr=1e-3, betas=CONFIG.betas, weight_decay=1e-4)
    policies = make_policies(ToyStudent.load(), ("theta",))
    optimizer = StudentOptimizer(policies.weights("theta"), CONFIG)
    draw = torch.Generator().manual_seed(0)
    x_BFCHW = torch.randn(2, 12, 3, 16, 16, generator=draw)
    for step in range(3):
        losses = []
        for one in (plain, policies.student):
            text_BLE = one.encode(["a ball falls", "a red ball rolls"])
            losses.append(one.net(x_BFCHW, torch.tensor([[500.0]]), text_BLE).square().mean())
        adam.param_groups[0]["lr"] = 1e-3 * cosine_rate(step, 10)
        adam.zero_grad()
        losses[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CONFIG.grad_clip)
        adam.step()
        metrics = optimizer.step(losses[1])
        assert metrics["student/grad_norm"] == float(norm)
        assert metrics["student/loss"] == losses[0].item()
    for mine, theirs in zip(policies.student.parameters(), parameters, strict=True):
        assert torch.equal(mine, theirs)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_parts_of_an_update_add_up(lora: LoraConfig | None, dtype: torch.dtype) -> None:
    policies, optimizer = prepared(dtype, lora)
    parts = [loss_of(policies.student, seed) / 3 for seed in range(3)]
    expected = [torch.zeros_like(master) for master in optimizer.weights.masters]
    asked = [p for p in policies.student.parameters() if p.requires_grad]
    for part in parts:
        gradients = torch.autograd.grad(part, asked, retain_graph=True)
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient.float()
    norm = torch.stack([total.norm() for total in expected]).norm()
    loss_of(policies.student, 9).backward()  # what lay there before the update is none of its own
    for part in parts:
        optimizer.add(part)
    for master, total in zip(optimizer.weights.masters, expected, strict=True):
        assert master.grad is not None
        assert torch.equal(master.grad, total)
    metrics = optimizer.step()
    assert metrics["student/loss"] == (parts[0] + parts[1] + parts[2]).item()
    assert metrics["student/grad_norm"] == pytest.approx(float(norm), rel=1e-6)


@KINDS
def test_small_steps_are_not_lost_in_bf16(lora: LoraConfig | None) -> None:
    """At this rate a single step changes hardly any bf16 weight; fifty of them do."""
    config = CONFIG.model_copy(update={"learning_rate": 1e-5, "cosine_updates": None})
    policies, optimizer = prepared(torch.bfloat16, lora, config)
    weights = optimizer.weights
    start = {name: value.clone() for name, value in weights.state_dict().items()}
    asked = [p for p in policies.student.parameters() if p.requires_grad]
    rounded = [parameter.detach().clone() for parameter in asked]
    for _ in range(50):
        optimizer.step(loss_of(policies.student))
    moved = weights.state_dict()
    large = [name for name, value in start.items() if float(value.abs().max()) > 0]
    assert all(not torch.equal(moved[name], start[name]) for name in large)
    for before, parameter, master in zip(rounded, asked, weights.masters, strict=True):
        assert torch.equal(parameter, master.bfloat16())
        assert bool((before != parameter).any())


def test_a_gradient_that_is_not_finite_stops_the_update_and_names_a_weight() -> None:
    policies, optimizer = prepared(torch.bfloat16, LORA)
    optimizer.step(loss_of(policies.student))
    before = [master.detach().clone() for master in optimizer.weights.masters]
    kept = optimizer.state_dict()["adam"]["state"][0]["exp_avg"].clone()
    with pytest.raises(TrainingError, match=r"update 2: the gradient of blocks\.0\..*not finite"):
        optimizer.step(loss_of(policies.student) * float("nan"))
    for master, value in zip(optimizer.weights.masters, before, strict=True):
        assert torch.equal(master, value)
    assert torch.equal(optimizer.state_dict()["adam"]["state"][0]["exp_avg"], kept)
    assert optimizer.updates == 1
    optimizer.step(loss_of(policies.student))
    assert optimizer.updates == 2


def test_an_update_of_a_process_without_videos_is_one_of_zero_gradient() -> None:
    policies, optimizer = prepared()
    loss_of(policies.student).backward()
    metrics = optimizer.step()
    assert metrics["student/grad_norm"] == metrics["student/loss"] == 0


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_optimizer_that_comes_back_goes_on_bit_for_bit(
    lora: LoraConfig | None, dtype: torch.dtype, tmp_path: object
) -> None:
    policies, optimizer = prepared(dtype, lora)
    for seed in range(2):
        optimizer.step(loss_of(policies.student, seed))
    file = f"{tmp_path}/state.pt"
    torch.save((policies.state_dict(), optimizer.state_dict()), file)
    others, another = prepared(dtype, lora)
    held = torch.load(file, weights_only=True)
    others.load_state_dict(held[0])
    another.load_state_dict(held[1])
    first = optimizer.step(loss_of(policies.student, 2))
    assert another.step(loss_of(others.student, 2)) == first
    for mine, theirs in zip(optimizer.weights.masters, another.weights.masters, strict=True):
        assert torch.equal(mine, theirs)


# --- sharded weights: what needs no second process (tests/afd/test_distributed.py has them) ---


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@KINDS
def test_sharded_weights_are_their_own_masters_and_save_as_whole_ones(
    lora: LoraConfig | None, tmp_path: Path
) -> None:
    mesh = init_device_mesh("cpu", (1,))
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def shard(net: CausalWan) -> None:
        fully_shard(net, mesh=mesh, mp_policy=mixed)

    names = ("theta", "old", "ref")
    sharded = make_policies(student(), names, lora=lora, shard=shard)
    optimizer = StudentOptimizer(sharded.weights("theta"), CONFIG)
    assert all(isinstance(master, DTensor) for master in optimizer.weights.masters)
    for _ in range(2):
        optimizer.step(loss_of(sharded.student, dtype=torch.bfloat16))
    sharded.average("old", "theta", 0.5)
    # The state of a sharded run goes into one that is not, and back.
    (tmp_path / "state").mkdir()
    shards.write(
        tmp_path / "state",
        {"policies": sharded.state_dict(), "adam": optimizer.state_dict()},
        ALONE,
    )
    held = shards.read(tmp_path / "state", ALONE)
    whole = make_policies(student(), names, lora=lora)
    plain = StudentOptimizer(whole.weights("theta"), CONFIG)
    whole.load_state_dict(held["policies"])
    plain.load_state_dict(held["adam"])
    again = make_policies(student(), names, lora=lora, shard=shard)
    back = StudentOptimizer(again.weights("theta"), CONFIG)
    again.load_state_dict(whole.state_dict())
    back.load_state_dict(plain.state_dict())
    metrics = optimizer.step(loss_of(sharded.student, dtype=torch.bfloat16))
    assert back.step(loss_of(again.student, dtype=torch.bfloat16)) == metrics
    for name in sharded.names:
        for key, value in sharded.weights(name).state_dict().items():
            assert torch.equal(value, again.weights(name).state_dict()[key])
    with pytest.raises(ValueError, match="state"):
        again.weights("old").load_state_dict({})
