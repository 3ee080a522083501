"""What every section of the configuration is made of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
Natural = Annotated[int, Field(ge=0, lt=2**63)]
# More than any machine's cores; with millions torch crashes.
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
    """Base of every section: unknown keys and numbers that are not finite are errors, values cannot
    change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_a_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """`steps: true` would count as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        parts = set(_parts(annotation))
        if parts & {int, float} and bool not in parts:
            given = value if isinstance(value, list) else [value]
            if any(isinstance(one, bool) for one in given):
                raise PydanticCustomError("switch", "needed: a number, neither true nor false")
        return value


def _parts(annotation: Any) -> Iterator[Any]:
    """The types in an annotation, at every depth."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
