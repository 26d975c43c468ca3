"""Many threads at once, and processes forked or spawned after threads have run."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest

import fastsoftmax

SHAPES = [
    ((3,), 0),
    ((40, 50), 1),
    ((40, 50), 0),
    ((700, 800), 1),
    ((700, 800), 0),
    ((600_000,), 0),
    ((900, 900), None),
]


def test_many_python_threads_at_once(backend, function, dtype, monkeypatch):
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "2")
    call = getattr(fastsoftmax, function)
    rng = np.random.default_rng(0)
    inputs = [(rng.normal(size=shape).astype(dtype), axis) for shape, axis in SHAPES]
    expected = [call(x, axis) for x, axis in inputs]

    def work(index):
        x, axis = inputs[index % len(inputs)]
        result = call(x, axis, backend=backend.name)  # the context that forces it is the main thread's alone
        np.testing.assert_array_equal(result, expected[index % len(inputs)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(6 * len(inputs))))


def softmax_in_a_child(backend, x):
    """Compute in another process, on two threads; return the result and the plan."""
    with fastsoftmax.record_plans() as plans:
        return fastsoftmax.softmax(x, 1, backend=backend), plans[0].schedule.n_threads


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes(backend, method, monkeypatch):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    if method != "fork" and backend.tier not in (None, "portable"):
        pytest.skip("a process that is not a copy of this one is the same for every tier")
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "2")
    x = np.random.default_rng(0).normal(size=(1500, 400))
    expected = fastsoftmax.softmax(x, 1)  # the parent's threads have run before its children are made
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        children = [pool.submit(softmax_in_a_child, backend.name, x) for _ in range(2)]
        for child in children:
            result, n_threads = child.result(timeout=120)
            assert n_threads == (2 if backend.has_kernels else 1)
            if method == "fork" or backend.tier is None:
                np.testing.assert_array_equal(result, expected)
            else:  # by the best tier of the machine, not by the one that was forced here
                np.testing.assert_allclose(result, expected, rtol=1e-14)
