"""The compiled backend's pool of threads: every block once, in any process, beside any other thread."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import _schedule

_threads = pytest.importorskip("fastsoftmax._threads")
compiled = pytest.importorskip("fastsoftmax.backends.compiled")


def threads_that_ran(n_blocks, n_threads):
    """Run blocks that take some time; return which ran, and how many threads ran them."""
    runs, seen = [], set()

    def run(block):
        time.sleep(0.002)
        runs.append(block)
        seen.add(threading.get_ident())

    _threads.run_blocks(run, n_blocks, n_threads)
    return sorted(runs), len(seen)


def run_on_two_threads():
    """Run two blocks, each of which waits for the other to have begun."""
    barrier = threading.Barrier(2, timeout=60)
    _threads.run_blocks(lambda block: barrier.wait(), 2, 2)


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("n_blocks", [0, 1, 2, 7, 40])
def test_every_block_runs_once(n_blocks, n_threads):
    runs, n_seen = threads_that_ran(n_blocks, n_threads)
    assert runs == list(range(n_blocks))
    assert n_seen <= min(n_blocks, n_threads)


def test_blocks_run_at_the_same_time():
    barrier = threading.Barrier(3, timeout=60)
    _threads.run_blocks(lambda block: barrier.wait(), 3, 3)


def test_one_after_the_other():
    for n_threads in [2, 3, 2, 4, 1, 2] * 50:
        runs = []
        _threads.run_blocks(runs.append, 9, n_threads)
        assert sorted(runs) == list(range(9))


def test_helpers_that_sleep_wake_up():
    run_on_two_threads()
    time.sleep(0.2)  # they look for work for far less than that
    run_on_two_threads()


def test_callers_that_find_the_pool_taken_do_without():
    done = []

    def call():
        for _ in range(50):
            runs = []
            _threads.run_blocks(runs.append, 20, 3)
            assert sorted(runs) == list(range(20))
        done.append(True)

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(done) == 6


def test_a_block_may_use_the_pool():
    inner = []
    _threads.run_blocks(lambda block: _threads.run_blocks(inner.append, 4, 2), 3, 2)
    assert sorted(inner) == sorted([0, 1, 2, 3] * 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_child_has_threads_of_its_own(busy):
    stop = threading.Event()

    def keep_the_pool_busy():
        while not stop.is_set():
            _threads.run_blocks(lambda block: time.sleep(0.001), 4, 3)

    threads_that_ran(20, 2)
    other = threading.Thread(target=keep_the_pool_busy)
    if busy:
        other.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                try:
                    run_on_two_threads()
                    os._exit(0 if threads_that_ran(10, 2)[0] == list(range(10)) else 99)
                finally:
                    os._exit(98)  # an exception must not come back to pytest
            deadline = time.monotonic() + 90
            while (finished := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.005)
            assert (finished[0], os.waitstatus_to_exitcode(finished[1])) == (child, 0)
    finally:
        stop.set()
        if busy:
            other.join(60)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not tell what threads block")
def test_helpers_leave_signals_to_python():
    threads_that_ran(20, 4)
    masks = [
        int(line.split()[1], 16)
        for status in Path("/proc/self/task").glob("*/status")
        for line in status.read_text().splitlines()
        if line.startswith("SigBlk:")
    ]
    assert sum(mask >> (signal.SIGINT - 1) & 1 for mask in masks) >= 3


def test_ctrl_c_ends_a_long_call(monkeypatch):
    monkeypatch.setattr(compiled, "_MAX_BLOCK_BYTES", 1 << 16)
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "2")
    compiled.make_schedule.cache_clear()
    x = np.zeros((3000, 3000))
    out = np.full_like(x, 7)

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        with pytest.raises(KeyboardInterrupt), fastsoftmax.use_backend("cython"), fastsoftmax.record_plans():
            while True:
                out[-1] = 7
                fastsoftmax.softmax(x, 1, out=out)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        compiled.make_schedule.cache_clear()
    fastsoftmax.softmax(x, 1, out=out)
    assert (out == 1 / 3000).all()


def test_the_process_ends_while_helpers_look_for_work():
    code = "import numpy as np, fastsoftmax\nfastsoftmax.softmax(np.zeros(10**6).reshape(1000, -1), 1)"
    environment = os.environ | {"FASTSOFTMAX_NUM_THREADS": "4"}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=60, capture_output=True, check=False
    )
    assert (finished.returncode, finished.stderr) == (0, b"")


# threadpoolctl


def test_threadpoolctl_limits_the_threads(monkeypatch):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "4")
    x = np.zeros((2000, 1000))

    def n_threads():
        with fastsoftmax.use_backend("cython"), fastsoftmax.record_plans() as plans:
            fastsoftmax.softmax(x, 1)
        return plans[0].schedule.n_threads

    assert n_threads() == 4
    with threadpoolctl.threadpool_limits(1):
        assert n_threads() == 1
        assert _schedule.max_threads() == 1
    assert n_threads() == 4
    with threadpoolctl.threadpool_limits(3, user_api="fastsoftmax"):
        assert n_threads() == 3
    with threadpoolctl.threadpool_limits(8):
        assert n_threads() == 4
    entries = [entry for entry in threadpoolctl.threadpool_info() if entry["user_api"] == "fastsoftmax"]
    assert [(entry["internal_api"], entry["num_threads"]) for entry in entries] == [("fastsoftmax", 4)]


@pytest.mark.parametrize("order", ["fastsoftmax, threadpoolctl", "threadpoolctl, fastsoftmax"])
def test_threadpoolctl_finds_the_pool(python, order):
    pytest.importorskip("threadpoolctl")
    code = f"import {order}\nfastsoftmax.softmax([1.0])\n"
    code += "print([entry['user_api'] for entry in threadpoolctl.threadpool_info()].count('fastsoftmax'))"
    assert python(code) == "1"


def test_direct_calls_follow_threadpoolctl(monkeypatch):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "4")
    chosen, make_schedule = [], compiled.make_schedule
    monkeypatch.setattr(
        compiled, "make_schedule", lambda *arguments: chosen.append(arguments[3]) or make_schedule(*arguments)
    )
    x = np.zeros((2000, 1000))
    with fastsoftmax.use_backend("cython"):
        fastsoftmax.softmax(x, 1)
        with threadpoolctl.threadpool_limits(1):
            fastsoftmax.softmax(x, 1)
        fastsoftmax.softmax(x, 1)
    assert chosen[-3:] == [4, 1, 4]
