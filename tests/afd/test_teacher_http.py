"""What the door to the network lets through: addresses, schemes, sizes; that no key gets out."""

from __future__ import annotations

import asyncio
import copy
import io
import logging
import pickle
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.pretty import pretty_repr

from afd.config.run import load_config, make_config, to_yaml
from afd.errors import ConfigError, TeacherError, Unanswered
from afd.teachers.paid.answers import Failure, Kind
from afd.teachers.paid.config import FetchConfig
from afd.teachers.paid.http import Http, place
from afd.teachers.paid.network import is_public
from afd.teachers.paid.secret import Secret
from tests.afd.paid import paid_config, teacher_of, video_bytes
from tests.afd.service import (
    KEY,
    WIRES,
    Exchange,
    Service,
    answer,
    cut_off,
    drip,
    hang_up,
    truncated,
)

VIDEO = video_bytes()
NAMES = {"ark": "ARK_API_KEY", "openai": "OPENAI_API_KEY", "fal": "FAL_KEY"}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    for name in NAMES.values():
        monkeypatch.setenv(name, KEY)
    with Service(VIDEO).running() as running:
        yield running


def redirect(to: str, status: int = 302) -> Any:
    def fault(exchange: Exchange) -> bool:
        there = to.format(port=exchange.server.server_address[1], root=exchange.service.root)
        exchange.say(status, b"", location=there)
        return True

    return fault


def first(wire: str, service: Service, folder: Path, **fetch: Any) -> BaseException | Path:
    teacher = teacher_of(paid_config(wire, service, folder, tries=2, **fetch))
    try:
        future = teacher.start(teacher.requests[0])
        return future.exception() or future.result()
    finally:
        teacher.close()


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("http://localhost:{port}/media/x", "localhost is the private address"),
        ("http://127.0.0.2:{port}/media/x", "127.0.0.2 is the private address"),
        ("http://[::1]:{port}/media/x", "::1 is the private address"),
        ("http://[::ffff:127.0.0.1]:{port}/x", "is the private address"),
        ("http://10.1.2.3/x", "10.1.2.3 is the private address"),
        ("http://169.254.169.254/latest/meta-data", "169.254.169.254 is the private address"),
        ("http://2130706433:{port}/x", "is the private address"),
        ("https://127.0.0.1:{port}/x", "the scheme 'https' is not allowed"),
        ("file:///etc/passwd", "the scheme 'file' is not allowed"),
        ("ftp://127.0.0.1/x", "the scheme 'ftp' is not allowed"),
        ("/media/around", "more than 5 redirects"),
    ],
)
def test_a_redirect_leads_nowhere_else(
    service: Service, tmp_path: Path, to: str, told: str
) -> None:
    service.script("media", *[redirect(to)] * 6)
    got = first("ark", service, tmp_path)
    assert isinstance(got, Unanswered)
    assert told in str(got)
    assert not (tmp_path / "videos").joinpath("x").exists()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_an_allowed_place_is_followed(
    service: Service, tmp_path: Path, status: int
) -> None:
    service.script(
        "media", redirect("{root}/media/ark-1.mp4", status), redirect("/media/y", status)
    )
    got = first("ark", service, tmp_path)
    assert isinstance(got, Path)
    assert got.read_bytes() == VIDEO


@pytest.mark.parametrize("wire", WIRES)
def test_the_key_is_shown_to_no_other_host(service: Service, tmp_path: Path, wire: str) -> None:
    with Service(VIDEO).running() as other:
        service.script("media", redirect(f"{other.root}/media/{wire}-1.mp4"))
        assert isinstance(first(wire, service, tmp_path), Path)
        assert len(other.requests) == 1
        assert KEY not in str(other.requests)
    assert KEY in str(service.requests)


def test_a_queue_that_names_addresses_elsewhere_does_not_get_the_key_sent_there(
    service: Service, tmp_path: Path
) -> None:
    def elsewhere(exchange: Exchange) -> bool:
        told = exchange.submitted(exchange.accept())
        exchange.say(200, told | {"status_url": "http://127.0.0.1:9/status"})
        return True

    service.script("submit", elsewhere)
    assert isinstance(first("fal", service, tmp_path), Path)


def test_the_api_itself_is_not_redirected(service: Service, tmp_path: Path) -> None:
    with Service(VIDEO).running() as other:
        service.script("submit", redirect(f"{other.root}/ark/contents/generations/tasks", 307))
        assert isinstance(first("ark", service, tmp_path), TeacherError)
        assert other.requests == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://localhost:1", "https://10.0.0.1"])
def test_the_api_may_not_be_private_or_in_the_clear_unless_told(
    service: Service, tmp_path: Path, url: str
) -> None:
    config = paid_config("ark", service, tmp_path, f"teacher.api.base_url={url}/v1")
    fetch = FetchConfig(budget_usd=9, price_usd=1, tries=1, backoff_s=0.01)
    teacher = teacher_of(
        config.model_copy(update={"teacher": config.teacher.model_copy(update={"fetch": fetch})})
    )
    try:
        with pytest.raises(TeacherError, match=r"is not allowed|is the private address"):
            teacher.answer(teacher.requests[0])
    finally:
        teacher.close()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_what_counts_as_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_the_address_that_was_checked_is_the_one_that_is_contacted(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that resolves to another address at every look-up is looked up once."""
    looked: list[str] = []
    port = int(service.root.rsplit(":", 1)[1])

    async def ask() -> None:
        loop = asyncio.get_running_loop()

        async def look_up(host: str, port: int, **_: Any) -> list[Any]:
            looked.append(host)
            address = "127.0.0.1" if len(looked) > 1 else "8.8.8.8"
            return [(2, 1, 6, "", (address, port))]

        connected: list[str] = []

        async def connect(self: Any, host: str, *_: Any) -> Any:
            connected.append(host)
            raise OSError("far away")

        monkeypatch.setattr(loop, "getaddrinfo", look_up)
        monkeypatch.setattr("httpcore.AnyIOBackend.connect_tcp", connect)
        config = FetchConfig(schemes=["http"])
        async with Http("http://a.example", [], Secret("X", KEY), "Bearer", config) as http:
            with pytest.raises(Failure, match="far away"):
                await http.call("GET", f"http://rebind.example:{port}/media/x")
            assert connected == ["8.8.8.8"]
            with pytest.raises(Failure, match="is the private address"):
                await http.call("GET", f"http://rebind.example:{port}/media/x")

    asyncio.run(ask())
    assert looked == ["rebind.example", "rebind.example"]


def test_a_large_answer_of_the_api_is_not_read_to_its_end(service: Service) -> None:
    async def ask() -> None:
        service.script("poll", answer(200, b"0" * (9 * 2**20)))
        config = FetchConfig(schemes=["http"], private_hosts=["127.0.0.1"])
        root = service.base_url("ark")
        async with Http(root, [root], Secret("X", KEY), "Bearer", config) as http:
            with pytest.raises(Failure, match="exceeds 8388608 bytes"):
                await http.call("GET", "/contents/generations/tasks/ark-1")

    asyncio.run(ask())


# The key.


def test_a_secret_shows_itself_nowhere() -> None:
    secret = Secret("ARK_API_KEY", KEY)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r}", repr({"a": [secret]})]
    shown.append(repr(getattr(secret, "__dict__", "none")))
    assert KEY not in "".join(shown)
    for copier in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be serialised"):
            copier(secret)


@pytest.mark.parametrize("value", ["", "  ", "secret7", "schlüssel-0123456", "two\nlines-01234567"])
def test_what_is_no_key_is_refused_without_being_shown(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("ARK_API_KEY", value)
    teacher = teacher_of(paid_config("ark", service, tmp_path))
    with pytest.raises(TeacherError, match="ARK_API_KEY") as error:
        teacher.answer(teacher.requests[0])
    teacher.close()
    assert not value.strip() or value not in str(error.value)


def test_a_key_in_the_configuration_is_refused(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = paid_config("ark", service, tmp_path, f"teacher.api.options={{api_key: {KEY}}}")
    teacher = teacher_of(config)
    with pytest.raises(TeacherError, match="belongs only in an environment variable") as error:
        teacher.answer(teacher.requests[0])
    teacher.close()
    assert KEY not in str(error.value)
    with pytest.raises(ConfigError, match="no user name") as wrong:
        make_config({}, ["teacher.kind=ark", f"teacher.api.base_url=https://me:{KEY}@a.example/v1"])
    assert KEY not in str(wrong.value).split("base_url=https")[-1].split("no user name")[1]


def echo(exchange: Exchange) -> bool:
    """A server that repeats the header it got."""
    said = exchange.headers["authorization"]
    exchange.say(400, {"error": {"code": said, "message": said}, "detail": said}, x_said=said)
    return True


FAULTS = {
    "submit": [echo, hang_up, drip, answer(401), answer(500), answer(200)],
    "poll": [echo, hang_up, drip, answer(403), answer(200, b"[[["), answer(404)],
    "media": [cut_off, drip, truncated, answer(403), redirect("http://10.0.0.1/"), redirect("x:y")],
    "list": [echo, hang_up],
}


def everything(error: BaseException | None) -> str:
    """An exception, those behind it also where hidden, and the locals of all their frames as a
    traceback with locals prints them."""
    said = ""
    while error is not None:
        said += f"{type(error)} {error} {error!r} {error.args!r}\n"
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for name, value in frame.f_locals.items():
                # The test's own service and folder hold the key on purpose.
                if not isinstance(value, Service | Exchange):
                    said += f"{name} = {value!r} {pretty_repr(value, max_depth=5)}\n"
        error = error.__cause__ or error.__context__
    return said


@pytest.mark.parametrize("wire", WIRES)
def test_no_failure_writes_or_tells_the_key(
    service: Service, tmp_path: Path, wire: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Every fault at every point; then everything that was written, logged or could be printed of
    the exceptions, local variables of all their frames included."""
    said = io.StringIO()
    with caplog.at_level(logging.DEBUG):
        number = 0
        for point, faults in FAULTS.items():
            for fault in faults:
                number += 1
                service.script(point, *[fault] * 3)
                if point == "list":
                    service.script("submit", hang_up)
                folder = tmp_path / str(number)
                patience = {"request_s": 0.1, "download_s": 0.1, "deadline_s": 0.15}
                error = first(wire, service, folder, **patience)
                if isinstance(error, BaseException):
                    said.write(everything(error))
                service.faults.clear()
    config = paid_config(wire, service, tmp_path / "last")
    said.write(to_yaml(config) + repr(config) + caplog.text)
    assert len(said.getvalue()) > 10_000
    assert KEY not in said.getvalue()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_the_log_of_an_address_leaves_out_its_signature() -> None:
    assert place("https://u:p@a.example:1/v.mp4?sig=secret#x") == "https://a.example:1/v.mp4"


def test_a_failure_keeps_no_frames_of_the_http_client(service: Service) -> None:
    async def ask() -> Failure:
        service.script("poll", hang_up)
        config = FetchConfig(schemes=["http"], private_hosts=["127.0.0.1"])
        root = service.base_url("ark")
        async with Http(root, [root], Secret("X", KEY), "Bearer", config) as http:
            with pytest.raises(Failure) as error:
                await http.call("GET", "/contents/generations/tasks/ark-1")
        return error.value

    failure = asyncio.run(ask())
    assert failure.kind is Kind.RETRYABLE
    assert failure.__cause__ is None
    assert failure.__context__ is None
    files = {frame.filename for frame in traceback.extract_tb(failure.__traceback__)}
    assert not any(re.search("httpx|httpcore|h11", name) for name in files)
    assert httpx.__name__


def test_a_configuration_with_a_paid_teacher_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs teacher\.api\.model, teacher\.api\.prompts"):
        make_config({"teacher": {"kind": "ark"}})
    path = tmp_path / "run.yaml"
    path.write_text("teacher: {kind: ark, api: {modell: x}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"did you mean teacher\.api\.model"):
        load_config(path)
