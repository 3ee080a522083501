"""What is spent: bills that servers name, prices below a service's rule, the cap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afd.config.run import make_config
from afd.errors import BudgetError, TeacherError
from afd.teachers.paid.contents import Saved
from afd.teachers.paid.ledger import Ledger
from afd.teachers.paid.teacher import PROVIDERS, price_of
from tests.afd.paid import paid_config, teacher_of, video_bytes
from tests.afd.service import KEY, WIRES, Exchange, Service
from tests.afd.test_ledger import order

VIDEO = video_bytes()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    for provider in PROVIDERS.values():
        monkeypatch.setenv(provider.key_variable, KEY)
    with Service(VIDEO).running() as running:
        yield running


def billing(field: str, value: str) -> Any:
    """A finished task that names this bill; `value`: JSON, or what some take for it."""

    def fault(exchange: Exchange) -> bool:
        job = exchange.job()
        job.state = "done"
        url = exchange.media(job)
        body = f'{{"id": "{job.number}", "status": "succeeded", "content": {{"video_url": "{url}"}}'
        held = f'{{"total_tokens": {value}}}' if field == "usage.total_tokens" else value
        exchange.say(200, f'{body}, "{field.split(".")[0]}": {held}}}'.encode())
        return True

    return fault


NO_BILLS = ["-1e9", "0", "-0", '"5"', "1e999", "NaN", "-Infinity", "true", "null", "[1]", "{}"]
NO_BILLS += ["1" + "0" * 400, "1", "0.5", "1e-300"]


@pytest.mark.parametrize(
    ("per", "field", "value"),
    [
        *(("million_tokens", "usage.total_tokens", value) for value in NO_BILLS),
        *(("million_tokens", "usage", value) for value in ("true", "[1]", '"5"')),
        *(("second", "duration", value) for value in ("-5", "1e999", "0.5", '"5"')),
    ],
)
def test_nothing_a_server_says_lowers_what_is_spent(
    service: Service, tmp_path: Path, per: str, field: str, value: str
) -> None:
    units: dict[str, Any] = {"price_per": per, "price_usd": 1.0}
    units |= {"units": 1e6 if per != "second" else 1.0}
    service.script("poll", *[billing(field, value)] * 3)
    config = paid_config(
        "ark", service, tmp_path, prompts=3, budget_usd=2.0, concurrency=1, **units
    )
    teacher = teacher_of(config)
    errors = [teacher.start(request).exception() for request in teacher.requests]
    assert teacher.progress().spent_usd == 2.0
    teacher.close()
    assert errors[:2] == [None, None]
    assert isinstance(errors[2], BudgetError)
    assert len(service.jobs) == 2


@pytest.mark.parametrize(
    ("per", "field", "value", "price"),
    [
        ("million_tokens", "usage.total_tokens", "3e6", 3.0),
        ("million_tokens", "usage.total_tokens", "999999999999999999", 999999999999.999999),
        ("second", "duration", "12", 12.0),
    ],
)
def test_a_bill_above_the_estimate_counts_and_raises_the_next(
    service: Service, tmp_path: Path, per: str, field: str, value: str, price: float
) -> None:
    units: dict[str, Any] = {"price_per": per, "price_usd": 1.0}
    units |= {"units": 1e6 if per != "second" else 1.0}
    service.script("poll", *[billing(field, value)] * 3)
    config = paid_config(
        "ark", service, tmp_path, prompts=3, budget_usd=2.5, concurrency=1, **units
    )
    teacher = teacher_of(config)
    errors = [teacher.start(request).exception() for request in teacher.requests]
    assert teacher.progress().spent_usd == pytest.approx(price)
    teacher.close()
    assert [type(error).__name__ for error in errors] == ["NoneType", "BudgetError", "BudgetError"]


def test_what_is_under_way_counts_with_the_raised_price(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    rows = [ledger.reserve(order(number), 1.0, 10.0) for number in range(3)]
    ledger.done(rows[0], "a.mp4", Saved("0" * 64, 1), 3.0)
    # 3 paid, two in progress at 3 each: 9 of 11.
    with pytest.raises(BudgetError, match=r"9\.00 USD .*budget_usd=11\.00 .* may cost 3\.00"):
        ledger.reserve(order(3), 1.0, 11.0)
    assert ledger.reserve(order(3), 1.0, 12.0).price_usd == 3.0
    ledger.close()


@pytest.mark.parametrize("bill", [float("nan"), float("inf"), -5.0, 0.0, None])
def test_the_ledger_itself_takes_no_such_bill(tmp_path: Path, bill: float | None) -> None:
    ledger = Ledger(tmp_path)
    row = ledger.running(ledger.reserve(order(), 1.0, 10.0), {"id": "t"})
    ledger.done(row, "a.mp4", Saved("0" * 64, 1), bill)
    assert ledger.spent_usd() == 1.0
    ledger.done(row, "a.mp4", Saved("0" * 64, 1), 2.0)
    ledger.end(row, "written_off", "retryable", "gone", paid=True)
    assert ledger.spent_usd() == 2.0
    for price in (float("nan"), float("inf"), -1.0):
        with pytest.raises(BudgetError):
            ledger.reserve(order(1), price, 10.0)
    ledger.close()


@pytest.mark.parametrize(
    ("wire", "per", "units", "options", "price"),
    [
        ("ark", "video", 7.0, {"duration": 5}, 2.0),
        ("ark", "second", None, {"duration": 5}, 10.0),
        ("ark", "second", 1.0, {"duration": 5}, 10.0),
        ("ark", "second", 8.0, {"duration": 5}, 16.0),
        ("ark", "second", None, {"frames": 48}, 4.0),
        ("openai", "second", 1.0, {"seconds": "8"}, 16.0),
        ("openai", "second", None, {}, 8.0),
        ("fal", "second", 2.0, {"duration": "6s"}, 12.0),
        ("ark", "million_tokens", 10.0, {"duration": 5, "resolution": "480p"}, 2 * 0.036),
        ("ark", "million_tokens", None, {"duration": 5, "resolution": "480p"}, 2 * 0.036),
        ("ark", "million_tokens", 1e6, {"duration": 5, "resolution": "480p"}, 2.0),
    ],
)
def test_a_price_is_not_below_the_services_own_rule(
    service: Service,
    tmp_path: Path,
    wire: str,
    per: str,
    units: float | None,
    options: dict[str, Any],
    price: float,
) -> None:
    fetch = {"price_per": per, "units": units, "price_usd": 2.0}
    config = paid_config(wire, service, tmp_path, **fetch).teacher
    provider = PROVIDERS[wire]()
    assert price_of(config, provider, options) == pytest.approx(price)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("value", ["abc", -1, 0, True, "nan", "inf", "1e400", "²", [5], "5 min"])
def test_a_length_that_is_none_gives_no_price(
    service: Service, tmp_path: Path, wire: str, value: Any
) -> None:
    config = paid_config(wire, service, tmp_path, price_per="second").teacher
    options = {"duration": value, "seconds": value, "frames": value}
    with pytest.raises(TeacherError, match="needs a duration"):
        price_of(config, PROVIDERS[wire](), options)


def test_a_price_is_finite(service: Service, tmp_path: Path) -> None:
    fetch = {"price_per": "second", "units": 1e300, "price_usd": 1e300}
    config = paid_config("ark", service, tmp_path, **fetch).teacher
    with pytest.raises(TeacherError, match="needs a finite price"):
        price_of(config, PROVIDERS["ark"](), {})
    with pytest.raises(ValueError, match="finite"):
        make_config({}, ["teacher.kind=ark", "teacher.fetch.price_usd=inf"])


@pytest.mark.parametrize("per", ["video", "second", "million_tokens"])
@pytest.mark.parametrize("wire", WIRES)
def test_the_cap_holds_under_every_unit(
    service: Service, tmp_path: Path, wire: str, per: str
) -> None:
    units = {"video": 1.0, "second": 5.0, "million_tokens": 1e6}[per]
    price = {"video": 1.0, "second": 0.2, "million_tokens": 1.0}[per]
    fetch = {"price_per": per, "units": units, "price_usd": price, "budget_usd": 3.0}
    for _ in range(2):
        teacher = teacher_of(paid_config(wire, service, tmp_path, prompts=9, **fetch))
        futures = [teacher.start(request) for request in teacher.requests]
        assert sum(future.exception() is None for future in futures) == 3
        assert teacher.progress().spent_usd == pytest.approx(3.0)
        teacher.close()
        assert len(service.jobs) == 3
