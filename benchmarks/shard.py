"""A pytest plugin that splits the tests among processes and stops at a deadline.

    python -m pytest -p benchmarks.shard --shard 2/8 --until 90 tests/ops

Test i of the collection runs in shard i modulo the number of shards, so that the parameters of a
slow test are spread over all shards. Each shard begins at another place of the collection, so that
they compile different kernels and find each other's in the cache. A test that would start `--until`
seconds or more after the process started is not run; the process then ends with a line that counts
these tests, and a special exit code.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.clock import INCOMPLETE, MISSING, age_s


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="this process / of how many, from 0")
    parser.addoption("--until", type=float, default=float("inf"), help="seconds of the process")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Shard(config), "one-shard")


class Shard:
    """The tests of this process; `missing`: those it had no time for."""

    def __init__(self, config: pytest.Config) -> None:
        index, _, count = config.getoption("shard").partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise pytest.UsageError(f"--shard: got {config.getoption('shard')}; needed: as 0/8")
        self.index, self.count = int(index), int(count)
        self.until_s: float = config.getoption("until")
        self.missing: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: Any, items: list[pytest.Item]) -> None:
        own = items[self.index :: self.count]
        mine = set(map(id, own))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in mine])
        first = len(own) * self.index // self.count
        items[:] = own[first:] + own[:first]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if age_s() < self.until_s:
            return None
        self.missing.append(item.nodeid)
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        fine = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if exitstatus in fine:
            # With few tests a shard may be empty.
            session.exitstatus = INCOMPLETE if self.missing else pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.missing:
            first = self.missing[0]
            terminalreporter.write_line(f"{MISSING}{len(self.missing)} tests, from {first}")
