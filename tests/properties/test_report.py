"""Any run folder gives a page that names what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.lab.report.page import write_report
from tests.afd.report_folder import make_folder

FILES = ("config.yaml", "doctor.json", "evaluation.jsonl", "metrics.jsonl", "samples.safetensors")
VIDEO = {"evaluation": {"kind": "video"}, "method": "afd", "student": {"kind": "wan"}}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from([10**400, 1e308, -1e308, 5e-324, "x", "\ud83d", "0" * 300, [], {}])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = (
    "update",
    "method",
    "metrics",
    "videos",
    "seed",
    "phase_s",
    "time_s",
    "student/loss",
    "file",
)
KEYS += (
    "phys",
    "rend",
    "MQ",
    "discriminator/margin",
    "teacher",
    "video",
    "evaluation",
    "ops",
    "cpu",
)
KEYS += (
    "packages",
    "steps",
    "path",
    "manifest",
    "frames",
    "height",
    "width",
    "fps",
    "kind",
    "prompt",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("report") / "quickstart")


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """JSON lines with the report's own keys and any values, cut anywhere."""
    metrics = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3)
    rows = draw(st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES | metrics), max_size=4))
    data = "".join(json.dumps({"update": i} | row) + "\n" for i, row in enumerate(rows)).encode()
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


def mappings(**fixed: Any) -> st.SearchStrategy[bytes]:
    """JSON, which is YAML, too."""
    sections = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4)
    odd = st.dictionaries(st.sampled_from(KEYS), VALUES | sections, max_size=5)
    return odd.map(lambda held: json.dumps({**held, **fixed}).encode())


CONTENTS = lines() | mappings() | mappings(**VIDEO) | st.binary(max_size=40)


@given(
    part=st.sampled_from(["afd", "base", "sft", "teacher"]),
    files=st.dictionaries(st.sampled_from(FILES), CONTENTS | st.none(), min_size=1, max_size=3),
    single=st.booleans(),
)
def test_any_folder_gives_a_page(
    part: str, files: dict[str, bytes | None], single: bool, whole: Path, tmp_path: Path
) -> None:
    """`None`: a folder in the file's place."""
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    single = single and part != "teacher"  # which holds no run
    source = whole / part if single else whole
    copy = shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("*.mp4"))
    folder = copy if single else copy / part
    for name, data in files.items():
        (folder / name).unlink(missing_ok=True)
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
    page = write_report(copy).read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")


@pytest.mark.parametrize("held", ["config only", "video"])
def test_a_folder_of_little_gives_a_page(held: str, tmp_path: Path) -> None:
    config = VIDEO if held == "video" else {"teacher": {"path": "x" * 5000}, "updates": [1]}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    if held == "video":
        (tmp_path / "videos").mkdir()
        for name in ("update_x.mp4", "update_000001.mp4", "update_.mp4"):
            (tmp_path / "videos" / name).write_bytes(b"none")
        names = ("x" * 5000, "../../etc/passwd", "a\0", "", "..")
        text = "".join(json.dumps({"file": name, "prompt": 7}) + "\n" for name in names)
        (tmp_path / "samples.jsonl").write_text(text)
    assert write_report(tmp_path).read_text(encoding="utf-8").rstrip().endswith("</html>")
