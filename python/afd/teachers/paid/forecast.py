"""Forecast of a paid service from its prices and ledger, and checks of its prerequisites."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from afd.errors import TeacherError
from afd.teachers.forecast import SECONDS_PER_VIDEO, Forecast
from afd.teachers.paid.config import PaidConfig
from afd.teachers.paid.ledger import NAME, Ledger
from afd.teachers.paid.prompts import read_prompts
from afd.teachers.paid.teacher import PROVIDERS, price_of


def forecast(config: PaidConfig, folder: Path, drawn: int) -> Forecast:
    """Estimate the cost of `drawn` requests, offline (`TeacherConfig.forecast`)."""
    provider = PROVIDERS[config.kind](config.api.base_url)
    parameters = {**provider.defaults(), **config.api.options}
    price = price_of(config, provider, parameters)
    assert config.api.prompts is not None
    try:
        wanted = len(read_prompts(config.api.prompts)) * config.api.draws
    except TeacherError:  # reported by `missing`
        wanted = 0
    there = rejected = 0
    spent, seconds = 0.0, None
    if (folder / NAME).is_file():
        ledger = Ledger.snapshot(folder)
        try:
            counts, spent, seconds = ledger.counts(), ledger.spent_usd(), ledger.typical_seconds()
        finally:
            ledger.close()
        there, rejected = counts.get("done", 0), counts.get("content", 0)
    return Forecast(
        config.kind,
        wanted,
        min(there, wanted),
        rejected,
        min(drawn, wanted),
        price_usd=price,
        spent_usd=spent,
        budget_usd=config.fetch.budget_usd,
        seconds=SECONDS_PER_VIDEO if seconds is None else seconds,
        measured=seconds is not None,
        concurrency=config.fetch.concurrency,
    )


def missing(config: PaidConfig, folder: Path) -> Iterator[str]:
    """Yield a message per missing prerequisite (`TeacherConfig.missing`)."""
    assert config.api.prompts is not None
    try:
        read_prompts(config.api.prompts)
    except TeacherError as error:
        yield f"the prompts to ask: {error}"
    variable = PROVIDERS[config.kind](config.api.base_url).key_variable
    if not os.environ.get(variable, "").strip():
        yield f"the environment variable {variable} with the API key is not set"
