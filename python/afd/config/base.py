"""Building blocks of the configuration: base class of sections, number types, kinds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from typing_extensions import Self

from afd import registry
from afd.errors import ConfigError

Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
Natural = Annotated[int, Field(ge=0, lt=2**63)]
# More cores than any machine has; torch crashes with millions of threads.
Threads = Annotated[int, Field(ge=0, le=4096)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


def _in_utf8(path: Path) -> Path:
    if os.fsencode(path) != str(path).encode("utf-8", "replace"):
        message = "needed: a name in UTF-8, as safetensors opens no other files"
        raise PydanticCustomError("path_bytes", message)
    return path


# A folder in which safetensors files are written and read.
Folder = Annotated[Path, AfterValidator(_in_utf8)]


class Section(BaseModel):
    """Base class of every section: rejects unknown keys and non-finite numbers; immutable after
    loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_a_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject booleans for numbers: `steps: true` would count as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        parts = set(_parts(annotation))
        if parts & {int, float} and bool not in parts:
            given = value if isinstance(value, list) else [value]
            if any(isinstance(one, bool) for one in given):
                raise PydanticCustomError("switch", "needed: a number, neither true nor false")
        return value

    def pinned(self) -> Self:
        """A copy whose hub names are pinned to their current commits."""
        return self


@dataclass(frozen=True)
class ByKind:
    """Metadata of a field that holds one of several sections, chosen by `kind` in the registry.

    Attributes:
        default: the kind where none is given; None: a kind must be given.
        optional: whether the field may be null.
        without: kinds that the field does not take.
    """

    group: registry.Group
    default: str | None = None
    optional: bool = False
    without: tuple[str, ...] = ()

    def sections(self) -> list[type[BaseModel]]:
        """The sections of all kinds that can be imported."""
        refused = [registry.find(self.group, kind) for kind in self.without]
        found = registry.importable(self.group)
        return [section for section in dict.fromkeys(found) if section not in refused]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda section, info: section and section.model_dump(mode=info.mode), info_arg=True
            ),
        )

    def _validate(self, value: Any) -> Any:
        if isinstance(value, Section) or (value is None and self.optional):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("section", "needed: a section of keys and values with a kind")
        given = value if value.get("kind") is not None else {**value, "kind": self.default}
        if given["kind"] is None:
            known = ", ".join(registry.names(self.group))
            reason = f"kind: not given; needed: one of the {self.group} {known}"
            raise PydanticCustomError("kind", "{reason}", {"reason": reason})
        if given["kind"] in self.without:
            others = ", ".join(n for n in registry.names(self.group) if n not in self.without)
            reason = f"kind: got {given['kind']}; needed: one of {others}"
            raise PydanticCustomError("kind", "{reason}", {"reason": reason})
        try:
            section = registry.find(self.group, str(given["kind"]))
        except ConfigError as error:
            raise PydanticCustomError("kind", "{reason}", {"reason": f"kind: {error}"}) from None
        return section.model_validate(given)


def of_default_kind() -> Any:
    """The default of a `ByKind` field: the section of the default kind with its defaults."""
    return Field(default={}, validate_default=True)


def _parts(annotation: Any) -> Iterator[Any]:
    """All types in an annotation, recursively."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
