"""Hypothesis profiles: a fixed, bounded search in `make test`, a random one in `make soak`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

_ANY_SPEED = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)

settings.register_profile(
    "bounded", max_examples=40, derandomize=True, deadline=None, suppress_health_check=_ANY_SPEED
)
settings.register_profile(
    "soak", max_examples=200, deadline=None, suppress_health_check=_ANY_SPEED, print_blob=True
)


def pytest_configure() -> None:
    # The soak names its own profile on the command line, which hypothesis loads after this.
    settings.load_profile("bounded")
