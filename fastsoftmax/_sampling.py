"""Random draws from a softmax."""

from __future__ import annotations

import math
import operator
import sys
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastsoftmax._api import _dtypes, _read_as
from fastsoftmax._cross_entropy import _number
from fastsoftmax._derivatives import _real_numbers
from fastsoftmax._dispatch import Truncation, execute_sampling, select_for
from fastsoftmax._layout import Array, make_layout, readable
from fastsoftmax._selection import _count, _one_axis

# Below this temperature logits are taken relative to the largest one beforehand: quotients might overflow.
_COLD = 2.0**-20


def sample(
    logits: ArrayLike,
    axis: int = -1,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    size: int | tuple[int, ...] | None = None,
    rng: np.random.Generator | None = None,
    backend: str | None = None,
) -> Any:
    """Draw indices with the probabilities of a softmax.

    Parameters
    ----------
    logits : array_like
        Real numbers. Each row along ``axis`` is a distribution: ``softmax(logits / temperature, axis)``.
    axis : int, optional
        The axis of the elements that are drawn from; the last by default.
    temperature : float, optional
        Divides the logits: below 1 the probable elements become more so.
    top_k : int, optional
        Draw from the ``top_k`` largest logits only, from 1 to the number of elements along ``axis``. Of equal ones,
        those of the lowest indices.
    top_p : float, optional
        Draw from the most probable elements only: as few as sum up to ``top_p`` of what ``temperature`` and ``top_k``
        have left (nucleus sampling). Above 0, and at most 1.
    size : int or tuple of ints, optional
        The shape of the result, to which that of the rows (``logits`` without ``axis``) must broadcast, as it does for
        the parameters of the distributions of `numpy.random.Generator`. By default one draw from each row.
    rng : numpy.random.Generator, optional
        Where the random numbers come from: one ``rng.random(size)``. By default a new one, seeded by the system.
    backend : {"cython", "numba", "numpy"}, optional
        Force a backend; by default the fastest that fits is chosen.

    Returns
    -------
    ndarray or scalar
        int64 indices along ``axis``.

    Raises
    ------
    TypeError
        If ``logits`` does not hold real numbers, is a masked array or on a CUDA device; if ``rng`` is not a Generator;
        if another argument is of the wrong type.
    ValueError
        If a row has a NaN or +inf, or nothing but -inf; if ``temperature``, ``top_k`` or ``top_p`` is out of its range;
        if the rows do not broadcast to ``size``; if there is nothing along ``axis``.
    numpy.exceptions.AxisError
        If ``axis`` is out of range.
    BackendUnavailableError
        If ``backend`` cannot run here.

    Notes
    -----
    A draw is the first element whose cumulative probability is above a uniform random number, so that the same state of
    ``rng`` gives the same draws, on any number of threads. Cumulative sums are float64; an element of -inf is never
    drawn. A uniform number has 53 bits, by which the probability of each element may be off by 2**-53.

    Nucleus sampling: A. Holtzman et al., *The curious case of neural text degeneration*, 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import sample
    >>> logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    >>> sample(logits, rng=np.random.default_rng(1))
    array([1, 2])
    >>> draws = sample(logits[1], size=10_000, rng=np.random.default_rng(1))
    >>> (np.bincount(draws) / 10_000).round(1)
    array([0.1, 0.1, 0.8])
    >>> sample(logits, top_k=1, size=(3, 2))
    array([[0, 2],
           [0, 2],
           [0, 2]])
    """
    values = _real_numbers(logits, "logits")
    drawn, n = _one_axis(values, axis, "logits")
    if n == 0:
        raise ValueError(f"logits has nothing to draw from along axis {axis}")
    divisor = _number(temperature, "temperature", sys.float_info.min, math.inf)
    if top_k is not None:
        top_k = _count(top_k, "top_k", n)
    share = 1.0 if top_p is None else _share(top_p, "top_p")
    if rng is not None and not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator, not {rng!r}")
    working, _ = _dtypes(values.dtype, "softmax")
    module = select_for("sample", working, values.size, backend)
    rows_shape = values.shape[:drawn] + values.shape[drawn + 1 :]
    shape = rows_shape if size is None else _shape(size, rows_shape)
    if divisor < _COLD:
        values, divisor = _relative(values, drawn, working), max(divisor, float(np.finfo(working).tiny))
    data = readable(values, _read_as(module, values, working))
    uniforms = np.asarray((rng or np.random.default_rng()).random(shape))
    # Draws from one row lie along the dimensions that its row is broadcast to.
    padded = (1,) * (len(shape) - len(rows_shape)) + rows_shape
    order = sorted(range(len(shape)), key=lambda dimension: padded[dimension] == 1)  # the rows' dimensions first
    n_rows = math.prod(rows_shape)
    by_rows = np.ascontiguousarray(uniforms.transpose(order)).reshape(n_rows, -1 if n_rows else 0)
    draws = np.empty(by_rows.shape, np.int64)
    if draws.size:
        terms = Truncation(divisor, None if top_k == n else top_k, share)
        execute_sampling(module, make_layout(data, (drawn,), data, in_order=True), data, by_rows, draws, terms)
        _check_rows(draws, np.moveaxis(values, drawn, -1))
    result = draws.reshape([shape[dimension] for dimension in order]).transpose(np.argsort(order))
    return np.ascontiguousarray(result) if shape else result[()]


def _share(value: Any, name: str) -> float:
    """Return a number above 0 and at most 1, or raise an error that names the argument."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (Real, np.floating, np.integer)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    share = float(value)
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, not {value!r}")
    return share


def _shape(size: Any, rows_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the result, or raise an error."""
    try:
        sizes = size if isinstance(size, (tuple, list)) else (size,)
        if any(isinstance(one, (bool, np.bool_)) for one in sizes):
            raise TypeError
        shape = tuple(operator.index(one) for one in sizes)
    except TypeError:
        raise TypeError(f"size must be an integer or a tuple of integers, not {size!r}") from None
    if any(one < 0 for one in shape):
        raise ValueError(f"size must not be negative, not {size!r}")
    try:
        fits = np.broadcast_shapes(shape, rows_shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"size must be a shape that rows of shape {rows_shape} broadcast to, not {size!r}")
    return shape


def _relative(values: Array, axis: int, dtype: np.dtype[Any]) -> Array:
    """Return logits relative to the largest of each row, where that is finite; the differences that count are exact."""
    differences: Array = values.astype(dtype)
    largest = differences.max(axis, keepdims=True)
    with np.errstate(all="ignore"):  # what is too far below the largest for a number is -inf
        np.subtract(differences, largest, out=differences, where=np.isfinite(largest))
    return differences


def _check_rows(draws: Array, rows: Array) -> None:
    """Raise an error if there was nothing to draw from in a row."""
    is_faulty = draws[:, 0] < 0
    if is_faulty.any():
        index = np.unravel_index(int(is_faulty.argmax()), rows.shape[:-1])
        row = rows[index].astype(np.float64)
        where = f" at index {tuple(map(int, index))}" if index else ""
        what = "a NaN" if np.isnan(row).any() else "+inf" if row.max() > 0 else "nothing but -inf"
        raise ValueError(f"logits must not have {what} in the row{where}: there are no probabilities to draw by")
