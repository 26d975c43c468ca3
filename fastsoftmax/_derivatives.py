"""The derivatives of the public functions: what the gradient of a result makes of the gradient of its input.

With logits x, probabilities p = softmax(x) and a gradient g of some scalar with respect to a function's result, the
vector-Jacobian product is the gradient with respect to x::

    softmax        p * (g - sum(p * g))      since dp_i/dx_j = p_i * ((i == j) - p_j)
    log_softmax    g - exp(log_p) * sum(g)
    logsumexp      g * softmax(a)

The first two take what the forward function returned, so that nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastsoftmax import _dispatch
from fastsoftmax._api import (
    _check_out,
    _common_dtype,
    _deliver,
    _dtypes,
    _is_same_view,
    _is_writable_as,
    _numbers,
    _read_as,
    _reduced_shape,
)
from fastsoftmax._dispatch import Function, execute, is_on_gpu, select, select_on_gpu
from fastsoftmax._layout import Array, make_layout, normalize_axes, readable
from fastsoftmax._outputs import empty_like


def softmax_vjp(
    p: ArrayLike,
    g: ArrayLike,
    axis: int | tuple[int, ...] | None = None,
    *,
    out: Array | None = None,
    backend: str | None = None,
) -> Any:
    """Compute the vector-Jacobian product of `softmax`: ``p * (g - sum(p * g, axis))``.

    Parameters
    ----------
    p : array_like
        Probabilities: what `softmax` returned.
    g : array_like
        The gradient with respect to them, in the shape of ``p``.
    axis : int, tuple of ints or None, optional
        The axes over which the probabilities sum to 1, as they were given to `softmax`.
    out : ndarray, optional
        Where to write the result; it must have the shape of ``p`` and the dtype of the result. It may be ``p`` or
        ``g``.
    backend : {"cython", "numba", "numpy", "cuda"}, optional
        Force a backend; by default the fastest that fits is chosen.

    Returns
    -------
    ndarray or scalar
        The gradient with respect to the logits, in the shape and memory order of ``p`` and the dtype that ``p`` and
        ``g`` combine to, in which integers count as float64. It is 0 where ``p`` is, whatever ``g``.

    Raises
    ------
    TypeError
        If ``p`` or ``g`` does not hold real numbers, or is a masked array; if ``axis`` is not made of integers; if
        ``out`` is not an array of the result's dtype.
    ValueError
        If ``g`` or ``out`` has another shape than ``p``; if ``out`` cannot be written; if an axis is repeated; if
        ``backend`` is unknown.
    numpy.exceptions.AxisError
        If an axis is out of range.
    BackendUnavailableError
        If ``backend`` cannot run here.

    Examples
    --------
    >>> from fastsoftmax import softmax, softmax_vjp
    >>> p = softmax([0.0, 0.0, 0.0, -1000.0])
    >>> softmax_vjp(p, [3.0, 0.0, 0.0, 7.0]).round(3)
    array([ 0.667, -0.333, -0.333,  0.   ])
    """
    direct = _dispatch.direct_calls
    if direct is not None and (result := direct.direct_softmax_vjp(p, g, axis, out, backend)) is not None:
        return result
    return _vjp("softmax_vjp", "p", p, g, axis, False, out, backend)


def log_softmax_vjp(
    log_p: ArrayLike,
    g: ArrayLike,
    axis: int | tuple[int, ...] | None = None,
    *,
    out: Array | None = None,
    backend: str | None = None,
) -> Any:
    """Compute the vector-Jacobian product of `log_softmax`: ``g - exp(log_p) * sum(g, axis)``.

    Parameters
    ----------
    log_p : array_like
        Log-probabilities: what `log_softmax` returned.
    g : array_like
        The gradient with respect to them, in the shape of ``log_p``.
    axis : int, tuple of ints or None, optional
        The axes over which the probabilities sum to 1, as they were given to `log_softmax`.
    out : ndarray, optional
        Where to write the result; it must have the shape of ``log_p`` and the dtype of the result. It may be ``log_p``
        or ``g``.
    backend : {"cython", "numba", "numpy", "cuda"}, optional
        Force a backend; by default the fastest that fits is chosen.

    Returns
    -------
    ndarray or scalar
        The gradient with respect to the logits, in the shape and memory order of ``log_p`` and the dtype that
        ``log_p`` and ``g`` combine to, in which integers count as float64. It is ``g`` where the probability is 0.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError, BackendUnavailableError
        As for `softmax_vjp`.

    Examples
    --------
    >>> from fastsoftmax import log_softmax, log_softmax_vjp
    >>> log_p = log_softmax([0.0, 0.0, -1000.0])
    >>> log_softmax_vjp(log_p, [3.0, 0.0, 1.0])
    array([ 1., -2.,  1.])
    """
    direct = _dispatch.direct_calls
    if direct is not None and (result := direct.direct_log_softmax_vjp(log_p, g, axis, out, backend)) is not None:
        return result
    return _vjp("log_softmax_vjp", "log_p", log_p, g, axis, False, out, backend)


def logsumexp_vjp(
    a: ArrayLike,
    g: ArrayLike,
    axis: int | tuple[int, ...] | None = None,
    keepdims: bool = False,
    *,
    out: Array | None = None,
    backend: str | None = None,
) -> Any:
    """Compute the vector-Jacobian product of `logsumexp`: ``g * softmax(a, axis)``.

    Parameters
    ----------
    a : array_like
        Exponents: what `logsumexp` was given.
    g : array_like
        The gradient with respect to its result, in the shape of that: one number for each sum.
    axis : int, tuple of ints or None, optional
        The axes that were summed over, as they were given to `logsumexp`.
    keepdims : bool, optional
        Whether the result, and so ``g``, keeps the summed axes with length 1.
    out : ndarray, optional
        Where to write the result; it must have the shape of ``a`` and the dtype of the result. It may be ``a``.
    backend : {"cython", "numba", "numpy", "cuda"}, optional
        Force a backend; by default the fastest that fits is chosen.

    Returns
    -------
    ndarray or scalar
        The gradient with respect to ``a``, in its shape and memory order and the dtype that ``a`` and ``g`` combine
        to, in which integers count as float64. It is 0 where the probability is, whatever ``g``.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError, BackendUnavailableError
        As for `softmax_vjp`, but ``g`` has the shape of the sums.

    Examples
    --------
    >>> from fastsoftmax import logsumexp_vjp
    >>> logsumexp_vjp([[0.0, 0.0], [1000.0, 0.0]], [1.0, 5.0], axis=1)
    array([[0.5, 0.5],
           [5. , 0. ]])
    """
    return _vjp("logsumexp_vjp", "a", a, g, axis, keepdims, out, backend)


def softmax_jacobian(p: ArrayLike, axis: int = -1) -> Array:
    """Compute the Jacobian of `softmax`: ``diag(p) - outer(p, p)`` for each row.

    Parameters
    ----------
    p : array_like
        Probabilities: what `softmax` returned.
    axis : int, optional
        The axis over which they sum to 1; the last by default.

    Returns
    -------
    ndarray
        In place of ``axis`` there are two axes at the end: element ``[..., i, j]`` is the derivative of probability i
        by logit j. It has the dtype of ``p``; integers give float64.

    Raises
    ------
    TypeError
        If ``p`` does not hold real numbers, or is a masked array; if ``axis`` is not an integer.
    numpy.exceptions.AxisError
        If ``axis`` is out of range.

    Notes
    -----
    It holds the square of a row's elements: a product with it is `softmax_vjp`, and takes no such memory.

    Examples
    --------
    >>> from fastsoftmax import softmax_jacobian
    >>> softmax_jacobian([0.25, 0.75])
    array([[ 0.1875, -0.1875],
           [-0.1875,  0.1875]])
    """
    probabilities = _real_numbers(p, "p")
    if axis is None or isinstance(axis, (tuple, list)):
        raise TypeError(f"axis must be one integer, not {axis!r}")
    (reduced,) = normalize_axes(axis, probabilities.ndim) or (0,)
    working, dtype = _dtypes(probabilities.dtype, "logsumexp")
    rows = np.moveaxis(np.atleast_1d(probabilities).astype(working, copy=False), reduced, -1)
    with np.errstate(all="ignore"):
        jacobian: Array = -rows[..., :, np.newaxis] * rows[..., np.newaxis, :]
        every = np.arange(rows.shape[-1])
        jacobian[..., every, every] = rows * (1 - rows)  # not p - p**2, which loses its digits near 1
        return jacobian.astype(dtype, copy=False)


def _real_numbers(value: ArrayLike, name: str) -> Array:
    array = _numbers(value, name)
    if array.dtype.kind == "c":
        raise TypeError(f"{name} must hold real numbers, not {array.dtype}")
    return array


def _vjp(
    function: Function,
    name: str,
    x: ArrayLike,
    g: ArrayLike,
    axis: Any,
    keepdims: bool,
    out: Array | None,
    backend: str | None,
) -> Any:
    """Run a vector-Jacobian product of the argument called ``name``."""
    if not isinstance(x, np.ndarray) and is_on_gpu(x):
        return select_on_gpu(backend).compute(function, x, axis, out, keepdims, g, name)
    values, gradient = _real_numbers(x, name), _real_numbers(g, "g")
    axes = normalize_axes(axis, values.ndim)
    working, dtype = _dtypes(_common_dtype(name, x, values, "g", g, gradient), "logsumexp")
    module = select(working, values.size, backend)
    if dtype == values.dtype.newbyteorder("=") == gradient.dtype.newbyteorder("="):
        working = _read_as(module, values, working)
    shape = _reduced_shape(values.shape, axes, keepdims) if function == "logsumexp_vjp" else values.shape
    if gradient.shape != shape:
        owner = "logsumexp's result" if function == "logsumexp_vjp" else name
        raise ValueError(f"g must have the shape of {owner}, {shape}, not {gradient.shape}")
    if out is not None:
        _check_out(out, values.shape, dtype)
    data, gradient = readable(values, working), readable(gradient, working)
    if function == "logsumexp_vjp":
        expanded = gradient if keepdims or values.ndim == 0 else np.expand_dims(gradient, axes)
        gradient = np.broadcast_to(expanded, values.shape)
    overlapping = [array for array in (data, gradient) if out is not None and np.may_share_memory(array, out)]
    # The probabilities that logsumexp's gradient multiplies may be written before it is read.
    replaceable = (data,) if function == "logsumexp_vjp" else (data, gradient)
    in_place = [array for array in replaceable if out is not None and _is_same_view(array, out)]
    if out is not None and _is_writable_as(out, working) and len(in_place) == len(overlapping):
        target = out
    else:
        target, in_place = empty_like(values, working), []
    if target.size:
        layout = make_layout(data, axes, target, gradient)
        execute(module, function, layout, data, target, bool(in_place), gradient)
    return _deliver(target, out, dtype)
