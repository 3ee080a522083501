"""API keys, and the removal of keys and terminal control characters from external text."""

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
# Minimum length of runs of the key that are hidden: in text for display, where a false match is
# harmless, and in identifiers and URLs, which are refused on a match.
WORD_RUN, NAME_RUN = 6, 8
LAYERS = 4  # of nested escapes
_SEED = 4
_SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"
_BASES = ((base64.b64encode, 6, 3), (base64.b32encode, 5, 5))
# A run of backslashes is matched only from its beginning: matching from each one is quadratic.
_RUN = r"(?<!\\)\\+"
_ESCAPE = re.compile(
    rf"(?:{_RUN}|%)[uU]\{{?([0-9a-fA-F]{{2,6}})\}}?|(?:{_RUN}[xX]|%|=)([0-9a-fA-F]{{2}})"
    rf"|{_RUN}([0-7]{{3}})"
)


def clean(text: str) -> str:
    """The text on one line, without unprintable characters: control characters, terminal escapes,
    bidirectional marks, lone surrogates."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        " " if c in _SPACES else c
        for c in text
        if c in _SPACES or unicodedata.category(c)[0] != "C"
    )


class Secret:
    """An API key that never reveals its value in repr, str, pickle or copies."""

    __slots__ = ("_seeds", "_value", "name")

    def __init__(self, name: str, value: str) -> None:
        self.name, self._value = name, value
        # Index of all positions in all spellings of the key by the next `_SEED` characters.
        self._seeds: dict[str, list[tuple[str, int, float]]] = {}
        for spelling, characters in _spellings(value):
            per_character = len(spelling) / characters
            for at in range(len(spelling) - _SEED + 1):
                found = self._seeds.setdefault(spelling[at : at + _SEED], [])
                found.append((spelling, at, per_character))

    @classmethod
    def from_environment(cls, name: str) -> Secret:
        """Read the key from an environment variable (listed in docs/ENVIRONMENT.md). Raises
        TeacherError if it is unset or not valid in a header."""
        value = os.environ.get(name, "").strip()
        if not value:
            raise TeacherError(f"no API key: set the environment variable {name}")
        if len(value) < 8 or not value.isascii() or not value.isprintable():
            raise TeacherError(
                f"the environment variable {name} holds no API key "
                "(it is shorter than 8 characters or contains invalid characters)"
            )
        return cls(name, value)

    def reveal(self) -> str:
        """The key itself, for use in the Authorization header only."""
        return self._value

    def stands_in(self, text: str) -> bool:
        """Whether the text contains the whole key verbatim."""
        return self._value in text

    def hide(self, text: str, least: int = WORD_RUN) -> str:
        """Replace the key, and runs of `least` or more of its characters, in a text.

        Also recognised if reversed, in another case, interrupted by punctuation, or encoded in
        base64, base32, hexadecimal or character codes (also nested), anywhere in a longer text. If
        the match was escaped (JSON, percent, HTML, quoted-printable), the text is returned
        unescaped.
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
        raise TypeError("a Secret cannot be serialised")


def _letters(text: str) -> tuple[str, list[int]]:
    """Only the letters and digits, normalised in case and width; and the position of each in the
    text (empty if the text is ASCII: then they are the characters that are `isalnum`)."""
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
    """Remove one layer of escapes."""
    if not any(mark in text for mark in "\\%&="):
        return text

    def character(found: re.Match[str]) -> str:
        wide, byte, octal = found.groups()
        code = int(octal, 8) if octal else int(wide or byte, 16)
        return chr(code) if code <= 0x10FFFF else found.group()

    return _ESCAPE.sub(character, html.unescape(text))


def _spellings(key: str) -> Iterator[tuple[str, int]]:
    """Yield the letters and digits of each spelling, and how many characters of the key they
    encode."""
    seen: set[str] = set()
    for plain in (key, key[::-1]):
        wide = [plain.encode(width) for width in ("utf-16-le", "utf-16-be")]
        first = [code for data in (plain.encode(), *wide) for code in _codes(data)]
        second = [code for data in _codes(plain.encode(), True) for code in _codes(data, True)]
        for data in (plain.encode(), *first, *second):
            letters = _letters(data.decode("ascii"))[0]
            if len(letters) >= _SEED and letters not in seen:
                seen.add(letters)
                # Of the plain key only letters and digits count; encodings cover every character.
                yield letters, len(letters) if data == plain.encode() else len(plain)


def _codes(data: bytes, usual: bool = False) -> Iterator[bytes]:
    """Yield encodings: hexadecimal and base64; unless `usual`, also base32 and decimal codes.
    Base64 and base32 at every alignment, without the characters that depend on adjacent data."""
    yield binascii.hexlify(data)
    if not usual:
        yield " ".join(str(byte) for byte in data).encode()
    for encode, bits, alignments in _BASES[: 1 if usual else 2]:
        for before in range(alignments):
            code = encode(bytes(before) + data)
            yield code[-(-before * 8 // bits) : (before + len(data)) * 8 // bits]
