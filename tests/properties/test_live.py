"""Whatever a viewer sends to `afd live` is a message or one sentence."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from afd.live import protocol
from afd.live.security import Guard, guard

KINDS = (
    "play",
    "pause",
    "step",
    "restart",
    "switch",
    "record",
    "blind",
    "vote",
    "controls",
    "seen",
)
KEYS = ("seed", "prompt", "mode", "start", "on", "choice", "take", "chunk", "file", "type")
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from(["plain", "recache", "noise", "picture", "/etc/passwd", "../x"]),
    st.lists(st.integers(), max_size=3),
)


def parsed(text: str) -> protocol.Incoming | str:
    """The message, or the sentence that refuses it."""
    try:
        return protocol.parse(text)
    except ValueError as error:
        return str(error)


@given(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(KEYS[:-1]), VALUES, max_size=5))
def test_a_message_is_taken_as_it_is_or_refused_in_a_sentence(
    kind: str, more: dict[str, Any]
) -> None:
    message = parsed(json.dumps({"type": kind, **more}))
    if isinstance(message, str):
        assert len(message) < 400
        assert "\n" not in message
        return
    # What is taken says nothing else than what came, in the types that came.
    held = message.model_dump()
    assert {key: held[key] for key in more} == more
    assert all(type(held[key]) is type(value) for key, value in more.items())


@given(st.one_of(st.text(), st.binary().map(lambda b: b.decode("latin-1"))))
def test_any_text_is_a_message_or_a_sentence(text: str) -> None:
    assert len(str(parsed(text))) < 400


class Request:
    """The part of a request that the guard reads."""

    def __init__(self, host: str, origin: str) -> None:
        self._values = {"host": [host], "origin": [origin]}
        self.headers = self
        self.query_params: dict[str, str] = {}

    def getlist(self, name: str) -> list[str]:
        return self._values[name]


HOSTS = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"\A[a-z0-9.@:/\[\]%-]{0,30}\Z"),
    st.sampled_from(["127.0.0.1", "localhost:8742", "evil.example", "127.0.0.1.evil.example"]),
)


@given(HOSTS, HOSTS)
def test_only_the_server_s_own_names_and_origin_pass(host: str, origin: str) -> None:
    rules: Guard = guard("127.0.0.1", None)
    for given_origin in (origin, f"http://{origin}", f"http://{host}"):
        refusal = rules.refusal(Request(host, given_origin))  # type: ignore[arg-type]
        if refusal is None:
            bare = host.lower()
            assert any(bare == n or bare.startswith(f"{n}:") for n in
                       ("127.0.0.1", "localhost", "[::1]"))  # fmt: skip
            assert given_origin.lower().split("://")[1].split(":")[0] in bare
