"""Memory for fresh results: that of large ones is kept when it is freed, for the next one.

The reason and the allocator are in src_cython/output_cache.pyx; where it was not built every result is new memory.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from fastsoftmax._layout import Array

# Up to here the C library reuses memory by itself (the highest threshold for mapping it anew in glibc): at 32 MB a
# fresh result took no longer than `out=`, at 40 MB 1.9 times as long.
_MIN_BYTES = 32 * 1024 * 1024

_DEFAULT_LIMIT = 256 * 1024 * 1024


def empty_like(x: Array, dtype: np.dtype[Any]) -> Array:
    """Return an array of the shape and memory order of ``x``, with arbitrary elements."""
    allocator = _allocator() if x.size * dtype.itemsize > _MIN_BYTES else None
    result: Array = np.empty_like(x, dtype=dtype) if allocator is None else allocator.empty_like(x, dtype)
    return result


def limit_output_cache(n_bytes: int) -> None:
    """Set how much freed memory of large results is kept for later ones.

    The memory of results above 32 MiB is not given back to the system when it is freed but kept for the next result
    of nearly the same size, because new memory costs more time than a softmax. What is kept above the limit is given
    back at once, the oldest first. The limit at the start is 256 MiB, or what the environment variable
    ``FASTSOFTMAX_OUTPUT_CACHE`` says, in bytes.

    Parameters
    ----------
    n_bytes : int
        The limit in bytes; 0 gives everything back and keeps nothing from now on.

    Raises
    ------
    TypeError
        If ``n_bytes`` is not an integer.
    ValueError
        If it is negative.

    Examples
    --------
    >>> import fastsoftmax
    >>> fastsoftmax.limit_output_cache(0)
    >>> fastsoftmax.limit_output_cache(256 * 1024 * 1024)
    """
    if isinstance(n_bytes, bool) or not isinstance(n_bytes, (int, np.integer)):
        raise TypeError(f"n_bytes must be an integer, not {n_bytes!r}")
    if n_bytes < 0:
        raise ValueError(f"n_bytes must not be negative: {n_bytes}")
    if (allocator := _allocator()) is not None:
        allocator.limit(min(int(n_bytes), 2**63 - 1))


@cache
def _allocator() -> Any:
    """Return the module of the allocator, with the limit set; None if it was not built."""
    try:
        allocator = import_module("fastsoftmax._output_cache")
    except ImportError:
        return None
    allocator.limit(_limit_at_start())
    return allocator


def _limit_at_start() -> int:
    text = os.environ.get("FASTSOFTMAX_OUTPUT_CACHE")
    if not text:
        return _DEFAULT_LIMIT
    if not text.isdecimal():
        raise ValueError(f"FASTSOFTMAX_OUTPUT_CACHE must be a number of bytes, not {text!r}")
    return min(int(text), 2**63 - 1)
