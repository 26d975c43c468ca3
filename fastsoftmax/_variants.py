"""Two functions that are a softmax of something else: of -x, and of x with a zero beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastsoftmax._api import _check_out, _deliver, _dtypes, _map_rows, _numbers, softmax
from fastsoftmax._dispatch import select, select_for
from fastsoftmax._layout import Array, normalize_axes
from fastsoftmax._outputs import empty_like


def softmin(
    x: ArrayLike, axis: int | tuple[int, ...] | None = None, *, out: Array | None = None, backend: str | None = None
) -> Any:
    """Compute the softmax of ``-x``: ``exp(-x) / sum(exp(-x), axis)``.

    Parameters
    ----------
    x : array_like
        Energies, costs or distances of any shape and any real or complex dtype.
    axis : int, tuple of ints or None, optional
        The axes over which the probabilities sum to 1. None, the default, means all of them.
    out : ndarray, optional
        Where to write the result; it must have the shape of ``x`` and the dtype of the result. It may be ``x``.
    backend : {"cython", "numba", "numpy"}, optional
        Force a backend; by default the fastest that fits is chosen.

    Returns
    -------
    ndarray or scalar
        Probabilities, the largest where ``x`` is smallest; dtypes as for `softmax`. Integers are negated after their
        conversion, so that unsigned ones do not wrap around.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError, BackendUnavailableError
        As for `softmax`; an array on a CUDA device is a TypeError.

    Notes
    -----
    The negated elements are written where the result goes, and their softmax in place of them. A row with a NaN or
    -inf, or of nothing but +inf, is NaN throughout.

    Examples
    --------
    >>> from fastsoftmax import softmin
    >>> softmin([1.0, 2.0, 1000.0]).round(3)
    array([0.731, 0.269, 0.   ])
    """
    values = _numbers(x, "x")
    axes = normalize_axes(axis, values.ndim)
    working, dtype = _dtypes(values.dtype, "softmax")
    select(working, values.size, backend)
    if out is not None:
        _check_out(out, values.shape, dtype)
    if values.dtype.kind in "iub":
        values = values.astype(working)
    is_direct = out is not None and out.dtype == values.dtype.newbyteorder("=") and out.flags.aligned
    target = out if out is not None and is_direct else empty_like(values, values.dtype.newbyteorder("="))
    np.negative(values, out=target)
    softmax(target, axes, out=target, backend=backend)
    return _deliver(target, out, dtype)


def softmax_one(
    x: ArrayLike, axis: int | tuple[int, ...] | None = None, *, out: Array | None = None, backend: str | None = None
) -> Any:
    """Compute the softmax with 1 added to the denominator: ``exp(x) / (1 + sum(exp(x), axis))``.

    The 1 is the exponential of one more logit, a zero, whose own probability is not returned. It takes what the others
    leave, so that they may all be near 0: the attention sink.

    Parameters
    ----------
    x : array_like
        Logits of any shape and any real or complex dtype.
    axis : int, tuple of ints or None, optional
        The axes to sum over. None, the default, means all of them.
    out : ndarray, optional
        Where to write the result; it must have the shape of ``x`` and the dtype of the result. It may be ``x``.
    backend : {"cython", "numba", "numpy"}, optional
        Force a backend; by default the fastest that fits is chosen.

    Returns
    -------
    ndarray or scalar
        Probabilities that sum to less than 1, in the shape and memory order of ``x``; dtypes as for `softmax`. A row of
        nothing but -inf gives zeros; one with a NaN or +inf is NaN throughout.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError, BackendUnavailableError
        As for `softmax`; an array on a CUDA device is a TypeError.

    Notes
    -----
    Known as softmax-one, softmax1 or off-by-one softmax (E. Miller, *Attention is off by one*, 2023). Logits that were
    shifted by a constant give another result. The logarithm of the denominator is ``logaddexp(0, logsumexp(x))``.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import softmax_one
    >>> softmax_one([0.0, 0.0])
    array([0.33333333, 0.33333333])
    >>> softmax_one([[-np.inf, -np.inf], [-2.0, 1000.0]], axis=1)
    array([[0., 0.],
           [0., 1.]])
    """
    values = _numbers(x, "x")
    select_for("softmax_one", _dtypes(values.dtype, "softmax")[0], values.size, backend)
    return _map_rows("softmax_one", values, axis, out, None, 1.0, None, backend)
