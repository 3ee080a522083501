"""What rule 7 of the architecture asks of every op: opcheck, compile, fake tensors, no syncs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from afd import ops
from afd_kernels import dispatch, registry
from afd_kernels.dispatch import use_backend
from tests.cases import BASE, CASES, Case, raw

Place = tuple[str, str]

NAMES = ("forward_noise", "forward_noise_bwd", "nft_loss", "nft_loss_bwd", "nft_loss_bwd_")
# Checked in files of their own, because they run on other backends or devices.
ELSEWHERE = {
    *("block_attention", "block_attention_bwd"),  # test_attention.py
    *("qk_norm_rope", "qk_norm_rope_bwd", "qk_norm_rope_append_", "adaln", "adaln_bwd"),
}


def transposed(x: Tensor) -> Tensor:
    """The same values, column by column in memory."""
    moved = x.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
    return moved.requires_grad_(x.requires_grad)


def arguments(name: str, device: str, strided: bool) -> tuple[Any, ...]:
    """Positional arguments of torch.ops.afd.<name>."""
    i = BASE.inputs(device)
    if strided:
        i = {k: transposed(v) if isinstance(v, Tensor) and v.ndim == 5 else v for k, v in i.items()}
    x0 = i["x0"].clone().requires_grad_()
    tensors, options = raw(i)
    return {
        "forward_noise": (x0, i["t"], i["seed"], None, "rectified_flow", [], "BCFHW"),
        "forward_noise_bwd": (i["x0"], i["t"], "vp_linear", [0.1, 20.0], "BCFHW"),
        "nft_loss": (*tensors, *options),
        "nft_loss_bwd": (i["x0"], torch.tensor(0.5, device=device)),
        "nft_loss_bwd_": (i["x0"], torch.tensor(0.5, device=device)),
    }[name]


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(place: Place, name: str, strided: bool) -> None:
    op = getattr(torch.ops.afd, name).default
    torch.library.opcheck(op, arguments(name, place[1], strided))


def test_every_registered_op_is_checked_here() -> None:
    registered = {
        n.split("::")[1].split(".")[0]
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("afd::")
    }
    assert registered == {*NAMES, *ELSEWHERE}
    assert set(dispatch.OPS) == {
        name for name in registered if "_bwd" not in name and name[-1] != "_"
    }


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph_with_the_same_bits(backend: str) -> None:
    inputs = BASE.inputs()

    def step(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        x_t = ops.forward_noise(inputs["x0"], inputs["t"], seed=inputs["seed"])
        return ops.nft_loss(**inputs).loss * 2, x_t

    eager_loss, eager_x = step(inputs)
    eager_loss.backward()
    eager_grad, inputs["v_theta"].grad = inputs["v_theta"].grad, None
    loss, x_t = torch.compile(step, fullgraph=True, backend=backend)(inputs)
    loss.backward()
    assert torch.equal(loss, eager_loss)
    assert torch.equal(x_t, eager_x)
    assert torch.equal(inputs["v_theta"].grad, eager_grad)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_cuda_tensors_pass_without_a_synchronisation(case: Case) -> None:
    """A hidden .item() would raise DataDependentOutputException here."""
    real = case.inputs()
    with FakeTensorMode():
        fake = {
            k: torch.empty(v.shape, dtype=v.dtype, device="cuda") if isinstance(v, Tensor) else v
            for k, v in real.items()
        }
        result = ops.nft_loss(**fake)
        assert result.loss.device.type == "cuda"
        # Recording autograd on fake CUDA tensors needs a CUDA build, so the backward is called.
        grad = torch.ops.afd.nft_loss_bwd(fake["v_theta"], result.loss)
        assert grad.shape == fake["v_theta"].shape
        assert grad.device.type == "cuda"
        x_t = ops.forward_noise(
            fake["x0"], fake["t"], seed=fake["seed"], noise=fake["noise"], layout=fake["layout"]
        )
        assert x_t.shape == fake["x0"].shape


def test_mixed_devices_are_refused_by_the_fake_too() -> None:
    with FakeTensorMode():
        x0 = torch.empty(2, 3, device="cuda")
        with pytest.raises(ValueError, match=r"t: got .* on cpu; needed: the device of x0"):
            ops.forward_noise(x0, torch.empty(2), noise=x0)


def test_a_backend_that_cannot_run_says_why() -> None:
    x0 = torch.zeros(2, 3, dtype=torch.float64)
    with (
        use_backend("native"),
        pytest.raises(RuntimeError, match=r"'native' was requested.*float64") as caught,
    ):
        ops.forward_noise(x0, torch.zeros(2), noise=x0)
    assert "reference: would run" in str(caught.value)
    with pytest.raises(ValueError, match=r"backend: got 'cuda'"), use_backend("cuda"):
        pass
    with pytest.raises(ValueError, match=r"op: got 'attention'; needed: one of forward_noise"):
        ops.explain("attention", "cpu", {torch.float32})


def test_the_automatic_choice_falls_through_to_the_reference() -> None:
    x0 = torch.randn(2, 3, dtype=torch.float64)
    x_t = ops.forward_noise(x0, torch.ones(2), noise=torch.ones_like(x0))
    assert torch.equal(x_t, torch.ones_like(x0))
    reasons = ops.explain("forward_noise", "cpu", {torch.float64})
    assert reasons["reference"] is None
    assert "float64" in reasons["native"]


def test_a_kernel_runs_with_the_device_of_its_tensors_current(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a tensor on a second GPU would meet a launch on the first."""
    entered: list[torch.device] = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    with FakeTensorMode():
        x = torch.empty(1, device="cuda:1")
    assert registry._on_its_device(lambda *args: args[-1])(None, torch.ones(1), x) is x
    assert entered == [torch.device("cuda", 1)]
