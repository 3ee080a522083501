"""The compiling processes that all offline tests share."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.offline import budget

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test of a file waits for all its compilations."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """Processes with the real Triton compiler: here it may be loaded as an interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    with budget.pool(str(tmp_path_factory.mktemp("triton"))) as pool:
        yield pool
