"""Fixtures that run each test on every backend, every instruction-set tier, every function and both kernel dtypes."""

import gc
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import fastsoftmax
from fastsoftmax import _dispatch

# The same examples on every machine, so that a failure anywhere is a failure everywhere. The `backend` fixture may hold
# its context over all examples of a test.
settings.register_profile(
    "reproducible",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("reproducible")

collect_ignore = [] if find_spec("numba_cuda") else ["ptx.py", "cuda"]  # test_cuda.py says what is missing

# The one compiles all kernels of Numba, which others then find in its cache, the other those of CUDA: where each is the
# first of a process, nothing is compiled twice.
FIRST_FILES = ("test_boundaries", "test_cuda")


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: FIRST_FILES.index(item.path.stem) if item.path.stem in FIRST_FILES else len(FIRST_FILES)
    )


def pytest_collection_finish():
    """Leave what exists now out of garbage collections: to look through 40,000 tests takes 0.7 s each time."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)  # nor through what Numba makes, which stays: a tenth of its time


# Names, not modules: collecting the tests loads no backend.
FORCED_BACKENDS = ("numpy", "numba", "cython-portable", "cython-x86_64_v2", "cython-x86_64_v3", "cython-x86_64_v4")


@dataclass(frozen=True)
class ForcedBackend:
    """The backend that serves every call of a test, and its tier: None where it has none."""

    name: str
    tier: str | None

    max_ulps = 2  # of each backend, in float32 and float64

    @property
    def has_kernels(self):
        return self.name != "numpy"


@pytest.fixture(params=FORCED_BACKENDS)
def backend(request):
    """Force one backend and tier for the duration of a test; skip what the machine or the build lacks."""
    name, _, tier = request.param.partition("-")
    record = next(record for record in _dispatch.BACKENDS if record.name == name)
    if reason := _dispatch.unavailable_reason(record):
        pytest.skip(f"backend {name!r}: {reason}")
    with ExitStack() as stack:
        if tier:
            from fastsoftmax.backends import compiled

            if tier not in compiled.tiers():
                pytest.skip(f"this machine or this build lacks the tier {tier!r}; it has {compiled.tiers()}")
            stack.enter_context(compiled.use_tier(tier))
        stack.enter_context(fastsoftmax.use_backend(name))
        yield ForcedBackend(name, tier or None)


@pytest.fixture(params=["softmax", "log_softmax", "logsumexp"])
def function(request):
    """The name of one of the three functions."""
    return request.param


@pytest.fixture(params=["softmax", "log_softmax"])
def map_function(request):
    """One of the two functions whose output has the shape of their input."""
    return getattr(fastsoftmax, request.param)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    """A dtype that the kernels compute in."""
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(20180508)


def run_python(code, environment):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FASTSOFTMAX")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=inherited | environment,
        capture_output=True,
        check=False,
        text=True,
        timeout=600,  # Numba compiles for minutes where other processes share the machine
    )


@pytest.fixture
def python():
    """Run code in a process of its own, which must succeed; return what it printed."""

    def run(code, **environment):
        done = run_python(code, environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture
def python_error():
    """Run code in a process of its own, which must fail; return the last line of its error."""

    def run(code, **environment):
        done = run_python(code, environment)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr.strip().splitlines()[-1]

    return run
