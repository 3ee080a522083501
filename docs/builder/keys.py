"""The page of the configuration, made from its pydantic models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import BaseMetadata
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from afd.adapt.config import SequenceConfig
from afd.audit.command import AuditOptions
from afd.benchmarks.config import BenchmarkConfig
from afd.config.base import ByKind
from afd.config.keys import NAMED, sections_of
from afd.config.run import RunConfig
from afd.export import ExportConfig
from afd.lab.ablation import AblationConfig
from afd.live.config import LiveConfig
from afd.sampling.config import SampleConfig

# Heading and root section of every command that takes keys.
ROOTS: dict[str, type[BaseModel]] = {
    "afd train, resume, eval, quickstart": RunConfig,
    "afd sample": SampleConfig,
    "afd live": LiveConfig,
    "afd benchmark": BenchmarkConfig,
    "afd adapt": SequenceConfig,
    "afd ablation": AblationConfig,
    "afd export": ExportConfig,
    "afd teacher audit": AuditOptions,
}
# Sections that have a table already, each with what its keys begin with.
Seen = set[tuple[str, type[BaseModel]]]
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def page() -> str:
    """Markdown: every key with its type, default and description."""
    parts = [
        "# Configuration",
        "Generated from the models in `python/afd`. A YAML file nests the parts of a dotted key, "
        "and a command takes `section.key=value`. A name in angle brackets is the user's own; "
        "a section that depends on its `kind` has a table per kind.",
    ]
    seen: Seen = set()
    for title, root in ROOTS.items():
        parts += [f"## {title}", *_section(root, "", seen)]
    return "\n\n".join(parts) + "\n"


def _section(section: type[BaseModel], prefix: str, seen: Seen) -> Iterator[str]:
    if (prefix, section) in seen:
        return
    seen.add((prefix, section))
    doc = (section.__doc__ or "").strip()
    if doc and doc != (BaseModel.__doc__ or "").strip():
        yield _cell(doc)
    rows = [f"| `{prefix}{name}` | {_row(field)} |" for name, field in section.model_fields.items()]
    yield "\n".join(["| key | type | default | description |", "|---|---|---|---|", *rows])
    for name, field in section.model_fields.items():
        below = f"{prefix}{name}.{NAMED}." if _is_mapping(field) else f"{prefix}{name}."
        if get_origin(field.annotation) is list:
            below = f"{prefix}{name}[]."
        kinds: dict[type[BaseModel], list[str]] = {}
        for one in sections_of(field):
            kinds.setdefault(one, []).extend(_kinds(one))
        for one, names in kinds.items():
            if (below, one) not in seen:
                chosen = f" (kind {', '.join(names)})" if names else ""
                yield f"### `{below[:-1]}`{chosen}"
                yield from _section(one, below, seen)


def _kinds(section: type[BaseModel]) -> list[str]:
    field = section.model_fields.get("kind")
    chosen = field is not None and get_origin(field.annotation) is Literal
    return [str(kind) for kind in get_args(field.annotation)] if field and chosen else []


def _is_mapping(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is dict and bool(sections_of(field))


def _row(field: FieldInfo) -> str:
    limits = [limit for each in field.metadata for limit in _limits(each)]
    limits += _inner_limits(field.annotation)
    kind = ", ".join([_type(field.annotation), *dict.fromkeys(limits)])
    return " | ".join(map(_cell, (kind, _default(field), field.description or "")))


def _type(annotation: Any) -> str:
    """A type in words: `int or null`, `afd or sft`, `list of text`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(parts[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_type, parts)))
    if origin is Literal:
        return " or ".join(json.dumps(part) if part is None else str(part) for part in parts)
    if origin in (list, tuple):
        return "list of " + ", ".join(dict.fromkeys(_type(p) for p in parts if p is not Ellipsis))
    if origin is dict:
        inner = _type(parts[1])
        return "sections by name" if inner == "section" else f"{inner} by name"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {str: "text", Path: "path", bool: "true or false", NoneType: "null", Any: "any"}
    return names.get(annotation) or getattr(annotation, "__name__", str(annotation))


def _inner_limits(annotation: Any) -> list[str]:
    """Limits of the parts of an annotation, such as those of a list's numbers."""
    found = []
    for part in get_args(annotation):
        if get_origin(part) is Annotated:
            found += [limit for each in part.__metadata__ for limit in _limits(each)]
        found += _inner_limits(part) if get_origin(part) is not Literal else []
    return found


def _limits(each: Any) -> Iterator[str]:
    if isinstance(each, FieldInfo):
        for inner in each.metadata:
            yield from _limits(inner)
    elif isinstance(each, BaseMetadata) or hasattr(each, "pattern"):
        for name, sign in SIGNS.items():
            value = getattr(each, name, None)
            # The bounds of 64 bits are nobody's choice.
            if value is not None and value != 2**63:
                yield f"{sign} {value:g}" if isinstance(value, float) else f"{sign} {value}"
        if getattr(each, "pattern", None):
            yield f"matching `{each.pattern}`"
        for name, words in (("min_length", "at least"), ("max_length", "at most")):
            if getattr(each, name, None):
                yield f"{words} {getattr(each, name)} long"


def _default(field: FieldInfo) -> str:
    by_kind = [each for each in field.metadata if isinstance(each, ByKind)]
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "required"
    if by_kind and default == {}:
        return f"kind {by_kind[0].default}"
    if isinstance(default, BaseModel):
        return "its keys below"
    return json.dumps(default, default=str, ensure_ascii=False)


def _cell(text: str) -> str:
    """A text that a table of the site shows as it is; code keeps its characters."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    parts[::2] = [
        re.sub(r"([|*_\\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]
    ]
    return "".join(parts)
