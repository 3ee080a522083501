"""VideoAlign's weights and scores, and the discriminator that learns on from them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afd.discriminators.base import DifferentiableDiscriminator
from afd.discriminators.config import VideoAlignConfig
from afd.discriminators.videoalign.discriminator import VideoAlignDiscriminator
from afd.discriminators.videoalign.model import NORMS, VideoAlign, find_files, remap
from afd.discriminators.videoalign.prompt import OWN_TEMPLATE, REWARD_TOKENS
from afd.errors import ConfigError
from tests.afd.tiny_videoalign import (
    ALPHA,
    HIDDEN,
    LAYERS,
    PROMPTS,
    RANK,
    clips,
    released_state,
    seen,
    write_released,
    write_settings,
)
from tests.tolerances import NETWORK_REORDERED, VIDEOALIGN_SAME

Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"
EMBEDDING = "base_model.model.model.embed_tokens.weight"
# VideoAlign's own settings learn too slowly for tests of a few steps.
FAST: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 3e-3, "grad_clip": 100.0}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_released(tmp_path_factory.mktemp("videoalign") / "one")


@pytest.fixture
def altered(tmp_path: Path) -> Callable[..., Path]:
    """Writes a released folder whose state dict was changed by a function."""

    def write(change: Callable[[dict[str, Tensor]], Any], heads: int = 1) -> Path:
        folder = write_released(tmp_path / "altered", heads)
        file = folder / "root" / "checkpoint-7" / "model.pth"
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)
        return folder

    return write


def load(folder: Path, **settings: Any) -> VideoAlign:
    settings = {"dtype": torch.float32, "template": OWN_TEMPLATE, **settings}
    return VideoAlign.load(folder / "root", base=folder / "base", **settings)


def make(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return VideoAlignDiscriminator(
        load(folder, dtype=dtype), VideoAlignConfig(**{**FAST, **changes}), seed=seed
    )


# --- the released file ---


def test_every_tensor_of_the_file_reaches_the_network(released: Path) -> None:
    state = released_state(released / "base")
    scorer = load(released, lora=False)
    held = scorer.network.state_dict()
    merged = sum("lora_" in name for name in state)
    # Without LoRA, the language model's head and the reward head everything is a weight.
    assert len(held) == len(state) - merged - 2
    assert merged == 2 * 7 * LAYERS
    assert torch.equal(scorer.head_OD, state["base_model.model.rm_head.weight"].float())
    expected = state[f"{Q_PROJ}.base_layer.weight"].float()
    assert torch.equal(held["language_model.layers.1.self_attn.q_proj.weight"], expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_released_lora_is_merged_by_alpha_and_its_own_rank(
    rslora: bool, tmp_path: Path
) -> None:
    folder = write_released(tmp_path / "x")
    write_settings(folder / "root", peft_lora_config={"use_rslora": rslora})
    state = {k: v.float() for k, v in released_state(folder / "base").items()}
    product = state[f"{Q_PROJ}.lora_B.default.weight"] @ state[f"{Q_PROJ}.lora_A.default.weight"]
    scale = ALPHA / (RANK**0.5 if rslora else RANK)
    found = load(folder).network.language_model.layers[1].self_attn.q_proj.weight
    expected = state[f"{Q_PROJ}.base_layer.weight"] + scale * product
    torch.testing.assert_close(found, expected, **NETWORK_REORDERED)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.update({"base_model.model.extra.weight": torch.ones(1)}), "extra.weight"),
        (lambda s: s.update({"visual.stray": torch.ones(1)}), "visual.stray"),
        (lambda s: s.update({"base_model.model.model.norm.bias": torch.ones(1)}), "norm.bias"),
        (lambda s: s.pop("base_model.model.model.norm.weight"), "norm.weight"),
        (lambda s: s.pop("base_model.model.visual.patch_embed.proj.weight"), "patch_embed"),
        (lambda s: s.pop(f"{Q_PROJ}.lora_A.default.weight"), "q_proj"),
        (lambda s: s.pop(f"{Q_PROJ}.base_layer.weight"), "q_proj"),
        (lambda s: [s.pop(f"{Q_PROJ}.lora_{x}.default.weight") for x in "AB"], "q_proj"),
        (lambda s: s.update({f"{Q_PROJ}.weight": s[f"{Q_PROJ}.base_layer.weight"]}), "q_proj"),
        (lambda s: s.update({f"{Q_PROJ}.lora_A.default.weight": torch.ones(RANK, 3)}), "q_proj"),
        (lambda s: s.pop("base_model.model.rm_head.weight"), "rm_head"),
        (lambda s: s.update({"base_model.model.rm_head.weight": torch.ones(2, HIDDEN)}), "rm_head"),
        (lambda s: s.update({EMBEDDING: s[EMBEDDING][:-1]}), "tokenizer"),
        (lambda s: s.update({"base_model.model.model.norm.weight": torch.ones(3)}), "norm.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(
    altered: Callable[..., Path], change: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        load(altered(change))


def test_a_lora_of_another_rank_than_the_config_s_is_refused(tmp_path: Path) -> None:
    folder = write_released(tmp_path / "x")
    write_settings(folder / "root", peft_lora_config={"lora_r": 2 * RANK})
    with pytest.raises(ValueError, match="rank of LoRA"):
        load(folder)


class _Malicious:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_a_pickle_with_code_is_refused_and_never_run(
    altered: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="could run code"):
        load(altered(lambda state: state.update({"odd": _Malicious()})))
    assert "code ran" not in capsys.readouterr().out


def test_full_size_names_and_shapes_fit_the_network(shared: Path) -> None:
    """The shapes of the released file's 1123 tensors, without their 5 GB."""
    held = json.loads((shared / "golden" / "videoalign" / "full_size_keys.json").read_text())
    named, head = remap({k: torch.empty(v, device="meta") for k, v in held.items()}, alpha=128.0)
    assert (len(held), tuple(head.shape)) == (1123, (1, 1536))
    assert sum(name.startswith("visual.") for name in named) == 391
    assert len(named) == 1123 - 392 - 2


def test_the_model_is_found_by_its_root_its_checkpoint_or_its_file(released: Path) -> None:
    root = released / "root"
    file = root / "checkpoint-7" / "model.pth"
    assert find_files(root) == find_files(file.parent) == find_files(file)
    assert find_files(root) == (file, root / "model_config.json")


def test_other_layouts_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_config\.json"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"checkpoint-\*/model\.pth"):
        find_files(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        find_files(tmp_path)
    (tmp_path / "model.pth").touch()
    with pytest.raises(FileNotFoundError, match="beside"):
        find_files(tmp_path)


@pytest.mark.parametrize(
    "sections",
    [
        {"model_config": {"reward_token": "last"}},
        {"data_config": {"eval_dim": ["MQ", "VQ", "TA"]}},
        {"data_config": {"prompt_template_type": "none"}},
    ],
)
def test_models_that_read_their_rewards_otherwise_are_refused(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    folder = write_released(tmp_path / "x")
    write_settings(folder / "root", **sections)
    with pytest.raises(ValueError, match=next(iter(next(iter(sections.values()))))):
        load(folder, template=None)


def test_settings_come_from_the_checkpoint(tmp_path: Path) -> None:
    folder = write_released(tmp_path / "x")
    write_settings(folder / "root", data_config={"num_frames": 4, "max_frame_pixels": 9408})
    settings = load(folder).settings
    assert (settings.preprocessing.count, settings.preprocessing.max_pixels) == (4, 9408)
    assert settings.norms == NORMS | {"MQ": (1.0, 2.0)}


# --- scores ---


def test_vq_and_mq_do_not_see_the_prompt_and_ta_does(released: Path) -> None:
    video = clips(count=1).repeat(2, 1, 1, 1, 1)
    ratings = load(released).ratings(video, PROMPTS, normalised=False)
    for name in ("VQ", "MQ"):
        assert float(ratings[name].diff().abs()) <= VIDEOALIGN_SAME
    assert float(ratings["TA"].diff().abs()) > 0.1
    other = load(released).ratings(clips(seed=1), PROMPTS, normalised=False)
    assert all(float((other[n] - ratings[n]).abs().max()) > 0.01 for n in ("VQ", "MQ", "TA"))


def test_a_score_does_not_depend_on_what_else_is_in_the_batch(released: Path) -> None:
    scorer, video = load(released), clips()
    together = scorer.ratings(video, PROMPTS)
    alone = scorer.ratings(video, PROMPTS, micro_batch=1)
    for name, values in together.items():
        torch.testing.assert_close(values, alone[name], **NETWORK_REORDERED)


def test_three_heads_read_one_token_each(altered: Callable[..., Path]) -> None:
    folder = altered(lambda state: None, heads=3)
    scorer, video = load(folder), clips()
    assert scorer.head_OD.shape == (3, HIDDEN)
    states = scorer.states(scorer.settings.preprocessing.choose(video, 16.0), PROMPTS)
    ratings = scorer.ratings(video, PROMPTS, normalised=False)
    for i, name in enumerate(("VQ", "MQ", "TA")):
        expected = states[:, i] @ scorer.head_OD[i]
        torch.testing.assert_close(ratings[name].float(), expected, **NETWORK_REORDERED)


def test_normalised_ratings_are_z_scores_that_sum_to_overall(released: Path) -> None:
    scorer, video = load(released), clips()
    plain = scorer.ratings(video, PROMPTS, normalised=False)
    normal = scorer.ratings(video, PROMPTS)
    norms = NORMS | {"MQ": (1.0, 2.0)}
    for name, (mean, std) in norms.items():
        assert torch.equal(normal[name], (plain[name] - mean) / std)
    assert torch.equal(normal["Overall"], normal["VQ"] + normal["MQ"] + normal["TA"])


def test_rotary_tables_are_the_original_s_unless_asked_otherwise(released: Path) -> None:
    """The original casts its frequencies to bfloat16, and its weights have learnt with them."""
    tables = {}
    for rotary in ("released", "rounded", "exact"):
        network = load(released, rotary=rotary).network
        tables[rotary] = network.language_model.rotary_emb.inv_freq
        assert network.visual.rotary_pos_emb.inv_freq.isfinite().all()
    default = load(released).network
    assert torch.equal(default.language_model.rotary_emb.inv_freq, tables["released"])
    assert default.visual.rotary_pos_emb.inv_freq.dtype == torch.bfloat16
    assert torch.equal(tables["released"], tables["exact"].bfloat16().float())
    assert not torch.equal(tables["released"], tables["exact"])
    with pytest.raises(ValueError, match="rotary"):
        load(released, rotary="bf16")


def test_the_network_is_bfloat16_throughout_and_its_head_is_not(released: Path) -> None:
    scorer = load(released, dtype=torch.bfloat16)
    assert {p.dtype for p in scorer.network.parameters()} == {torch.bfloat16}
    assert scorer.head_OD.dtype == torch.float32
    exact = load(released).ratings(clips(), PROMPTS, normalised=False)
    found = scorer.ratings(clips(), PROMPTS, normalised=False)
    assert all(float((found[n] - exact[n]).abs().max()) < 0.5 for n in exact)


# --- learning ---


def test_before_its_first_step_it_scores_as_released(released: Path) -> None:
    video = clips()
    for head in ("TA", "sum"):
        discriminator: DifferentiableDiscriminator = make(released, head=head)
        plain = discriminator.released_ratings(
            discriminator.prepare(video), PROMPTS, normalised=False
        )  # type: ignore[attr-defined]
        expected = plain["TA" if head == "TA" else "Overall"].float()
        score = discriminator.score(discriminator.prepare(video), PROMPTS)
        assert not score.requires_grad
        torch.testing.assert_close(score, expected, **NETWORK_REORDERED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_moves_lora_and_head_and_the_released_model_stays_itself(
    released: Path, dtype: torch.dtype
) -> None:
    discriminator, video = make(released, dtype=dtype), seen()
    frozen = {
        k: v.clone() for k, v in discriminator.scorer.state_dict().items() if "lora_" not in k
    }
    before, score = (
        discriminator.released_ratings(video, PROMPTS),
        discriminator.score(video, PROMPTS),
    )
    trained = {k: v.detach().clone() for k, v in discriminator.trained().items()}
    assert len(trained) == 2 * 7 * LAYERS + 1
    assert all("language_model" in k or k == "rm_head.weight" for k in trained)
    assert {value.dtype for value in trained.values()} == {torch.float32}
    for seed in range(3):
        discriminator.step(video, seen(seed=seed + 5), PROMPTS)
    assert not any(torch.equal(v, trained[k]) for k, v in discriminator.trained().items())
    assert all(torch.equal(v, discriminator.scorer.state_dict()[k]) for k, v in frozen.items())
    assert not torch.equal(discriminator.score(video, PROMPTS), score)
    for name, values in discriminator.released_ratings(video, PROMPTS).items():
        assert torch.equal(values, before[name])


def test_it_learns_to_rank_the_teacher_first(released: Path) -> None:
    """The teacher's videos fade to black, the student's to white."""
    discriminator = make(released, learning_rate=1e-2)
    fade = torch.linspace(0, 1, seen().shape[1]).view(1, -1, 1, 1, 1)
    for seed in range(30):
        video = seen(seed)
        metrics = discriminator.step(video - fade, video + fade, PROMPTS)
    assert metrics.keys() == {"loss", "grad_norm", "accuracy", "margin"}
    unseen = seen(seed=99)
    margin = discriminator.score(unseen - fade, PROMPTS) - discriminator.score(
        unseen + fade, PROMPTS
    )
    assert (margin > 1).all()


@pytest.mark.parametrize(("loss", "head"), [("gan", "TA"), ("bt", "sum"), ("gan", "sum")])
def test_every_loss_falls_by_every_head(released: Path, loss: str, head: str) -> None:
    discriminator = make(released, loss=loss, head=head)
    losses = [discriminator.step(seen(), seen(seed=1), PROMPTS)["loss"] for _ in range(6)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("loss", ["bt", "gan"])
def test_pieces_make_the_same_update_as_the_whole(released: Path, loss: str) -> None:
    videos, others, prompts = seen(count=3), seen(seed=1, count=3), [*PROMPTS, "third"]
    updates = []
    for size in (None, 1, 2):
        discriminator = make(released, loss=loss, micro_batch=size)
        metrics = discriminator.step(videos, others, prompts)
        grads = {k: p.grad for k, p in discriminator.trained().items()}
        updates.append((metrics, grads))
    whole, grads = updates[0]
    for metrics, found in updates[1:]:
        assert metrics == pytest.approx(whole, rel=1e-4, abs=1e-5)
        for name, value in found.items():
            torch.testing.assert_close(value, grads[name], **NETWORK_REORDERED)


def test_checkpointing_computes_the_layers_twice_and_changes_no_gradient(released: Path) -> None:
    grads, passes = [], []
    for checkpointing in (False, True):
        discriminator, video = make(released, gradient_checkpointing=checkpointing), seen()
        calls: list[int] = []
        attention = discriminator.scorer.network.language_model.layers[0].self_attn
        attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        video.requires_grad_()
        discriminator.differentiable_score(video, PROMPTS).sum().backward()
        grads.append([video.grad, *(p.grad for p in discriminator.trained().values())])
        passes.append(len(calls))
    assert passes == [1, 2]
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


def test_pixels_get_the_gradient_that_raises_the_score(released: Path) -> None:
    discriminator, video = make(released), seen() * 0.8
    video.requires_grad_()
    before_B = discriminator.differentiable_score(video, PROMPTS)
    before_B.sum().backward()
    # A quarter of a level: rounding moves some pixels by a whole one and others not at all.
    size = 0.25 / 127.5
    expected_B = video.grad.abs().sum((1, 2, 3, 4)) * size
    with torch.no_grad():
        up_B, down_B = (
            discriminator.score(video + s * video.grad.sign(), PROMPTS) for s in (size, -size)
        )
    assert (up_B > before_B).all()
    assert (down_B < before_B).all()
    ratio_B = (up_B - down_B) / (2 * expected_B)
    assert ((ratio_B > 0.5) & (ratio_B < 1.5)).all()


def test_each_teacher_has_a_reward_head_that_begins_as_the_released_one(released: Path) -> None:
    plain, discriminator = (make(released, weight_decay=0.0) for _ in range(2))
    discriminator.with_teachers(["a", "b"])
    video, other = seen(), seen(seed=1)
    for name in ("a", "b"):
        same = discriminator.score(video, PROMPTS, [name] * 2)
        torch.testing.assert_close(same, plain.score(video, PROMPTS), **NETWORK_REORDERED)
    before = discriminator.head_OD.detach().clone()
    metrics = discriminator.step(video, other, PROMPTS, ["a", "a"])
    rows = len(before) // 2
    assert torch.equal(discriminator.head_OD[rows:], before[rows:])
    assert not torch.equal(discriminator.head_OD[:rows], before[:rows])
    assert "accuracy/a" in metrics
    assert "accuracy/b" not in metrics
    discriminator.step(video, other, PROMPTS, ["a", "b"])
    each = [discriminator.score(video, PROMPTS, [name] * 2) for name in ("a", "b")]
    assert not torch.equal(*each)
    torch.testing.assert_close(discriminator.score(video, PROMPTS), (each[0] + each[1]) / 2)
    again = make(released, seed=3, weight_decay=0.0)
    again.with_teachers(["a", "b"])
    again.load_state_dict(copy.deepcopy(discriminator.state_dict()))
    assert torch.equal(
        again.score(video, PROMPTS, ["b", "a"]), torch.stack([each[1][0], each[0][1]])
    )
    with pytest.raises(ValueError, match="state"):
        make(released).load_state_dict(discriminator.state_dict())


def test_a_saved_discriminator_continues_with_the_same_bits(released: Path) -> None:
    first, second = make(released, seed=1), make(released, seed=2)
    assert not torch.equal(*(next(iter(c.trained().values())) for c in (first, second)))
    first.step(seen(), seen(seed=1), PROMPTS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for discriminator in (first, second):
        discriminator.step(seen(seed=2), seen(seed=3), PROMPTS)
    assert torch.equal(first.score(seen(), PROMPTS), second.score(seen(), PROMPTS))
    with pytest.raises(ValueError, match="state"):
        make(released, lora_rank=2).load_state_dict(first.state_dict())


def test_a_saved_discriminator_refuses_another_released_checkpoint(
    released: Path, altered: Callable[..., Path]
) -> None:
    def nudge(state: dict[str, Tensor]) -> None:
        state["base_model.model.rm_head.weight"] += 1

    state = make(released).state_dict()
    with pytest.raises(ConfigError, match=r"discriminator\.checkpoint: holds other weights"):
        make(altered(nudge)).load_state_dict(state)


def test_the_rate_rises_and_gradients_are_clipped(released: Path) -> None:
    discriminator = make(released, learning_rate_warmup=4, grad_clip=1e-3)
    rates = []
    for seed in range(5):
        discriminator.step(seen(seed), seen(seed=9), PROMPTS)
        rates.append(discriminator.optimizer.adam.param_groups[0]["lr"])
        norms = torch.stack([p.grad.norm() for p in discriminator.trained().values()])
        assert float(norms.norm()) <= 1e-3 * 1.001
    assert rates == pytest.approx([3e-3 * i / 4 for i in (1, 2, 3, 4, 4)])


def test_building_one_leaves_the_global_random_numbers_alone(released: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make(released)
    assert torch.equal(torch.rand(3), expected)


def test_wrong_calls_name_the_argument(released: Path) -> None:
    discriminator = make(released)
    with pytest.raises(ValueError, match="prompts"):
        discriminator.score(seen(), PROMPTS[:1])
    with pytest.raises(ValueError, match="student_BFCHW"):
        discriminator.step(seen(), seen(count=1), PROMPTS)
    with pytest.raises(ValueError, match="prompts"):
        discriminator.score(seen(), [f"a {REWARD_TOKENS[0]}", "b"])
    too_long = make(released, window=1.0)  # the toy's videos have 12 frames, 0.75 s
    with pytest.raises(ValueError, match=r"discriminator\.window: got 1 s"):
        too_long.score(seen(), PROMPTS)
