"""What importing the package costs, and that it works where parts of it are missing."""

import pytest

# What the names of the extension modules begin with, one for each tier.
KERNELS = "fastsoftmax._kernels"

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.startswith({blocked!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""

COMPUTE = """
import numpy as np
import fastsoftmax
x = np.arange(200_000, dtype=np.float32).reshape(2, -1)
assert np.isclose(fastsoftmax.softmax(x, 1).sum(), 2)
assert np.isclose(fastsoftmax.log_softmax(x, 1).max(), -0.4586751)
assert np.isclose(fastsoftmax.logsumexp(x[0]), 99999.4586751)
print(*fastsoftmax.available_backends())
"""


def test_import_loads_nothing_heavy(python):
    loaded = python("import sys, fastsoftmax; print(*sys.modules)").split()
    heavy = {"numba", "llvmlite", "scipy", "matplotlib", "asv", "mpmath", "cython", "Cython", "sklearn", "torch"}
    assert heavy.isdisjoint(name.split(".")[0] for name in loaded)


def test_import_adds_few_modules_to_numpys(python):
    code = "import sys, numpy; before = set(sys.modules); import fastsoftmax; print(*set(sys.modules) - before)"
    added = {name for name in python(code).split() if name.split(".")[0] != "fastsoftmax"}
    # dataclasses and concurrent.futures, with what those need.
    assert len(added) <= 20, added


def test_small_calls_load_neither_numba_nor_scipy(python):
    code = "import sys, fastsoftmax; fastsoftmax.softmax([1.0, 2.0]); print(*sys.modules)"
    assert {"numba", "scipy"}.isdisjoint(python(code).split())


def test_public_names(python):
    code = "import fastsoftmax as f; print(all(hasattr(f, name) for name in f.__all__), f.__version__)"
    complete, version = python(code).split()
    assert complete == "True"
    assert version[0].isdigit()


def test_unknown_attributes(python_error):
    assert python_error("import fastsoftmax; fastsoftmax.nothing") == (
        "AttributeError: module 'fastsoftmax' has no attribute 'nothing'"
    )


@pytest.mark.parametrize(
    ("blocked", "unavailable"),
    [((KERNELS,), {"cython"}), (("numba",), {"numba"}), ((KERNELS, "numba"), {"cython", "numba"})],
    ids=["the extension", "numba", "both"],
)
def test_the_package_works_without(python, blocked, unavailable):
    """An extension that is not built, numba that is not installed, or both."""
    available = python(BLOCK.format(blocked=blocked) + COMPUTE).split()
    assert available[-1] == "numpy"
    assert unavailable.isdisjoint(available)


@pytest.mark.parametrize(("blocked", "name"), [(KERNELS, "cython"), ("numba", "numba")])
def test_what_is_missing_is_named_when_it_is_forced(python_error, blocked, name):
    answer = python_error(
        BLOCK.format(blocked=(blocked,)) + f"import fastsoftmax; fastsoftmax.softmax([1.0], backend={name!r})"
    )
    assert answer.startswith("fastsoftmax._dispatch.BackendUnavailableError: ")
    assert blocked in answer
    assert "'numpy'" in answer


def test_a_forced_tier_without_the_extension_is_an_error(python):
    code = """
import fastsoftmax
for size in (2, 100_000):
    try:
        fastsoftmax.softmax([1.0] * size)
    except ValueError as error:
        print(error)
print(*fastsoftmax.available_backends())
"""
    message = f"backend 'cython' is not available: No module named '{KERNELS}_portable'"
    printed = python(BLOCK.format(blocked=(KERNELS, "numba")) + code, FASTSOFTMAX_ISA="x86_64_v3")
    assert printed.splitlines() == [f"FASTSOFTMAX_ISA is 'x86_64_v3', but {message}"] * 2 + ["numpy"]
