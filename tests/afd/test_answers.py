"""The door through which words and numbers of a server enter: decoding, the key, bounds, types."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from afd.teachers.paid.answers import (
    Address,
    Amount,
    Answer,
    Failure,
    Name,
    Number,
    Reply,
    Word,
    receive,
)
from afd.teachers.paid.secret import HIDDEN, Secret, clean

KEY = "sk-Test-9fQ2xLbV7RmZ4TaK8wDe"
SECRET = Secret("X", KEY)


def arrived(body: bytes | str | Any, **headers: str) -> Reply:
    if not isinstance(body, bytes):
        body = body if isinstance(body, str) else json.dumps(body)
        body = body.encode("utf-8", "surrogatepass")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return receive(200, named, body, SECRET)


def b64(text: str, before: str = "") -> str:
    return base64.b64encode((before + text).encode()).decode()


SPELLINGS = {
    "plain": KEY,
    "upper": KEY.upper(),
    "reversed": KEY[::-1],
    "spaced": " ".join(KEY),
    "zero width": "\u200b".join(KEY),
    "lines": KEY[:10] + "\n" + KEY[10:],
    "full width": "".join(chr(ord(c) + 0xFEE0) for c in KEY),
    "percent": "".join(f"%{ord(c):02X}" for c in KEY),
    "percent twice": "".join(f"%25{ord(c):02x}" for c in KEY),
    "percent partly": KEY.replace("e", "%65").replace("T", "%54").replace("9", "%39"),
    "JSON escapes": "".join(f"\\u{ord(c):04x}" for c in KEY),
    "JSON escapes twice": "".join(f"\\\\u{ord(c):04x}" for c in KEY),
    "backslash x": "".join(f"\\x{ord(c):02x}" for c in KEY),
    "octal": "".join(f"\\{ord(c):03o}" for c in KEY),
    "HTML": "".join(f"&#{ord(c)};" for c in KEY),
    "HTML hex": "".join(f"&#x{ord(c):x};" for c in KEY),
    "quoted printable": "".join(f"={ord(c):02X}" for c in KEY),
    "hex": KEY.encode().hex(),
    "hex with colons": KEY.encode().hex(":"),
    "codes": str(list(KEY.encode())),
    "base64": b64(KEY),
    "base64 behind one": b64(KEY, "x"),
    "base64 behind two": b64(KEY, "xy"),
    "base64 of the header": b64(f"Authorization: Bearer {KEY}"),
    "base64url": base64.urlsafe_b64encode(f"?>{KEY}".encode()).decode(),
    "base64 in base64": b64(b64(KEY, "x"), "y"),
    "base64 of hex": b64(KEY.encode().hex()),
    "base64 of reversed": b64(KEY[::-1]),
    "base64 of UTF-16": base64.b64encode(KEY.encode("utf-16")).decode(),
    "base32": base64.b32encode(f"abc{KEY}".encode()).decode(),
}


def traces(text: str) -> list[str]:
    """Runs of 9 characters of any spelling that are still there, whatever stands between."""
    plain = "".join(filter(str.isalnum, text)).lower()
    found = []
    for name, spelling in SPELLINGS.items():
        letters = "".join(filter(str.isalnum, spelling)).lower()
        if name not in ("full width", "base64 of the header"):
            least = 9 * max(1, len(letters) // len(KEY))
            found += [
                name for at in range(len(letters) - least) if letters[at : at + least] in plain
            ]
    return sorted(set(found))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("around", ["{}", "Incorrect key: {}, see the page", "<p>{}</p>"])
def test_no_spelling_of_the_key_passes(spelling: str, around: str) -> None:
    text = around.format(SPELLINGS[spelling])
    assert HIDDEN in SECRET.hide(text)
    for reply in (
        arrived({"error": {"message": text}, "name" + text: text, "id": text}),
        arrived("not JSON: " + text),
        arrived("".join(f"\\u{ord(c):04x}" for c in text).join(('{"a": "', '"}'))),
        arrived(json.dumps({"a": text}).encode("utf-16")),
        arrived({}, retry_after=text),
    ):
        assert HIDDEN in repr(reply)
        assert traces(repr(reply)) == []


def test_parts_of_the_key_are_hidden_and_ordinary_words_are_not() -> None:
    halves = f"it begins with {KEY[:14]} and ends with {KEY[14:]}, or {KEY[5:12]}"
    assert SECRET.hide(halves) == f"it begins with {HIDDEN} and ends with {HIDDEN}, or {HIDDEN}"
    words = "HTTP 400 InvalidParameter: request id 02178780432326311300f35b2a874e35aceb4d: 50 %25"
    assert SECRET.hide(words) == words


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\x1b]0;title\x07\x1b[2J", "]0;title[2J"),
        ("a\r\nb\tc\u2028d", "a  b c d"),
        ("\u202egnp.exe\u2066 \u200d\ufeff\x00\x9b31m", "gnp.exe 31m"),
        ("cut \ud83d", "cut "),
        ("ü 敏感 🎬", "ü 敏感 🎬"),
    ],
)
def test_what_is_no_character_to_read_is_removed(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
    reply = arrived({"message": text})
    assert reply.json == {"message": cleaned}
    reply.text.encode()
    assert clean(reply.text) == reply.text


@pytest.mark.parametrize("charset", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_json_is_read_in_every_charset_it_may_have(charset: str) -> None:
    assert arrived('{"id": "ü1"}'.encode(charset)).json == {"id": "ü1"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"{",
        b'{"id": 1} x',
        b"[" * 100_000,
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b'{"id": "a", "id": "b"}',
        b'{"id": "a", "id\\u0000": "b"}',
        b"[" + b"0," * 300_000 + b"0]",
        b"\xff\xfe\x00\xd8",
    ],
)
def test_what_is_no_plain_json_is_none(body: bytes) -> None:
    assert arrived(body).json is None
    with pytest.raises(Failure, match=r"with an empty body|with no JSON object"):
        arrived(body).object()


def test_numbers_that_are_none_are_nothing() -> None:
    body = '{"a": 1e999, "b": NaN, "c": -Infinity, "d": 1' + "0" * 5000 + ', "e": -0, "f": 1}'
    assert arrived(body).json == {"a": None, "b": None, "c": None, "d": None, "e": 0, "f": 1}


class Model(Answer):
    name: Name = "x"
    word: Word = ""
    url: Address | None = None
    number: Number = None
    amount: Amount = None


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        ("name", "cgt-2025:a_b~c.d=+@,", "cgt-2025:a_b~c.d=+@,"),
        ("name", 12, "12"),
        ("word", None, ""),
        ("word", 3, "3"),
        ("word", "w" * 400, "w" * 300),
        ("number", "1.5", 1.5),
        ("number", True, None),
        ("number", "1e3", None),
        ("number", [1], None),
        ("amount", 5, 5.0),
        ("amount", "5", None),
        ("amount", 0, None),
        ("amount", -1e9, None),
        ("amount", True, None),
        ("amount", {"n": 1}, None),
        ("amount", 10**18, None),
        ("url", "https://a.example/v", "https://a.example/v"),
    ],
)
def test_fields_are_typed(field: str, value: Any, read: Any) -> None:
    assert getattr(arrived({field: value}).read(Model), field) == read


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", value) for value in ("", ".", "..", "../x", "a/b", "a%2fb", "a b", "a\\b", "é")),
        *(("name", value) for value in ("a?b", "a#b", "x" * 201, -1, True, 1.5, None, ["a"], KEY)),
        *(("name", value) for value in ("a\nb", "a\0", KEY[:12])),
        *(("word", value) for value in (True, ["a"], {"a": 1})),
        *(("url", value) for value in ("", 5, ["x"], "x" * 9000, f"https://a.example/?k={KEY}")),
    ],
)
def test_a_field_of_another_form_is_a_failure_that_names_it(field: str, value: Any) -> None:
    # Characters that are removed cannot make a wrong name a right one: "a\nb" has a space left.
    reply = arrived({field: value})
    if value == "a\0":
        assert reply.read(Model).name == "a"
        return
    with pytest.raises(Failure, match=f"whose {field} is wrong") as failure:
        reply.read(Model)
    assert failure.value.__context__ is None
    assert KEY not in str(failure.value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2.5", 2.5),
        ("-3", 0.0),
        ("nan", 0.0),
        ("inf", 0.0),
        ("1e999", 0.0),
        ("9" * 200, 86_400.0),
        ("1e9", 86_400.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 99 Oct 99999999999999999999 99:28:00 GMT", 0.0),
        ("soon", 0.0),
        ("", 0.0),
    ],
)
def test_retry_after_is_a_finite_time(value: str, seconds: float) -> None:
    assert arrived({}, retry_after=value).retry_after_s == seconds
