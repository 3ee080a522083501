"""The report in a real browser: it renders, moves, stays silent and asks nobody for anything."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afd.lab.report.page import write_report
from tests.afd.report_folder import make_folder

SCRIPT = Path(__file__).parents[2] / "docs/screenshot.py"


def load_script() -> Any:
    """The script as a module; docs/ is not a package."""
    spec = importlib.util.spec_from_file_location("screenshot", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


screenshot = load_script()
CHROMIUM = screenshot.find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_folder(tmp_path_factory.mktemp("report") / "quickstart"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with screenshot.browser(CHROMIUM) as page:
        yield page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 820, 390])
def test_the_page_fits_and_raises_no_complaint(
    report: Path, browser: Any, width: int, dark: bool
) -> None:
    browser.open(report, width, 900, dark)
    assert browser.complaints == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    sizes = browser.value("[...document.querySelectorAll('.film')].map(f => f.offsetWidth)")
    assert sizes == [112 if width == 1280 else 80] * 24
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == dark
    assert browser.picture(900).startswith(b"\x89PNG")


def test_the_videos_move_together_and_obey_the_slider(report: Path, browser: Any) -> None:
    browser.open(report, 1280, 900)
    frame = "document.body.dataset.frame"
    places = (
        "[...new Set([...document.querySelectorAll('.film')]"
        ".map(f => getComputedStyle(f).backgroundPositionX))]"
    )
    before = browser.value(frame)
    browser.wait(f"{frame} !== '{before}'")
    assert len(browser.value(places)) == 1
    browser.value("document.querySelector('.bar button').click()")
    assert browser.value("document.querySelector('.bar button').textContent") == "Play"
    browser.value(
        "(s => { s.value = 5; s.dispatchEvent(new Event('input')); })"
        "(document.querySelector('.bar input'))"
    )
    assert browser.value(places) == ["-560px"]  # five frames of 16 pixels, each 7 wide
    assert browser.value(frame) == "5"


def test_an_error_in_a_page_and_a_request_are_noticed(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<body data-ready='yes'><img src='other.png'><script>nothing.there()</script></body>"
    )
    with screenshot.browser(CHROMIUM) as browser:
        browser.open(page, 640, 480)
        browser.wait("document.readyState === 'complete'")
        complaints = " ".join(browser.complaints)
    assert "nothing is not defined" in complaints
    assert "other.png" in complaints


def test_the_screenshot_script_makes_a_small_picture(report: Path, tmp_path: Path) -> None:
    png = tmp_path / "quickstart.png"
    command = [sys.executable, str(SCRIPT), str(report.parent), str(png)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size < screenshot.LIMIT_BYTES
