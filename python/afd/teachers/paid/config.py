"""Typed settings of paid services. They never contain API keys: see docs/TEACHERS.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from afd.config.base import Count, Natural, Positive, Section
from afd.registry import load
from afd.teachers.config import TeacherConfig
from afd.teachers.forecast import Forecast


class ApiConfig(Section):
    """Parameters of the videos requested from a paid service (kinds ark, openai, fal); every field
    affects the videos."""

    model: str | None = Field(
        default=None,
        description="the provider's name of the model, such as dreamina-seedance-2-0-260128",
    )
    prompts: Path | None = Field(
        default=None,
        description="file of prompts: .txt one a line, .jsonl or .csv with the field prompt",
    )
    draws: Count = Field(default=1, description="videos per prompt, each with its own seed")
    options: dict[str, Any] = Field(
        default={},
        description="further fields of the request, with the provider's names, such as "
        "{resolution: 480p, duration: 5}; null leaves out one of the provider's defaults",
    )
    prompt_suffix: str = Field(
        default="",
        description="sent after every prompt (older Seedance models read --resolution there)",
    )
    send_seed: bool | None = Field(
        default=None, description="whether the request carries the seed; null: if the provider can"
    )
    base_url: str | None = Field(
        default=None, description="root of the API; null is the provider's own"
    )

    @field_validator("base_url")
    @classmethod
    def _no_credentials(cls, url: str | None) -> str | None:
        if url is not None and ("@" in urlsplit(url).netloc or not urlsplit(url).netloc):
            # The value is left out of the message: it may contain a password.
            raise ValueError("teacher.api.base_url needs scheme://host[:port]/path, no user name")
        return url

    @field_validator("options")
    @classmethod
    def _plain_json(cls, options: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(options, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("teacher.api.options needs plain JSON values") from None
        return options


class FetchConfig(Section):
    """How a paid service is used: prices, timeouts and trusted hosts. Nothing here affects the
    videos."""

    budget_usd: float = Field(
        default=0.0,
        ge=0,
        description="total budget of this folder's videos, in USD",
    )
    price_usd: float | None = Field(
        default=None,
        ge=0,
        description="USD per video, per second of video or per million tokens, see price_per",
    )
    price_per: Literal["video", "second", "million_tokens"] = Field(
        default="video", description="unit of price_usd"
    )
    units: Positive | None = Field(
        default=None,
        description="seconds or tokens of one video, for the estimate before a submit; null: "
        "seconds are read from the options",
    )
    concurrency: Count = Field(default=8, description="maximum number of videos in progress")
    prefetch: Natural = Field(
        default=16, description="number of requests made ahead of the trainer, in the background"
    )
    attempts: Count = Field(
        default=3, description="maximum number of submits per video after the provider's failures"
    )
    tries: Count = Field(
        default=5, description="attempts per HTTP exchange after transient failures"
    )
    backoff_s: Positive = Field(
        default=2.0, description="first pause after a failure in seconds; doubles, with jitter"
    )
    backoff_max_s: Positive = Field(default=60.0, description="longest such pause in seconds")
    poll_s: Positive = Field(default=5.0, description="seconds between two polls of a task")
    request_s: Positive = Field(default=60.0, description="seconds one API exchange may take")
    download_s: Positive = Field(default=600.0, description="seconds one download may take")
    deadline_s: Positive = Field(
        default=3600.0, description="seconds from a submit until the video is given up for now"
    )
    settle_s: Positive = Field(
        default=120.0,
        description="seconds after which a submit without an answer must show in the provider's "
        "list if it arrived",
    )
    max_mib: Positive = Field(default=512.0, description="largest video file in MiB")
    max_rejected: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="stop when more than this share of at least 20 videos was refused as content",
    )
    retry_rejected: bool = Field(
        default=False,
        description="ask again (and pay again) for what was refused as content, and for tasks that "
        "failed because the request is wrong",
    )
    resubmit_in_doubt: bool = Field(
        default=False,
        description="submit again what may have been paid already but cannot be found; its price "
        "stays counted",
    )
    retry_faults: bool = Field(
        default=False,
        description="retry videos that failed five times with an unknown error; "
        "what may be paid is collected, not bought again",
    )
    adopt_videos: bool = Field(
        default=False,
        description="take finished videos of this teacher that its ledger does not list as bought "
        "before, at no cost; otherwise a folder with such videos is refused",
    )
    accept_changed_videos: bool = Field(
        default=False,
        description="take videos whose contents are no longer those that were bought as they are; "
        "otherwise they are refused",
    )
    idempotency_header: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9-]+$",
        description="idempotency header of this server, if it has one",
    )
    schemes: list[Literal["https", "http"]] = Field(
        default=["https"], description="allowed URL schemes, including those of redirects"
    )
    private_hosts: list[str] = Field(
        default=[], description="hosts allowed to have private or loopback addresses"
    )


class PaidConfig(TeacherConfig):
    """A paid service, whose videos are kept in a folder."""

    opener: ClassVar[str] = "afd.teachers.paid.teacher:open_teacher"

    kind: Literal["ark", "openai", "fal"] = Field(
        description="ark, openai, fal: the service's protocol"
    )
    seed: Natural = Field(default=0, description="base seed of the requests")
    api: ApiConfig = ApiConfig()
    fetch: FetchConfig = FetchConfig()

    @model_validator(mode="after")
    def _needs(self) -> PaidConfig:
        needed = {
            "teacher.api.model": self.api.model,
            "teacher.api.prompts": self.api.prompts,
            "teacher.fetch.price_usd": self.fetch.price_usd,
        }
        missing = [key for key, value in needed.items() if value is None]
        if missing:
            raise ValueError(f"teacher.kind={self.kind} needs {', '.join(missing)}")
        return self

    @property
    def patience_s(self) -> float:
        return self.fetch.deadline_s

    def forecast(self, folder: Path, drawn: int) -> Forecast:
        found: Forecast = load("afd.teachers.paid.forecast:forecast")(self, folder, drawn)
        return found

    def missing(self, folder: Path) -> Iterator[str]:
        yield from load("afd.teachers.paid.forecast:missing")(self, folder)
