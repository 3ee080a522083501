"""The page of `afd live` in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.afd.live_server import Running, configuration, other_student, running
from tests.afd.test_report_browser import CHROMIUM, screenshot

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)"
)
BLUE = "A blue ball on the right is thrown, going left."


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with screenshot.browser(CHROMIUM) as page:
        yield page


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    # Slower than usual, for a machine that also runs the browser.
    out = tmp_path_factory.mktemp("live")
    with running(configuration(out, fps=12)) as server:
        yield server


def show(browser: Any, server: Running, width: int = 1280, dark: bool = False) -> None:
    browser.complaints.clear()
    browser.show(server.url, width, 900, dark)
    browser.wait("document.body.dataset.frames > 2", 30)


def steer(browser: Any) -> None:
    """Take the controls, which the page before this one may still hold for a moment."""
    browser.wait("state.controls || ($('controls').click(), false)", 30)


PIXELS = "[...document.querySelectorAll('#stage canvas')].map(c => c.toDataURL()).join()"


def test_the_stream_moves_and_a_typed_prompt_switches_on_the_timeline(
    browser: Any, served: Running
) -> None:
    show(browser, served)
    steer(browser)
    before = browser.value(PIXELS)
    browser.wait(f"({PIXELS}) !== {before!r}")
    browser.value("$('prompt').focus(), $('prompt').select()")
    browser.send("Input.insertText", text=f"{BLUE}<b>x</b>")
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
    browser.send("Input.dispatchKeyEvent", type="keyDown", **key)
    browser.send("Input.dispatchKeyEvent", type="keyUp", **key)
    browser.wait("document.querySelector('#switches li span') !== null", 30)
    # Text, not markup.
    assert browser.value("$('switches').querySelector('span').textContent") == f"{BLUE}<b>x</b>"
    assert browser.value("$('switches').querySelectorAll('li').length") == 1
    browser.wait("document.body.dataset.latency > 0", 30)
    browser.wait("past.some(frame => frame.switched)")
    # A switch is a dark line on the timeline.
    browser.wait("timeline() || past.filter(f => f.switched).length === 1")
    assert browser.complaints == []


def test_the_last_seconds_can_be_scrubbed_and_the_stream_goes_on(
    browser: Any, served: Running
) -> None:
    show(browser, served)
    browser.wait("past.length > 12", 30)
    browser.value("$('scrub').value = 2, $('scrub').dispatchEvent(new Event('input'))")
    browser.wait("!$('live').hidden")
    still = browser.value(PIXELS)
    count = browser.value("Number(document.body.dataset.frames)")
    browser.wait(f"document.body.dataset.frames > {count + 6}", 30)
    browser.wait("wanted === null")
    still = browser.value(PIXELS)
    browser.wait(f"document.body.dataset.frames > {count + 12}", 30)
    assert browser.value(PIXELS) == still
    browser.value("$('live').click()")
    browser.wait(f"({PIXELS}) !== {still!r}", 30)
    assert browser.complaints == []


def test_pause_step_restart_and_record(browser: Any, served: Running, tmp_path: Path) -> None:
    show(browser, served)
    steer(browser)
    browser.value("$('play').click()")
    browser.wait("$('play').textContent === 'Play' && queue.length === 0", 30)
    count = browser.value("Number(document.body.dataset.chunks)")
    browser.value("document.body.focus()")
    browser.send("Input.dispatchKeyEvent", type="keyDown", key=".", text=".")
    browser.wait(f"Number(document.body.dataset.chunks) === {count + 1}", 30)
    take = browser.value("state.take")
    browser.value("$('seed').value = 77, $('restart').click()")
    browser.wait(f"state.take === {take + 1} && state.seed === 77 && past[0]?.at === 0", 30)
    browser.value("$('play').click(), $('record').click()")
    browser.wait("state.recording && $('record').textContent === 'Stop recording'", 30)
    browser.wait("past.length > 9", 30)
    browser.value("$('record').click()")
    browser.wait("/recorded 2/.test($('log').textContent)", 30)
    assert browser.value("document.querySelector('#log a').pathname") == "/recordings/1/0.mp4"
    browser.wait("[...$('start').options].some(o => o.value === '1')", 30)
    browser.value("$('start').value = '1', $('restart').click()")
    browser.wait(f"state.take === {take + 2} && state.start === '1'", 30)
    assert browser.complaints == []


def test_a_reload_in_mid_stream_goes_on_with_the_switches(browser: Any, served: Running) -> None:
    show(browser, served)
    steer(browser)
    browser.value(f"$('prompt').value = {BLUE!r}, $('ask').requestSubmit()")
    browser.wait("document.querySelector('#switches li') !== null", 30)
    take, chunk = browser.value("state.take"), browser.value("past.at(-1).chunk")
    show(browser, served)
    assert browser.value("state.take") == take
    assert browser.value("past.at(-1).chunk") >= chunk
    assert BLUE in browser.value("$('switches').textContent")
    assert browser.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_from_a_phone_to_a_desk(browser: Any, served: Running, dark: bool) -> None:
    for width in (360, 768, 1440):
        show(browser, served, width, dark)
        assert browser.value("document.documentElement.scrollWidth") <= width
        paper = browser.value("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == dark
        # Everything that acts can be reached by the keyboard and has a name.
        nameless = browser.value(
            "[...document.querySelectorAll('button, input, select')].filter(e => e.tabIndex < 0 ||"
            " !(e.textContent.trim() || e.labels?.length || e.ariaLabel)).map(e => e.id)"
        )
        assert nameless == []
        assert browser.complaints == []


def test_two_students_are_voted_on_blind(browser: Any, tmp_path: Path) -> None:
    config = configuration(tmp_path, fps=12, compare=other_student(tmp_path / "x"))
    with running(config) as server:
        show(browser, server)
        names = "[...document.querySelectorAll('#stage figcaption span')].map(s => s.textContent)"
        assert browser.value(names) == ["base", "other"]
        browser.value("$('blind').click(), $('dice').click()")
        browser.wait("state.take === 2 && state.columns.hidden", 30)
        assert browser.value(names) == ["A", "B"]
        browser.value("document.querySelector('#stage figure button').click()")
        browser.wait("state.voted && !state.columns.hidden", 30)
        assert sorted(browser.value(names)) == ["base", "other"]
        assert browser.complaints == []
        # The page of a server that ends says so, and comes back with it.
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 1
    browser.wait("$('status').className === 'lost'", 30)
