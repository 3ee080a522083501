"""What a run starts from: runs, checkpoints and exports, on the weights that they belong on."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd.cli import main
from afd.config.run import RunConfig, make_config
from afd.errors import DONE, MISTAKE, ConfigError
from afd.export import ExportConfig, export
from afd.lab.student import ToyStudent
from afd.models.config import DTYPES
from afd.models.low_rank import LowRank, cut, folded, joined
from afd.models.policies import make_policies
from afd.models.wan.student import WanStudent
from afd.trainer.build import build_method
from afd.trainer.loop import Outcome, load_run, train
from afd.trainer.origin import start_of
from tests.afd.test_export import (
    FRAMES,
    RANK,
    Run,
    base,
    diffusers_forward,
    error,
    forward,
    pipeline,
    policy_weights,
    save_run,
)
from tests.afd.test_resume import numbers
from tests.afd.tiny_methods import toy_student
from tests.afd.tiny_wan import HEIGHT, WIDTH
from tests.tolerances import NETWORK_FORWARD

# A run of the toy task that costs a second.
SMALL: dict[str, Any] = {
    "method": "sft",
    "updates": 2,
    "prompts_per_update": 2,
    "threads": 1,
    "teacher": {"kind": "simulator", "count": 4},
    "discriminator": {"warmup_updates": 0, "backbone": "scratch"},
    "sft": {"learning_rate": 1e-2, "draws": 1},
    "afd": {"samples_per_prompt": 2, "draws": 1, "warmup_updates": 0},
    "evaluation": {"kind": "none"},
    "logging": {"tensorboard": False},
}
LORA = "student.lora={rank: 4, alpha: 6}"
STACKED = "student.parents=stacked"


def config_of(out: Path, teacher: Path, *overrides: str) -> RunConfig:
    return make_config(
        {**SMALL, "name": out.name, "out": str(out)}, [f"teacher.path={teacher}", *overrides]
    )


class Runs:
    """Short runs from one small base student, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "base.safetensors"
        toy_student().save(self.base, torch.float32)

    def config(self, name: str, *overrides: str) -> RunConfig:
        base = f"student.checkpoint={self.base}"
        return config_of(self.folder / name, self.folder / "teacher", base, *overrides)

    def made(self, name: str, *overrides: str) -> Path:
        config = self.config(name, *overrides)
        assert train(config) is not Outcome.STOPPED
        return config.run_dir

    def start(self, *overrides: str) -> dict[str, Tensor]:
        return start_of(self.config("x", *overrides).student).network.state_dict()

    def learned(self, folder: Path, weights: str = "ema") -> dict[str, Tensor]:
        """Whole weights of a run's version, as its own method computes with them."""
        out = self.folder / f"{folder.name}-{weights}-whole"
        if not out.exists():
            export(folder, ExportConfig(out=out, kind="student", weights=weights))
        toy = ToyStudent.load(str(out / "student.safetensors"))
        return toy.net.state_dict()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(tmp_path_factory.mktemp("runs"))
    found.made("a", LORA)
    found.made("b", LORA, "seed=1", f"student.init={found.folder / 'a'}")
    found.made("c", LORA, STACKED, "seed=1", f"student.init={found.folder / 'a'}")
    found.made("d", LORA, STACKED, "seed=2", f"student.init={found.folder / 'c'}")
    found.made("full", "student.lora=null")
    return found


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("a", "update 2 of a run, weights ema, a LoRA of rank 4"),
        ("a/checkpoints/update_000002", "update 2 of a run, weights ema, a LoRA of rank 4"),
        ("b", "update 2 of a run, weights ema, a LoRA of rank 4"),
        ("c", "update 2 of a run, weights ema, a LoRA of rank 4"),
        ("d", "update 2 of a run, weights ema, a LoRA of rank 4"),
        ("full", "update 2 of a run, weights ema, every weight"),
    ],
)
def test_a_run_and_its_checkpoint_give_the_weights_that_it_ended_with(
    runs: Runs, what: str, found: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "afd")
    start = runs.start(f"student.init={runs.folder / what}")
    assert equal(start, runs.learned(runs.folder / what.partition("/")[0]))
    assert distance(start, runs.start()) > 1e-3
    assert found in caplog.text


@pytest.mark.parametrize("kind", ["peft", "diffusers_lora", "student", "self_forcing"])
@pytest.mark.parametrize("which", ["a", "b", "d"])
def test_every_export_gives_the_weights_of_its_run(
    runs: Runs, tmp_path: Path, kind: str, which: str
) -> None:
    out = export(runs.folder / which, ExportConfig(out=tmp_path / "out", kind=kind))  # type: ignore[arg-type]
    files = [out, *(p for p in out.iterdir() if p.suffix in (".safetensors", ".pt"))]
    for path in files[:1] if kind == "peft" else files:
        start = runs.start(f"student.init={path}")
        assert distance(start, runs.learned(runs.folder / which)) < 1e-6


@pytest.mark.parametrize("later", ["b", "c"])
def test_an_adapter_of_a_later_run_is_refused_on_the_released_weights(
    runs: Runs, tmp_path: Path, later: str
) -> None:
    own = export(runs.folder / later, ExportConfig(out=tmp_path / "own", against="start"))
    with pytest.raises(ConfigError, match=r"belongs on other weights than these \(SHA-256"):
        runs.start(f"student.init={own}")
    note = json.loads((own / "afd.json").read_text())
    assert [parent["run"] for parent in note["parents"]] == ["a"]
    whole = export(runs.folder / later, ExportConfig(out=tmp_path / "whole"))
    base = json.loads((whole / "afd.json").read_text())["base"]
    first = export(runs.folder / "a", ExportConfig(out=tmp_path / "first"))
    assert base == json.loads((first / "afd.json").read_text())["base"]
    assert base["sha256"] != note["base"]["sha256"]
    # It belongs on its parent's weights.
    parent = export(runs.folder / "a", ExportConfig(out=tmp_path / "parent", kind="student"))
    file = parent / "student.safetensors"
    again = runs.start(f"student.checkpoint={file}", f"student.init={own}")
    assert distance(again, runs.learned(runs.folder / later)) < 1e-6


def test_the_sum_of_two_adapters_can_be_cut_to_a_rank_with_its_error(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = str(runs.folder / "b")
    assert main(["export", b, f"out={tmp_path / 'cut'}", "rank=3"]) == DONE
    said = capsys.readouterr().out
    assert "rank 8 cut to 3" in said
    assert "relative error" in said
    file = "pytorch_lora_weights.safetensors"
    with safe_open(tmp_path / "cut" / file, "pt") as opened:
        assert {min(opened.get_tensor(n).shape) for n in opened.keys()} == {3}  # noqa: SIM118
    cut_at = distance(runs.start(f"student.init={tmp_path / 'cut'}"), runs.learned(Path(b)))
    assert main(["export", b, f"out={tmp_path / 'full'}", "rank=8"]) == DONE
    full = distance(runs.start(f"student.init={tmp_path / 'full'}"), runs.learned(Path(b)))
    assert full < 1e-5 < cut_at
    assert main(["export", b, f"out={tmp_path / 'no'}", "kind=student", "rank=3"]) == MISTAKE


def test_the_best_change_of_a_rank_loses_the_smallest_singular_values() -> None:
    draw = torch.Generator().manual_seed(0)
    change = joined(
        [
            LowRank({"l": torch.randn(r, 6, generator=draw)}, {"l": torch.randn(5, r)}, 0.5)
            for r in (2, 2)
        ]
    )
    small, error = cut(change, 2)
    u, s, vh = torch.linalg.svd(change.delta("l").double())
    best = (u[:, :2] * s[:2]) @ vh[:2]
    assert torch.allclose(small.delta("l").double(), best, atol=1e-5)
    assert error == pytest.approx(float((s[2:].square().sum() / s.square().sum()).sqrt()))
    whole, none = cut(change, 4)
    assert torch.allclose(whole.delta("l"), change.delta("l"), atol=1e-5)
    assert none < 1e-6


def test_a_foreign_adapter_is_folded_with_a_warning(
    runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the names of kohya's converters: no note, no settings."""
    layer = "blocks.0.attn1.to_q"
    a_RI, b_OR = torch.ones(2, 32), torch.full((32, 2), 0.5)
    file = tmp_path / "foreign.safetensors"
    parts = {"A": a_RI, "B": b_OR}
    save_file({f"transformer.{layer}.lora_{k}.weight": x for k, x in parts.items()}, file)
    start = runs.start(f"student.init={file}")
    assert "does not record which weights it belongs on" in caplog.text
    expected = folded(
        runs.start(), LowRank({"blocks.0.self_attn.q": a_RI}, {"blocks.0.self_attn.q": b_OR})
    )
    assert equal(start, expected)
    for name, wrong in (("lora_A.weight", a_RI[:, :3]), ("alpha", torch.ones(()))):
        held = load_file(file) | {f"transformer.{layer}.{name}": wrong.contiguous()}
        save_file(held, tmp_path / "odd.safetensors")
        with pytest.raises(ConfigError, match=r"student\.init: "):
            runs.start(f"student.init={tmp_path / 'odd.safetensors'}")


def test_what_cannot_be_started_from_is_one_sentence(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for init, words in (
        ("none", "does not exist; needed: a run folder"),
        ("empty", "needed: "),
        ("run", "has no checkpoint"),
        ("bad.safetensors", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=words) as raised:
            runs.start(f"student.init={tmp_path / init}")
        assert str(raised.value).startswith("student.init: ")
        assert "\n" not in str(raised.value)
    for extra, words in (
        ("student.init_weights=old", "has ema, theta"),
        ("student.lora=null", None),
    ):
        overrides = [f"student.init={runs.folder / 'a'}", extra]
        if words is None:
            assert equal(runs.start(*overrides), runs.learned(runs.folder / "a"))
            continue
        with pytest.raises(ConfigError, match=words):
            runs.start(*overrides)
    with pytest.raises(ConfigError, match=r"without student\.init; needed: both"):
        runs.config("x", "student.init_weights=ema")


@pytest.mark.parametrize("what", ["a", "a/checkpoints/update_000002", "peft"])
def test_a_run_as_checkpoint_is_pointed_to_init(runs: Runs, what: str, tmp_path: Path) -> None:
    path = runs.folder / what
    if what == "peft":
        path = export(runs.folder / "a", ExportConfig(out=tmp_path / "x", kind="peft"))
    with pytest.raises(ConfigError, match=r"and student\.init for what begins from a run"):
        runs.config("x", f"student.checkpoint={path}")


def test_a_run_that_starts_from_itself_is_refused(runs: Runs, tmp_path: Path) -> None:
    first = runs.made("first", LORA)
    runs.made("second", LORA, f"student.init={first}")
    shutil.rmtree(first)
    circle = runs.config("first", LORA, f"student.init={runs.folder / 'second'}")
    with pytest.raises(ConfigError, match=r"student\.init: a circle \("):
        train(circle)
    own = runs.config("own", LORA, f"student.init={runs.made('own', LORA)}", "updates=3")
    with pytest.raises(ConfigError, match=r"student\.init: .* there, .* now"):
        train(own)


@pytest.mark.parametrize("parents", ["folded", "stacked"])
def test_a_parent_that_has_changed_since_is_refused(runs: Runs, parents: str) -> None:
    parent = runs.made(f"parent-{parents}", LORA)
    settings = [LORA, f"student.parents={parents}"]
    child = runs.made(f"child-{parents}", *settings, f"student.init={parent}")
    later = runs.config(f"later-{parents}", *settings, f"student.init={child}")
    assert train(load_run(parent, ["updates=3"])) is Outcome.FINISHED
    words = "other weights than those that the run started from"
    with pytest.raises(ConfigError, match=words):
        train(load_run(child, ["updates=3"]))
    with pytest.raises(ConfigError, match="belongs on other weights than these"):
        train(later)
    kind = ExportConfig(out=runs.folder / f"out-{parents}", kind="student")
    with pytest.raises(ConfigError, match=words):
        export(child, kind)


@pytest.mark.parametrize(
    ("parent", "lora"),
    [(p, lora) for p in ("b", "d", "full") for lora in (LORA, "student.lora=null")]
    + [(p, STACKED) for p in ("b", "d")],
)
def test_the_references_are_the_released_weights_and_the_start(
    runs: Runs, lora: str, parent: str
) -> None:
    config = runs.config(
        "x",
        *([LORA] if lora == STACKED else []),
        lora,
        "method=afd",
        f"student.init={runs.folder / parent}",
        "afd.prior_reference={pretrained: 1, previous: 2}",
    )
    method = build_method(config, prompts=["a"])
    released, start = runs.start(), runs.learned(runs.folder / parent)

    def output(weights: dict[str, Tensor]) -> Tensor:
        toy = toy_student()
        toy.net.load_state_dict(weights)
        return forward(toy)

    def forward(student: Any) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        x_BFCHW = torch.randn(1, 12, 3, 16, 16, generator=draw)
        with torch.no_grad():
            out: Tensor = student.net(x_BFCHW, torch.tensor([[500.0]]), student.encode(["a ball"]))
            return out

    policies = method.policies  # type: ignore[attr-defined]
    for name, weights in (("pretrained", released), ("previous", start), ("theta", start)):
        version = policies.reference(name) if name != "theta" else name
        with policies.using(version) as student:
            assert torch.allclose(forward(student), output(weights), atol=1e-4), name
    assert (forward(toy_student()) - output(start)).abs().max() > 1e-2
    # One prior per reference has the gradient of one to their mean.
    mean = method.reference(lambda v: torch.tensor(1.0 if v == "ref" else 4.0))  # type: ignore[attr-defined]
    assert float(mean) == pytest.approx((1 * 4 + 2 * 1) / 3)
    assert method.prior_weight == pytest.approx(3 * config.afd.prior_weight)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacked_parents_leave_every_earlier_result_to_the_bit(tmp_path: Path, dtype: str) -> None:
    """The released student and what the last run ended with; in bf16, folding rounds the latter."""
    first, kind = Run(tmp_path, dtype=dtype), DTYPES[dtype]
    section = first.config.student.model_copy(update={"parents": "stacked"})
    released = forward(base(first).to(kind), kind)
    parent, policies = first.folder, first.policies
    for number in (1, 2):
        with policies.using("old") as student:
            ended = forward(student.net, kind)
        section = section.model_copy(update={"init": str(parent)})
        start = start_of(section)
        assert len(start.stack(section.init)) == number
        net = WanStudent(base(first).to(kind), height=HEIGHT, width=WIDTH, frames=FRAMES)
        policies = make_policies(
            net,
            ("theta", "old", "ref", "pretrained"),
            lora=section.lora,
            seed=number,
            parents=start.stack(section.init),
        )
        for version, expected in (("pretrained", released), ("ref", ended), ("theta", ended)):
            with policies.using(version) as student:
                assert torch.equal(forward(student.net, kind), expected), (number, version)
        assert not torch.equal(forward(start.network.to(kind), kind), ended)
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for master in policies.weights("old").masters:
                master.add_(torch.randn(master.shape, generator=draw), alpha=0.1)
        policies.weights("old").publish()
        parent = tmp_path / f"run{number}"
        named = {"name": parent.name, "out": parent, "student": section}
        save_run(first.config.model_copy(update=named), {"policies": policies.state_dict()})


def test_a_stopped_run_on_stacked_parents_continues_bit_by_bit(runs: Runs) -> None:
    both = "afd.prior_reference={pretrained: 1, previous: 1}"
    rest = [LORA, STACKED, "method=afd", both, f"student.init={runs.folder / 'c'}"]
    rest += ["checkpoint.every=1", "afd.prior_weight=1"]
    whole = runs.made("whole", *rest, "updates=3")
    parts = runs.made("parts", *rest, "updates=1")
    assert train(load_run(parts, ["updates=3"])) is Outcome.FINISHED
    assert numbers(parts) == numbers(whole)
    assert numbers(parts)[-1]["student/prior"] > 0
    assert equal(runs.learned(parts, "old"), runs.learned(whole, "old"))


def test_parents_that_cannot_be_stacked_are_one_sentence(runs: Runs, tmp_path: Path) -> None:
    odd = tmp_path / "odd.safetensors"
    factors = {"A": torch.ones(2, 32), "B": torch.ones(32, 2)}
    save_file({f"time_embedding.2.lora_{k}.weight": x for k, x in factors.items()}, odd)
    for init, words in (
        (runs.folder / "full", r"has whole weights; needed: folded, or these weights, exported"),
        (odd, r"changes time_embedding\.2, which has no adapters here; needed: folded"),
    ):
        with pytest.raises(ConfigError, match=rf"student\.parents: got stacked; .* {words}"):
            build_method(runs.config("x", LORA, STACKED, f"student.init={init}"), prompts=["a"])
    with pytest.raises(ConfigError, match=r"student\.parents: got stacked without student\.lora"):
        runs.config("x", "student.lora=null", STACKED)


def test_a_chain_of_adapters_is_one_lora_in_diffusers(tmp_path: Path) -> None:
    """Two runs of the released layout, the second on what the first has learned."""
    first = Run(tmp_path)
    student = first.config.student
    section = student.model_copy(update={"init": str(first.folder)})
    out = tmp_path / "second"
    config = first.config.model_copy(update={"name": "second", "out": out, "student": section})
    start = start_of(section)
    assert distance(start.network.state_dict(), policy_weights(first, "old")) < 1e-6
    net = WanStudent(start.network, height=HEIGHT, width=WIDTH, frames=FRAMES)
    policies = make_policies(net, ("theta", "old"), lora=section.lora, seed=1)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for master in policies.weights("old").masters:
            master.add_(torch.randn(master.shape, generator=draw), alpha=0.1)
    save_run(config, {"policies": policies.state_dict()})
    with policies.using("old") as version:
        expected = forward(version.net)
    lora = export(out, ExportConfig(out=tmp_path / "lora"))
    pipe, released = pipeline(first, tmp_path), base(first)
    pipe.load_lora_weights(str(lora))
    found = diffusers_forward(pipe.transformer, released)
    assert pipe.transformer.peft_config["default_0"].r == 2 * RANK
    assert error(found, expected) <= NETWORK_FORWARD
    assert error(first.output("old"), expected) > 0.01
    # On the weights that it was trained on, the second adapter alone is the same.
    own = export(out, ExportConfig(out=tmp_path / "own", against="start"))
    again = student.model_copy(update={"init": str(lora)})
    assert error(forward(start_of(again).network), expected) <= NETWORK_FORWARD
    with pytest.raises(ConfigError, match="belongs on other weights"):
        start_of(student.model_copy(update={"init": str(own)}))
    whole = export(out, ExportConfig(out=tmp_path / "whole", kind="diffusers"))
    load = student.model_copy(update={"init": str(whole)})
    assert error(forward(start_of(load).network), expected) <= NETWORK_FORWARD


def test_without_a_parent_both_references_are_one_pass(runs: Runs) -> None:
    both = "afd.prior_reference={pretrained: 1, previous: 2}"
    method = build_method(runs.config("x", LORA, "method=afd", both), prompts=["a"])
    asked: list[str] = []
    method.reference(lambda v: asked.append(v) or torch.zeros(()))  # type: ignore
    assert asked == ["ref"]
    for value in ("{pretrained: 0}", "{pretrained: -1}", "{}", "{next: 1}", "next"):
        needed = r"afd\.prior_reference is .*; needed: pretrained, previous, or positive weights"
        with pytest.raises(ConfigError, match=needed) as raised:
            runs.config("x", "method=afd", f"afd.prior_reference={value}")
        assert "\n" not in str(raised.value)
