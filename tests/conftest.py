"""Fixtures of every suite. Triton runs interpreted where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

# Must be set before Triton is imported; docs/ENVIRONMENT.md lists it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from afd_kernels import plans
from afd_kernels.dispatch import OPS, explain, use_backend

# Processes that share the tests (make test) share the cores, too.
torch.set_num_threads(
    max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
# How a backend refuses what it runs on no machine; what is only missing here must fail.
NEVER = ("attention libraries on CUDA take",)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Captured output may hold names that are not UTF-8, which no process can send to another."""
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode())
        for title, text in report.sections
    ]
    return report


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `place` runs once per backend of its file's op and per device.

    The op is the module's OP, or nft_loss, whose backends are those of every fused op.
    """
    if "place" in metafunc.fixturenames:
        backends = OPS[getattr(metafunc.module, "OP", "nft_loss")]
        places = [(backend, device) for device in DEVICES for backend in backends]
        metafunc.parametrize("place", places, ids="-".join, indirect=True)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Runs the test on one (backend, device), with that backend required.

    On the CPU Triton means its interpreter.
    """
    backend, device = request.param
    if backend == "triton" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton runs on the GPU here; the interpreter is for machines without one")
    op = getattr(request.module, "OP", "nft_loss")
    dtype = request.node.callspec.params.get("dtype")
    if not isinstance(dtype, torch.dtype):
        dtype = torch.float32
    refusal = explain(op, device, {dtype})[backend]
    if refusal and any(words in refusal for words in NEVER):
        pytest.skip(refusal)
    with use_backend(backend):
        yield backend, device


@pytest.fixture
def shared() -> Path:
    """The folder of golden tensors and real data beside the checkout; not part of the product."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent (golden data lives beside the checkout)")
    return SHARED


@pytest.fixture(autouse=True)
def _no_plans_of_other_tests() -> None:
    """Tests replace backends and what they refuse, which a kept plan would not notice."""
    plans.clear()
