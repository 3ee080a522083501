"""The report says what the files say, whole or in part, in one file that needs no other."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from afd.lab.report import words as words
from afd.lab.report.charts import Series, draw, exposure, running_mean
from afd.lab.report.page import write_report
from afd.lab.report.read import by_step, choose_prompts, read_parts
from tests.afd.report_folder import AFD, BASE, SFT, TEACHER, make_folder, write_lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("report") / "quickstart")


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "quickstart"))


class Page(HTMLParser):
    """What a browser would see: the elements, and all words but those of styles and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._skip = ""
        self.feed(html)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._skip = tag if tag in ("style", "script") else self._skip

    def handle_endtag(self, tag: str) -> None:
        self._skip = "" if tag == self._skip else self._skip

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.text += data

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]

    def ids(self) -> set[str]:
        return {str(attributes["id"]) for _, attributes in self.elements if "id" in attributes}


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


# --- the page ---


def test_a_finished_quickstart_has_every_section_and_number(folder: Path) -> None:
    page = page_of(folder)
    assert page.ids() >= {"headline", "videos", "metrics", "curves", "timing", "ran", "warnings"}
    assert "notices" not in page.ids()
    assert len(page.with_class("film")) == 6 * 4
    assert len(page.with_class("chart")) >= 10
    for value in (*TEACHER.values(), *BASE.values(), *AFD.values(), *SFT.values()):
        assert words.number(value) in page.text
    assert "native backend" in page.text
    assert "seed 0, 400 updates, 576 videos" in page.text
    assert "start from the same noise" in page.text


def test_the_report_needs_no_other_file_and_no_network(folder: Path) -> None:
    html = write_report(folder).read_text(encoding="utf-8")
    assert not re.search(r"https?:|file:|@import", html)
    for _, attributes in Page(html).elements:
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert all(url.startswith("data:image/png") for url in re.findall(r"url\(([^)]*)", html))


def test_the_same_files_give_the_same_report(folder: Path) -> None:
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert not list(folder.glob("*.partial"))


def test_everything_from_the_files_is_escaped(folder: Path) -> None:
    evil = "</script><script>alert('1')</script><img src=x onerror=alert(1)> & \"quoted\""
    metadata = {"prompts": json.dumps([evil]), "seeds": "[0]"}
    videos = np.zeros((1, 12, 16, 16, 3), np.uint8)
    for part in ("base", "sft", "afd"):
        save_file({"videos": videos}, folder / part / "samples.safetensors", metadata)
    (folder / "afd/train.log").write_text(f"WARNING update 1: {evil}\n", encoding="utf-8")
    (folder / "afd/config.yaml").write_text(json.dumps({evil: evil}), encoding="utf-8")
    doctor = {"afd": evil, "ops": {evil: {"chosen": evil}}}
    (folder / "afd/doctor.json").write_text(json.dumps(doctor), encoding="utf-8")
    write_lines(folder / "afd/metrics.jsonl", [{"step": 1, "phase_s": {evil: 1.0}, evil: 1.0}])
    page = page_of(folder)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert page.text.count(evil) >= 5


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("teacher", "did not run"),
        ("base", "Teacher: no evaluation yet"),
        ("afd", "AFD: did not run here"),
        ("sft", "SFT: did not run here"),
        ("afd/evaluation.jsonl", "AFD: no evaluation yet"),
        ("afd/samples.safetensors", "no samples yet"),
        ("afd/metrics.jsonl", "AFD took"),
        ("afd/config.yaml", "AFD took"),
        ("afd/doctor.json", "native backend"),
    ],
)
def test_what_is_missing_is_named_and_the_rest_is_shown(
    folder: Path, missing: str, said: str
) -> None:
    path = folder / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert said in page_of(folder).text


@pytest.mark.parametrize(
    "broken",
    [
        "afd/evaluation.jsonl",
        "afd/metrics.jsonl",
        "afd/samples.safetensors",
        "afd/config.yaml",
        "afd/doctor.json",
        "teacher/prompts.jsonl",
    ],
)
def test_what_is_unreadable_is_named(folder: Path, broken: str) -> None:
    (folder / broken).write_text("{ no: [", encoding="utf-8")
    page = page_of(folder)
    assert "notices" in page.ids()
    assert Path(broken).name in page.text


def test_an_unfinished_run_is_called_provisional(folder: Path) -> None:
    (folder / "afd/DONE").unlink()
    path = folder / "afd/metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:150]) + '{"step": 15')
    path = folder / "afd/evaluation.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:4]))
    text = page_of(folder).text
    assert "AFD: unfinished, update 150 of 400." in text
    assert "its numbers are provisional" in text


def test_the_folder_of_one_run_has_a_report_too(finished: Path, tmp_path: Path) -> None:
    page = page_of(Path(shutil.copytree(finished / "sft", tmp_path / "mine")))
    assert "The same prompts, two ways" in page.text  # SFT, and the base of its first evaluation
    assert "AFD: did not run here." in page.text
    assert words.number(SFT["phys"]) in page.text
    assert words.number(BASE["phys"]) in page.text  # the run before its first update


def test_an_empty_folder_gives_an_honest_page(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "No student has been measured here" in page.text
    assert "videos" not in page.ids()


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run_dir .*nowhere: no such folder"):
        write_report(tmp_path / "nowhere")


# --- the words ---


def told(
    afd: dict[str, float], sft: dict[str, float], teacher: dict[str, float] = TEACHER
) -> words.Headline:
    measured = {"teacher": teacher, "base": BASE, "afd": BASE | afd, "sft": BASE | sft}
    return words.headline(measured, {})


def test_afd_ahead_on_both_is_said() -> None:
    said = told(AFD, SFT)
    assert said.title.startswith("AFD took most of the teacher’s physics and kept the student’s")
    assert said.title.endswith("SFT took some of the teacher’s physics and took over its look")
    assert "AFD is ahead on physics and look." in said.paragraph
    assert "from 0.177 to 0.051 with AFD and to 0.065 with SFT (teacher 0.005)" in said.paragraph


def test_afd_behind_with_a_clean_teacher_is_said() -> None:
    clean = {"rend": 0.006, "phys": 0.073}
    said = told({"phys": 0.394, "rend": 0.032}, {"phys": 0.188, "rend": 0.03}, clean)
    assert "SFT is ahead on physics and neither is ahead on look." in said.paragraph
    assert "no foreign look to resist" in said.paragraph


def test_each_may_be_ahead_on_one_thing() -> None:
    said = told({"phys": 0.37, "rend": 0.03}, {"phys": 0.23, "rend": 0.19})
    assert "AFD is ahead on look and SFT is ahead on physics." in said.paragraph


def test_what_did_not_change_is_said_to_stay() -> None:
    said = told({"rend": 0.0301}, {"rend": 0.0299})
    assert "The look error stayed at 0.030 with AFD and SFT (teacher 0.171)." in said.paragraph


def test_what_both_did_is_said_once() -> None:
    said = told(AFD, SFT | {"phys": 0.2})
    start = "Both runs took most of the teacher’s physics; "
    assert said.title == start + "AFD kept the student’s look, SFT took over the teacher’s look"
    assert told(AFD, AFD).title.endswith("physics and kept the student’s look")


def test_a_run_that_learned_nothing_is_not_praised() -> None:
    assert told({"phys": 0.70}, SFT).title.startswith("AFD left the physics as it was")
    assert told({"phys": 0.90}, SFT).title.startswith("AFD moved away from the teacher’s physics")


def test_close_values_are_called_equal() -> None:
    said = told({"phys": 0.31, "rend": 0.03}, {"phys": 0.30, "rend": 0.035})
    assert "Neither is ahead on physics and look." in said.paragraph


def test_the_best_value_is_marked_by_its_direction_and_ties_share_it() -> None:
    metrics = {metric.key: metric for metric in words.METRICS}
    values = {"teacher": 1.4, "base": 1.7, "afd": 1.3, "sft": 1.1}
    assert words.best(metrics["phys"], values) == {"sft"}
    assert words.best(metrics["adh"], values) == {"base"}
    assert words.best(metrics["div"], values) == {"afd"}
    assert words.best(metrics["phys"], {"afd": 0.3301, "sft": 0.3302}) == {"afd", "sft"}
    assert words.best(metrics["phys"], {"teacher": 0.1, "afd": 0.3}) == set()


# --- reading and drawing ---


def test_a_step_written_twice_counts_once_with_its_later_line() -> None:
    lines = [{"step": 2, "a": 1}, {"step": 1}, {"step": 2, "a": 2}, {"step": "x"}]
    assert by_step(lines) == [{"step": 1}, {"step": 2, "a": 2}]


def test_warnings_come_once_with_their_count(folder: Path) -> None:
    said = read_parts(folder)["afd"].warnings
    assert said[0].endswith("its scores say little (from update 12, 2 times)")
    assert said[1].endswith("too strong (from update 40)")


def test_the_prompts_shown_are_unlike_each_other(folder: Path) -> None:
    chosen = choose_prompts(read_parts(folder), 6)
    assert len(set(chosen)) == 6
    assert {prompt.split()[1] for prompt in chosen} == {"red", "green", "blue"}


def test_charts_leave_out_what_is_no_number() -> None:
    assert draw("empty", "", [Series("a", "afd", [1, 2], [math.nan, math.inf])]) is None
    chart = draw("two", "", [Series("a", "afd", [0, 1, 2], [1.0, math.nan, 3.0])])
    assert chart is not None
    assert chart.lines[0]["path"].count("L") == 1
    flat = draw("one", "", [Series("a", "afd", [5], [0.0])])
    assert flat is not None
    assert flat.y_ticks


def test_the_running_mean_is_the_mean_of_its_window() -> None:
    values = list(np.random.default_rng(0).normal(size=30))
    for width in (1, 2, 5):
        expected = [
            np.mean(values[max(0, i - width // 2) : i + (width + 1) // 2]) for i in range(30)
        ]
        np.testing.assert_allclose(running_mean(values, width), expected, atol=1e-12)


def test_the_exposure_of_a_still_clip_is_its_frame() -> None:
    frame = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    still = np.repeat(frame[None], 12, 0)
    assert exposure(still) == exposure(frame[None])
