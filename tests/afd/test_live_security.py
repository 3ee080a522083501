"""Who may use `afd live`: Host, Origin, token, sizes, and that nothing of a page names a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from afd.live import protocol
from afd.live.security import Guard, guard
from afd.live.serve import address, listen
from tests.afd.live_server import client, configuration, viewer

RULES = Guard(frozenset({"testserver", "127.0.0.1", "::1"}))
SECRET = Guard(frozenset({"testserver"}), token="right")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with client(configuration(tmp_path_factory.mktemp("live")), RULES) as found:
        yield found


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with client(configuration(tmp_path_factory.mktemp("live")), SECRET) as found:
        yield found


def refused(opened: TestClient, url: str = "/socket", **headers: str) -> bool:
    """Whether the socket is refused with 403, before it is accepted."""
    try:
        with viewer(opened, url, **headers) as watching:
            watching.event("hello")
    except WebSocketDisconnect:
        return True
    return False


@pytest.mark.parametrize(
    ("host", "right"),
    [
        ("testserver", True),
        ("TESTSERVER:8742", True),
        ("127.0.0.1:9", True),
        ("[::1]:8742", True),
        ("evil.example", False),
        ("testserver.evil.example", False),
        ("testserver@evil.example", False),
        ("evil.example/testserver", False),
        ("192.0.2.1", False),
        ("testserver:port", False),
        ("", False),
    ],
)
def test_the_host_must_be_this_server_s(opened: TestClient, host: str, right: bool) -> None:
    assert (opened.get("/", headers={"host": host}).status_code == 200) == right
    assert refused(opened, host=host) != right


@pytest.mark.parametrize(
    ("origin", "right"),
    [
        ("http://testserver", True),
        ("https://testserver", True),
        ("http://testserver:80", True),
        ("http://testserver:8742", False),
        ("http://evil.example", False),
        ("http://testserver.evil.example", False),
        ("null", False),
        ("file://", False),
        ("ftp://testserver", False),
        ("testserver", False),
    ],
)
def test_another_site_s_page_cannot_connect(opened: TestClient, origin: str, right: bool) -> None:
    assert refused(opened, origin=origin) != right
    assert (opened.get("/", headers={"origin": origin}).status_code == 200) == right


def test_a_token_is_needed_where_there_is_one(secret: TestClient) -> None:
    for url in ("/", "/recordings/1/0.mp4"):
        for query in ("", "?token=", "?token=wrong", "?token=rightright", "?token=%ff"):
            assert secret.get(url + query).status_code == 403, url + query
    assert secret.get("/?token=right").status_code == 200
    assert refused(secret)
    assert refused(secret, "/socket?token=wrong")
    assert not refused(secret, "/socket?token=right")


def test_the_subprotocol_is_needed(opened: TestClient) -> None:
    for offered in ([], ["afd-live.2"]):
        with pytest.raises(WebSocketDisconnect), opened.websocket_connect("/socket", offered):
            pass


def test_only_loopback_goes_without_a_token() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        assert guard(host, None).token is None
    for host, public in (("0.0.0.0", None), ("::", None), ("192.0.2.1", None)):
        assert len(guard(host, public).token or "") >= 32
    behind = guard("127.0.0.1", "https://live.example.org/")
    assert "live.example.org" in behind.hosts
    assert len(behind.token or "") >= 32
    assert guard("0.0.0.0", None).token != guard("0.0.0.0", None).token
    with listen("127.0.0.1", 0) as listening:
        url = address(listening, guard("127.0.0.1", None), None)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        url = address(listening, behind, "https://live.example.org/")
        assert url == f"https://live.example.org/?token={behind.token}"


def test_all_addresses_are_meant_by_a_wildcard_but_no_other_name(tmp_path: Path) -> None:
    rules = guard("0.0.0.0", None)
    with client(configuration(tmp_path), rules) as opened:
        url = f"/?token={rules.token}"
        for host, status in (
            ("192.0.2.7:8742", 200),
            ("[2001:db8::1]", 200),
            ("evil.example", 403),
        ):
            assert opened.get(url, headers={"host": host}).status_code == status, host


def test_an_oversized_message_closes_the_socket(opened: TestClient) -> None:
    for kind, size in (("text", protocol.MAX_TEXT_BYTES), ("bytes", protocol.MAX_PICTURE_BYTES)):
        with viewer(opened) as watching:
            watching.event("hello")
            if kind == "text":
                watching.socket.send_text(" " * (size + 1))
            else:
                watching.socket.send_bytes(bytes(size + 1))
            with pytest.raises(ConnectionError, match="1009"):
                watching.until(lambda: False)


def test_a_prompt_that_is_too_long_is_refused(opened: TestClient) -> None:
    with viewer(opened) as watching:
        watching.send("switch", prompt="x" * (protocol.MAX_PROMPT + 1))
        assert "switch.prompt" in watching.event("problem")["text"]


def test_more_viewers_than_allowed_are_sent_away(
    opened: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afd.live.server.MAX_VIEWERS", 1)
    with viewer(opened) as first, viewer(opened) as second:
        first.event("hello")
        with pytest.raises(ConnectionError, match="1013"):
            second.until(lambda: False)


@pytest.mark.parametrize("url", ["/recordings/1/0.mp4", "/recordings/9/9.mp4"])
def test_no_recording_no_file(opened: TestClient, url: str) -> None:
    assert opened.get(url).status_code == 404


@pytest.mark.parametrize(
    "url",
    ["/page.html", "/../pyproject.toml", "/recordings/../votes.jsonl", "/recordings/1/x.mp4",
     "/recordings/1/0.yaml", "/etc/passwd"],
)  # fmt: skip
def test_no_path_leads_to_a_file(opened: TestClient, url: str) -> None:
    assert opened.get(url).status_code == 404


def test_the_page_allows_its_own_script_alone(opened: TestClient) -> None:
    answers = [opened.get("/") for _ in range(2)]
    nonces = set()
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        (nonce,) = set(re.findall(r"'nonce-([^']+)'", policy))
        nonces.add(nonce)
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert set(re.findall(r'nonce="([^"]+)"', answer.text)) == {nonce}
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert len(nonces) == 2


def test_the_page_puts_text_in_as_text_and_asks_no_other_host() -> None:
    folder = Path(protocol.__file__).parent
    source = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.html"))
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                 "http://", "https://", " style=", "onclick="):  # fmt: skip
        assert word not in source, word
