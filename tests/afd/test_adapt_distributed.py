"""A sequence of domains in two processes: the same bits whatever is killed, measured once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from afd.adapt.run import adapt
from tests.afd import test_adapt
from tests.afd.adapting import sequence
from tests.afd.test_adapt import DOMAINS, assert_same_sequence, quiet, written
from tests.afd.test_distributed import torchrun
from tests.afd.test_resume import numbers
from tests.afd.tiny_methods import toy_student
from tests.afd.together import together
from tests.tolerances import DISTRIBUTED

OVERRIDES = [
    "prompts_per_update=4",
    "replay.fraction=0.5",
    "replay.teacher=cached",
    "afd.prior_reference={pretrained: 1, previous: 1}",
    "student.lora={rank: 2, alpha: 2}",
    "student.parents=stacked",
    "checkpoint.every=1",
]


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("shared")
    test_adapt.SHARED["folder"] = folder
    toy_student().save(folder / "base.safetensors", torch.float32)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence under torchrun, without a stop."""
    path = written(tmp_path_factory.mktemp("straight"), {"overrides": OVERRIDES})
    ended = torchrun("adapt", str(path))
    assert ended.returncode == 0, ended.stderr
    return path.parent / "out"


def test_torchrun_goes_through_the_domains_of_one_process(straight: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path = written(tmp_path, {"overrides": OVERRIDES})
    assert adapt(path, [], quiet())
    for name in DOMAINS:
        log = (straight / name / "train.log").read_text()
        assert log.count("2 processes, ddp") == log.count("finished: ") == 1
        for ours, theirs in zip(
            numbers(straight / name), numbers(tmp_path / "out" / name), strict=True
        ):
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                near = {"rtol": 0, "atol": 1e-3} if "agreement" in key else DISTRIBUTED
                np.testing.assert_allclose(value, theirs[key], **near, err_msg=key)
    log = (straight / "2_sand" / "train.log").read_text()
    assert "replay: 4 of 4 prompts have a video of an earlier teacher (4 videos)" in log
    assert (straight / "report.html").is_file()
    rows = sorted(path.name for path in (straight / "matrix").iterdir())
    assert rows == ["0_base.json", "1_fall.json", "2_sand.json"]


@pytest.mark.parametrize(
    ("moment", "killed"),
    [
        ("before", 1),
        ("within", None),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in (("before", None), ("after", 0), ("within", 0), ("save", 0), ("save", 1))
        ),
    ],
)
def test_a_sequence_of_which_processes_are_killed_ends_with_the_same_bits(
    straight: Path, tmp_path: Path, moment: str, killed: int | None
) -> None:
    path = written(tmp_path, {"overrides": OVERRIDES})
    with pytest.raises(RuntimeError, match=r"process \d ended"):
        together(2, sequence, path, moment, killed)
    out = tmp_path / "out"
    assert not (out / "2_sand" / "DONE").exists()
    measured = {p: p.stat().st_mtime_ns for p in (out / "matrix").iterdir()}
    assert together(2, sequence, path, "", None) == [True, True]
    assert_same_sequence(out, straight)
    assert {p: p.stat().st_mtime_ns for p in measured} == measured, "rows are measured once"
