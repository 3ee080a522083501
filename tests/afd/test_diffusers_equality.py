"""With one chunk over all frames, the network is diffusers' WanTransformer3DModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afd.models.wan.checkpoints import load_checkpoint, save_diffusers, save_self_forcing
from afd.models.wan.network import CausalWan
from afd.models.wan.types import WanConfig
from tests.tolerances import NETWORK_FORWARD, NETWORK_GRADIENT

FRAMES, HEIGHT, WIDTH, TEXT = 5, 6, 8, 12


def theirs(heads: int = 3, head_dim: int = 24, channels: int = 4) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(heads)
    model = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=20,
        freq_dim=32,
        ffn_dim=100,
        num_layers=3,
    )
    with torch.no_grad():
        for parameter in model.parameters():  # no gain of one, no bias of zero, no dead table
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def inputs(channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(7)
    x_BFCHW = torch.randn(2, FRAMES, channels, HEIGHT, WIDTH, generator=draw)
    text_BLE = torch.randn(2, TEXT, 20, generator=draw)
    text_BLE[0, 7:] = 0
    return x_BFCHW, torch.tensor([[937.5], [250.25]]), text_BLE


def forward(model: Any, x_BFCHW: Tensor, t_B1: Tensor, text_BLE: Tensor) -> Tensor:
    out_BCFHW = model(x_BFCHW.transpose(1, 2), t_B1[:, 0], text_BLE, return_dict=False)[0]
    return out_BCFHW.transpose(1, 2)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize(("heads", "head_dim", "channels"), [(3, 24, 4), (2, 40, 16), (1, 128, 48)])
def test_the_bidirectional_case_is_diffusers_network(
    tmp_path: Path, heads: int, head_dim: int, channels: int
) -> None:
    model = theirs(heads, head_dim, channels)
    model.save_pretrained(tmp_path / "transformer")
    net = load_checkpoint(tmp_path, text_len=TEXT, chunk=FRAMES)
    assert (net.config.head_dim, net.config.in_dim) == (head_dim, channels)
    x_BFCHW, t_B1, text_BLE = inputs(channels)
    mine = x_BFCHW.clone().requires_grad_()
    other = x_BFCHW.clone().requires_grad_()
    out, expected = net(mine, t_B1, text_BLE), forward(model, other, t_B1, text_BLE)
    assert error(out, expected) <= NETWORK_FORWARD
    weight = torch.randn_like(expected)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert mine.grad is not None
    assert other.grad is not None
    assert error(mine.grad, other.grad) <= NETWORK_GRADIENT


def test_a_clean_first_frame_is_a_time_per_token_of_diffusers_network(tmp_path: Path) -> None:
    """How Wan2.2-TI2V-5B starts from an image: t = 0 for the first frame's tokens."""
    model = theirs(channels=48)
    model.save_pretrained(tmp_path)
    net = load_checkpoint(tmp_path, text_len=TEXT, chunk=FRAMES)
    x_BFCHW, t_B1, text_BLE = inputs(48)
    t_BF = t_B1.repeat(1, FRAMES)
    t_BF[:, 0] = 0
    t_BL = t_BF.repeat_interleave(HEIGHT * WIDTH // 4, 1)
    with torch.no_grad():
        out = model(x_BFCHW.transpose(1, 2), t_BL, text_BLE, return_dict=False)[0]
        assert error(net(x_BFCHW, t_BF, text_BLE), out.transpose(1, 2)) <= NETWORK_FORWARD


def test_a_chunk_is_causal_where_diffusers_is_not(tmp_path: Path) -> None:
    """The equality above is not for want of a difference."""
    model = theirs()
    model.save_pretrained(tmp_path)
    x_BFCHW, t_B1, text_BLE = inputs()
    net = load_checkpoint(tmp_path, text_len=TEXT, chunk=1)
    with torch.no_grad():
        out = net(x_BFCHW, t_B1, text_BLE)
        assert error(out, forward(model, x_BFCHW, t_B1, text_BLE)) > 10 * NETWORK_FORWARD


def test_diffusers_loads_what_we_save_and_computes_the_same(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    net = CausalWan(
        WanConfig(
            dim=48,
            num_heads=2,
            ffn_dim=96,
            num_layers=2,
            freq_dim=32,
            text_dim=20,
            text_len=TEXT,
            in_dim=4,
            out_dim=4,
            chunk=FRAMES,
        )
    )
    save_diffusers(tmp_path / "net", net)
    model, info = WanTransformer3DModel.from_pretrained(tmp_path / "net", output_loading_info=True)
    assert not any(info.values()), info
    x_BFCHW, t_B1, text_BLE = inputs()
    with torch.no_grad():
        expected = forward(model.eval(), x_BFCHW, t_B1, text_BLE)
        assert error(net(x_BFCHW, t_B1, text_BLE), expected) <= NETWORK_FORWARD


def test_shards_written_by_diffusers_load_and_go_through_a_pt_file_unchanged(
    tmp_path: Path,
) -> None:
    model = theirs()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    net = load_checkpoint(tmp_path / "sharded", text_len=TEXT)
    save_self_forcing(tmp_path / "model.pt", generator=net)
    again = load_checkpoint(tmp_path / "model.pt", head_dim=24, text_len=TEXT)
    save_diffusers(tmp_path / "again", again)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors")
    original = model.state_dict()
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
