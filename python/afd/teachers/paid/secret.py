"""API keys, and how they and whatever would move a terminal are taken out of others' words."""

from __future__ import annotations

import base64
import binascii
import html
import os
import re
import unicodedata
from collections.abc import Iterator
from typing import NoReturn

from afd.errors import TeacherError

HIDDEN = "[key]"
# Runs of the key that are hidden: in words for people, where one too many is harmless, and in
# identifiers and addresses, which are then refused.
WORD_RUN, NAME_RUN = 6, 8
LAYERS = 4  # escapes within escapes
_SEED = 4
_SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"
_BASES = ((base64.b64encode, 6, 3), (base64.b32encode, 5, 5))
# A run of backslashes is looked at from its beginning only: from each of them it is quadratic.
_RUN = r"(?<!\\)\\+"
_ESCAPE = re.compile(
    rf"(?:{_RUN}|%)[uU]\{{?([0-9a-fA-F]{{2,6}})\}}?|(?:{_RUN}[xX]|%|=)([0-9a-fA-F]{{2}})"
    rf"|{_RUN}([0-7]{{3}})"
)


def clean(text: str) -> str:
    """The text on one line and without what is no character to read: controls, escapes of
    terminals, marks that turn the reading direction, halves of surrogate pairs."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        " " if c in _SPACES else c
        for c in text
        if c in _SPACES or unicodedata.category(c)[0] != "C"
    )


class Secret:
    """An API key that does not show itself: no value in repr, str, pickle or copies."""

    __slots__ = ("_seeds", "_value", "name")

    def __init__(self, name: str, value: str) -> None:
        self.name, self._value = name, value
        # Every place of every spelling of the key by the `_SEED` characters that begin there.
        self._seeds: dict[str, list[tuple[str, int, float]]] = {}
        for spelling, characters in _spellings(value):
            per_character = len(spelling) / characters
            for at in range(len(spelling) - _SEED + 1):
                found = self._seeds.setdefault(spelling[at : at + _SEED], [])
                found.append((spelling, at, per_character))

    @classmethod
    def from_environment(cls, name: str) -> Secret:
        """The key in an environment variable (docs/ENVIRONMENT.md names them); TeacherError if
        there is none or it could not be a header."""
        value = os.environ.get(name, "").strip()
        if not value:
            raise TeacherError(f"no API key: set the environment variable {name}")
        if len(value) < 8 or not value.isascii() or not value.isprintable():
            raise TeacherError(
                f"the environment variable {name} holds no API key "
                "(it is shorter than 8 characters or has some that no key has)"
            )
        return cls(name, value)

    def reveal(self) -> str:
        """The key itself, for the one header it belongs to."""
        return self._value

    def stands_in(self, text: str) -> bool:
        """Whether the whole key stands in the text as it is."""
        return self._value in text

    def hide(self, text: str, least: int = WORD_RUN) -> str:
        """The text without the key and without runs of `least` or more characters of it.

        Also where it is reversed, in other case, interrupted by punctuation, or spelt in base64,
        base32, hexadecimal or codes, one within another, at any place of a longer text; where it
        is escaped (JSON, percent, HTML, quoted-printable), the text comes back without escapes.
        """
        layers = [text]
        while len(layers) <= LAYERS and (plain := _unescaped(layers[-1])) != layers[-1]:
            layers.append(plain)
        for layer in reversed(layers):
            marked = self._marked(layer.replace(self._value, HIDDEN), least)
            if marked != layer:
                return marked
        return text

    def _marked(self, text: str, least: int) -> str:
        letters, places = _letters(text)
        spans: list[tuple[int, int]] = []
        end = 0
        for at in range(len(letters) - _SEED + 1):
            for spelling, start, per_character in self._seeds.get(letters[at : at + _SEED], ()):
                if at < end:
                    break
                length = _SEED
                while (
                    at + length < len(letters)
                    and start + length < len(spelling)
                    and letters[at + length] == spelling[start + length]
                ):
                    length += 1
                if length + 1e-9 >= min(least * per_character, len(spelling)):
                    end = at + length
                    spans.append((at, end))
        if not spans:
            return text
        places = places or [n for n, c in enumerate(text) if c.isalnum()]
        kept, done = "", 0
        for first, last in spans:
            kept += text[done : places[first]] + HIDDEN
            done = places[last - 1] + 1
        return re.sub(r"(?:\[key\]\W{0,3})*\[key\]", HIDDEN, kept + text[done:])

    def __repr__(self) -> str:
        return f"Secret({self.name})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not written anywhere")


def _letters(text: str) -> tuple[str, list[int]]:
    """The letters and digits alone, in one case and width; and where each stands in the text
    (empty where the text is ASCII: they are those that `isalnum`)."""
    if text.isascii():
        return re.sub(r"[^a-z0-9]+", "", text.lower()), []
    letters: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        for plain in unicodedata.normalize("NFKC", character).casefold():
            if plain.isascii() and plain.isalnum():
                letters.append(plain)
                places.append(place)
    return "".join(letters), places


def _unescaped(text: str) -> str:
    """One layer of escapes less."""
    if not any(mark in text for mark in "\\%&="):
        return text

    def character(found: re.Match[str]) -> str:
        wide, byte, octal = found.groups()
        code = int(octal, 8) if octal else int(wide or byte, 16)
        return chr(code) if code <= 0x10FFFF else found.group()

    return _ESCAPE.sub(character, html.unescape(text))


def _spellings(key: str) -> Iterator[tuple[str, int]]:
    """Letters and digits of each spelling, and how many characters of the key they stand for."""
    seen: set[str] = set()
    for plain in (key, key[::-1]):
        wide = [plain.encode(width) for width in ("utf-16-le", "utf-16-be")]
        first = [code for data in (plain.encode(), *wide) for code in _codes(data)]
        second = [code for data in _codes(plain.encode(), True) for code in _codes(data, True)]
        for data in (plain.encode(), *first, *second):
            letters = _letters(data.decode("ascii"))[0]
            if len(letters) >= _SEED and letters not in seen:
                seen.add(letters)
                # Of the key itself only letters and digits count; codes hold every character.
                yield letters, len(letters) if data == plain.encode() else len(plain)


def _codes(data: bytes, usual: bool = False) -> Iterator[bytes]:
    """Hexadecimal and base64, unless `usual` also base32 and decimal codes. Base64 and base32 at
    every alignment, without the characters that also depend on what stands around the data."""
    yield binascii.hexlify(data)
    if not usual:
        yield " ".join(str(byte) for byte in data).encode()
    for encode, bits, alignments in _BASES[: 1 if usual else 2]:
        for before in range(alignments):
            code = encode(bytes(before) + data)
            yield code[-(-before * 8 // bits) : (before + len(data)) * 8 // bits]
