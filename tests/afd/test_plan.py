"""The dry run: its formulas against real networks and counts, its money against a real ledger."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from afd import cli
from afd.config.parallel import ParallelConfig
from afd.config.run import RunConfig, load_config, make_config
from afd.errors import DONE, MISTAKE, ConfigError
from afd.methods.config import AfdConfig
from afd.methods.optimizer import StudentOptimizer
from afd.models.config import LoraConfig
from afd.models.policies import Policies, make_policies
from afd.models.wan.network import CausalWan
from afd.models.wan.sizes import LATENTS
from afd.models.wan.student import WanStudent
from afd.models.wan.types import WanConfig
from afd.models.wan.vae import VideoVAE
from afd.models.wan.vae_files import WAN22
from afd.planning import cost_model as cost
from afd.planning.autoencoders import AUTOENCODERS
from afd.planning.cost_model import Net
from afd.planning.plan import Plan, make_plan, show, student_net
from afd.teachers.forecast import Forecast
from afd.teachers.paid.contents import Saved
from afd.teachers.paid.ledger import Ledger
from afd.teachers.paid.service import Order
from benchmarks.hardware import pass_work
from tests import tolerances
from tests.afd.tiny_wan import HEIGHT, WIDTH, tiny

CONFIGS = Path(__file__).parents[2] / "python" / "afd" / "configs"
RELEASED = Net(1536, 8960, 30, 512, 1_418_996_800, 21, 3, 1560)


# --- operations ---


def forecast(config: RunConfig) -> Forecast:
    drawn = config.updates * config.prompts_per_update
    return config.teacher.forecast(config.teacher_dir, drawn)


def test_the_update_takes_what_the_roofline_counts() -> None:
    # kernels.md, section 2 (b), PFLOP a video: A, B, C, and C with the caches of the rollout. The
    # roofline counts the last layer of a context pass whole, and not its last chunk.
    before = RELEASED.chunks - 1
    roofline = RELEASED.whole(before, before * (before + 1) / 2)
    context = cost.context_flop(RELEASED) - roofline
    shared = cost.nft_flop(RELEASED, "shared_context", checkpointed=False)
    kept = cost.nft_flop(RELEASED, "shared_context", kept=True, checkpointed=False)
    own = cost.nft_flop(RELEASED, "own_context", checkpointed=False)
    found = [own - 3 * context, shared - context, shared - kept - context]
    assert [round(flop / 1e15, 2) for flop in found] == [1.44, 1.12, 0.16]


def test_a_rollout_takes_what_the_roofline_counts_but_the_last_context_pass() -> None:
    counted = 990e12 * (1 - 0.041)
    # The last layer of a context pass, of which the roofline counts more than keys and values.
    layers = [RELEASED.whole(1, c) - RELEASED.context(1, c) for c in range(1, RELEASED.chunks)]
    found = cost.rollout_flop(RELEASED, 4) + sum(layers)
    assert found == pytest.approx(counted, rel=tolerances.COUNTED_TO_THREE_DIGITS)


def test_a_pass_takes_what_the_benchmarks_floor_counts() -> None:
    wan, tokens = WanConfig(), 3 * 1560
    for chunk in (1, 4, 7):
        assert RELEASED.whole(1, chunk) == pass_work(wan, tokens, chunk * tokens, 1, 2).flop


def test_adapters_add_their_products_and_spare_gradients_of_frozen_weights() -> None:
    adapted = Net(**{**RELEASED.__dict__, "lora": 256})
    extra = 2 * adapted.lora_parameters / 10 * 8.4  # all but keys and values of the prompt
    per_token = adapted.linear(1) - RELEASED.linear(1)
    assert 0 < per_token <= 2 * adapted.lora_parameters
    assert per_token == pytest.approx(extra, rel=0.1)
    assert cost.linear_backward(adapted, 1) < cost.linear_backward(RELEASED, 1)


def test_fewer_chunks_more_draws_and_no_prior_change_the_work_as_they_should() -> None:
    whole = cost.nft_flop(RELEASED, "shared_context", kept=True)
    part = cost.nft_flop(RELEASED, "shared_context", kept=True, part=3 / 7)
    assert part == pytest.approx(whole * 3 / 7)
    assert cost.nft_flop(RELEASED, "shared_context", kept=True, draws=2) == pytest.approx(2 * whole)
    assert cost.nft_flop(RELEASED, "shared_context", kept=True, prior=False) < whole


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_the_autoencoders_work_is_that_of_its_layers(name: str) -> None:
    from diffusers import AutoencoderKLWan

    wan22 = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, **WAN22}
    with torch.device("meta"):
        model = AutoencoderKLWan(**(wan22 if name == "wan2.2" else {}))
    sizes = AUTOENCODERS[LATENTS[name]]
    assert sum(p.numel() for p in model.parameters()) == sizes.parameters
    vae = VideoVAE(model)
    channels, _, space = vae.latents
    with FlopCounterMode(display=False) as decoded, torch.no_grad():
        vae.stream()(torch.zeros(1, 2, channels, 480 // space, 832 // space, device="meta"))
    with FlopCounterMode(display=False) as encoded, torch.no_grad():
        vae.encode(torch.zeros(1, 5, 3, 480, 832, device="meta"))
    near = tolerances.EXACT_COUNT
    counted = sizes.decode_flop(2, 480 * 832), sizes.encode_flop(2, 480 * 832)
    assert decoded.get_total_flops() == pytest.approx(counted[0], rel=near)
    assert encoded.get_total_flops() == pytest.approx(counted[1], rel=near)


def test_the_readers_and_the_text_encoders_sizes_are_the_released_ones() -> None:
    from transformers import Qwen2VLConfig, Qwen2VLModel, UMT5Config, UMT5EncoderModel

    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_660}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16}
    umt5 = {"vocab_size": 256_384, "d_model": 4096, "d_ff": 10_240, "num_layers": 24}
    umt5 |= {"num_heads": 64, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        reader = Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision))
        encoder = UMT5EncoderModel(UMT5Config(**umt5))
    held = sum(p.numel() for p in reader.parameters())
    assert cost.VideoAlignSizes().parameters == pytest.approx(
        held, rel=tolerances.COUNTED_TO_THREE_DIGITS
    )
    assert sum(p.numel() for p in encoder.parameters()) == cost.TEXT_PARAMETERS


# --- memory ---


def held_by(policies: Policies, optimizer: StudentOptimizer) -> int:
    """Bytes of all parameters, masters, gradients and moments, each memory once."""
    found: dict[int, int] = {}

    def note(tensor: Tensor | None) -> None:
        if tensor is not None:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()

    for name in (*policies.names, "ref"):
        with policies.using(name) as student:
            for parameter in student.net.parameters():
                note(parameter)
    for name in policies.names:
        for master in policies.weights(name).masters:
            note(master)
            note(master.grad)
    for state in optimizer.adam.state.values():
        for value in state.values():
            if value.ndim:  # a step counter is no moment
                note(value)
    return sum(found.values())


@pytest.mark.parametrize("lora", [LoraConfig(rank=4, alpha=4.0), None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_optimizer_and_gradients_take_the_bytes_of_the_plan(
    lora: LoraConfig | None, dtype: str, tmp_path: Path
) -> None:
    torch_dtype = getattr(torch, dtype)
    net = tiny(dim=64, ffn_dim=96)
    student = WanStudent(net.to(torch_dtype), height=HEIGHT, width=WIDTH, frames=6)
    config = small(dtype=dtype, lora=None if lora is None else lora.model_dump())
    policies = make_policies(student, ("theta", "old", "ref"), lora=lora)
    optimizer = StudentOptimizer(policies.weights("theta"), AfdConfig())
    x = torch.randn(1, 6, 4, HEIGHT, WIDTH, dtype=torch_dtype)
    text = torch.randn(1, 5, 8, dtype=torch_dtype)
    optimizer.step(student.net(x, torch.full((1, 1), 500.0), text).float().square().mean())
    plan = make_plan(config)
    wanted = {"network", "adapters", "reference", "optimizer", "gradients"}
    parts = {part.name: part.bytes for part in plan.memory if part.name in wanted}
    # The plan takes the released network's sizes where no checkpoint is; here it is the tiny one.
    net_of = student_net(config)
    assert net_of.parameters != sum(p.numel() for p in tiny(dim=64, ffn_dim=96).parameters())
    scaled = planned(parts, net_of, student, lora)
    assert scaled == held_by(policies, optimizer)


def planned(parts: dict[str, int], of: Net, student: WanStudent, lora: LoraConfig | None) -> int:
    """The plan's bytes of a network of another size: each part is proportional to its numbers."""
    wan = student.net.config
    sizes = (wan.dim, wan.ffn_dim, wan.num_layers, wan.text_len)
    numbers = sum(p.numel() for n, p in student.net.named_parameters() if ".lora_" not in n)
    ours = Net(*sizes, numbers, 6, wan.chunk, 6, None if lora is None else lora.rank)
    total = 0
    for name, size in parts.items():
        frozen = name == "reference" or (name == "network" and lora is not None)
        then, now = (of.parameters, ours.parameters) if frozen else (of.trained, ours.trained)
        assert size % then == 0
        total += size // then * now
    return total


def small(**student: Any) -> RunConfig:
    """A run at the released sizes and little else."""
    return make_config(
        {
            "method": "afd",
            "video": {"frames": 81, "height": 480, "width": 832, "fps": 16},
            "student": {"kind": "wan", **student},
            "discriminator": {"kind": "videoalign"},
            "evaluation": {"kind": "none"},
        }
    )


def test_a_cache_takes_the_bytes_of_the_formula() -> None:
    net = tiny()
    text = torch.zeros(2, 5, 8)
    cache = net.new_cache(text, 6, HEIGHT, WIDTH)
    sizes = Net(32, 48, 2, 5, 0, 6, 3, (HEIGHT // 2) * (WIDTH // 2))
    assert cost.kv_bytes(sizes, 2, 4) == cache.bytes


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_autograd_keeps_is_near_the_formula(checkpointed: bool) -> None:
    # One layer more at the released proportions and a long enough video: what a layer keeps.
    tokens, kept = 96, []
    for layers in (1, 2):
        torch.manual_seed(0)
        wan = WanConfig(
            dim=384, ffn_dim=2240, num_heads=3, num_layers=layers, text_dim=8, text_len=8
        )
        net = CausalWan(wan).bfloat16()
        net.checkpoint_blocks = checkpointed
        x = torch.randn(1, 6, 16, 4, tokens, dtype=torch.bfloat16)
        text = torch.randn(1, 8, 8, dtype=torch.bfloat16)
        context = net.clean_context(x, text)
        known = {t.untyped_storage().data_ptr() for pair in context for t in pair}
        known |= {p.untyped_storage().data_ptr() for p in net.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, into: dict[int, int] = saved, known: set[int] = known) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                into[storage.data_ptr()] = storage.nbytes()
            return tensor

        context = [(k.detach(), v.detach()) for k, v in context]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(x, torch.full((1, 6), 500.0), text, context)
        kept.append(sum(saved.values()))
    one, two = (
        cost.activation_bytes(
            Net(384, 2240, layers, 8, 0, 6, 3, tokens), 1, 2, checkpointed=checkpointed
        )
        for layers in (1, 2)
    )
    assert kept[1] - kept[0] == pytest.approx(two - one, rel=tolerances.ACTIVATION_ESTIMATE)


# --- plans ---


def printed(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=160)
    show(plan, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_released_size_is_planned_without_any_file() -> None:
    plan = make_plan(load_config(CONFIGS / "afd_self_forcing_480x832.yaml"))
    told = printed(plan)
    assert plan.net.parameters == RELEASED.parameters
    for name in ("adapters", "optimizer", "cache", "decode", "VideoAlign", "text encoder"):
        assert name in told
    for phase in ("rollout", "decode", "discriminator", "student", "evaluation"):
        assert any(one.name == phase and one.seconds > 0 for one in plan.phases)
    assert "estimate, assuming 35%" in told
    assert "student.checkpoint: checkpoints/self_forcing_dmd.pt is not there" in told
    assert "nothing was run" in told


def test_two_gpus_halve_the_hours_and_shards_the_weights() -> None:
    config = load_config(CONFIGS / "afd_self_forcing_480x832.yaml")
    one, two = make_plan(config), make_plan(config, 2)
    assert one.gpu_seconds == two.gpu_seconds
    assert f"{one.gpu_seconds / 7200:.1f} hours on 2 GPUs" in printed(two)
    shards = make_plan(config.model_copy(update={"parallel": ParallelConfig(weights="fsdp")}), 2)
    bytes_of = [{p.name: p.bytes for p in plan.memory}["optimizer"] for plan in (two, shards)]
    assert bytes_of[0] == 2 * bytes_of[1]
    with pytest.raises(ConfigError, match="processes is 9; needed: 1 to prompts_per_update, 8"):
        make_plan(config, 9)


def test_what_a_run_would_refuse_its_plan_refuses() -> None:
    config = load_config(CONFIGS / "afd_self_forcing_480x832.yaml", ["parallel=fsdp"])
    with pytest.raises(ConfigError, match=r"per_update is 8; parallel=fsdp .* multiple of 3"):
        make_plan(config, 3)
    for file in ("afd_self_forcing_480x832", "quickstart"):
        with pytest.raises(ConfigError, match="chunks_per_update: got 9; needed: at most the"):
            make_plan(load_config(CONFIGS / f"{file}.yaml", ["afd.chunks_per_update=9"]))
    with pytest.raises(ConfigError, match=r"video\.frames.*got 9, 16, 16; needed: 12, 16, 16"):
        make_plan(make_config({}, ["video.frames=9"]))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "contains none of prompts.jsonl"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "lists no video"),
        (b'{"file": "a.mp4"}\n', "1 wrong, such as line 1: needs a file and a prompt"),
        (b'{"file": "a.mp4", "prompt": "p"}\n' * 2, "2 wrong, such as a.mp4: no such file"),
    ],
)
def test_what_a_folder_lacks_is_told(tmp_path: Path, text: bytes | None, told: str) -> None:
    if text is not None:
        (tmp_path / "prompts.jsonl").write_bytes(text)
    config = load_config(CONFIGS / "folder.yaml", [f"teacher.path={tmp_path}"])
    assert any(told in line for line in make_plan(config).missing)


def test_kept_contexts_are_the_roofline_gigabytes() -> None:
    # kernels.md: 193 GB for the caches of 32 videos, the prompts' not counted.
    config = load_config(CONFIGS / "afd_self_forcing_480x832.yaml", ["afd.keep_context=true"])
    plan = make_plan(config)
    kept = next(part for part in plan.memory if part.name == "kept contexts")
    prompts = 2 * 30 * 32 * 512 * 1536 * 2
    near = tolerances.COUNTED_TO_THREE_DIGITS
    assert kept.bytes - prompts == pytest.approx(193e9, rel=near)
    assert "exceeds an H200" in printed(plan)


def test_a_gan_pays_for_gradients_through_the_decode() -> None:
    gan, afd = (
        make_plan(load_config(CONFIGS / f"{name}_self_forcing_480x832.yaml"))
        for name in ("gan", "afd")
    )
    names = {part.name for part in gan.memory}
    assert "decode with gradients" in names - {part.name for part in afd.memory}
    assert gan.peaks()["student"] > afd.peaks()["student"]
    convolutions = {phase.name: phase.convolutions for phase in gan.phases}
    assert convolutions["student"] > 0

    # Every rollout is shown to the discriminator before the update makes it again.
    decoded = convolutions["decode"], convolutions["student"]
    assert decoded[1] == 3 * decoded[0] > 0


def test_a_fields_update_costs_and_keeps_what_fine_tuning_does() -> None:
    names = ("updates=10", "dmd.score_updates=3", "dmd.score_warmup_updates=20")
    dmd = make_plan(load_config(CONFIGS / "dmd_self_forcing_480x832.yaml", names))
    sft = make_plan(load_config(CONFIGS / "sft_self_forcing_480x832.yaml"))
    phases = {phase.name: phase for phase in dmd.phases}
    fine_tuning = next(phase.flop for phase in sft.phases if phase.name == "student")
    # 32 videos there; here 3 updates of real on 8 teacher's and of fake on 32 rollouts.
    assert phases["discriminator"].flop == pytest.approx(fine_tuning * 3 * (8 + 32) / 32)
    # The student begins once a field has 20 updates: in the seventh of the run.
    assert phases["student"].times == 10 - 6
    bytes_of = [{p.name: p.bytes for p in plan.memory} for plan in (dmd, sft)]
    assert bytes_of[0]["fields' activations"] == bytes_of[1]["activations"]
    assert dmd.peaks()["discriminator"] > dmd.peaks()["student"]


def test_the_toy_has_memory_and_no_gpu_time() -> None:
    told = printed(make_plan(load_config(CONFIGS / "quickstart.yaml")))
    assert "memory of each CPU process" in told
    assert "GPU-s" not in told
    assert "200 videos; nothing is bought" in told


def test_a_checkpoint_that_is_there_gives_the_sizes(tmp_path: Path) -> None:
    from afd.models.wan.checkpoints import save_self_forcing

    net = tiny(in_dim=16, out_dim=16)
    save_self_forcing(tmp_path / "tiny.pt", generator=net)
    student = {"checkpoint": str(tmp_path / "tiny.pt"), "head_dim": 16, "text_len": 5}
    plan = make_plan(small(**student))
    assert plan.net.parameters == sum(p.numel() for p in net.parameters())
    assert plan.net.dim == 32


# --- money ---


def paid(folder: Path, **fetch: Any) -> RunConfig:
    prompts = folder / "asked.txt"
    prompts.write_text("".join(f"prompt {n}\n" for n in range(10)), encoding="utf-8")
    api = {"model": "seedance", "prompts": str(prompts), "draws": 2}
    fetch = {"price_usd": 0.5, "budget_usd": 5.0, "concurrency": 4} | fetch
    teacher = {"kind": "ark", "path": str(folder / "videos"), "api": api, "fetch": fetch}
    return make_config({"updates": 5, "prompts_per_update": 3, "teacher": teacher})


def test_only_what_the_run_will_see_and_the_folder_lacks_is_to_be_bought(tmp_path: Path) -> None:
    config = paid(tmp_path)
    before = forecast(config)
    assert (before.wanted, before.distinct, before.to_buy) == (20, 15, 15)
    assert before.cost_usd == pytest.approx(7.5)
    assert before.wait_s == 4 * 120
    assert not (tmp_path / "videos").exists()
    ledger = Ledger(tmp_path / "videos")
    order = Order("ark", "seedance", "prompt 0", {}, seed=1)
    row = ledger.reserve(order, 0.5, 5.0)
    ledger.done(row, order.file, Saved(sha256="0", bytes=1), None)
    other = Order("ark", "seedance", "prompt 1", {}, seed=1)
    ledger.end(ledger.reserve(other, 0.5, 5.0), "failed", "content", "refused", paid=False)
    ledger.close()
    after = forecast(config)
    assert (after.there, after.rejected, after.to_buy) == (1, 1, 13)
    assert after.spent_usd == pytest.approx(0.5)
    assert after.measured
    told = "\n".join(after.lines(3600.0))
    assert "13 to buy at about 0.50 USD: 6.50 USD" in told
    assert "4.50 left, which is not enough" in told


def test_without_its_prompts_a_teachers_cost_is_not_made_up(tmp_path: Path) -> None:
    config = paid(tmp_path)
    (tmp_path / "asked.txt").unlink()
    told = "\n".join(forecast(config).lines(0.0))
    assert told == (
        "teacher: ark, about 0.50 USD a video; the number of videos is unknown without the prompts"
    )
    missing = make_plan(config).missing
    assert any("teacher.api.prompts" in line and "cannot be read" in line for line in missing)


# --- the command ---


def test_the_dry_run_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(CONFIGS / "sft_self_forcing_480x832.yaml")
    assert cli.main(["train", config, "--dry-run", "--processes", "2", "updates=10"]) == DONE
    assert "10 updates" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert cli.main(["train", config, "--dry-run", "--processes", "0"]) == MISTAKE
