"""How a run is divided over processes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from afd.config.base import Count, Section

# Sections that a single word may stand for, and its key: parallel=fsdp is parallel.weights=fsdp.
ONE_WORD = {"parallel": "weights"}


class ParallelConfig(Section):
    """Under torchrun: what every process holds, and which processes share a video."""

    weights: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="whole weights in every process, or sharded weights"
    )
    sequence: Count = Field(
        default=1,
        description="processes that compute each video together, over its tokens and heads; a "
        "divisor of the student's heads",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_one_word(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {ONE_WORD["parallel"]: given}
        if not isinstance(given, dict | cls):
            needed = "ddp, fsdp, or the keys weights and sequence"
            raise ValueError(f"parallel: got {given!r}; needed: {needed}")
        return given
