"""Blocks on threads: each once, errors raised and not swallowed, and a working pool in a forked child."""

import os
import signal
import threading
import time
from collections import Counter

import pytest

import fastsoftmax
from fastsoftmax import _executor
from fastsoftmax._executor import run_blocks

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.mark.parametrize("n_blocks", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
def test_each_block_runs_once(n_blocks, n_threads):
    runs = []
    run_blocks(runs.append, n_blocks, n_threads)
    assert Counter(runs) == Counter(range(n_blocks))
    if n_threads == 1:
        assert runs == list(range(n_blocks))


def test_blocks_run_at_the_same_time():
    """Two blocks that wait for each other can only end on two threads; the caller's is one of them."""
    barrier, threads = threading.Barrier(2, timeout=30), set()

    def run(block):
        threads.add(threading.current_thread())
        barrier.wait()

    run_blocks(run, 2, 2)
    assert len(threads) == 2
    assert threading.current_thread() in threads


def test_one_thread_starts_no_other():
    before = threading.active_count()
    threads = set()
    run_blocks(lambda block: threads.add(threading.current_thread()), 50, 1)
    assert threads == {threading.current_thread()}
    assert threading.active_count() == before


def test_no_more_threads_than_blocks(monkeypatch):
    monkeypatch.setattr(_executor, "_pool", None)
    monkeypatch.setattr(_executor, "_pool_size", 0)
    run_blocks(lambda block: None, 3, 100)
    assert _executor._pool_size == 2


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("in_caller", [True, False])
def test_an_exception_stops_the_other_blocks_and_is_raised(exception, in_caller):
    caller, runs = threading.current_thread(), []
    barrier = threading.Barrier(2, timeout=30)

    def run(block):
        runs.append(block)
        if len(runs) <= 2:
            barrier.wait()  # both threads are at work
        if (threading.current_thread() is caller) is in_caller:
            raise exception(block)
        time.sleep(0.01)

    with pytest.raises(exception):
        run_blocks(run, 10_000, 2)
    assert len(runs) < 1000
    after = []
    run_blocks(after.append, 10, 2)
    assert len(after) == 10


@pytest.fixture
def interruptible():
    """Let SIGINT raise KeyboardInterrupt here, even where the tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("in_its_block", "in_its_wait"), [(1, 0), (0, 1), (0, 3), (1, 3)])
def test_an_interrupted_caller_waits_for_the_block_of_a_helper(monkeypatch, in_its_block, in_its_wait):
    """The helper's block ends only when the caller, after so many interrupts, waits for it once more."""
    caller, wait, interrupts = threading.current_thread(), _executor.wait, [signal.SIGINT] * in_its_wait
    barrier, waiting, started, finished = threading.Barrier(2, timeout=30), threading.Event(), [], []

    def interrupted_wait(helpers):
        if interrupts:
            signal.raise_signal(interrupts.pop())
        waiting.set()
        return wait(helpers)

    def run(block):
        started.append(block)
        barrier.wait()  # both threads are at work
        if threading.current_thread() is caller:
            if in_its_block:
                signal.raise_signal(signal.SIGINT)
        else:
            assert waiting.wait(10)
        finished.append(block)

    monkeypatch.setattr(_executor, "wait", interrupted_wait)
    with pytest.raises(KeyboardInterrupt):
        run_blocks(run, 100 if in_its_block else 2, 2)
    assert sorted(started) == [0, 1]
    assert len(finished) == 2 - in_its_block


@pytest.mark.parametrize("earlier_size", [10, 400_000], ids=["no threads before", "threads before"])
def test_a_call_for_threads_when_the_interpreter_starts_none_any_more(python, earlier_size):
    kernels = [name for name in fastsoftmax.available_backends() if name != "numpy"]
    if not kernels:
        pytest.skip("only kernels use threads")
    code = f"""
import atexit
import numpy as np
import fastsoftmax

def call(size):
    with fastsoftmax.record_plans() as plans:
        total = fastsoftmax.softmax(np.ones((2, size // 2)), 1, backend={kernels[0]!r}).sum()
    print(plans[0].schedule.n_threads, round(total))

call({earlier_size})
atexit.register(call, 400_000)
"""
    earlier, at_exit = python(code, FASTSOFTMAX_NUM_THREADS="2").splitlines()
    assert earlier == ("1 2" if earlier_size == 10 else "2 2")
    assert at_exit == "2 2"


def test_exceptions_of_a_single_thread():
    with pytest.raises(ZeroDivisionError):
        run_blocks(lambda block: 1 // (block - 3), 10, 1)


def test_callers_share_the_pool_and_let_it_grow():
    totals = [0] * 8

    def call(index):
        def run(block):
            with lock:
                totals[index] += block

        lock = threading.Lock()
        for _ in range(20):
            run_blocks(run, 10, 2 + index % 3)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert totals == [20 * 45] * 8


def exit_code_of_child(work, deadline=60):
    """Fork; return the exit code of a child that does ``work``, which must be done before the deadline."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hung"


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_starts_a_pool_of_its_own():
    run_blocks(lambda block: None, 10, 3)
    assert _executor._pool is not None

    def work():
        runs = []
        barrier = threading.Barrier(2, timeout=30)
        run_blocks(lambda block: (barrier.wait(), runs.append(block)), 2, 2)
        return sorted(runs) == [0, 1]

    assert exit_code_of_child(work) == 0


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_while_the_pool_is_at_work_or_locked():
    release = threading.Event()
    busy = threading.Thread(target=run_blocks, args=(lambda block: release.wait(60), 4, 2))
    busy.start()
    with _executor._pool_lock:
        code = exit_code_of_child(lambda: run_blocks(lambda block: None, 10, 2) is None)
    release.set()
    busy.join(60)
    assert code == 0
