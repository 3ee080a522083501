"""What a run exports is what its student computes, in the loaders of those who will load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from afd.cli import main
from afd.config.run import RunConfig, make_config, plain, to_yaml
from afd.errors import ConfigError
from afd.export import ExportConfig, export
from afd.lab.student import ToyStudent
from afd.models.config import DTYPES
from afd.models.policies import Policies, make_policies
from afd.models.wan.checkpoints import load_checkpoint, save_self_forcing
from afd.models.wan.network import CausalWan
from afd.models.wan.student import WanStudent
from afd.trainer import checkpoint
from tests.afd.tiny_methods import make_afd, step, wan_batch, wan_student
from tests.afd.tiny_wan import HEIGHT, WIDTH, text, tiny, video
from tests.tolerances import NETWORK_BFLOAT16, NETWORK_FORWARD

FRAMES, STEP = 3, 7
RANK, ALPHA = 4, 6
KINDS = pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}], ids=["full", "lora"])


def forward(net: CausalWan, dtype: torch.dtype = torch.float32) -> Tensor:
    """One chunk over all frames: the causal network is then the bidirectional one."""
    with torch.no_grad():
        t_B1 = torch.tensor([[937.5], [250.25]])
        out: Tensor = net(video(net, FRAMES).to(dtype), t_B1, text(net).to(dtype))
        return out


def diffusers_forward(model: Any, net: CausalWan) -> Tensor:
    x_BCFHW = video(net, FRAMES).transpose(1, 2)
    with torch.no_grad():
        t_B = torch.tensor([937.5, 250.25])
        out: Tensor = model(x_BCFHW, t_B, text(net), return_dict=False)[0]
        return out.transpose(1, 2)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def save_run(config: RunConfig, method_state: dict[str, Any]) -> None:
    """The run folder that the trainer leaves after STEP updates."""
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    state = {
        "update": STEP,
        "method": config.method,
        "config": plain(config),
        "method_state": method_state,
    }
    checkpoint.save(config.run_dir / "checkpoints", state, keep=1)


# Other keys of a Wan student's run, as the defaults are the toy's.
REST = {
    "video": {"frames": 9},
    "discriminator": {"kind": "latent"},
    "evaluation": {"kind": "none"},
}


class Run:
    """A run folder with one checkpoint: start weights, and versions that have moved from them."""

    def __init__(
        self, folder: Path, *, lora: bool = True, ema: bool = False, dtype: str = "float32"
    ) -> None:
        self.folder, self.start = folder / "run", folder / "start.pt"
        save_self_forcing(self.start, generator=tiny())
        student = {
            "kind": "wan",
            "checkpoint": str(self.start),
            "head_dim": 16,
            "text_len": 5,
            "dtype": dtype,
            "lora": {"rank": RANK, "alpha": ALPHA} if lora else None,
        }
        self.config: RunConfig = make_config(
            {"name": "tiny", "out": str(self.folder), "student": student} | REST
        )
        names = ("theta", "old", "ema") if ema else ("theta", "old")
        self.policies: Policies = make_policies(
            WanStudent(base(self).to(DTYPES[dtype]), height=HEIGHT, width=WIDTH, frames=FRAMES),
            names,
            lora=self.config.student.lora,
        )
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name in names:
                for master in self.policies.weights(name).masters:
                    master.add_(torch.randn(master.shape, generator=draw), alpha=0.1)
                self.policies.weights(name).publish()
        save_run(self.config, {"policies": self.policies.state_dict()})

    def output(self, version: str) -> Tensor:
        with self.policies.using(version) as student:
            return forward(student.net)

    def export(self, **settings: Any) -> Path:
        return export(self.folder, ExportConfig(**settings))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("lora"), ema=True)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("full"), lora=False)


def base(run: Run) -> CausalWan:
    return load_checkpoint(run.start, head_dim=16, text_len=5)


@pytest.mark.parametrize("version", ["theta", "old", "ema"])
def test_peft_loads_the_adapter_and_computes_the_same(
    run: Run, tmp_path: Path, version: str
) -> None:
    from peft import PeftModel

    out = run.export(out=tmp_path / "adapter", kind="peft", weights=version)
    net = base(run)
    model = PeftModel.from_pretrained(net, str(out))
    assert torch.equal(forward(net), run.output(version))
    held = {k.replace(".default.", "."): v for k, v in model.state_dict().items()}
    for name, value in run.policies.weights(version).state_dict().items():
        assert torch.equal(held[f"base_model.model.{name}"], value)
    whole = model.merge_and_unload()
    assert error(forward(whole), run.output(version)) <= NETWORK_FORWARD


def test_peft_injects_the_adapter_into_our_network(run: Run, tmp_path: Path) -> None:
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    out = run.export(out=tmp_path / "adapter", kind="peft", weights="ema")
    net = base(run)
    inject_adapter_in_model(PeftConfig.from_pretrained(str(out)), net)
    loaded = set_peft_model_state_dict(net, load_peft_weights(str(out), device="cpu"))
    assert not loaded.unexpected_keys
    assert torch.equal(forward(net), run.output("ema"))


def pipeline(run: Run, folder: Path) -> Any:
    """diffusers' pipeline around its own transformer with the run's start weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    from afd.models.wan.checkpoints import save_diffusers

    save_diffusers(folder / "base", base(run))
    transformer = WanTransformer3DModel.from_pretrained(folder / "base")
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer.eval(),
    )


def test_diffusers_pipeline_loads_the_lora_and_computes_the_same(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = run.export(out=tmp_path / "lora", weights="old")
    pipe, net = pipeline(run, tmp_path), base(run)
    assert error(diffusers_forward(pipe.transformer, net), run.output("ref")) <= NETWORK_FORWARD
    caplog.clear()
    pipe.load_lora_weights(str(out))
    assert not caplog.records, "no key without its place"
    expected = run.output("old")
    assert error(expected, run.output("ref")) > 0.01
    assert error(diffusers_forward(pipe.transformer, net), expected) <= NETWORK_FORWARD
    settings = pipe.transformer.peft_config["default_0"]
    assert (settings.r, settings.lora_alpha) == (RANK, ALPHA)
    pipe.unload_lora_weights()
    pipe.transformer.load_lora_adapter(str(out), adapter_name="afd", use_safetensors=True)
    pipe.transformer.set_adapters("afd", 1.0)
    assert error(diffusers_forward(pipe.transformer, net), expected) <= NETWORK_FORWARD
    pipe.transformer.fuse_lora()
    assert error(diffusers_forward(pipe.transformer, net), expected) <= NETWORK_FORWARD


def test_diffusers_would_have_named_the_lora_as_we_do(run: Run, tmp_path: Path) -> None:
    """Loaded there and saved by its own saver, it is the same file but for the run's note."""
    out = run.export(out=tmp_path / "lora")
    pipe = pipeline(run, tmp_path)
    pipe.load_lora_weights(str(out), adapter_name="default")
    pipe.transformer.save_lora_adapter(tmp_path / "theirs", adapter_name="default")
    file = "pytorch_lora_weights.safetensors"
    with safe_open(out / file, "pt") as ours, safe_open(tmp_path / "theirs" / file, "pt") as theirs:
        names = {f"transformer.{name}" for name in theirs.keys()}  # noqa: SIM118
        assert set(ours.keys()) == names
        for name in names:
            other = theirs.get_tensor(name.removeprefix("transformer."))
            assert torch.equal(ours.get_tensor(name), other)


def policy_weights(run: Run, version: str) -> dict[str, Tensor]:
    """Whole weights of a version, added up here in another way, and near to PEFT's."""
    from peft.tuners.lora import LoraLayer

    with run.policies.using(version) as student:
        state = dict(student.net.state_dict())
        weights = {k: v for k, v in state.items() if ".lora_" not in k}
        weights = {k.replace(".base_layer", ""): v.clone() for k, v in weights.items()}
        for name, module in student.net.named_modules():
            if isinstance(module, LoraLayer):
                adapter = "default" if version == "theta" else version
                a_RI, b_OR = (x[adapter].weight.detach() for x in (module.lora_A, module.lora_B))
                delta = in_rank_order(b_OR, a_RI) * module.scaling[adapter]
                peft = module.get_delta_weight(adapter)  # type: ignore[operator]
                torch.testing.assert_close(delta, peft.detach())
                weights[f"{name}.weight"] += delta
    return weights


def in_rank_order(b_OR: Tensor, a_RI: Tensor) -> Tensor:
    """B A, each product and sum rounded on its own."""
    total = np.zeros((len(b_OR), a_RI.shape[1]), np.float32)
    for column, row in zip(b_OR.T.numpy(), a_RI.numpy(), strict=True):
        total = total + np.outer(column, row)
    return torch.from_numpy(total)


@pytest.mark.parametrize("which", ["run", "full"])
def test_self_forcing_gets_both_whole_networks_bit_for_bit(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run: Run = request.getfixturevalue(which)
    version = "ema" if which == "run" else "old"
    file = run.export(out=tmp_path / "out", kind="self_forcing") / "model.pt"
    held = torch.load(file, weights_only=True)
    assert list(held) == ["generator", "generator_ema", "afd"]
    assert all(name.startswith("model.") for name in held["generator"])
    for ema, name in ((False, "theta"), (True, version)):
        net = load_checkpoint(file, ema=ema, head_dim=16, text_len=5)
        expected = policy_weights(run, name)
        assert net.state_dict().keys() == expected.keys()
        for key, value in net.state_dict().items():
            assert torch.equal(value, expected[key]), key
        assert error(forward(net), run.output(name)) <= NETWORK_FORWARD
    only = run.export(out=tmp_path / "theta", kind="self_forcing", weights="theta") / "model.pt"
    assert list(torch.load(only, weights_only=True)) == ["generator", "afd"]


@pytest.mark.parametrize("which", ["run", "full"])
def test_diffusers_loads_the_whole_network_and_computes_the_same(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from diffusers import WanTransformer3DModel

    run: Run = request.getfixturevalue(which)
    out = run.export(out=tmp_path / "out", kind="diffusers", weights="old")
    model, info = WanTransformer3DModel.from_pretrained(
        out, subfolder="transformer", output_loading_info=True
    )
    assert not any(info.values()), info
    expected = run.output("old")
    assert error(diffusers_forward(model.eval(), base(run)), expected) <= NETWORK_FORWARD
    again = load_checkpoint(out, text_len=5)
    for key, value in policy_weights(run, "old").items():
        assert torch.equal(again.state_dict()[key], value)


def test_weights_are_rounded_once_to_the_asked_dtype(run: Run, tmp_path: Path) -> None:
    file = run.export(out=tmp_path / "whole", kind="self_forcing", dtype="bfloat16") / "model.pt"
    held = load_checkpoint(file, ema=True, head_dim=16, text_len=5).state_dict()
    for key, value in policy_weights(run, "ema").items():
        assert torch.equal(held[key], value.bfloat16())
    out = run.export(out=tmp_path / "lora", dtype="float16", weights="old")
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as opened:
        name = "blocks.1.ffn.2.lora_B.weight"
        tensor = opened.get_tensor("transformer." + name.replace("ffn.2", "ffn.net.2"))
    assert torch.equal(tensor, run.policies.weights("old").state_dict()[name].half())


def test_a_bf16_run_exports_what_bf16_has_not_rounded(tmp_path: Path) -> None:
    """The file's own start weights and the fp32 masters, though the network saw neither."""
    run = Run(tmp_path, dtype="bfloat16")
    file = run.export(out=tmp_path / "out", kind="self_forcing") / "model.pt"
    held = load_checkpoint(file, ema=True, head_dim=16, text_len=5)
    weights, expected = run.policies.weights("old").state_dict(), base(run).state_dict()
    for name, value in weights.items():
        if ".lora_B" in name:
            layer = name.partition(".lora_B")[0]
            change = in_rank_order(value, weights[f"{layer}.lora_A.weight"]) * (ALPHA / RANK)
            expected[f"{layer}.weight"] = expected[f"{layer}.weight"] + change
    for name, value in held.state_dict().items():
        assert torch.equal(value, expected[name])
    with run.policies.using("old") as student:
        rounded = forward(student.net, torch.bfloat16).float()
    assert error(rounded, forward(held)) <= NETWORK_BFLOAT16


def test_everything_says_where_it_comes_from(run: Run, tmp_path: Path) -> None:
    files = {
        "peft": "adapter_model.safetensors",
        "diffusers_lora": "pytorch_lora_weights.safetensors",
        "self_forcing": "model.pt",
        "diffusers": "transformer/diffusion_pytorch_model.safetensors",
    }
    for kind, file in files.items():
        out = run.export(out=tmp_path / kind, kind=kind)
        note = json.loads((out / "afd.json").read_text())
        if kind == "self_forcing":
            inside = torch.load(out / file, weights_only=True)["afd"]
        else:
            with safe_open(out / file, "pt") as opened:
                inside = opened.metadata()["afd"]
        assert json.loads(inside) == note
        assert (note["run"], note["update"], note["weights"]) == ("tiny", STEP, "ema")
        assert (note["kind"], note["start"]) == (kind, "start.pt")
        assert note["lora"] == {"rank": RANK, "alpha": ALPHA}
        assert len(note["config_sha256"]) == len(note["checkpoint_sha256"]) == 64
        assert {"afd", "torch", "peft"} <= note["exported_with"].keys()
        assert str(tmp_path) not in json.dumps(note)
        assert str(run.folder) not in json.dumps(note)
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_the_command_exports_and_says_in_one_line_what_it_cannot(
    run: Run, full: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run.folder), f"out={tmp_path}/a", "kind=peft"]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/a"
    # It is never written over.
    assert main(["export", str(run.folder), f"out={tmp_path}/a", "kind=peft"]) == 2
    assert "new or empty folder" in capsys.readouterr().err
    for kind in ("peft", "diffusers_lora"):
        assert main(["export", str(full.folder), f"out={tmp_path}/b", f"kind={kind}"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "trained every weight" in said
        assert "self_forcing or diffusers" in said
    assert main(["export", str(full.folder), f"out={tmp_path}/b", "weights=ema"]) == 2
    assert "this run has old, theta" in capsys.readouterr().err
    assert main(["export", str(full.folder), f"out={tmp_path}/b", "knid=peft"]) == 2
    assert "did you mean kind" in capsys.readouterr().err
    assert main(["export", str(tmp_path), f"out={tmp_path}/b"]) == 2
    assert not (tmp_path / "b").exists()


def test_start_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    other = tiny()
    with torch.no_grad():
        other.get_parameter("head.head.weight")[0, 0] += 1
    save_self_forcing(run.start, generator=other)
    with pytest.raises(ConfigError, match="other weights than those that the run started from"):
        run.export(out=tmp_path / "out", kind="diffusers")
    assert not (tmp_path / "out").exists()
    run.start.unlink()
    with pytest.raises(ConfigError, match=r"start\.pt is not there"):
        run.export(out=tmp_path / "out", kind="diffusers")
    # An adapter needs no start weights.
    run.export(out=tmp_path / "out", kind="peft")


@KINDS
def test_what_afd_has_learned_is_what_is_exported(
    tmp_path: Path, lora: dict[str, int] | None
) -> None:
    """The evaluated policy of a method after two updates, in a network loaded from the export."""
    start = tmp_path / "start.pt"
    save_self_forcing(start, generator=wan_student().net)
    student = {"kind": "wan", "checkpoint": str(start), "head_dim": 16, "text_len": 5}
    student |= {"dtype": "float32"}
    student |= {"lora": lora}
    config = make_config({"out": str(tmp_path / "run"), "student": student} | REST)
    method = make_afd(
        wan_student(), lora=config.student.lora, learning_rate=1e-2, old_decay_slope=0.25
    )
    for update in range(2):
        step(method, wan_batch(update))
    save_run(config, method.state_dict())
    out = export(config.run_dir, ExportConfig(out=tmp_path / "out", kind="self_forcing"))
    nets = [load_checkpoint(path, head_dim=16, text_len=5) for path in (start, out / "model.pt")]
    with method.evaluation_policy() as policy:
        expected = forward(policy.net)
    assert error(forward(nets[1]), expected) <= NETWORK_FORWARD
    assert error(forward(nets[0]), expected) > 100 * NETWORK_FORWARD


@KINDS
def test_a_toy_run_exports_a_student_that_streams(
    tmp_path: Path, lora: dict[str, int] | None
) -> None:
    config = make_config({"out": str(tmp_path / "run"), "student": {"lora": lora}})
    policies = make_policies(ToyStudent.load(), ("theta", "old"), lora=config.student.lora)
    with torch.no_grad():
        for master in policies.weights("old").masters:
            master.add_(0.02)
    save_run(config, {"policies": policies.state_dict()})
    out = export(config.run_dir, ExportConfig(out=tmp_path / "out", kind="student"))
    toy = ToyStudent.load(str(out / "student.safetensors"))
    x_BFCHW, t_B1 = torch.randn(1, 12, 3, 16, 16), torch.tensor([[500.0]])
    text_BLE = toy.encode(["a ball falls"])
    with torch.no_grad(), policies.using("old") as expected:
        out_BFCHW = expected.net(x_BFCHW, t_B1, text_BLE)
        assert error(toy.net(x_BFCHW, t_B1, text_BLE), out_BFCHW) <= NETWORK_FORWARD
        assert error(ToyStudent.load().net(x_BFCHW, t_B1, text_BLE), out_BFCHW) > 0.01
