"""`afd report RUN --live`: the report in the browser, renewed while the run trains, read only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from afd.cli import main
from afd.lab.report.page import render_report
from afd.live import watch
from afd.live.security import Guard
from tests.afd.live_server import serving
from tests.afd.report_folder import make_folder
from tests.afd.test_report_browser import CHROMIUM, screenshot

RULES = Guard(frozenset({"testserver"}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "quickstart")


@contextmanager
def opened(run: Path, rules: Guard = RULES) -> Iterator[TestClient]:
    with TestClient(watch.Watched(run, rules).app()) as found:
        yield found


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), os.stat(p).st_mtime_ns) for p in folder.rglob("*"))


def grow(run: Path) -> None:
    """One more update of a run of the folder."""
    path = run / "afd" / "metrics.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    with path.open("a") as file:
        file.write(json.dumps(last | {"update": last["update"] + 1}) + "\n")


def test_the_report_is_that_of_the_folder_and_nothing_is_written(run: Path) -> None:
    (run / "report.html").unlink(missing_ok=True)
    before = listing(run)
    with opened(run) as client:
        assert client.get("/report").text == render_report(run)
        assert client.get("/state").json()["name"] == "quickstart"
    assert listing(run) == before


def test_it_is_renewed_after_a_change_but_not_all_the_time(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    whole = watch.render_report
    monkeypatch.setattr(watch, "render_report", lambda run: made.append(run) or whole(run))
    with opened(run) as client:
        client.get("/report")
        stamp = client.get("/state").json()["stamp"]
        client.get("/report")
        assert len(made) == 1
        grow(run)
        # The page learns of the change when it can have it.
        assert client.get("/state").json()["stamp"] == stamp
        client.get("/report")
        assert len(made) == 1
        monkeypatch.setattr(watch, "REST_S", 0.0)
        assert client.get("/state").json()["stamp"] != stamp
        client.get("/report")
        assert len(made) == 2


@pytest.mark.parametrize("url", ["/", "/report", "/state"])
def test_it_is_guarded_like_the_stream(run: Path, url: str) -> None:
    with opened(run, Guard(frozenset({"testserver"}), token="right")) as client:
        assert client.get(url).status_code == 403
        assert client.get(f"{url}?token=right").status_code == 200
        for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
            assert client.get(f"{url}?token=right", headers=headers).status_code == 403
        for path in ("/config.yaml", "/afd/metrics.jsonl", "/../x"):
            assert client.get(f"{path}?token=right").status_code == 404


def test_a_folder_that_goes_away_is_no_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "REST_S", 0.0)
    with opened(run) as client:
        html = client.get("/report").text
        run.rename(run.with_name("moved"))
        assert client.get("/report").text == html
        assert client.get("/state").status_code == 200


def test_a_mistake_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none"), "--live"]) == 2
    assert "none does not exist; needed: the folder of a run" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
def test_the_browser_shows_a_change_where_the_reader_is(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "REST_S", 0.0)
    rules = Guard(frozenset({"127.0.0.1"}))
    inside = "document.querySelector('iframe').contentWindow"
    with (
        serving(watch.Watched(run, rules).app()) as server,
        screenshot.browser(CHROMIUM) as browser,
    ):
        browser.show(server.url, 1280, 900, ready="document.body?.dataset.loads === '1'")
        browser.wait(f"{inside}.document.body.dataset.ready === 'yes'")
        browser.value(f"{inside}.scrollTo(0, 400)")
        grow(run)
        browser.wait("document.body.dataset.loads === '2'", 30)
        assert browser.value(f"{inside}.scrollY") == 400
        assert browser.value("document.querySelectorAll('iframe').length") == 1
        # The report and the question whether it has changed are all that is asked for.
        asked = {c for c in browser.complaints if not c.startswith(f"requests {server.url}")}
        assert asked == set()
