"""The toy student: its text encoder, its prediction, its stream, its checkpoint file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from afd.lab.shipped import checkpoint_path
from afd.lab.simulator import PROMPTS
from afd.lab.student import ToyConfig, ToyStudent, encode_prompts
from afd.rollout import STEPS, check_steps, rollout, seeded_noise, stream
from tests.tolerances import NETWORK_REORDERED as SAME

SHAPE = (3, 3, 16, 16)


@pytest.fixture
def student() -> ToyStudent:
    """Random weights, the zero head included, so that every path matters."""
    torch.manual_seed(0)
    student = ToyStudent(ToyConfig())
    torch.nn.init.normal_(student.net.head.head.weight, std=0.05)
    return student.requires_grad_(False)


def test_every_sentence_of_the_grammar_has_its_own_code() -> None:
    codes = encode_prompts(list(PROMPTS), 6, 32).flatten(1)
    assert torch.pdist(codes).min() > 1
    assert torch.equal(encode_prompts([list(PROMPTS)[5]], 6, 32).flatten(1)[0], codes[5])


def test_any_text_can_be_a_prompt() -> None:
    code = encode_prompts(["", "Ein Hund läuft über die lange Straße nach Hause zurück"], 6, 32)
    assert code.shape == (2, 6, 32)
    assert not code[0].any()
    assert code[1].any(1).all()


def test_a_new_student_predicts_grey(student: ToyStudent) -> None:
    torch.manual_seed(0)
    fresh = ToyStudent()
    x_t, t = torch.randn(2, 12, 3, 16, 16), torch.rand(2, 4)
    text = fresh.encode(list(PROMPTS)[:2])
    assert not fresh.predict_x0(x_t, t, text).any()


def test_velocity_and_prediction_are_one_statement(student: ToyStudent) -> None:
    x_t, t = torch.randn(2, 12, 3, 16, 16), torch.tensor([[0.9, 0.5, 0.3, 1.0], [0.06, 1, 1, 0.7]])
    text = student.encode(list(PROMPTS)[:2])
    x0 = student.predict_x0(x_t, t, text)
    v = student.velocity(x_t, t, text)
    t_BF = t.repeat_interleave(3, 1)[..., None, None, None]
    torch.testing.assert_close(x_t - t_BF * v, x0, rtol=1e-5, atol=1e-5)


def test_streaming_equals_teacher_forcing_on_the_own_past(student: ToyStudent) -> None:
    prompts = list(PROMPTS)[:2]
    text = student.encode(prompts)
    noise = seeded_noise([5, 6], SHAPE)
    drawn = {(c, s): noise(c, s) for c in range(4) for s in range(2)}
    video = torch.cat(
        list(stream(student, text, lambda c, s: drawn[c, s], denoising_steps=(1.0, 0.7))), 1
    )
    context = student.clean_context(video, text)
    x_1 = torch.cat([drawn[c, 0] for c in range(4)], 1)
    first = student.predict_x0(x_1, torch.ones(2, 1), text, context)
    x_2 = 0.3 * first + 0.7 * torch.cat([drawn[c, 1] for c in range(4)], 1)
    second = student.predict_x0(x_2, torch.full((2, 1), 0.7), text, context)
    torch.testing.assert_close(video, second, **SAME)


def test_the_context_left_in_the_cache_is_the_clean_context(student: ToyStudent) -> None:
    text = student.encode(list(PROMPTS)[:2])
    cache = student.new_cache(text, 12)
    video = torch.cat(list(stream(student, text, seeded_noise([1, 2], SHAPE), cache=cache)), 1)
    for (k, v), (k_clean, v_clean) in zip(
        cache.self_kv, student.clean_context(video, text), strict=True
    ):
        torch.testing.assert_close(k[:, :9], k_clean[:, :9], **SAME)
        torch.testing.assert_close(v[:, :9], v_clean[:, :9], **SAME)


def test_a_video_does_not_depend_on_its_batch(student: ToyStudent) -> None:
    prompts, seeds = list(PROMPTS)[:5], [11, 12, 13, 14, 15]
    together = rollout(student, prompts, seeds)
    alone = rollout(student, prompts[3:4], seeds[3:4])
    torch.testing.assert_close(together[3:4], alone, **SAME)
    split = rollout(student, prompts, seeds, batch=2)
    torch.testing.assert_close(split, together, **SAME)


def test_chunks_come_one_after_another_and_the_stream_may_be_longer(student: ToyStudent) -> None:
    text = student.encode(list(PROMPTS)[:1])
    chunks = stream(student, text, seeded_noise([1], SHAPE), frames=24)
    first = next(chunks)
    assert first.shape == (1, *SHAPE)
    assert len(list(chunks)) == 7
    short = next(stream(student, text, seeded_noise([1], SHAPE), frames=12))
    torch.testing.assert_close(first, short, **SAME)


def test_bad_steps_frames_and_seeds_are_refused(student: ToyStudent) -> None:
    check_steps(STEPS)
    for steps in ([], [0.9, 0.5], [1.0, 1.0], [1.0, 0.5, 0.0]):
        with pytest.raises(ValueError, match="steps: "):
            check_steps(steps)
    text = student.encode(["a"])
    with pytest.raises(ValueError, match="frames: got 10; needed: a multiple of the chunk 3"):
        next(stream(student, text, seeded_noise([1], SHAPE), frames=10))
    with pytest.raises(ValueError, match="seeds: got 1; needed: 2, one per prompt"):
        rollout(student, ["a", "b"], [1])


def test_a_saved_student_is_loaded_with_its_sizes(student: ToyStudent, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    student.save(path, torch.float32)
    loaded = ToyStudent.load(str(path))
    assert loaded.config == student.config
    for name, value in student.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    with pytest.raises(FileNotFoundError, match="checkpoint: nowhere is neither a file nor one of"):
        checkpoint_path("nowhere")
