"""The loss in a minute: rows, accuracy beside time, what is written, comparison of two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import clock, compare, loss_table, nft_loss
from benchmarks.nft_case import Nft, official_loss

QUICK = ["--quick", "--device", "cpu"]


@pytest.fixture(autouse=True)
def young(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of the tests is older than a benchmark may get."""
    monkeypatch.setattr(clock, "age_s", lambda: 0.0)


def test_the_table_fits_and_its_json_describes_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nft_loss.main([*QUICK, "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert max(map(len, printed.out.split("noise given;")[0].splitlines())) <= 100
    assert "…" not in printed.out
    assert "bf16 B=2: eager" in printed.err
    document = json.loads((tmp_path / "nft_loss_table.json").read_text())
    assert document["shape"] == [4, 3, 10, 13]
    assert document["arguments"]["device"] == "cpu"
    assert {"cores", "memory_bytes", "instruction_set", "threads"} <= set(document["environment"])
    rows = {(row["provider"], row["dtype"]): row for row in document["rows"]}
    assert {("eager", "bf16"), ("eager", "fp32"), ("x0 in bf16", "bf16")} <= set(rows)
    # Accuracy beside time: an answer without float32 arithmetic is visibly the worse one.
    assert rows["x0 in bf16", "bf16"]["error"] > rows["eager", "bf16"]["error"] > 1e-4
    assert rows["eager", "fp32"]["error"] < 1e-5
    # Beside itself every row needs the units it needed.
    nft_loss.main([*QUICK, "--compare", str(tmp_path / "nft_loss_table.json")])
    assert "| eager | bf16 | 2 |" in capsys.readouterr().out


def test_without_out_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(loss_table, "run", seen.append)
    nft_loss.main(["--device", "cpu"])
    assert seen[0].out is None


def test_what_the_minute_has_no_room_for_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = loss_table.prepare

    def slow(*given: Any) -> loss_table.Prepared:
        ready = prepare(*given)
        monkeypatch.setattr(clock, "age_s", lambda: 59.0)
        return ready

    monkeypatch.setattr(loss_table, "prepare", slow)
    with pytest.raises(SystemExit) as end:
        nft_loss.main([*QUICK, "--providers", "eager", "reference"])
    assert end.value.code == clock.INCOMPLETE
    assert "not enough time for: fp32" in capsys.readouterr().out


def asked(*argv: str) -> Any:
    """The arguments that loss_table.run is given."""
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_table, "run", seen.append)
        nft_loss.main(["--device", "cpu", *argv])
    return seen[0]


def test_the_largest_batch_is_tried_first() -> None:
    tiny = ("--shape", "2", "2", "4", "4")
    assert loss_table.batches_that_fit(asked(*tiny), "bf16", 60.0) == [8, 4, 2, 1]
    some = asked(*tiny, "--batch", "2", "16", "3")
    assert loss_table.batches_that_fit(some, "bf16", 60.0) == [16, 3, 2]
    # Where time or memory suffices for none, the smallest.
    assert loss_table.batches_that_fit(some, "bf16", 0.0) == [2]


def test_a_batch_whose_one_call_takes_too_long_gives_way_to_a_smaller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = asked("--shape", "2", "2", "4", "4", "--providers", "eager", "native", "--reps", "3")
    monkeypatch.setattr(clock, "age_s", lambda: 4.0)
    # At batch 1, then at 8: 13 calls at 2 fit into the 26 s that are left, not at 4.
    took = iter([0.001, 7.0, 0.001])
    monkeypatch.setattr(loss_table, "seconds", lambda *_: next(took))
    assert loss_table.prepare(args, "fp32", 30.0, loss_table.Clock(54.0)).batch == 2
    assert "fp32 B=8: a call of eager" in capsys.readouterr().err


def test_the_compiler_is_waited_for_only_while_there_is_time() -> None:
    args = asked("--providers", "compile")
    minute = loss_table.Clock(54.0)
    with loss_table.warm_compiler(args) as minute.compiler:
        assert minute.compiler is not None
        assert not minute.may_compile(0.2)  # by now it has imported nothing
        assert minute.compiler.returncode is not None  # and does not run beside the timing
        assert not minute.may_compile(30.0)
    assert loss_table.Clock(54.0).may_compile(30.0)
    with loss_table.warm_compiler(asked("--providers", "eager")) as none:
        assert none is None


def test_the_float64_gradient_is_the_suites() -> None:
    case = Nft("x0_adaptive", "fp32", 3, (2, 3, 4))
    inputs = case.inputs("cpu", 0)
    found = loss_table.exact_gradient(official_loss("x0_adaptive"), inputs)
    torch.testing.assert_close(found, case.oracle(inputs)[1], rtol=1e-12, atol=0)


def saved(path: Path, shape: list[int], **ms: float) -> Path:
    """A run on a machine whose floor is 1 ms."""
    rows = [
        {"provider": name, "dtype": "bf16", "B": 8, "median_ms": t, "pct_of_floor": 100 / t,
         "error": 1e-3}
        for name, t in ms.items()
    ]  # fmt: skip
    path.write_text(json.dumps({"shape": shape, "rows": rows}))
    return path


def test_runs_are_compared_in_units_of_their_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = saved(tmp_path / "old", [4, 4], eager=20.0, native=2.0)
    same = json.loads(old.read_text())
    for row in same["rows"]:  # a machine of half the bandwidth, on which all takes twice the time
        row["median_ms"] *= 2
    twice = tmp_path / "twice"
    twice.write_text(json.dumps(same))
    assert compare.main([str(old), str(twice)]) == 0
    slower = saved(tmp_path / "slower", [4, 4], eager=20.0, native=2.5)
    assert compare.main([str(old), str(slower)]) == 1
    assert "slower: native bf16 8, 1.25 times its units" in capsys.readouterr().out
    assert compare.main([str(old), str(slower), "--threshold", "1.3"]) == 0


def test_other_shapes_and_other_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = saved(tmp_path / "old", [4, 4], eager=20.0)
    other = saved(tmp_path / "other", [4, 8], eager=20.0)
    assert compare.main([str(old), str(other)]) == 2
    assert "shape: got [4, 4] and [4, 8]; needed: the same" in capsys.readouterr().err
    (tmp_path / "list").write_text("[]")
    for path, words in ((tmp_path / "list", "without shape"), (tmp_path / "none", "No such file")):
        assert compare.main([str(old), str(path)]) == 2
        assert words in capsys.readouterr().err
    alone = saved(tmp_path / "alone", [4, 4], native=2.0)
    assert compare.main([str(old), str(alone)]) == 2


def test_the_run_of_now_is_of_the_old_shape_and_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = saved(tmp_path / "old", [2, 2, 4, 4], eager=20.0)
    command: list[str] = []

    class Done:
        returncode = clock.INCOMPLETE  # not every row found time: what there is counts

    def run(words: list[str], cwd: Path) -> Done:
        command[:] = words
        saved(Path(words[words.index("--out") + 1], "nft_loss_table.json"), [2, 2, 4, 4], eager=10)
        return Done()

    monkeypatch.setattr(compare.subprocess, "run", run)
    assert compare.main([str(old)]) == 0
    assert command[-7:] == ["--shape", "2", "2", "4", "4", "--batch", "8"]
    Done.returncode = 1
    assert compare.main([str(old)]) == 2
