"""The compiling processes that all offline tests share."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.offline import budget


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """Processes with the real Triton compiler: here it may be loaded as an interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    with budget.pool(str(tmp_path_factory.mktemp("triton"))) as pool:
        yield pool
