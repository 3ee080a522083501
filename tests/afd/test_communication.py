"""The dry run's communication is what the processes send."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from afd.config.run import make_config
from afd.planning.communication import traffic
from afd.planning.plan import student_net
from afd.planning.work import Work
from tests.afd.test_origin import Runs
from tests.afd.together import together
from tests.afd.traffic import sent

LORA = {"lora": {"rank": 4, "alpha": 4.0}}
CASES: dict[str, dict[str, Any]] = {
    "replicated": {"parallel": {}, "afd": {"context": "recompute"}},
    "sharded": {"parallel": {"weights": "fsdp"}, "afd": {"context": "own_context"}},
    "sharded adapters": {
        "parallel": {"weights": "fsdp"},
        "student": LORA | {"checkpoint_blocks": True, "rollout_batch": 1},
        "afd": {"context": "shared_context", "micro_batch": 1, "keep_context": False},
    },
    "one video": {"parallel": {"sequence": 2}, "afd": {"context": "recompute", "micro_batch": 3}},
    "one video, sharded": {
        "parallel": {"weights": "fsdp", "sequence": 2},
        "student": {"checkpoint_blocks": True},
        "afd": {"context": "recompute", "chunks_per_update": 2},
    },
    "one video, group": {
        "parallel": {"sequence": 2},
        "student": LORA | {"rollout_batch": 3},
        "afd": {"context": "own_context", "group_from_chunk": 2},
    },
}
SWITCHED = {"context": "own_context", "keep_context": False, "stream_switch": "recache"}
WINDOW = {"window": 9, "sink": 3}
CASES["switched, sharded"] = {
    "parallel": {"weights": "fsdp"},
    "student": WINDOW,
    "afd": SWITCHED | {"stream_frames": 15, "stream_start": 0.4, "group_from_chunk": 2},
}
CASES["switched, one video"] = {
    "parallel": {"sequence": 2},
    "student": WINDOW | {"rollout_batch": 2},
    "afd": SWITCHED | {"stream_frames": 15},
}
# Runs that start from others, sharded, with a pass for each reference of the prior.
BOTH = {"prior_reference": {"pretrained": 1.0, "previous": 1.0}}
CONTINUED: dict[str, dict[str, Any]] = {
    "stacked": {
        "student": LORA | {"init": "b", "parents": "stacked"},
        "afd": BOTH | {"context": "own_context"},
    },
    "stacked, no prior": {
        "student": LORA | {"init": "b", "parents": "stacked"},
        "afd": {"context": "recompute", "prior_weight": 0.0},
    },
    "taken back": {"student": LORA | {"init": "b"}, "afd": BOTH | {"context": "recompute"}},
    "replaced": {"student": LORA | {"init": "full"}, "afd": BOTH | {"context": "own_context"}},
    "every weight": {
        "student": {"lora": None, "init": "b"},
        "afd": BOTH | {"context": "shared_context", "keep_context": False},
    },
}


def continued(folder: Path) -> dict[str, dict[str, Any]]:
    """CONTINUED on the runs that it names."""
    runs = Runs(folder)
    a = runs.made("a", "student.lora={rank: 3, alpha: 6}")
    runs.made("b", "student.lora={rank: 2, alpha: 2}", f"student.init={a}")
    runs.made("full", "student.lora=null")
    found = {}
    for name, case in CONTINUED.items():
        student = {**case["student"], "checkpoint": str(runs.base)}
        student["init"] = str(folder / student["init"])
        found[name] = {"parallel": {"weights": "fsdp"}, **case, "student": student}
    return found


def run_of(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompts_per_update": 2,
        "discriminator": {"warmup_updates": 0, "loss": "gan", "steps_per_update": 1},
        "evaluation": {"kind": "none"},
        **case,
        "afd": {"samples_per_prompt": 3, "draws": 2} | case["afd"],
    }


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """What was sent, and what was planned, of each case."""
    cases = CASES | continued(tmp_path_factory.mktemp("runs"))
    runs = [run_of(case) for case in cases.values()]
    works = [Work(config, student_net(config), 2) for config in map(make_config, runs)]
    moved, _ = together(2, sent, runs, [work.net.trained for work in works])
    planned = []
    for work in works:
        total: Counter[str] = Counter()
        for one in traffic(work):
            name = "all-gather" if one.name == "velocities" else one.name
            total[name] += one.bytes  # type: ignore[assignment]
        planned.append(dict(total))
    return dict(zip(cases, zip(moved, planned, strict=True), strict=True))


@pytest.mark.parametrize("name", [*CASES, *CONTINUED])
def test_a_plan_counts_what_is_sent(
    both: dict[str, tuple[dict[str, float], dict[str, float]]], name: str
) -> None:
    moved, planned = both[name]
    assert planned == pytest.approx(moved, rel=1e-9)
