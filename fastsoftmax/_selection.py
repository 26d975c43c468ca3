"""The largest probabilities of a softmax, without the others."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastsoftmax._api import _check_out, _dtypes, _read_as
from fastsoftmax._derivatives import _real_numbers
from fastsoftmax._dispatch import execute_topk, select_for
from fastsoftmax._layout import Array, make_layout, normalize_axes, readable


class TopK(NamedTuple):
    """What `softmax_topk` returns.

    Parameters
    ----------
    values : ndarray
        Probabilities, the largest first.
    indices : ndarray
        Where they are along the axis, int64.
    """

    values: Array
    indices: Array


def softmax_topk(
    x: ArrayLike, k: int, axis: int = -1, *, out: tuple[Array, Array] | None = None, backend: str | None = None
) -> TopK:
    """Compute the ``k`` largest probabilities of a softmax, and where they are.

    Parameters
    ----------
    x : array_like
        Logits, of real numbers.
    k : int
        How many, from 1 to the number of elements along ``axis``.
    axis : int, optional
        The axis over which the probabilities sum to 1; the last by default.
    out : tuple of two ndarrays, optional
        Where to write the values and the indices; both must have the shape of ``x`` with ``k`` elements along
        ``axis``, the first the dtype of the values, the second int64.
    backend : {"cython", "numba", "numpy"}, optional
        Force a backend; by default the fastest that fits is chosen.

    Returns
    -------
    values : ndarray
        Probabilities, in the order of their logits from the largest down; their dtype is that of `softmax`.
    indices : ndarray
        int64. Of equal logits, the one with the lowest index comes first.

    Raises
    ------
    TypeError
        If ``x`` does not hold real numbers, is a masked array or on a CUDA device; if ``k`` or ``axis`` is not an
        integer; if ``out`` is not two arrays of the results' dtypes.
    ValueError
        If ``k`` is out of its range; if ``x`` has no axis; if an array of ``out`` has the wrong shape or cannot be
        written; if ``backend`` is unknown.
    numpy.exceptions.AxisError
        If ``axis`` is out of range.
    BackendUnavailableError
        If ``backend`` cannot run here.

    Notes
    -----
    One pass over the data finds the state of the softmax and the ``k`` largest logits (M. Milakov, N. Gimelshein,
    *Online normalizer calculation for softmax*, arXiv 1805.02867, section 4); only these become probabilities. With the
    compiled backend, those of float32 and float64 have the bits that `softmax` gives them.

    In a row with a NaN or +inf, or of nothing but -inf, the values are NaN, as in `softmax`. Its indices are still
    those of the largest logits, where a NaN counts as larger than any number, as it does for `numpy.sort`.

    Examples
    --------
    >>> from fastsoftmax import softmax_topk
    >>> values, indices = softmax_topk([[1.0, 4.0, 2.0, 4.0], [0.0, 0.0, 9.0, -1.0]], 2)
    >>> values.round(3)
    array([[0.458, 0.458],
           [1.   , 0.   ]])
    >>> indices
    array([[1, 3],
           [2, 0]])
    """
    values = _real_numbers(x, "x")
    selected, n = _one_axis(values, axis, "x")
    k = _count(k, "k", n)
    working, dtype = _dtypes(values.dtype, "softmax")
    module = select_for("softmax_topk", working, values.size, backend)
    shape = tuple(k if index == selected else size for index, size in enumerate(values.shape))
    if out is not None:
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"out must be a tuple of two arrays, for the values and the indices, not {out!r}")
        _check_out(out[0], shape, dtype, "out[0]")
        _check_out(out[1], shape, np.dtype(np.int64), "out[1]")
    data = readable(values, _read_as(module, values, working))
    n_rows = values.size // n
    probabilities, indices = np.empty((n_rows, k), working), np.empty((n_rows, k), np.int64)
    if n_rows:
        layout = make_layout(data, (selected,), data, in_order=True)
        execute_topk(module, layout, data, probabilities, indices)
    rows_shape = (*shape[:selected], *shape[selected + 1 :], k)
    result = TopK(
        np.moveaxis(probabilities.reshape(rows_shape), -1, selected),
        np.moveaxis(indices.reshape(rows_shape), -1, selected),
    )
    with np.errstate(all="ignore"):
        if out is None:
            return TopK(result.values.astype(dtype, copy=False), result.indices)
        for target, source in zip(out, result, strict=True):
            np.copyto(target, source, casting="unsafe")
    return TopK(*out)


def _one_axis(values: Array, axis: Any, name: str) -> tuple[int, int]:
    """Return an axis that is one integer, and its length."""
    if isinstance(axis, (tuple, list)) or axis is None:
        raise TypeError(f"axis must be one integer, not {axis!r}")
    if values.ndim == 0:
        raise ValueError(f"{name} must have an axis to select from, not be a scalar")
    (index,) = normalize_axes(axis, values.ndim)
    return index, values.shape[index]


def _count(value: Any, name: str, n: int) -> int:
    """Return an integer from 1 to n, or raise an error that names the argument."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if not 1 <= value <= n:
        raise ValueError(f"{name} must be from 1 to {n}, the number of elements along axis, not {value}")
    return int(value)
