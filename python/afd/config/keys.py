"""Dotted keys of a root section: which exist, what type each has, which one was meant.

The names of a mapping's entries, which the user chooses, are NAMED in these keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from afd.config.base import ByKind
from afd.errors import ConfigError
from afd.listing import shown

NAMED = "<name>"


def known_keys(kind: type[BaseModel]) -> list[str]:
    """Every dotted key of a root section, including sections of all kinds."""
    return list(dict.fromkeys(_keys(kind, "")))


def with_named(key: str, kind: type[BaseModel]) -> str:
    """A dotted key with NAMED in the place of a name that the user has chosen."""
    first, *rest = key.split(".")
    field = kind.model_fields.get(first)
    if field is None or len(rest) < 2 or not _is_mapping(field):
        return key
    return ".".join([first, NAMED, *rest[1:]])


def suggest(key: str, kind: type[BaseModel]) -> str:
    """Suggest the closest known keys by last part (same section first), else the section's keys."""
    known = known_keys(kind)
    section, _, end = key.rpartition(".")

    def closeness(candidate: str) -> float:
        other_section, _, other_end = candidate.rpartition(".")
        near = difflib.SequenceMatcher(None, end, other_end).ratio()
        return near + 0.15 * (section == other_section)

    ranked = sorted(known, key=closeness, reverse=True)
    best = closeness(ranked[0])
    if best >= 0.6:
        return (
            "did you mean " + " or ".join(k for k in ranked[:3] if closeness(k) > best - 0.1) + "?"
        )
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    return "known here: " + ", ".join(siblings)


def types_of(kind: type[BaseModel], parts: Sequence[str]) -> list[Any]:
    """The types of a dotted key, one per section that has it."""
    field = kind.model_fields.get(parts[0])
    if field is None:
        return []
    if len(parts) == 1:
        return [field.annotation]
    rest = parts[2:] if _is_mapping(field) else parts[1:]
    return [found for s in sections_of(field) if rest for found in types_of(s, rest)]


def parts_of(annotation: Any) -> Iterator[Any]:
    """The plain types in a union: Path and str, but neither literals nor element types of lists."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from parts_of(part)
    elif origin is Annotated:
        yield from parts_of(get_args(annotation)[0])
    else:
        yield origin or annotation


def sections_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The sections that a field may hold: one, one per kind, or an empty list."""
    for each in field.metadata:
        if isinstance(each, ByKind):
            return each.sections()
    return _sections(field.annotation)


def _is_mapping(field: FieldInfo) -> bool:
    """Whether a field holds sections under names that the user chooses."""
    return get_origin(field.annotation) is dict and bool(sections_of(field))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    for each in getattr(annotation, "__metadata__", ()):
        if isinstance(each, ByKind):
            return each.sections()
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [section for part in get_args(annotation) for section in _sections(part)]


def _keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if get_origin(field.annotation) is list:
            continue  # no dotted key reaches into a list
        below = f"{prefix}{name}.{NAMED}." if _is_mapping(field) else f"{prefix}{name}."
        for one in sections_of(field):
            yield from _keys(one, below)


def described(key: str, kind: type[BaseModel]) -> str:
    """What a section's own key needs: its description, else "a value"."""
    field = kind.model_fields.get(key)
    return (field.description if field else None) or "a value"


def refuse_idle(overrides: Iterable[str], method: str, methods: Iterable[str]) -> None:
    """Raise ConfigError for an override of another method's section: the run never reads it."""
    for override in overrides:
        section = override.partition("=")[0].strip().partition(".")[0]
        if section in methods and section != method:
            raise ConfigError(f"override {shown(override)}: has no effect with method={method}")
