"""Chunks drawn for an update: alone they give what they give among all, from the network up."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from afd.methods.config import AfdConfig, SftConfig
from afd.methods.copies import Copies, draw_copies
from afd.ops import intervals
from tests.afd.tiny_methods import make_afd, make_sft, toy_student
from tests.afd.tiny_wan import HEIGHT, WIDTH, text, tiny, video
from tests.tolerances import NETWORK_REORDERED as SAME

FRAMES, CHUNK = 12, 3
# Two of four chunks, other ones for each video.
DRAWN = torch.tensor([[0, 2], [1, 3]])


def some(x_BFCHW: Tensor) -> Tensor:
    """The frames of the drawn chunks of each."""
    frame_BF = (DRAWN[..., None] * CHUNK + torch.arange(CHUNK)).flatten(1)
    return x_BFCHW[torch.arange(2)[:, None], frame_BF]


@pytest.mark.parametrize("how", ["context", "one pass"])
def test_drawn_chunks_get_the_output_and_gradients_that_they_get_among_all(how: str) -> None:
    found = {}
    for drawn in (False, True):
        net = tiny()
        x, clean = video(net, FRAMES), video(net, FRAMES, seed=5)
        t = 1000 * torch.rand(2, FRAMES, generator=Generator().manual_seed(3))
        given: dict[str, Any] = {"x0_BFCHW": clean, "clean_t_BF": torch.full((1, 1), 40.0)}
        if how == "context":
            told = torch.full((1, 1), 40.0)
            given = {"context": net.clean_context(clean, text(net), told)}
        if drawn:
            out = net(some(x), some(t), text(net), chunks_BN=DRAWN, **given)
        else:
            out = some(net(x, t, text(net), **given))
        out.square().sum().backward()
        found[drawn] = [out.detach(), *(p.grad for p in net.parameters())]
    for ours, expected in zip(found[True], found[False], strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours / scale, expected / scale, **SAME)


def test_one_list_of_chunks_for_all_streams_and_one_for_each_mean_the_same() -> None:
    every = intervals.noisy_half(FRAMES, CHUNK, 2)
    assert intervals.noisy_half(FRAMES, CHUNK, 2, [range(4)]) == every
    each = intervals.noisy_half(FRAMES, CHUNK, 2, [[0, 2], [1, 3]])
    assert each.streams == 2
    mask = each.mask(2 * (FRAMES + 6))
    whole = every.mask(2 * 2 * FRAMES)[0]
    for stream, numbers in enumerate(DRAWN.tolist()):
        for place, number in enumerate(numbers):
            row = mask[stream, 6 * place]
            # Clean keys are where they were; the chunk's own follow in the order of the drawing.
            assert torch.equal(row[: 2 * FRAMES], whole[6 * number][: 2 * FRAMES])
            own = row[2 * FRAMES :].nonzero().flatten().tolist()
            assert own == list(range(6 * place, 6 * place + 6))
    both = intervals.teacher_forcing(FRAMES, CHUNK, 2, [[0, 2], [1, 3]])
    clean = intervals.teacher_forcing(FRAMES, CHUNK, 2).mask(2 * 2 * FRAMES)[0, : 2 * FRAMES]
    assert torch.equal(both.mask(2 * (FRAMES + 6))[:, 2 * FRAMES :], mask)
    assert torch.equal(both.mask(2 * 2 * FRAMES)[1, : 2 * FRAMES], clean)


def test_wrong_chunks_are_refused_by_name() -> None:
    net = tiny()
    x, t = video(net, 6), torch.zeros(2, 6)
    context = net.clean_context(video(net, FRAMES), text(net))
    for wrong in ([[2, 0], [1, 3]], [[0, 4], [1, 3]], [[1, 1], [1, 3]]):
        with pytest.raises(ValueError, match=r"chunks: got .*rising numbers in"):
            net(x, t, text(net), context, chunks_BN=torch.tensor(wrong))
    with pytest.raises(ValueError, match=r"chunks: .*\[B, N\] with 6 frames in x"):
        net(x, t, text(net), context, chunks_BN=DRAWN[:, :1])
    with pytest.raises(ValueError, match=r"chunks: .*None where nothing clean is given"):
        net(x, t, text(net), chunks_BN=DRAWN)
    with pytest.raises(ValueError, match=r"x0_BFCHW: .*the shape of x"):
        net(x, t, text(net), x0_BFCHW=video(net, FRAMES)[..., :2], chunks_BN=DRAWN)


# --- the draws of an update ---


def draws(seed: int = 0, own: slice = slice(None), **changes: Any) -> Copies:
    config = AfdConfig(**{"draws": 2, "chunks_per_update": 2, "timesteps": "uniform", **changes})
    generator = Generator().manual_seed(seed)
    return draw_copies(config, 6, 4, (1.0, 0.5), generator, own=own)


def test_every_process_has_the_draws_that_one_would_make_for_its_videos() -> None:
    whole = draws()
    assert whole.video_N.tolist() == [*range(6), *range(6)]
    for own in (slice(0, 2), slice(2, 5), slice(5, 6)):
        part, count = draws(own=own), own.stop - own.start
        assert part.video_N.tolist() == [*range(count), *range(count)]
        assert part.total == whole.total == 12
        assert part.share == count / 6
        for name in ("t_NK", "seed_N", "chunks_NM"):
            of_all = getattr(whole, name).unflatten(0, (2, 6))[:, own].flatten(0, 1)
            assert torch.equal(getattr(part, name), of_all)


def test_pieces_are_all_copies_in_order() -> None:
    whole = draws()
    pieces = list(whole.pieces(5))
    assert [len(piece) for piece in pieces] == [5, 5, 2]
    assert sum(piece.share for piece in pieces) == pytest.approx(1)
    for name in ("video_N", "t_NK", "seed_N", "chunks_NM"):
        joined = torch.cat([getattr(piece, name) for piece in pieces])
        assert torch.equal(joined, getattr(whole, name))
    assert [len(piece) for piece in whole.pieces(None)] == [12]


def test_chunks_are_drawn_for_each_copy_and_every_one_comes_up() -> None:
    copies = draws(draws=200)
    assert copies.chunks_NM is not None
    rising = copies.chunks_NM[:, 1:] > copies.chunks_NM[:, :-1]
    assert bool(rising.all())
    share = copies.chunks_NM.flatten().bincount(minlength=4) / copies.chunks_NM.numel()
    assert share.tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert draws(chunks_per_update=None).chunks_NM is None
    for refused in (draws, partial(make_afd, toy_student()), partial(make_sft, toy_student())):
        with pytest.raises(ValueError, match="chunks_per_update: got 5; needed: at most the 4"):
            refused(chunks_per_update=5)


def test_drawn_frames_come_out_and_go_back_to_their_places() -> None:
    copies = draws()
    x = torch.randn(12, FRAMES, 4, HEIGHT, WIDTH)
    drawn, mask = copies.drawn(x, CHUNK), copies.mask(FRAMES, CHUNK)
    assert drawn.shape == (12, 6, 4, HEIGHT, WIDTH)
    assert mask is not None
    back = copies.whole(drawn, FRAMES, CHUNK)
    assert torch.equal(back, x * mask[..., None, None, None])
    t_NF = copies.t_NK.repeat_interleave(CHUNK, 1)
    assert torch.equal(copies.drawn_t.repeat_interleave(CHUNK, 1), t_NF[mask].view(12, 6))
    every = draws(chunks_per_update=None)
    assert every.drawn(x, CHUNK) is every.whole(x, FRAMES, CHUNK) is x
    assert every.mask(FRAMES, CHUNK) is None
    assert torch.equal(every.drawn_t, every.t_NK)


def test_a_chunk_of_one_time_for_the_video_has_that_time() -> None:
    copies = draws(timestep_per="video")
    assert copies.t_NK.shape == copies.drawn_t.shape == (12, 1)


def test_the_first_chunk_has_its_own_list_of_steps() -> None:
    config, generator = AfdConfig(draws=50), Generator().manual_seed(0)
    copies = draw_copies(config, 6, 4, (1.0, 0.5), generator, first_times=(1.0, 0.75, 0.25))
    first, later = copies.t_NK[:, 0].unique().tolist(), copies.t_NK[:, 1:].unique().tolist()
    assert first == [0.25, 0.75, 1.0]
    assert later == [0.5, 1.0]


def test_noise_of_the_context_is_another_noise_at_its_own_level() -> None:
    generator = Generator().manual_seed(0)
    config = SftConfig(draws=2)
    copies = draw_copies(config, 3, 4, (), generator, context_noise=0.3)
    x0 = torch.randn(6, FRAMES, 4, HEIGHT, WIDTH)
    assert copies.level_N is not None
    assert 0 <= float(copies.level_N.min()) < float(copies.level_N.max()) <= 0.3
    level = copies.level_N[:, None, None, None, None]
    shown = (copies.noise_context(x0) - (1 - level) * x0) / level
    noise, expected = copies.pure_noise(x0), copies.noise(x0)
    t = copies.t_NK.repeat_interleave(CHUNK, 1)[..., None, None, None]
    torch.testing.assert_close((1 - t) * x0 + t * noise, expected, rtol=1e-5, atol=1e-5)
    agreement = torch.corrcoef(torch.stack([shown.flatten(), noise.flatten()]))[0, 1]
    assert abs(float(agreement)) < 0.1
    assert draws().noise_context(x0) is x0
