"""Run the blocks of one call of the Numba backend on several threads. The compiled backend has a pool of its own.

The kernels release the GIL and blocks are rows, strips or chunks at fixed places, so a plain thread pool is enough, and
which thread runs which block never changes a result. The pool starts at first use and is dropped in a forked child,
whose copies of the worker threads do not exist; OpenMP and Numba's own threading layers hang or abort there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = Lock()


def run_blocks(run: Callable[[int], object], n_blocks: int, n_threads: int) -> None:
    """Call ``run(block)`` for each block in ``range(n_blocks)``, on up to ``n_threads`` threads.

    The calling thread works too. An exception in one block (a KeyboardInterrupt, say) stops the others at their next
    block and is raised here once they have.
    """
    helpers_wanted = min(n_threads, n_blocks) - 1
    if helpers_wanted < 1:
        for block in range(n_blocks):
            run(block)
        return
    ticket = count()
    stopped = False

    def work() -> None:
        nonlocal stopped
        try:
            while not stopped and (block := next(ticket)) < n_blocks:  # next() is atomic: each block is taken once
                run(block)
        except BaseException:
            stopped = True
            raise

    helpers: list[Future[None]] = []
    try:
        with suppress(RuntimeError):  # the interpreter is ending and starts no threads: the caller does all the work
            pool = _get_pool(helpers_wanted)
            for _ in range(helpers_wanted):
                helpers.append(pool.submit(work))
        work()
    finally:
        stopped = True
        # A helper that another caller's work kept from starting is no longer needed; one that runs still writes.
        _wait_for(helper for helper in helpers if not helper.cancel())
    for helper in helpers:
        if not helper.cancelled() and (error := helper.exception()) is not None:
            raise error


def _wait_for(helpers: Iterable[Future[None]]) -> None:
    """Wait until all helpers are done, however often the wait is interrupted; then raise the interruption."""
    running, interruption = set(helpers), None
    while running:
        try:
            running = wait(running).not_done
        except BaseException as error:
            interruption = error
    if interruption is not None:
        raise interruption


def _get_pool(size: int) -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # not above: its import fails while the interpreter is ending

    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < size:
            # Callers that still hold the smaller pool finish on it; its threads end when it is collected.
            _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="fastsoftmax"), size
        return _pool


def _forget_pool() -> None:
    global _pool, _pool_size, _pool_lock
    _pool, _pool_size, _pool_lock = None, 0, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
