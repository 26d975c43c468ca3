"""What calls leave of the process: its memory, its floating-point environment, its signals, its error stream.

``make leaks`` runs the tests of memory for longer: 1,000,000 small calls.
"""

import ctypes
import ctypes.util
import gc
import os
import signal
import threading

import numpy as np
import pytest

import fastsoftmax

N_CALLS = int(os.environ.get("FASTSOFTMAX_LEAK_CALLS", "10000"))
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def resident_bytes():
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * PAGE
    except OSError:
        pytest.skip("this system has no /proc/self/statm")


def call_everything(x, labels):
    """Call each function that has a kernel, the errors included."""
    fastsoftmax.softmax(x, 1)
    fastsoftmax.log_softmax(x, 0)
    fastsoftmax.logsumexp(x)
    fastsoftmax.softmax(x, 1, where=x > 0, temperature=0.7)
    fastsoftmax.softmax_vjp(x, x, 1)
    fastsoftmax.softmax_topk(x, 2)
    fastsoftmax.sample(x, rng=np.random.default_rng(0))
    fastsoftmax.softmax_cross_entropy(x, labels, return_grad=True)
    fastsoftmax.OnlineSoftmax(1).update(x).normalize(x)
    with pytest.raises(ValueError, match="out of bounds"):
        fastsoftmax.softmax(x, 5)
    with pytest.raises(ValueError, match="labels"):
        fastsoftmax.softmax_cross_entropy(x, labels + 100)


def growth(run, n_runs):
    """Return by how many bytes memory grows in that many runs: the least of three times, as a leak grows in each."""
    gc.collect()
    gc.freeze()  # to look through what other tests have left takes 0.6 s each time
    for _ in range(n_runs // 10 + 1):
        run()
    grown = []
    for _ in range(3):
        gc.collect()
        before = resident_bytes()
        for _ in range(n_runs):
            run()
        gc.collect()
        grown.append(resident_bytes() - before)
    return min(grown)


def test_memory_after_many_small_calls(backend, dtype):
    x, labels = np.linspace(-3, 3, 24, dtype=dtype).reshape(4, 6), np.arange(4)
    n_runs = max(100, N_CALLS // 33)
    # Half of what it would grow by if one call of a run kept an object of 32 bytes.
    assert growth(lambda: call_everything(x, labels), n_runs) < max(16 * n_runs, 8 * PAGE)


@pytest.mark.parametrize("shape", [(1, 300_000), (30_000, 10), (550, 550)], ids=str)
def test_memory_after_large_calls(backend, shape):
    x = np.zeros(shape, np.float32)

    def run():
        fastsoftmax.softmax(x, 0)
        fastsoftmax.logsumexp(fastsoftmax.log_softmax(x, 1), 1)

    assert growth(run, max(2, N_CALLS // 20_000)) < x.nbytes / 4


# The floating-point environment

FUNCTIONS = [
    lambda x: fastsoftmax.softmax(x, -1),
    lambda x: fastsoftmax.log_softmax(x, -1),
    lambda x: fastsoftmax.logsumexp(x, 0),
    lambda x: fastsoftmax.softmax(x, 0, temperature=0.5),
    lambda x: fastsoftmax.softmax_vjp(x, x, -1),
    lambda x: fastsoftmax.softmax_topk(x, 1),
]


def has_subnormal_numbers():
    """Whether they are neither flushed to zero nor taken for it."""
    smallest = np.array([np.finfo(np.float32).tiny, np.finfo(np.float32).smallest_subnormal])
    with np.errstate(under="ignore"):
        return smallest[0] / np.float32(2) > 0 and smallest[1] * np.float32(2**30) > 0


def hard_rows(dtype, n_rows=300):
    """Rows whose terms overflow, underflow, are subnormal, infinite or NaN."""
    wide = np.finfo(dtype).max
    rows = [
        [0, 0, 0, 0],
        [wide, -wide, 0, 1],
        [np.inf, 0, -np.inf, 1],
        [np.nan, np.inf, wide, 0],
        [-np.inf] * 4,
        [0, np.log(np.finfo(dtype).tiny) - 3, -1e4, 5e-324],
    ]
    return np.resize(np.array(rows, np.float64), (n_rows, 4)).astype(dtype)


def test_floating_point_environment(backend, dtype, monkeypatch):
    """Rounding and the handling of subnormal numbers, here and in a thread that is started afterwards."""
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    x = np.tile(hard_rows(dtype), (30, 20))
    for n_threads in ("1", "2"):
        monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", n_threads)
        rounding = libm.fegetround()
        for function in FUNCTIONS:
            function(x)
        assert libm.fegetround() == rounding
        assert has_subnormal_numbers()
        seen = []
        thread = threading.Thread(target=lambda seen=seen: seen.append(has_subnormal_numbers()))
        thread.start()
        thread.join()
        assert seen == [True]


@pytest.mark.parametrize("index", range(len(FUNCTIONS)))
def test_errors_that_numpy_is_told_to_raise(backend, dtype, index):
    """The kernels are silent, whatever `numpy.errstate` says, and leave no flag for NumPy to find."""
    x = hard_rows(dtype)
    with np.errstate(all="ignore"):
        expected = FUNCTIONS[index](x)
    with np.errstate(all="raise"):
        result = FUNCTIONS[index](x)
        assert np.float64(1) + 1 == 2
    for part, wanted in zip(result, expected, strict=True):
        np.testing.assert_array_equal(part, wanted)


# Signals and streams


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send a signal")
def test_keyboard_interrupt_in_a_long_call(python):
    """It is raised, no later than after the call, and the next call is right."""
    assert python(
        """
import signal
import numpy as np
import fastsoftmax

x = np.zeros((400, 20_000), np.float32)
fastsoftmax.softmax(x, 1)
signal.signal(signal.SIGALRM, signal.default_int_handler)
try:
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    for _ in range(10_000):
        fastsoftmax.softmax(x, 1)
except KeyboardInterrupt:
    print("interrupted")
print(fastsoftmax.softmax(x, 1)[0, 0] == np.float32(1 / 20_000))
"""
    ).split() == ["interrupted", "True"]


def test_nothing_is_printed(backend, capfd):
    x = hard_rows(np.float32)
    call_everything(x[:1].repeat(4, 0), np.zeros(4, int))
    for function in FUNCTIONS:
        function(x)
    assert capfd.readouterr() == ("", "")
