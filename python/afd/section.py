"""What every section of the configuration is made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
Natural = Annotated[int, Field(ge=0, lt=2**63)]
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
