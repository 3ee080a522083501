"""Files and servers that are not ours: nothing in them is run, and none leads elsewhere."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from afd.config.run import make_config
from afd.errors import ConfigError
from afd.hub import HUB_BYTES, local_copy
from afd.lab.report.page import write_report
from afd.models.wan.text import TextEncoder
from afd.models.wan.vae import VideoVAE
from afd.sampling.config import SampleConfig
from afd.sampling.jobs import read_jobs
from afd.trainer import checkpoint
from afd.trainer.loop import train
from tests.afd.hub import NAME, Hub
from tests.afd.paid import paid_config, video_bytes
from tests.afd.service import KEY, Exchange, Service
from tests.afd.test_text import diffusers_folder
from tests.afd.test_vae import model as vae_model
from tests.afd.tiny import TinyMethod
from tests.test_architecture import under

OURS = under("afd_kernels/", "python/", "benchmarks/", "docs/", "examples/", "setup.py")
# What runs code that is in its input.
RUNS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}


def dangers(source: str) -> list[str]:
    """Every way in which the source would let a file that it reads run code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"import {n}" for n in names if n.split(".")[0] in RUNS]
        if not isinstance(node, ast.Call):
            continue
        call = _dotted(node.func)
        said = {k.arg: str(getattr(k.value, "value", "?")) for k in node.keywords}
        if call == "torch.load" and said.get("weights_only") != "True":
            found.append(f"{call} without weights_only=True")
        if call.startswith("torch.") and call.endswith(("hub.load", "package.PackageImporter")):
            found.append(call)
        if said.get("allow_pickle", "False") != "False":
            found.append(f"{call} with pickles")
        if call.startswith("yaml.") and not call.startswith("yaml.safe_"):
            found += [call] * (call in ("yaml.load", "yaml.load_all", "yaml.unsafe_load"))
        if call in ("eval", "exec", "os.system", "os.popen") or said.get("shell") == "True":
            found.append(call)
        if said.get("trust_remote_code", "False") != "False":
            found.append(f"{call} with remote code")
    return found


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


@pytest.mark.parametrize("path", OURS, ids=str)
def test_nothing_of_ours_runs_what_a_file_holds(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.hub.load(r, m)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t)",
        "eval(t)",
        "subprocess.run(c, shell=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
    ],
)
def test_the_rule_sees_each_danger(source: str) -> None:
    assert len(dangers(source)) == 1


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.write_text, (self.place, "it ran")


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_pickles_in_a_pipelines_folder_are_not_run(tmp_path: Path, part: str) -> None:
    """Where transformers and diffusers would read them for us."""
    ran = tmp_path / "ran"
    if part == "vae":
        vae_model().save_pretrained(tmp_path / "vae")
        held, load = "diffusion_pytorch_model", VideoVAE.load
    else:
        diffusers_folder(tmp_path)
        held, load = "model", TextEncoder.load
    (tmp_path / part / f"{held}.safetensors").unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else f"{held}.bin"
    torch.save({"weight": Bomb(ran)}, tmp_path / part / name)
    with pytest.raises(ValueError, match=f"{part} .*it cannot be read"):
        load(tmp_path)
    assert not ran.exists()


def test_a_runs_checkpoint_with_code_is_not_run(tmp_path: Path) -> None:
    """Its digests are right, so that only we, who read no pickle, stand between it and us."""
    bomb = Bomb(tmp_path / "ran")
    state = {"update": 1, "method": "afd", "config": {}, "w": torch.ones(2)}
    folder = tmp_path / "checkpoints"
    with pytest.raises(TypeError, match=r"state: 'bomb' is .*Bomb"):
        checkpoint.save(folder, state | {"bomb": bomb}, keep=1)
    path = checkpoint.save(folder, state, keep=1)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    held = checkpoint.load(path, method="afd", config={})
    assert torch.equal(held["w"], torch.ones(2))
    # Where torch.distributed.checkpoint itself would keep and read one.
    meta = json.loads((path / "meta.json").read_text())
    for name, write in {".metadata": pickle.dumps, "state.json": pickle.dumps}.items():
        (path / name).write_bytes(write(bomb))
        meta["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
        del meta["sha256"]
        bound = json.dumps(meta, sort_keys=True).encode()
        meta["sha256"] = hashlib.sha256(bound).hexdigest()
        (path / "meta.json").write_text(json.dumps(meta))
        assert checkpoint.latest(folder) == path
        if name == ".metadata":
            assert checkpoint.load(path, method="afd", config={}).keys() == held.keys()
    with pytest.raises(ValueError, match=r"utf-8|Expecting value"):
        checkpoint.load(path, method="afd", config={})
    assert not (tmp_path / "ran").exists()


# --- what leads elsewhere ---


@pytest.mark.parametrize("key", ["image", "video"])
@pytest.mark.parametrize("named", ["../secret.png", "/etc/hostname", "link/secret.png"])
def test_a_list_of_prompts_names_files_of_its_own_folder_only(
    tmp_path: Path, key: str, named: str
) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    path = folder / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", key: named}))
    config = make_config({"prompts": str(path)}, (), "x", SampleConfig)
    with pytest.raises(ConfigError, match=rf"prompts\.jsonl:1: {key}: .* lies outside"):
        read_jobs(config)
    path.write_text(json.dumps({"prompt": "a", key: "below/one.png"}))
    (job,) = read_jobs(config)
    assert job.prefix == folder / "below" / "one.png"


@pytest.fixture
def hub() -> Hub:
    files = {"vae/config.json": b"{}", "vae/x.safetensors": b"weights", "other/y.bin": b"no"}
    return Hub(files, {"main": "a" * 40, "v1": "b" * 40, "b" * 40: "b" * 40})


def test_a_hub_name_may_pin_a_revision_and_only_the_part_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub.running(monkeypatch, str(tmp_path)):
        assert local_copy(NAME, ("vae",), "x").name == "a" * 40
        pinned = local_copy(f"{NAME}@v1", ("vae",), "x")
        assert (pinned.name, local_copy(f"{NAME}@{'b' * 40}", ("vae",), "x")) == ("b" * 40, pinned)
        with pytest.raises(FileNotFoundError, match=r"got someone/Wan@v2; .*the hub answered"):
            local_copy(f"{NAME}@v2", ("vae",), "x")
    assert (pinned / "vae" / "x.safetensors").read_bytes() == b"weights"
    assert tmp_path in pinned.parents
    assert "other/y.bin" not in hub.given


def test_more_than_a_part_can_have_is_not_downloaded(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.said["vae/x.safetensors"] = HUB_BYTES + 1
    with (
        hub.running(monkeypatch, str(tmp_path)),
        pytest.raises(FileNotFoundError, match="64 GiB to download, more than 64"),
    ):
        local_copy(NAME, ("vae",), "x")
    assert not list(tmp_path.rglob("x.safetensors"))


def echo(exchange: Exchange) -> bool:
    """A server that stumbles and repeats the header it got."""
    said = exchange.headers["authorization"]
    exchange.say(503, {"error": {"code": said, "message": said}}, x_said=said)
    return True


def test_a_run_with_a_paid_teacher_writes_its_key_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Log, configuration, checkpoints, event files, report and terminal, after a server that sends
    the key back."""
    monkeypatch.setenv("ARK_API_KEY", KEY)
    with Service(video_bytes(frames=16)).running() as service:
        service.script("poll", echo, echo)
        words = ["updates=2", "prompts_per_update=2", "evaluation.kind=none", "checkpoint.every=1"]
        config = paid_config("ark", service, tmp_path, *words, prompts=4)
        train(config, method=TinyMethod(), console=Console(force_terminal=True))
    write_report(tmp_path / "run")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files} | {path.name.split(".")[0] for path in files}
    assert {".html", ".safetensors", ".yaml", ".log", "doctor", "events"} <= kinds
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
