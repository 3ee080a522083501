"""Versions of a student's weights: switching, masters, averages, what a checkpoint keeps."""

from __future__ import annotations

import itertools
import timeit

import pytest
import torch
from torch import Tensor

from afd.errors import ConfigError
from afd.lab.student import ToyStudent
from afd.models.config import LoraConfig
from afd.models.policies import Policies, make_policies
from afd.models.student import Student
from afd.models.wan.graphs import FixedPasses, GraphedPasses
from afd.models.wan.student import WanStudent
from tests.afd.tiny_wan import HEIGHT, WIDTH, text, tiny, video
from tests.conftest import DEVICES
from tests.tolerances import NETWORK_REORDERED

LORA = LoraConfig(rank=4, alpha=8)
KINDS = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NAMES = ("theta", "old", "ref")


def student(dtype: torch.dtype = torch.float32) -> WanStudent:
    return WanStudent(tiny().to(dtype), height=HEIGHT, width=WIDTH, frames=6)


def forward(student: Student, seed: int = 1) -> Tensor:
    net = student.net
    x_BFCHW, text_BLE = video(net, 6, seed=seed), text(net)
    t_B1 = torch.tensor([[700.0], [250.0]])
    out: Tensor = net(x_BFCHW.to(student.dtype), t_B1, text_BLE.to(student.dtype))
    return out


def outputs(policies: Policies) -> dict[str, Tensor]:
    result = {}
    for name in NAMES:
        with policies.using(name) as version, torch.no_grad():
            result[name] = forward(version)
    return result


def change(policies: Policies, name: str, seed: int = 0) -> None:
    """A step that no two versions share."""
    draw = torch.Generator().manual_seed(seed)
    weights = policies.weights(name)
    with torch.no_grad():
        for master in weights.masters:
            step = torch.randn(master.shape, generator=draw).to(master.device)
            master.add_(step, alpha=0.05)
    weights.publish()


@KINDS
@DTYPES
def test_versions_start_equal_and_change_alone(lora: LoraConfig | None, dtype: torch.dtype) -> None:
    policies = make_policies(student(dtype), NAMES, lora=lora)
    assert policies.names == ("theta", "old")
    before = outputs(policies)
    assert torch.equal(before["theta"], before["ref"])
    assert torch.equal(before["old"], before["ref"])
    change(policies, "theta")
    after = outputs(policies)
    assert not torch.equal(after["theta"], before["theta"])
    assert torch.equal(after["old"], before["old"])
    assert torch.equal(after["ref"], before["ref"])
    change(policies, "old", seed=1)
    assert not torch.equal(outputs(policies)["old"], before["old"])
    assert torch.equal(outputs(policies)["ref"], before["ref"])


@KINDS
def test_gradients_reach_trained_versions_and_nothing_else(lora: LoraConfig | None) -> None:
    names = ("theta", "ema", "real", "ref")
    trained = ("theta", "real")
    policies = make_policies(student(), names, trained=trained, lora=lora)
    for name in ("ema", "ref"):
        with policies.using(name) as version:
            assert not forward(version).requires_grad
    with policies.using("real") as version:
        forward(version).square().mean().backward()
    # At its start B is 0, which leaves A without a gradient, but it is asked for.
    assert all(master.grad is not None for master in policies.weights("real").masters)
    assert all(master.grad is None for master in policies.weights("theta").masters)
    asking = sum(parameter.requires_grad for parameter in policies.student.parameters())
    assert asking == len(policies.weights("theta").masters) * (2 if lora else 1)


def test_adapters_sit_on_every_linear_layer_of_the_blocks_and_on_nothing_else() -> None:
    net = student().net
    policies = make_policies(WanStudent(net, height=HEIGHT, width=WIDTH), ("theta",), lora=LORA)
    adapted = {name.rpartition(".lora_")[0] for name in policies.weights("theta").names}
    parts = [f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo"] + ["ffn.0", "ffn.2"]
    assert adapted == {f"blocks.{i}.{part}" for i in range(2) for part in parts}


@KINDS
def test_masters_are_the_parameters_in_fp32_and_rounded_to_them_in_bf16(
    lora: LoraConfig | None,
) -> None:
    policies = make_policies(student(), NAMES, lora=lora)
    here = {id(parameter) for parameter in policies.student.parameters()}
    assert all(id(master) in here for master in policies.weights("theta").masters)
    policies = make_policies(student(torch.bfloat16), NAMES, lora=lora)
    weights = policies.weights("theta")
    assert {master.dtype for master in weights.masters} == {torch.float32}
    change(policies, "theta")
    start = outputs(policies)["theta"]
    # Steps that bf16 would lose add up in the masters.
    first = [master.clone() for master in weights.masters]
    for _ in range(64):
        with torch.no_grad():
            for master in weights.masters:
                master.mul_(1 + 2.0**-12)
        weights.publish()
    assert not torch.equal(outputs(policies)["theta"], start)
    assert all(
        bool((m.abs() >= f.abs()).all()) for m, f in zip(weights.masters, first, strict=True)
    )


@KINDS
@DTYPES
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
def test_gradients_of_several_passes_add_up_in_fp32(
    lora: LoraConfig | None, dtype: torch.dtype, checkpoint: bool
) -> None:
    """Against autograd's own gradients of each pass, added by hand."""
    policies = make_policies(student(dtype), ("theta", "old"), lora=lora)
    change(policies, "theta")
    net, weights = policies.student.net, policies.weights("theta")
    parameters = [p for p in net.parameters() if p.requires_grad]
    expected = [torch.zeros_like(master) for master in weights.masters]
    for seed in range(3):
        loss = forward(policies.student, seed).float().square().mean()
        for total, gradient in zip(expected, torch.autograd.grad(loss, parameters), strict=True):
            assert gradient.dtype == dtype
            total += gradient.float()
    net.checkpoint_blocks = checkpoint
    for seed in range(3):
        forward(policies.student, seed).float().square().mean().backward()
    for master, total in zip(weights.masters, expected, strict=True):
        assert master.grad is not None
        assert torch.equal(master.grad, total)
    if dtype == torch.bfloat16:
        assert all(parameter.grad is None for parameter in parameters)


def test_checkpointed_blocks_remember_their_adapter_in_the_backward() -> None:
    gradients = []
    for checkpoint in (False, True):
        policies = make_policies(student(), NAMES, trained=("theta", "old"), lora=LORA)
        change(policies, "theta")
        change(policies, "old", seed=1)
        policies.student.net.checkpoint_blocks = checkpoint
        with policies.using("old") as version:
            loss = forward(version).square().mean()
        with policies.using("ref"):
            loss.backward()
        gradients.append([master.grad for master in policies.weights("old").masters])
        assert all(master.grad is None for master in policies.weights("theta").masters)
    for kept, recomputed in zip(*gradients, strict=True):
        assert kept is not None
        assert recomputed is not None
        assert torch.equal(kept, recomputed)


@KINDS
def test_what_was_on_is_put_back_even_after_an_error(lora: LoraConfig | None) -> None:
    policies = make_policies(student(), NAMES, lora=lora)
    change(policies, "theta")
    change(policies, "old", seed=1)
    expected = outputs(policies)

    def fail() -> None:
        with policies.using("ref"), policies.using("old") as version:
            assert torch.equal(forward(version), expected["old"])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(forward(policies.student), expected["theta"])


def test_switching_adapters_takes_microseconds() -> None:
    policies = make_policies(student(), NAMES, lora=LORA)

    def switch() -> None:
        with policies.using("old"), policies.using("ref"):
            pass

    assert min(timeit.repeat(switch, number=100, repeat=5)) / 100 < 1e-3


@KINDS
def test_streams_and_recorded_passes_are_the_active_versions(lora: LoraConfig | None) -> None:
    policies = make_policies(student(), NAMES, lora=lora)
    change(policies, "theta")
    change(policies, "old", seed=1)
    t_11, firsts = torch.tensor([[500.0]]), []
    for name in NAMES:
        with policies.using(name) as version:
            net = version.net
            x_BFCHW, text_BLE = video(net, 6), text(net)
            caches = [version.new_cache(text_BLE, 6) for _ in range(2)]
            passes = FixedPasses(net)
            for start in (0, 3):
                chunk = x_BFCHW[:, start : start + 3]
                direct = net.forward_cached(chunk, t_11, caches[0], start)
                replayed = passes(chunk, t_11, caches[1], start, False)
                assert direct is not None
                assert replayed is not None
                assert torch.equal(direct, replayed)
            firsts.append(direct)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(firsts, 2))


@pytest.mark.parametrize("device", DEVICES)
def test_a_recorded_pass_belongs_to_one_adapter(device: str) -> None:
    """One cache, reset between versions: its recorded passes must not be another's."""
    policies = make_policies(student().to(device), NAMES, lora=LORA)
    change(policies, "theta")
    change(policies, "old", seed=1)
    net = policies.student.net
    passes = GraphedPasses(net) if device == "cuda" else FixedPasses(net)
    x_BFCHW, text_BLE = video(net, 3).to(device), text(net).to(device)
    t_11, outs = torch.tensor([[500.0]], device=device), []
    caches = {name: policies.student.new_cache(text_BLE, 3) for name in ("one", "direct")}
    for name in (*NAMES, *NAMES):
        with policies.using(name):
            for cache in caches.values():
                cache.reset()
            replayed = passes(x_BFCHW, t_11, caches["one"], 0, False)
            direct = net.forward_cached(x_BFCHW, t_11, caches["direct"], 0)
        assert replayed is not None
        torch.testing.assert_close(replayed, direct, **NETWORK_REORDERED)
        outs.append(replayed)
    assert passes.count == len(NAMES)
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(outs[:3], 2))


@pytest.mark.slow
@DTYPES
def test_fused_projections_live_through_copies_updates_and_adapters(dtype: torch.dtype) -> None:
    fused = student(dtype)
    fused.net.fuse_projections()
    assert fused.net.fused
    full = make_policies(fused, NAMES)
    with full.using("old") as old:
        assert old.net.fused
        assert old.net is not fused.net
    change(full, "theta")
    with torch.no_grad():
        same = forward(fused)
        plain = student(dtype)
        plain.net.load_state_dict(fused.net.state_dict())
        assert torch.equal(forward(plain), same)
    adapted = student(dtype)
    adapted.net.fuse_projections()
    lora = make_policies(adapted, NAMES, lora=LORA)
    change(lora, "theta")
    other = make_policies(student(dtype), NAMES, lora=LORA)
    other.load_state_dict(lora.state_dict())
    for mine, theirs in zip(outputs(lora).values(), outputs(other).values(), strict=True):
        assert torch.equal(mine, theirs)


def test_compiled_blocks_follow_the_adapter() -> None:
    policies = make_policies(student(), NAMES, lora=LORA)
    change(policies, "theta")
    change(policies, "old", seed=1)
    expected = outputs(policies)
    policies.student.net.compile_blocks(backend="eager")
    for _ in range(2):
        for name, out in outputs(policies).items():
            torch.testing.assert_close(out, expected[name])


@KINDS
@DTYPES
def test_the_average_is_taken_between_masters(lora: LoraConfig | None, dtype: torch.dtype) -> None:
    policies = make_policies(student(dtype), NAMES, lora=lora)
    change(policies, "theta")
    start = [master.detach().clone() for master in policies.weights("old").masters]
    source = policies.weights("theta").masters
    expected = [a.lerp(b.detach(), 1 - 0.999) for a, b in zip(start, source, strict=True)]
    policies.average("old", "theta", 0.999)
    for master, value in zip(policies.weights("old").masters, expected, strict=True):
        assert torch.equal(master, value)
    policies.average("old", "theta", 0.0)
    after = outputs(policies)
    assert torch.equal(after["old"], after["theta"])


@KINDS
@DTYPES
def test_the_state_comes_back_bit_for_bit(
    lora: LoraConfig | None, dtype: torch.dtype, tmp_path: object
) -> None:
    policies = make_policies(student(dtype), NAMES, lora=lora, seed=1)
    for seed, name in enumerate(policies.names):
        change(policies, name, seed)
    state = policies.state_dict()
    file = f"{tmp_path}/state.pt"
    torch.save(state, file)
    again = make_policies(student(dtype), NAMES, lora=lora, seed=2)
    again.load_state_dict(torch.load(file, weights_only=True))
    for name in policies.names:
        pairs = zip(policies.weights(name).masters, again.weights(name).masters, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    for mine, theirs in zip(outputs(policies).values(), outputs(again).values(), strict=True):
        assert torch.equal(mine, theirs)
    state["old"].popitem()
    with pytest.raises(ValueError, match="state"):
        again.load_state_dict(state)
    with pytest.raises(ValueError, match="versions"):
        again.load_state_dict({"start": state["start"], "theta": state["theta"]})


@KINDS
@DTYPES
def test_a_state_is_refused_on_other_start_weights_if_it_needs_them(
    lora: LoraConfig | None, dtype: torch.dtype
) -> None:
    for names in (NAMES, ("theta", "old")):
        other = student(dtype)
        with torch.no_grad():
            other.net.patch_embedding.weight[0, 0] += 1
        state = make_policies(student(dtype), names, lora=lora).state_dict()
        policies = make_policies(other, names, lora=lora)
        if lora is None and "ref" not in names:
            assert state["start"] is None
            policies.load_state_dict(state)
        else:
            with pytest.raises(ConfigError, match="run started from"):
                policies.load_state_dict(state)


def test_adapters_start_alike_for_one_seed_and_leave_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    first = None
    for seed in (1, 1, 2):
        torch.manual_seed(5)
        start = student()
        torch.manual_seed(5)
        state = make_policies(start, ("theta", "old"), lora=LORA, seed=seed).state_dict()
        assert torch.equal(torch.rand(3), expected)
        for name, value in state["old"].items():
            assert torch.equal(value, state["theta"][name])
        name = "blocks.0.self_attn.q.lora_A.weight"
        if first is not None:
            assert torch.equal(state["theta"][name], first) == (seed == 1)
        first = state["theta"][name]
        assert not state["theta"][name.replace("lora_A", "lora_B")].any()


def test_a_text_encoder_is_shared_between_copies_not_copied() -> None:
    class Encoder:
        def __call__(self, prompts: list[str]) -> Tensor:
            return torch.zeros(len(prompts), 5, 8)

        def __deepcopy__(self, memo: object) -> Encoder:
            raise AssertionError("an encoder has billions of weights")

    start = WanStudent(tiny(), height=HEIGHT, width=WIDTH, frames=6, encoder=Encoder())
    with make_policies(start, NAMES).using("ref") as ref:
        assert ref.encode(["a"]).shape == (1, 5, 8)


def test_wrong_names_are_refused() -> None:
    for names in itertools.chain([(), ("theta", "theta"), ("ref",)]):
        with pytest.raises(ValueError, match="names"):
            make_policies(student(), names)
    with pytest.raises(ValueError, match="trained"):
        make_policies(student(), ("theta",), trained=("ref",))
    for lora in (None, LORA):
        policies = make_policies(student(), ("theta",), lora=lora)
        with pytest.raises(ValueError, match="name"), policies.using("old"):
            pass
        with pytest.raises(ValueError, match="name"):
            policies.weights("ref")
    with pytest.raises(ValueError, match="make_policies"):
        make_policies(student(), ("theta",)).using("ref")


def test_the_toy_takes_adapters_too() -> None:
    policies = make_policies(ToyStudent.load(), ("theta", "old"), lora=LORA)
    assert len(policies.weights("theta").masters) == 3 * 10 * 2
