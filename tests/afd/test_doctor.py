"""The doctor: what runs here, what does not and why, for readers and for programs."""

from __future__ import annotations

import json
import platform
from typing import Any

import pytest
import torch

from afd import doctor, machine
from afd_kernels import dispatch


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return doctor.inspect()


def shown(facts: dict[str, Any]) -> str:
    return "".join(f"{line}\n" for line in doctor.lines(facts))


def test_the_facts_are_ready_for_json(facts: dict[str, Any]) -> None:
    assert json.loads(json.dumps(facts)) == facts


def test_versions_and_devices_are_told(facts: dict[str, Any]) -> None:
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cpu"]["cores"] >= 1
    assert len(facts["gpus"]) == torch.cuda.device_count()
    text = shown(facts)
    assert torch.__version__ in text
    assert facts["cpu"]["model"] in text


def test_every_op_has_a_backend_and_every_other_backend_its_reason(facts: dict[str, Any]) -> None:
    text = shown(facts)
    for op in dispatch.OPS:
        states = facts["ops"][op]
        assert states["chosen"] in dispatch.BACKENDS
        assert states[states["chosen"]].partition(":")[0] == "available"
        assert op in text
    assert set(facts["ops_by_device"]) >= {"cpu"}
    reasons = {
        states[backend]
        for ops in facts["ops_by_device"].values()
        for states in ops.values()
        for backend in states.keys() - {"chosen"}
        if not states[backend].startswith("available")
    }
    for reason in reasons:
        assert text.count(f") {reason}\n") == 1


def test_what_is_missing_is_told_with_the_command_that_brings_it() -> None:
    facts = doctor.inspect() | {
        "missing_optional": [{"package": "x", "for": "y", "install": "pip install 'afd-video[x]'"}],
        "compilers": {"c++": None},
        "compiled_core": {"present": False, "why": "absent (no compiler)"},
    }
    text = shown(facts)
    assert "optional: x (y): pip install 'afd-video[x]'" in text
    assert "c++: not found" in text
    assert "compiled core: absent (no compiler)" in text


def test_what_training_at_video_size_needs_is_told_beside_what_is_here() -> None:
    facts = doctor.inspect()
    needs = facts["training"]
    assert 20 < needs["gpu_gb"] < 80
    assert needs["disk_gb"] > 1
    assert needs["missing_packages"] == []
    assert f"{needs['gpu_gb']} GB of GPU memory" in shown(facts)
    lacking = facts | {"training": needs | {"missing_packages": ["peft", "ftfy"]}}
    assert "lacks ftfy, peft: pip install 'afd-video[wan]'" in shown(lacking)


def test_a_program_that_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._first_line("no-such-program", "--version") is None
    assert machine._version("no-such-package") is None
