"""The training benchmark in small: both sides compute the same, and rows add up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afd import ops
from afd.models.wan.types import WanConfig
from benchmarks import train_step
from benchmarks.eager_train import EagerTrained, by_chunk
from benchmarks.eager_wan import attention
from benchmarks.train_sides import Case, Eager, Ours
from tests.tolerances import NETWORK_GRADIENT

ROOT = Path(__file__).resolve().parents[2]
TINY = WanConfig(
    dim=48, num_heads=2, ffn_dim=64, num_layers=2, freq_dim=16, text_dim=16, text_len=8
)
CASES = {
    "toy": Case("toy", 2, 2),
    "wan": Case("wan", 1, 2, 1, TINY, 4, 6, 6, rank=4, checkpoint_blocks=True),
}


@pytest.mark.parametrize("name", CASES)
def test_eager_and_ours_have_the_same_loss_and_gradient(name: str) -> None:
    """Of `recompute`, at the same videos, noise, times and weights r."""
    ours = Ours(CASES[name], "cpu")
    eager = Eager(ours)
    student, config = ours.student, ours.case.afd
    draw = torch.Generator().manual_seed(2)
    x0 = torch.randn(3, student.frames, *student.frame_shape, generator=draw)
    t_BK = 0.1 + 0.8 * torch.rand(3, student.frames // student.chunk, generator=draw)
    noise, r_B = torch.randn(x0.shape, generator=draw), torch.rand(3, generator=draw)
    text_BLE = student.encode(["a red ball"] * 3)
    _move(ours, eager)
    t_BF111 = t_BK.repeat_interleave(student.chunk, 1)[..., None, None, None]
    x_t = (1 - t_BF111) * x0 + t_BF111 * noise

    def velocity(version: str) -> torch.Tensor:
        with ours.method.policies.using(version) as active:
            return active.velocity(x_t, t_BK, text_BLE, x0_BFCHW=x0)

    with torch.no_grad():
        v_old, v_ref = velocity("old"), velocity("ref")
    result = ops.nft_loss(
        v_theta=velocity("theta"),
        v_old=v_old,
        v_ref=v_ref,
        x0=x0,
        t=t_BK,
        r=r_B,
        noise=noise,
        nft_beta=config.nft_beta,
        prior_weight=config.prior_weight,
        adv_clip=config.adv_clip,
        weighting="x0_adaptive",
        layout="BFCHW",
    )
    result.loss.backward()
    loss = eager.update.loss_of(x0, noise, t_BK, text_BLE, r_B)
    eager.update.add(loss)
    assert loss.item() == pytest.approx(result.loss.item(), rel=1e-4)
    theta = ours.method.policies.weights("theta")
    mine = torch.cat([m.grad.flatten() for m in theta.masters if m.grad is not None])
    plain = torch.cat([p.grad.flatten() for p in _matching(ours, eager) if p.grad is not None])
    assert mine.numel() == plain.numel() > 1000
    assert (mine - plain).norm() < NETWORK_GRADIENT * plain.norm()


def _matching(ours: Ours, eager: Eager) -> list[torch.Tensor]:
    """Eager's trained tensors in the order of our masters."""
    theta, names = eager.update.theta, ours.method.policies.weights("theta").names
    if not theta.lora:
        return [theta.w[name.removeprefix("net.")] for name in names]
    return [_lora(theta, name) for name in names]


def _lora(net: EagerTrained, name: str) -> torch.Tensor:
    projection, _, part = name.partition(".lora_")
    adapter = net.lora[projection]
    return adapter.down if part.startswith("A") else adapter.up


@torch.no_grad()
def _move(ours: Ours, eager: Eager) -> None:
    """Random weights near the start for the trained version, on both sides."""
    theta = ours.method.policies.weights("theta")
    for master, plain in zip(theta.masters, _matching(ours, eager), strict=True):
        master.add_(0.05 * torch.randn_like(master))
        plain.copy_(master)
    theta.publish()


def test_a_mask_and_a_call_per_chunk_let_the_same_keys_be_seen() -> None:
    net = EagerTrained(TINY, {"patch_embedding.weight": torch.zeros(1)})
    q, k, v = (torch.randn(2, 2 * 3 * 4, 2, 8) for _ in range(3))
    mask = net.mask(24, 4, torch.device("cpu"))
    heads = (x.transpose(1, 2) for x in (q, k, v))
    masked = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
    assert torch.allclose(masked.transpose(1, 2).flatten(2), by_chunk(q, k, v, 4), atol=1e-6)
    assert not torch.allclose(by_chunk(q, k, v, 4), attention(q, k, v), atol=1e-2)


def test_every_provider_gets_rows_whose_numbers_belong_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step.main(["--quick", "--device", "cpu", "--reps", "1", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "train_step.json").read_text())
    assert document["failed"] == {}
    rows = {(row["case"], row["phase"], row["provider"]): row for row in document["rows"]}
    assert len(rows) == 2 * (5 + 1 + 1 + 5)
    for (case, phase, provider), row in rows.items():
        assert 0 < row["p20"] <= row["median_ms"] <= row["p80"]
        assert row["peak_mib"] > 0
        if phase in ("rollout", "update"):
            eager = rows[case, phase, "eager"]
            assert row["speedup"] == pytest.approx(eager["median_ms"] / row["median_ms"])
            assert row["floor_ms"] > 0
        if phase == "update":
            whole = rows[case, phase, "recompute"]
            assert row["x_recompute"] == pytest.approx(row["median_ms"] / whole["median_ms"])
            assert row["gflop"] <= whole["gflop"], provider
    kept, again = (rows["toy, quick", "update", f"shared_context{k}"] for k in (", kept", ""))
    assert kept["gflop"] < again["gflop"]
    assert "x recompute" in capsys.readouterr().out


def test_a_side_that_disagrees_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = EagerTrained.teacher_forced
    monkeypatch.setattr(EagerTrained, "teacher_forced", lambda *args: 1.01 * forward(*args))
    with pytest.raises(SystemExit):
        train_step.main(["--quick", "--device", "cpu", "--reps", "1", "--case", "wan"])
    said = capsys.readouterr().out
    assert "FAILED wan, quick eager: relative error 0.0" in said
    assert "shared_context, kept" in said


def test_the_other_benchmarks_need_no_pydantic() -> None:
    """A bare GPU machine has none; only the training step asks for it."""
    code = (
        "import sys; sys.modules['pydantic'] = None; from benchmarks import attention, "
        "forward_noise, gpu_check, nft_loss, rollout, sanitize"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
