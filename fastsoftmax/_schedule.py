"""Which traversal serves a call: a plain value, chosen from sizes alone before any kernel runs.

Two questions decide the memory traffic of a softmax (see docs/method.md): in which order are the rows visited, and
where do the exponentials live between the pass that sums them and the pass that scales them. A `Schedule` is the answer
to both; the kernels obey it and never choose for themselves.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Traversal = Literal["rows", "split", "tiles", "strips", "bands", "gather", "array"]
Exponentials = Literal["output", "scratch", "recompute", "none"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How one call visits its data.

    Parameters
    ----------
    traversal : {"rows", "split", "tiles", "strips", "bands", "gather", "array"}
        ``rows``: one contiguous row after the other. ``split``: the same, with all threads on each row. ``tiles``: many
        short rows side by side. ``strips``: bands of adjacent rows, for a reduced axis that is not the last. ``bands``:
        the same, turned into contiguous rows that are visited one after the other. ``gather``: rows of any other
        stride, collected a chunk at a time. ``array``: the whole array at once, in NumPy expressions.
    exponentials : {"output", "scratch", "recompute", "none"}
        Where exp(x) waits for the sum: in the output itself, in a cache-sized scratch, nowhere (the second pass
        computes it again), or it is never needed.
    streaming : bool
        Whether the output is written past the caches (non-temporal stores).
    n_threads : int
        How many threads share the work; results do not depend on it.
    n_blocks : int
        Into how many blocks the rows are cut; a thread takes one block at a time.
    """

    traversal: Traversal
    exponentials: Exponentials
    streaming: bool = False
    n_threads: int = 1
    n_blocks: int = 1


# So much is counted on of a larger last level, which many cores share and a virtual machine is told in whole. On one
# told 480 MiB, results past 64 MiB of input and output are written as fast past the caches as into them, and beyond
# 100 MiB faster: (8192, 4096) float32 take 21 ms instead of 27, (4096, 4096) over axis 0 15 instead of 25.
_MAX_LAST_LEVEL_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Caches:
    """Sizes in bytes of one core's private cache and of what a call can count on of the last cache level."""

    private: int
    last_level: int


@cache
def cache_sizes() -> Caches:
    """Read the cache sizes from the system; 512 KiB and 8 MiB, a small laptop's, where it does not tell."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (index / "type").read_text().strip() != "Instruction":
                text = (index / "size").read_text().strip()
                sizes[int((index / "level").read_text())] = int(text.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    private = sizes.get(2, 512 * 1024)
    last_level = min(sizes.get(max(sizes, default=0), 0), _MAX_LAST_LEVEL_BYTES)
    return Caches(private, max(last_level, 8 * 1024 * 1024, private))


_thread_limit: int | None = None


def max_threads() -> int:
    """Return ``FASTSOFTMAX_NUM_THREADS`` if it is set, else the number of cores this process may use.

    It is not more than threadpoolctl allows.

    Raises
    ------
    ValueError
        If the variable is set to anything but a positive integer.
    """
    n_threads = _threads_without_limit()
    return n_threads if _thread_limit is None else min(n_threads, _thread_limit)


def limit_threads(n_threads: int) -> None:
    """Allow so many threads from now on; there is no limit where it is no less than there would be without one."""
    global _thread_limit
    _thread_limit = max(n_threads, 1) if n_threads < _threads_without_limit() else None


def _threads_without_limit() -> int:
    text = os.environ.get("FASTSOFTMAX_NUM_THREADS")
    if text is None or text == "":
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"FASTSOFTMAX_NUM_THREADS must be a positive integer, not {text!r}")
    return int(text)


# Blocks per thread: enough for two threads to end together on a busy machine, few enough that the hand-over is noise.
BLOCKS_PER_THREAD = 4
