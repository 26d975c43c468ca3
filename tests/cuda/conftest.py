"""Tests of the CUDA backend where it computes: in Numba's simulator, or on a card.

With ``NUMBA_ENABLE_CUDASIM=1`` arrays are those of `simulator`, and cards are small; `tests/test_cuda.py` runs it so.
Without, every array library installed is used in turn: ``make test-gpu``. Where neither is to be had, all is skipped.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

collect_ignore = ["simulator.py"]  # it changes what it is imported for

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]


class Torch:
    def __init__(self):
        import torch

        self.torch = torch

    def to_device(self, array, offset):
        bits = array.view(np.int16) if array.dtype.name == "bfloat16" else array
        host = self.torch.from_numpy(np.ascontiguousarray(bits))
        memory = self.torch.empty(array.size + offset, dtype=host.dtype, device="cuda")[offset:]
        strides = [stride // array.itemsize for stride in np.empty_like(array).strides]
        tensor = memory.as_strided(array.shape, strides, offset)
        tensor.copy_(host)
        return tensor.view(self.torch.bfloat16) if array.dtype.name == "bfloat16" else tensor

    def to_host(self, tensor):
        import ml_dtypes

        if tensor.dtype == self.torch.bfloat16:
            return tensor.view(self.torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
        return tensor.cpu().numpy()


class Cupy:
    def __init__(self):
        import cupy

        self.cupy = cupy

    def to_device(self, array, offset):
        memory = self.cupy.empty(array.size + offset, array.dtype)[offset:]
        view = self.cupy.ndarray(array.shape, array.dtype, memory.data, np.empty_like(array).strides)
        view[...] = self.cupy.asarray(array)
        return view

    def to_host(self, array):
        return array.get()


class Numba:
    def to_device(self, array, offset):
        from numba import cuda

        if array.dtype.name == "bfloat16":
            pytest.skip("Numba has no arrays of bfloat16")
        room = np.zeros(array.size + offset, array.dtype)
        memory = cuda.to_device(room)[offset:]
        memory.copy_to_device(np.ascontiguousarray(array).ravel())
        return memory.reshape(array.shape)

    def to_host(self, array):
        return array.copy_to_host()


def _libraries():
    """Return the names of what arrays on the device can be made with; none, and why, where there is no device."""
    if SIMULATED:
        return ["simulator"], None
    try:
        import fastsoftmax.backends.numba_cuda  # noqa: F401
    except ImportError as error:
        return [], str(error)
    found = ["numba"]
    for name in ("torch", "cupy"):
        try:
            __import__(name)
        except ImportError:
            continue
        found.append(name)
    return found, None


_NAMES, _REASON = _libraries()


@pytest.fixture(params=_NAMES or ["none"], scope="session")
def gpu(request):
    """Who makes arrays on the device, and brings them back: ``to_device(array, offset)`` and ``to_host(array)``."""
    if request.param == "none":
        pytest.skip(f"no device: {_REASON}; and NUMBA_ENABLE_CUDASIM is not 1")
    if request.param == "simulator":
        import simulator

        return simulator
    return {"torch": Torch, "cupy": Cupy, "numba": Numba}[request.param]()


@pytest.fixture
def card():
    """Tests that use it are too large for the simulator."""
    if SIMULATED or not _NAMES:
        pytest.skip("the simulator is too slow" if SIMULATED else f"no device: {_REASON}")


def pytest_collection_modifyitems(items):
    # Threads of the simulator compute with NumPy, which tells of every overflow. On a card, Numba tells of small grids
    # and of arrays that it copies, and its libraries tell of what is to change.
    on_card = ["ignore:Grid size", "ignore:Host array", "ignore::DeprecationWarning"]
    ignored = ["ignore::RuntimeWarning"] if SIMULATED else on_card
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for filter in ignored:
                item.add_marker(pytest.mark.filterwarnings(filter))


@pytest.fixture
def small_plans(monkeypatch):
    """Have a small card, and blocks of no more than 64 threads that hold little, so that rows soon are long ones."""
    from fastsoftmax.backends import numba_cuda
    from fastsoftmax.cuda import _launch, _plan

    card = _plan.Device(n_multiprocessors=4, l2_bytes=1 << 20, shared_bytes=21 << 10)
    monkeypatch.setattr(_launch, "device_facts", lambda device: card)

    monkeypatch.setattr(_plan, "MOST_THREADS", 64)
    monkeypatch.setattr(_plan, "MOST_HELD", 2)
    monkeypatch.setattr(_plan, "MOST_HELD_OF_DOUBLES", 2)
    monkeypatch.setattr(_plan, "HELD_OF_MORE", 2)
    monkeypatch.setattr(_plan, "HELD_OF_MORE_DOUBLES", 2)
    monkeypatch.setattr(_plan, "HELD", 2)
    monkeypatch.setattr(_plan, "CHUNK_THREADS", 64)
    monkeypatch.setattr(_plan, "STRIP_THREADS", 64)
    monkeypatch.setattr(_plan, "MOST_STRIP_BYTES", 1024)
    numba_cuda._prepare.cache_clear()
    numba_cuda._known.clear()
    yield
    numba_cuda._prepare.cache_clear()
    numba_cuda._known.clear()
