"""What is compiled once for all tests here."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from afd_kernels import native
from tests.cuda_on_cpu import build, faults
from tests.cuda_on_cpu.device import Device


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the variants share their objects."""
    for reason in (native.why_missing(), build.why_not()):
        if reason is not None:
            pytest.skip(reason)
    return tmp_path_factory.mktemp("cuda_on_cpu")


@pytest.fixture(scope="session")
def device(built: Path) -> Device:
    """The unchanged kernels."""
    return Device.load(build.build(built))


@pytest.fixture(scope="session")
def faulty(built: Path) -> Device:
    """The kernels with every fault of faults.py in them, all switched off."""
    return Device.load(build.build(built, changes=faults.changes()))


@pytest.fixture(scope="session")
def kernels(built: Path) -> ctypes.CDLL:
    """kernels/features.cu."""
    library = ctypes.CDLL(str(build.build_kernels(built)))
    library.launch.restype = ctypes.c_char_p
    library.launch.argtypes = [
        *(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint),
    ]
    library.round_to_half.restype = ctypes.c_uint
    library.round_to_half.argtypes = [ctypes.c_float, ctypes.c_int]
    library.read_half.restype = ctypes.c_float
    library.read_half.argtypes = [ctypes.c_uint, ctypes.c_int]
    return library
