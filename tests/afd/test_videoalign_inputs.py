"""VideoAlign's input: which frames, which size, which patches, which words."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from afd.discriminators.videoalign.preprocess import (
    MEAN,
    MIN_PIXELS,
    STD,
    Preprocessing,
    frame_indices,
    patchify,
    resize,
    smart_resize,
)
from afd.discriminators.videoalign.prompt import (
    OWN_TEMPLATE,
    REWARD_TOKENS,
    PromptEncoder,
    check_template,
    read_template,
)
from tests.afd.tiny_videoalign import PROMPTS, clips, write_base

TEMPLATE = "\n".join((*REWARD_TOKENS[:2], "{{of}} {text_prompt} ", REWARD_TOKENS[2]))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    return PromptEncoder.load(write_base(tmp_path_factory.mktemp("words") / "base"), TEMPLATE)


# --- frames and patches ---


def test_a_wan_clip_gives_ten_frames_from_its_first_to_its_last() -> None:
    assert frame_indices(81, 16.0).tolist() == [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]
    assert smart_resize(480, 832, 448 * 448) == (336, 588)


def test_short_clips_give_at_least_four_frames_and_never_more_than_they_have() -> None:
    assert len(frame_indices(33, 16.0)) == 4
    assert frame_indices(3, 16.0).tolist() == [0, 2]
    assert frame_indices(5, 16.0, count=6).tolist() == [0, 1, 2, 3, 4]


def test_small_frames_are_enlarged_and_keep_their_shape() -> None:
    rows, columns = smart_resize(120, 160, 448 * 448)
    assert rows * columns >= MIN_PIXELS
    assert columns / rows == pytest.approx(160 / 120, rel=0.1)


def test_patches_stand_where_the_released_order_puts_them() -> None:
    levels = torch.randint(0, 256, (2, 4, 3, 56, 84)).float()
    patches, grid = patchify(levels)
    assert grid.tolist() == [[2, 4, 6]] * 2
    row = 0
    for b in range(2):
        for t in range(2):
            for top in range(0, 4, 2):
                for left in range(0, 6, 2):
                    for h, w in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        y, x = 14 * (top + h), 14 * (left + w)
                        cell = levels[b, 2 * t : 2 * t + 2, :, y : y + 14, x : x + 14]
                        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
                        expected = ((cell / 255 - mean) / std).transpose(0, 1).flatten()
                        assert torch.equal(patches[row], expected)
                        row += 1
    assert row == len(patches)


def test_finer_levels_than_a_file_has_are_not_seen() -> None:
    """The student's videos come as floats, the teacher's from 8 bits: both are rounded alike."""
    levels = torch.randint(2, 254, (1, 4, 3, 56, 56))
    decoded = levels / 127.5 - 1
    drawn = (levels + torch.rand(levels.shape) * 0.9 - 0.45) / 127.5 - 1
    seen = Preprocessing(max_pixels=56 * 56)
    assert torch.equal(seen.patches(decoded)[0], seen.patches(drawn)[0])


def test_rounding_passes_the_gradient_and_clipping_stops_it() -> None:
    frames = (torch.rand(1, 3, 60, 60) * 255).requires_grad_()
    resized = resize(frames, 28, 28)
    assert torch.equal(resized, resized.round())
    resized.sum().backward()
    # Each output is a weighted mean: all weights of all outputs sum to their number.
    assert float(frames.grad.sum()) == pytest.approx(3 * 28 * 28, rel=1e-4)
    wide = torch.full((1, 3, 28, 28), 300.0, requires_grad=True)
    resize(wide, 28, 28).sum().backward()
    assert float(wide.grad.abs().max()) == 0


def test_only_chosen_frames_get_a_gradient() -> None:
    video = clips(count=1).requires_grad_()
    seen = Preprocessing(max_pixels=56 * 56)
    pixels, _ = seen.patches(seen.choose(video, 16.0))
    pixels.square().sum().backward()
    moved = video.grad.abs().sum((0, 2, 3, 4)) > 0
    assert moved.nonzero().flatten().tolist() == frame_indices(17, 16.0).tolist()


@pytest.mark.parametrize(
    ("video", "settings", "named"),
    [
        (torch.zeros(1, 4, 1, 56, 56), {}, "video_BFCHW"),
        (torch.zeros(4, 3, 56, 56), {}, "video_BFCHW"),
        (torch.zeros(1, 1, 3, 56, 56), {}, "video_BFCHW"),
        (torch.zeros(1, 5, 3, 56, 56), {"count": 6}, "even"),
        (torch.zeros(1, 4, 3, 100, 1500), {"max_pixels": 9408}, "max_pixels"),
    ],
)
def test_videos_that_cannot_be_cut_into_patches_are_named(
    video: Tensor, settings: dict[str, int], named: str
) -> None:
    seen = Preprocessing(**settings)
    with pytest.raises(ValueError, match=named):
        seen.patches(seen.choose(video, 16.0))


# --- words ---


def test_the_template_is_read_and_the_file_never_run(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    (tmp_path / "prompt_template.py").write_text(
        f"open({str(proof)!r}, 'w')\n"
        "import no_such_module\n"
        "OTHER = 1\n"
        f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {TEMPLATE!r}\n"
        "raise SystemExit\n"
    )
    assert read_template(tmp_path) == TEMPLATE
    assert read_template(tmp_path / "prompt_template.py") == TEMPLATE
    assert not proof.exists()


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("OTHER = 'x'", "no DETAILED_PROMPT_WITH_SPECIAL_TOKEN"),
        ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN = open('x').read()", "plain string"),
        ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN = f'{text_prompt}'", "plain string"),
        ("def broken(", "cannot be parsed"),
        ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN = 'no field'", "text_prompt"),
    ],
)
def test_a_file_without_the_template_is_refused(tmp_path: Path, source: str, named: str) -> None:
    (tmp_path / "prompt_template.py").write_text(source)
    with pytest.raises(ValueError, match=named):
        read_template(tmp_path)


def test_a_wrong_checkout_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="KwaiVGI/VideoAlign"):
        read_template(tmp_path)
    with pytest.raises(ValueError, match="prompt_template_type"):
        read_template(tmp_path, "simple")


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE.replace("{text_prompt}", "{text_prompt.__class__}"),
        TEMPLATE.replace("{text_prompt}", "{text_prompt!r}"),
        TEMPLATE.replace("{text_prompt}", "{text_prompt:>99}"),
        TEMPLATE + "{text_prompt}",
        TEMPLATE + "{",
        TEMPLATE + REWARD_TOKENS[0],
        TEMPLATE.replace(REWARD_TOKENS[2], ""),
        "\n".join((REWARD_TOKENS[1], REWARD_TOKENS[0], "{text_prompt}", REWARD_TOKENS[2])),
    ],
)
def test_a_template_is_data_with_one_field_and_three_ratings(template: str) -> None:
    with pytest.raises(ValueError, match="template"):
        check_template(template)


def test_without_a_checkout_our_own_words_are_used_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "afd"):
        assert read_template(None) == OWN_TEMPLATE
    assert "own words" in caplog.text
    # What the model's VQ and MQ were trained on: a prompt that comes after them.
    text = check_template(OWN_TEMPLATE)
    assert text.index(REWARD_TOKENS[1]) < text.index("{text_prompt}") < text.index(REWARD_TOKENS[2])


def test_requests_are_padded_on_the_right_behind_their_video(encoder: PromptEncoder) -> None:
    tokens = encoder.encode(PROMPTS, [3, 5])
    assert (tokens.ids_BL == encoder.video_id).sum(1).tolist() == [3, 5]
    assert tokens.mask().sum(1).tolist() == list(tokens.lengths)
    assert tokens.lengths[0] < tokens.lengths[1] == tokens.ids_BL.shape[1]
    assert (tokens.ids_BL[0, tokens.lengths[0] :] == encoder.pad_id).all()
    found = tokens.ids_BL.gather(1, tokens.places_B3)
    assert found.tolist() == [encoder.reward_ids] * 2
    text = encoder.tokenizer.decode(tokens.ids_BL[0])
    assert "<|vision_start|>" + "<|video_pad|>" * 3 + "<|vision_end|>" in text
    assert "{of} a red ball falls \n" in text


def test_reward_tokens_get_the_last_rows_in_the_released_order(encoder: PromptEncoder) -> None:
    assert encoder.reward_ids == list(range(encoder.rows - 3, encoder.rows))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [("tokenizer.json", "<|video_pad|>", "<|other|>"), ("tokenizer_config.json", "pad_token", "x")],
)
def test_another_model_s_tokenizer_is_refused(
    tmp_path: Path, file: str, old: str, new: str
) -> None:
    base = write_base(tmp_path / "base")
    (base / file).write_text((base / file).read_text().replace(old, new))
    with pytest.raises(ValueError, match="tokenizer"):
        PromptEncoder.load(base, TEMPLATE)


def test_braces_in_a_prompt_are_text(encoder: PromptEncoder) -> None:
    assert "{of} {text_prompt} {} {0} }{ " in encoder.request("{text_prompt} {} {0} }{")


@pytest.mark.parametrize("token", ["<|TA_reward|>", "<|video_pad|>", "<|im_end|>"])
def test_a_prompt_with_the_model_s_own_tokens_is_refused(
    encoder: PromptEncoder, token: str
) -> None:
    with pytest.raises(ValueError, match="prompts"):
        encoder.encode([f"a cat {token}"], [1])
    with pytest.raises(ValueError, match="prompts"):
        encoder.encode("a cat", [1])
