"""The report: what it shows of whole, partial and damaged folders, in one file without network."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from safetensors.numpy import save_file

from afd.lab.report.charts import Line, line_chart, running_mean
from afd.lab.report.clips import choose_prompts, exposure
from afd.lab.report.headline import headline
from afd.lab.report.metrics import TOY_METRICS, best, number
from afd.lab.report.page import write_report
from afd.lab.report.phase_times import seconds_per_phase
from afd.lab.report.run_files import Part, by_update, numbers, read_parts
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
    assert page.ids() >= {"headline", "videos", "metrics", "curves", "timing", "setup", "warnings"}
    assert "notices" not in page.ids()
    assert len(page.with_class("film")) == 6 * 4
    assert len(page.with_class("chart")) >= 10
    for value in (*TEACHER.values(), *BASE.values(), *AFD.values(), *SFT.values()):
        assert number(value) in page.text
    assert "native backend" in page.text
    assert "seed 0, 400 updates, 576 videos" in page.text
    assert "start from the same noise" in page.text


def test_several_teachers_have_a_row_each(folder: Path) -> None:
    assert "teachers" not in page_of(folder).ids()
    path = folder / "afd" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line |= {"teacher/a/videos": 3, "teacher/b/videos": 1, "teachers/a~b/correlation": -0.125}
        line |= {"teacher/a/weight": 0.75, "discriminator/accuracy/a": 0.875}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(folder)
    assert "teachers" in page.ids()
    cells = page.text.replace(" ", "")
    assert f"AFDa{3 * len(lines)}0.7500.875––-0.125withb" in cells
    assert f"AFDb{len(lines)}––––-0.125witha" in cells


def test_the_report_needs_no_other_file_and_no_network(folder: Path) -> None:
    html = write_report(folder).read_text(encoding="utf-8")
    assert not re.search(r"https?:|file:|@import", html)
    for _, attributes in Page(html).elements:
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            # A "#" is a shape within the page.
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
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
    write_lines(folder / "afd/metrics.jsonl", [{"update": 1, "phase_s": {evil: 1.0}, evil: 1.0}])
    page = page_of(folder)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert page.text.count(evil) >= 5


@pytest.mark.parametrize(
    ("missing", "shown"),
    [
        ("teacher", "not run"),
        ("base", "Teacher: no evaluation yet"),
        ("afd", "AFD: not in this folder"),
        ("sft", "SFT: not in this folder"),
        ("afd/evaluation.jsonl", "AFD: no evaluation yet"),
        ("afd/samples.safetensors", "no samples yet"),
        ("afd/metrics.jsonl", "AFD learned"),
        ("afd/config.yaml", "AFD learned"),
        ("afd/doctor.json", "native backend"),
    ],
)
def test_what_is_missing_is_named_and_the_rest_is_shown(
    folder: Path, missing: str, shown: str
) -> None:
    path = folder / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert shown in page_of(folder).text


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
    path.write_text("".join(path.read_text().splitlines(True)[:150]) + '{"update": 15')
    path = folder / "afd/evaluation.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:4]))
    text = page_of(folder).text
    assert "AFD: unfinished, update 150 of 400." in text
    assert "its numbers are provisional" in text


def test_the_folder_of_one_run_has_a_report_too(finished: Path, tmp_path: Path) -> None:
    page = page_of(Path(shutil.copytree(finished / "sft", tmp_path / "mine")))
    assert len(page.with_class("value")) == 2 + 2  # SFT and the base of its first evaluation; times
    assert "AFD: not in this folder." in page.text
    assert number(SFT["phys"]) in page.text
    assert number(BASE["phys"]) in page.text  # the run before its first update


def test_a_run_without_results_gives_an_honest_page(tmp_path: Path) -> None:
    (tmp_path / "afd").mkdir()
    (tmp_path / "afd" / "metrics.jsonl").touch()
    page = page_of(tmp_path)
    assert "No trained student has been evaluated" in page.text
    assert "videos" not in page.ids()


def test_a_path_that_is_not_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run_dir .*nowhere: not a directory"):
        write_report(tmp_path / "nowhere")


# --- the headline ---


def sentences(
    afd: dict[str, float], sft: dict[str, float], teacher: dict[str, float] = TEACHER
) -> tuple[str, str]:
    measured = {"teacher": teacher, "base": BASE, "afd": BASE | afd, "sft": BASE | sft}
    return headline(measured, {})


def test_afd_ahead_on_both() -> None:
    title, paragraph = sentences(AFD, SFT)
    assert title.startswith("AFD learned most of the teacher’s physics and kept the student’s look")
    assert title.endswith("SFT learned some of the teacher’s physics and copied the teacher’s look")
    assert "AFD is ahead on physics and look." in paragraph
    assert "from 0.177 to 0.051 with AFD and to 0.065 with SFT (teacher 0.005)" in paragraph


def test_afd_behind_with_a_clean_teacher() -> None:
    clean = {"rend": 0.006, "phys": 0.073}
    _, text = sentences({"phys": 0.394, "rend": 0.032}, {"phys": 0.188, "rend": 0.03}, clean)
    assert "SFT is ahead on physics and neither is ahead on look." in text
    assert "no look to resist" in text


def test_each_may_be_ahead_on_one_thing() -> None:
    _, text = sentences({"phys": 0.37, "rend": 0.03}, {"phys": 0.23, "rend": 0.19})
    assert "AFD is ahead on look and SFT is ahead on physics." in text


def test_a_value_that_did_not_change_stays() -> None:
    _, text = sentences({"rend": 0.0301}, {"rend": 0.0299})
    assert "The look error stayed at 0.030 with AFD and SFT (teacher 0.171)." in text


def test_what_both_runs_did_is_written_once() -> None:
    title, _ = sentences(AFD, SFT | {"phys": 0.2})
    start = "Both runs learned most of the teacher’s physics; "
    assert title == start + "AFD kept the student’s look, SFT copied the teacher’s look"
    assert sentences(AFD, AFD)[0].endswith("physics and kept the student’s look")


def test_a_run_that_learned_nothing_is_not_praised() -> None:
    assert sentences({"phys": 0.70}, SFT)[0].startswith("AFD did not change the physics")
    away = "AFD moved away from the teacher’s physics"
    assert sentences({"phys": 0.90}, SFT)[0].startswith(away)


def test_runs_without_a_base_student_are_not_judged() -> None:
    title, text = headline({"afd": AFD, "sft": SFT}, {})
    assert title == "Results without the base student"
    assert "has not been evaluated" in text


def test_close_values_are_called_equal() -> None:
    _, text = sentences({"phys": 0.31, "rend": 0.03}, {"phys": 0.30, "rend": 0.035})
    assert "Neither is ahead on physics and look." in text


def test_the_best_value_is_marked_by_its_direction_and_ties_share_it() -> None:
    metrics = {metric.key: metric for metric in TOY_METRICS}
    values = {"teacher": 1.4, "base": 1.7, "afd": 1.3, "sft": 1.1}
    assert best(metrics["phys"], values) == {"sft"}
    assert best(metrics["adh"], values) == {"base"}
    assert best(metrics["div"], values) == {"afd"}
    assert best(metrics["phys"], {"afd": 0.3301, "sft": 0.3302}) == {"afd", "sft"}
    assert best(metrics["phys"], {"teacher": 0.1, "afd": 0.3}) == set()


# --- reading and drawing ---


def test_a_step_written_twice_counts_once_with_its_later_line() -> None:
    lines = [{"update": 2, "a": 1}, {"update": 1}, {"update": 2, "a": 2}, {"update": "x"}]
    assert by_update(lines) == [{"update": 1}, {"update": 2, "a": 2}]


def test_warnings_come_once_with_their_count(folder: Path) -> None:
    warnings = read_parts(folder)["afd"].warnings
    assert warnings[0].endswith("its scores carry little (from update 12, 2 times)")
    assert warnings[1].endswith("too strong (from update 40)")


def test_the_prompts_shown_are_unlike_each_other(folder: Path) -> None:
    chosen = choose_prompts(read_parts(folder), 6)
    assert len(set(chosen)) == 6
    assert {prompt.split()[1] for prompt in chosen} == {"red", "green", "blue"}


def tags(svg: str, tag: str) -> list[dict[str, str | None]]:
    return [attributes for name, attributes in Page(svg).elements if name == tag]


def test_charts_leave_out_what_is_not_finite(folder: Path) -> None:
    assert line_chart("empty", "", [Line("a", "afd", [])]) is None
    values = {"a": 1, "b": math.nan, "c": math.inf, "d": 10**400, "e": True, "f": "1", "g": 2.5}
    assert numbers(values) == {"a": 1.0, "g": 2.5}
    lines = [{"update": 0, "x": 1.0}, {"update": 1, "x": math.nan}, {"update": 2, "x": 3.0}]
    write_lines(folder / "afd/metrics.jsonl", lines)
    html = write_report(folder).read_text(encoding="utf-8")
    assert "AFD: 1.00 at update 0, 3.00 at update 2." in html


@pytest.mark.parametrize(
    "y",
    [[0.0], [1e100, -1e100], [3.0, 3.0 + 1e-15], [5e-324, 0.0], [1e-30, 2e-30]],
    ids=["one point", "huge", "equal", "denormal", "tiny"],
)
def test_a_chart_of_any_numbers_has_an_axis_inside_its_frame(y: list[float]) -> None:
    chart = line_chart("any", "", [Line("a", "afd", list(enumerate(y)))])
    assert chart is not None
    assert tags(chart.svg, "text")
    found = re.findall(r'<path d="([^"]*)" style="[^"]*stroke: var\(--afd\)', chart.svg)
    points = [float(value) for path in found for value in re.findall(r"-?\d+(?:\.\d+)?", path)]
    assert all(-10 <= value <= 560 for value in points)


def test_wild_single_updates_do_not_set_the_scale() -> None:
    y = [1.0 + 0.1 * (step % 2) for step in range(400)]
    calm = line_chart("loss", "", [Line("a", "afd", list(enumerate(y)))])
    wild = line_chart("loss", "", [Line("a", "afd", list(enumerate([1e6, *y[1:]])))])
    assert calm is not None
    assert wild is not None
    ticks = [re.findall(r">([\d.]+)</text>", chart.svg) for chart in (calm, wild)]
    assert ticks[0] == ticks[1]


def test_a_chart_takes_colours_and_fonts_from_the_page_and_has_a_text_for_screen_readers() -> None:
    chart = line_chart(
        "loss <b>", "", [Line("AFD", "afd", [(1, 0.5), (2, 0.25)])], [("Teacher", "teacher", 0.1)]
    )
    assert chart is not None
    (svg,) = tags(chart.svg, "svg")
    assert svg["role"] == "img"
    assert "<title>loss &lt;b&gt;</title>" in chart.svg
    assert "AFD: 0.500 at update 1, 0.250 at update 2. Teacher: 0.100." in chart.svg
    assert "var(--afd)" in chart.svg
    assert "var(--teacher)" in chart.svg
    # Neither a colour of matplotlib's nor a font, nor a style or link that reaches the page.
    assert not re.search(
        r"#[0-9a-f]{6}\b|font-family|font-size|<style|https?:|clip-path", chart.svg
    )


def test_drawing_is_repeatable_and_leaves_the_settings_of_matplotlib_alone() -> None:
    line = Line("a", "afd", [(0, 1.0), (1, 2.0), (2, 3.0)], dots=True)
    first = line_chart("one", "", [line])
    with matplotlib.rc_context({"lines.linewidth": 9, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert line_chart("one", "", [line]) == first
        assert dict(matplotlib.rcParams) == before
    code = "import sys; import afd.lab.report.page; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_ids_of_one_page_are_unique(folder: Path) -> None:
    ids = [a["id"] for _, a in page_of(folder).elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_time_outside_the_phases_is_other_and_phases_keep_the_order_of_the_trainer() -> None:
    lines = [
        {"update": 1, "time_s": 2.0, "phase_s": {"student": 1.0, "rollout": 0.5, "odd": -1.0}},
        {"update": 2, "time_s": 4.0, "phase_s": {"student": 1.0, "discriminator": math.nan}},
    ]
    seconds = seconds_per_phase(Part("afd", updates=lines))
    assert seconds == {"rollout": 0.5, "student": 2.0, "other": 1.5}
    assert list(seconds) == ["rollout", "student", "other"]
    assert seconds_per_phase(Part("afd")) == {}


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
